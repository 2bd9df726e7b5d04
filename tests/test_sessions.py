"""Parts of a model that are quantized, converted, loaded or solved apart from each other."""

import pytest
import torch
from torch import nn

import quantize as qz
from quantize.shell.calibrate import units
from quantize.shell.calibrate.layer import CalibrationLinear
from tests.models import WEIGHTS, config, filled, mlp, randn, solutions
from tests.zoo.experts import batch, gpt2, made, run

INT4 = {**WEIGHTS, "type": "int4"}
AWQ = config({"awq": {"grids_num": 4, "clip": False}}, weights=INT4, batch_num=2)


def hooks(model):
    return [model._forward_pre_hooks, model._forward_hooks, model._state_dict_hooks, model._load_state_dict_pre_hooks]


def test_a_model_that_was_converted_by_parts_is_saved_and_loaded(tmp_path):
    def build():
        return filled(nn.Sequential(nn.Sequential(nn.Linear(64, 64)), nn.Sequential(nn.Linear(64, 64))))

    model = build()
    qz.quantize(model, config())
    qz.convert(model[0])
    qz.convert(model[1])
    assert not [key for key in model.state_dict() if "_quantization" in key]
    qz.save(model, tmp_path / "out")
    fresh = build()
    qz.load(fresh, tmp_path / "out")
    x = randn(3, 64)
    assert torch.equal(fresh(x), model(x))
    # The first pass finds nothing left to watch.
    assert not any(hooks(model)[:2])


def test_a_refused_state_leaves_a_calibration_as_it_was():
    mine, theirs = mlp(), mlp()
    qz.quantize(mine, config("gptq", weights=INT4, batch_num=2))
    qz.quantize(theirs, {**AWQ, "batch_num": 1})
    with torch.no_grad():
        theirs(randn(40, 64))
        with pytest.raises(qz.QuantizeError, match="accepted: a state of gptq"):
            mine.load_state_dict(theirs.state_dict())
        mine(randn(40, 64, seed=1))
        mine(randn(40, 64, seed=2))
    assert {row.stage for row in qz.report(mine).rows} == {"quantized"}


def test_parts_of_a_calibration_may_be_loaded_one_by_one():
    mine, theirs = mlp(), mlp()
    for model in (mine, theirs):
        qz.quantize(model, AWQ)
    with torch.no_grad():
        mine(randn(40, 64))
        for source, target in zip(mine, theirs, strict=True):
            target.load_state_dict(source.state_dict())
        for model in (mine, theirs):
            model(randn(40, 64, seed=1))
    found, wanted = solutions(theirs), solutions(mine)
    assert all(torch.equal(found[name].weight.codes, wanted[name].weight.codes) for name in wanted)


def test_a_session_solves_its_own_layers_only():
    whole = filled(nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64))))
    qz.quantize(whole, {**AWQ, "batch_num": 1, "skip_layers": "1."})
    qz.quantize(whole[1], AWQ)
    with torch.no_grad():
        whole(randn(40, 64))
        assert [row.stage for row in qz.report(whole).rows] == ["quantized", "calibrating"]
        whole(randn(40, 64))
    assert [row.stage for row in qz.report(whole).rows] == ["quantized", "quantized"]


def test_a_part_that_saw_nothing_is_named():
    whole = nn.Sequential(mlp(), mlp())
    for part in whole:
        qz.quantize(part, AWQ)
    with torch.no_grad():
        whole[1](randn(40, 64))
    with pytest.raises(qz.QuantizeError, match="layer '0': 0 batches seen"):
        qz.finish(whole)


@pytest.mark.filterwarnings("ignore::quantize.QuantizeWarning")
def test_experts_of_two_sessions_are_no_stack(monkeypatch):
    monkeypatch.setattr(units, "_ONE_BY_ONE", frozenset())
    model = made("mixtral")
    blocks = [layer.mlp for layer in model.model.layers]
    for block, kind in zip(blocks, ("int8", "int4"), strict=True):
        qz.quantize(block, config({"gptq": {"sequential": False}}, weights={**INT4, "type": kind}, batch_num=9))
    run(model, [batch(1), batch(2)])
    qz.finish(model)
    for block, bits in zip(blocks, (8, 4), strict=True):
        assert {solution.weight.scheme.bits for solution in solutions(block).values()} == {bits}


@pytest.mark.filterwarnings("ignore::quantize.QuantizeWarning")
@pytest.mark.parametrize("make", [gpt2, lambda: made("mixtral")], ids=["conv1d", "experts"])
def test_an_interrupted_call_leaves_the_classes_of_modules(make, monkeypatch):
    model, adopt, solved = make(), CalibrationLinear.adopt, []
    classes = [type(module) for module in model.modules()]

    def interrupted(layer, solution):
        solved.append(layer)
        if len(solved) == 3:
            raise KeyboardInterrupt
        adopt(layer, solution)

    monkeypatch.setattr(CalibrationLinear, "adopt", interrupted)
    with pytest.raises(KeyboardInterrupt):
        qz.quantize(model, config())
    assert [type(module) for module in model.modules()] == classes
    assert not any(map(len, hooks(model)[:2]))
