"""Copies, pickles and state_dicts in every stage continue as the original does."""

import copy
import io
import pickle

import pytest
import torch
import torch.utils._pytree as pytree

import quantize as qz
from quantize.core import LayerSpec
from quantize.shell.deploy import state as saved
from quantize.shell.deploy.kernels import Layout
from tests.models import TENSOR, TOKEN, WEIGHTS, config, mlp, randn, snapshot

CONFIGS = {
    "minmax": config(inputs=TENSOR, batch_num=2),
    "gptq": config("gptq", weights={**WEIGHTS, "type": "int4", "symmetric": False}, batch_num=2),
    "awq": config({"awq": {"grids_num": 3}}, batch_num=2),
    "smoothquant": config("smoothquant", inputs={**TENSOR, "symmetric": False}, batch_num=2),
    "token": config("smoothquant", inputs=TOKEN, batch_num=2),
}
BATCHES = [randn(40, 64, seed=seed) for seed in (1, 2)]
PROBE = randn(3, 64, seed=3)
# The stages, and how many of the batches a model has seen there.
SEEN = {"float": 0, "started": 0, "calibrating": 1, "quantized": 2, "converted": 2}


def staged(given, stage):
    model = mlp()
    if stage == "float":
        return model
    qz.quantize(model, given)
    for x in BATCHES[: SEEN[stage]]:
        model(x)
    if stage == "converted":
        qz.convert(model)
    return model


def finished(model, given, stage):
    """Carry on from ``stage`` to the converted model; its output on the probe."""
    if stage == "float":
        qz.quantize(model, given)
    if stage != "converted":
        for x in BATCHES[SEEN[stage] :]:
            model(x)
        qz.convert(model)
    return model(PROBE)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


every_stage = pytest.mark.parametrize("stage", SEEN)
every_config = pytest.mark.parametrize("given", CONFIGS.values(), ids=CONFIGS.keys())


@every_stage
@every_config
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_goes_its_own_way(given, stage, copied):
    model = staged(given, stage)
    twin = copied(model)
    expected = finished(model, given, stage)
    # The original's batches did not reach the copy.
    assert torch.equal(finished(twin, given, stage), expected)
    assert str(qz.report(twin)) == str(qz.report(model))


@every_stage
@every_config
def test_a_state_dict_goes_round(given, stage):
    model = staged(given, stage)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = staged(given, "converted" if stage == "converted" else "float" if stage == "float" else "started")
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    if stage == "quantized":
        assert torch.equal(fresh(PROBE), model(PROBE))
    assert torch.equal(finished(fresh, given, stage), finished(model, given, stage))


def test_a_state_of_another_config_is_refused():
    state = staged(CONFIGS["minmax"], "calibrating").state_dict()
    with pytest.raises(qz.QuantizeError, match=r"layer '0': minmax, .*; accepted: a state of gptq, "):
        staged(CONFIGS["gptq"], "started").load_state_dict(state)


@pytest.mark.parametrize("stage", ["calibrating", "quantized", "converted"])
def test_casting_the_model_leaves_scales_and_statistics_in_float32(stage):
    model = staged(CONFIGS["smoothquant"], stage).to(torch.bfloat16)
    own = {name for name, _ in mlp().named_parameters()}
    held = pytree.tree_leaves({key: value for key, value in model.state_dict().items() if key not in own})
    floats = [t.dtype for t in held if isinstance(t, torch.Tensor) and t.is_floating_point()]
    assert len(floats) >= 4
    assert set(floats) == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(PROBE.bfloat16()).dtype == torch.bfloat16


def test_a_model_after_a_failed_forward_still_copies():
    model = staged(CONFIGS["gptq"], "calibrating")
    with pytest.raises(RuntimeError):
        model(randn(2, 63))
    twins = [each(model) for each in (copy.deepcopy, through_pickle)]
    expected = finished(staged(CONFIGS["gptq"], "calibrating"), CONFIGS["gptq"], "calibrating")
    for twin in twins:
        assert torch.equal(finished(twin, CONFIGS["gptq"], "calibrating"), expected)


def test_an_earlier_state_can_be_loaded_back_and_calibration_goes_on():
    given = CONFIGS["gptq"]
    model = staged(given, "calibrating")
    saved = copy.deepcopy(model.state_dict())
    model(BATCHES[1])
    expected = model(PROBE)
    model.load_state_dict(saved)
    assert qz.report(model).rows[0].stage == "calibrating"
    model(BATCHES[1])
    assert torch.equal(model(PROBE), expected)
    qz.convert(model)
    assert snapshot(model)["hooks"] == snapshot(mlp())["hooks"]


def test_a_state_of_other_options_is_refused():
    state = staged(CONFIGS["awq"], "calibrating").state_dict()
    with pytest.raises(qz.QuantizeError, match="grids_num=3"):
        staged(config("awq", batch_num=2), "started").load_state_dict(state)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_solution_is_written_as_tensors_and_read_back(name):
    layer = staged(CONFIGS[name], "quantized")[0]
    solved, weight = layer.solution, layer.weight
    layout = Layout(LayerSpec(solved.weight.scheme, solved.inputs), *weight.shape, weight.dtype)
    held = saved.tensors(solved)
    assert all(isinstance(value, torch.Tensor) for value in held.values())
    again = saved.solution("0", held, layout)
    expected, leaves = (pytree.tree_flatten(s) for s in (solved, again))
    assert leaves[1] == expected[1]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(leaves[0], expected[0], strict=True))
    assert "gptq" not in name or (again.error is not None and again.notes)
    with pytest.raises(qz.QuantizeError, match="layer '0': no 'codes' in the state"):
        saved.solution("0", {key: value for key, value in held.items() if key != "codes"}, layout)
