"""Models whose layers have several formats, from calibration to files: each layer is as its format alone makes it."""

import copy
import io

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

import quantize as qz
from quantize.shell.calibrate import sequential
from quantize.shell.calibrate.layer import calibrated
from tests.folds import ALL, float_again, folded, powers_of_two
from tests.models import (
    TENSOR,
    TOKEN,
    WEIGHTS,
    assert_converts_by_rounding_only,
    assert_same_snapshot,
    filled,
    randn,
    snapshot,
    solutions,
)
from tests.zoo import experts
from tests.zoo.folding import TOKENS, decoder
from tests.zoo.layers import Siblings
from tests.zoo.sequential import C, Chain, batches, made

INT4 = {**WEIGHTS, "type": "int4"}
ASYMMETRIC = {**INT4, "symmetric": False}
OFF = {"enable_quant": False}
ONE_PASS = {"gptq": {"sequential": False, "search_range": False}}
AWQ = {"awq": {"grids_num": 4, "clip": False}}


def given(algorithm, batch_num=3, **entries):
    return {"quant_cfg": entries, "algorithm": algorithm, "batch_num": batch_num}


def calibrate(config, model=None):
    model = model or made(Chain)
    qz.quantize(model, config)
    with torch.no_grad():
        for x in batches():
            model(x)
    return model


def leaves(solution):
    return [leaf for leaf in pytree.tree_leaves(solution) if isinstance(leaf, torch.Tensor)]


def assert_same(found, wanted, names):
    assert names
    for name in names:
        assert found[name].weight.scheme == wanted[name].weight.scheme
        assert found[name].inputs == wanted[name].inputs
        for a, b in zip(leaves(found[name]), leaves(wanted[name]), strict=True):
            assert torch.equal(a, b), name


# By algorithm, two formats: of all layers, and of those that a pattern matches.
PAIRS = {
    "minmax, inputs": ("minmax", (WEIGHTS, TENSOR), (INT4, TOKEN)),
    "gptq, weights": (ONE_PASS, (INT4, None), (WEIGHTS, None)),
    "gptq, inputs": (ONE_PASS, (INT4, None), (WEIGHTS, TENSOR)),
    "awq, weights": (AWQ, (INT4, None), (WEIGHTS, None)),
    "awq, inputs": (AWQ, (WEIGHTS, TOKEN), (INT4, None)),
    "smoothquant, inputs": ("smoothquant", (WEIGHTS, TENSOR), (INT4, TOKEN)),
}


def entries(part, formats):
    weights, inputs = formats
    return {f"{part}.weights": weights, f"{part}.inputs": inputs or OFF}


@pytest.mark.parametrize(("algorithm", "usual", "other"), PAIRS.values(), ids=PAIRS.keys())
def test_each_layer_has_the_codes_that_its_format_alone_gives(algorithm, usual, other):
    # `up` and `gate` read one tensor; `gate` and the first layer have the other format.
    own, rest = ("*gate", "fir*"), ("*up", "*down", "head*")
    every = solutions(
        calibrate(
            given(algorithm, **entries("*", usual), **{k: v for part in own for k, v in entries(part, other).items()})
        )
    )
    names = {name for name in every if name == "first" or name.endswith("gate")}
    assert len(names) == 4
    for parts, formats, mine in ((rest, usual, every.keys() - names), (own, other, names)):
        # The others stay in floating point, so that layers are solved beside the same ones.
        alone = calibrate(given(algorithm, **{k: v for part in parts for k, v in entries(part, formats).items()}))
        assert_same(every, solutions(alone), mine)
        if algorithm not in (ONE_PASS,):
            assert_same(every, solutions(calibrate(given(algorithm, **entries("*", formats)))), mine)


@pytest.mark.parametrize(("algorithm", "entry", "shared"), [
    ("minmax", {"*k.weights": INT4}, True),
    ("minmax", {"*k.inputs": TOKEN}, True),
    (ONE_PASS, {"*k.inputs": OFF, "*.inputs": OFF, "*k.weights": INT4}, True),
    (ONE_PASS, {"*k.inputs": OFF}, False),
    ("smoothquant", {"*k.weights": INT4}, True),
], ids=str)  # fmt: skip
def test_layers_that_read_one_tensor_and_learn_the_same_share_statistics(algorithm, entry, shared):
    model = filled(Siblings())
    qz.quantize(model, given(algorithm, 2, weights=WEIGHTS, inputs=TENSOR, **entry))
    model(randn(40, 16))
    q, k, v = ([id(leaf) for leaf in pytree.tree_leaves(layer.statistics)] for layer in (model.q, model.k, model.v))
    assert q == v
    assert (q == k) is shared


MIXED = given(
    {"gptq": {"search_range": False}}, weights=INT4, **{"*gate.weights": WEIGHTS, "*gate.inputs": TOKEN, "*head.inputs":
                                                        TENSOR, "*1.down.weights": ASYMMETRIC}
)  # fmt: skip


def formats(model):
    return {row.name: (str(row.weights), str(row.inputs or "float")) for row in qz.report(model).rows}


def test_lock_step_gives_what_full_passes_give(monkeypatch):
    found = calibrate(MIXED)
    assert qz.report(found).remarks == ()
    assert formats(found)["first"] == formats(found)["blocks.1.up"] == ("int4 channel symmetric", "float")
    assert formats(found)["blocks.1.gate"] == ("int8 channel symmetric", "int8 token symmetric")
    assert formats(found)["blocks.1.down"] == ("int4 channel asymmetric", "float")
    assert formats(found)["head"] == ("int4 channel symmetric", "int8 tensor symmetric")
    monkeypatch.setattr(sequential, "_in_lock_step", lambda *_: "asked for")
    with pytest.warns(qz.QuantizeWarning, match="asked for"):
        wanted = calibrate(MIXED)
    assert_same(solutions(found), solutions(wanted), formats(found))


def test_a_mixed_model_is_converted_saved_and_loaded(tmp_path):
    model = calibrate(MIXED)
    wanted, expected = solutions(model), formats(model)
    assert_converts_by_rounding_only(model, batches()[0])
    assert formats(model) == expected
    qz.save(model, tmp_path / "model")
    loaded, again = made(Chain), made(Chain)
    qz.load(loaded, tmp_path / "model")
    qz.convert(again, from_state=model.state_dict())
    with torch.no_grad():
        y = model(batches()[1])
        for other in (loaded, again):
            assert formats(other) == expected
            for name, solution in solutions(other).items():
                assert torch.equal(solution.weight.codes, wanted[name].weight.codes)
            assert torch.equal(other(batches()[1]), y)


def test_a_mixed_calibration_goes_on_from_a_state():
    wanted = solutions(calibrate(MIXED))
    model, fresh, file = made(Chain), made(Chain), io.BytesIO()
    for each in (model, fresh):
        qz.quantize(each, MIXED)
    with torch.no_grad():
        for x in batches()[:2]:
            model(x)
        torch.save(model.state_dict(), file)
        file.seek(0)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        fresh(batches()[2])
    assert_same(solutions(fresh), wanted, wanted)
    # After the last batch, too.
    copied = made(Chain)
    qz.quantize(copied, MIXED)
    copied.load_state_dict(fresh.state_dict())
    assert_same(solutions(copied), wanted, wanted)
    assert_same(solutions(copy.deepcopy(fresh)), wanted, wanted)


def test_a_state_of_other_formats_is_refused_by_the_name_of_the_layer(tmp_path):
    model, other = calibrate(MIXED), made(Chain)
    qz.quantize(other, {**MIXED, "quant_cfg": {**MIXED["quant_cfg"], "*2.up.weights": WEIGHTS}})
    qz.save_calibration(model, tmp_path / "state")
    before = snapshot(other)
    with pytest.raises(qz.QuantizeError, match=r"layer 'blocks\.2\.up': .*int4 channel.*; accepted: .*int8 channel"):
        qz.load_calibration(other, tmp_path / "state")
    assert_same_snapshot(before, snapshot(other))


def test_weights_alone_wait_for_the_layers_that_need_batches():
    model, plain = made(Chain), made(Chain)
    qz.quantize(model, given("minmax", 1, weights=WEIGHTS, **{"head*.inputs": TENSOR}))
    with torch.no_grad():
        assert torch.equal(model(batches()[0]), plain(batches()[0]))
    assert all(layer.active for layer in calibrated(model))
    assert [name for name, (_, inputs) in formats(model).items() if inputs != "float"] == ["head"]


@pytest.mark.filterwarnings("ignore:.*Embedding is not:quantize.QuantizeWarning")
@pytest.mark.parametrize(("algorithm", "entry"), [
    ("awq", {"*down.weights": WEIGHTS}),
    ("awq", {"*down.inputs": TENSOR}),
    ("smoothquant", {"inputs": TOKEN, "*k.weights": WEIGHTS, "*up.inputs": TENSOR}),
], ids=str)  # fmt: skip
def test_scales_are_folded_whatever_the_formats_of_the_readers(algorithm, entry, monkeypatch):
    powers_of_two(monkeypatch)
    model, plain = decoder(), decoder()
    qz.quantize(model, given({algorithm: {"fold": True}}, 1, weights=INT4, **entry))
    with torch.no_grad():
        model(TOKENS)
        assert folded(model) == ALL
        assert qz.report(model).remarks == ()
        # Products with powers of two are exact.
        assert torch.equal(float_again(model, lambda: model(TOKENS)), plain(TOKENS))
    for block in model.blocks:
        # The norm was divided once for all that read it.
        for readers in ((block.q, block.k, block.v), (block.gate, block.up)):
            assert all(torch.equal(layer.folded, readers[0].folded) for layer in readers)
    qz.convert(model)
    assert all("smoothing" not in module._buffers for module in model.modules())


@pytest.mark.filterwarnings("ignore::quantize.QuantizeWarning")
def test_experts_may_have_formats_of_their_own():
    tokens = [experts.batch(1), experts.batch(2)]
    part = {"*experts*down_proj.weights": INT4, "*experts.1.*.inputs": TOKEN}

    def run(**patterns):
        model = experts.made("mixtral")
        qz.quantize(model, given("minmax", 2, **patterns))
        return experts.run(model, tokens)

    model, alone = run(weights=WEIGHTS, **part), run(**{"*experts*down_proj.weights": INT4})
    found, down = formats(model), set(formats(alone))
    assert down == {name for name in found if "experts" in name and name.endswith("down_proj")} != set()
    for name, (weights, inputs) in found.items():
        assert weights == ("int4 channel symmetric" if name in down else "int8 channel symmetric")
        assert inputs == ("int8 token symmetric" if "experts.1." in name else "float")
    codes = {name: solution.weight.codes for name, solution in solutions(alone).items()}
    assert all(torch.equal(solutions(model)[name].weight.codes, codes[name]) for name in down)
    assert_converts_by_rounding_only(model, tokens[0])


def test_a_layer_under_two_names_has_the_format_of_the_last_entry_that_matches_any():
    layer = nn.Linear(C, C)
    model = nn.ModuleDict({"one": layer, "two": layer, "three": nn.Linear(C, C)})
    qz.quantize(model, given("minmax", 1, weights=WEIGHTS, **{"two*.weights": INT4}))
    assert formats(model) == {"one": ("int4 channel symmetric", "float"), "three": ("int8 channel symmetric", "float")}
