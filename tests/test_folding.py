"""Scales that move into what makes the inputs: the float model computes what it computed before."""

import copy
import dataclasses
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

import quantize as qz
from quantize.core import Scheme, round_to_nearest
from tests.folds import ALL, AWQ, INT4, SMOOTHQUANT, STATIC, every_config, float_again, folded, powers_of_two, run
from tests.models import TOKEN, config, filled, randn, solutions
from tests.zoo.folding import HEADS, TOKENS, Block, C, Chained, Norm, OnePlusNorm, Tiled, Ungated, decoder

EPS = torch.finfo(torch.float32).eps
# Which layers read what each of these makes, in a block.
NORMS = {"first": ("q", "k", "v"), "second": ("gate", "up")}
ROWS = {"v": ("o",), "up": ("down",)}


def readers(made_by):
    return {
        f"blocks.{i}.{maker}": [f"blocks.{i}.{name}" for name in names]
        for i in range(2)
        for maker, names in made_by.items()
    }


@every_config
def test_everything_in_a_block_of_llama_folds(given, monkeypatch):
    powers_of_two(monkeypatch)
    model = decoder()
    plain = copy.deepcopy(model)
    before, report = run(model, given)
    assert folded(model) == ALL
    assert not report.remarks
    assert all(row.notes["folded"] == 1 for row in report.rows)
    assert all(solution.smoothing is None for solution in solutions(model).values())
    for maker in ("norm", *readers(NORMS), *readers(ROWS)):
        assert not torch.equal(model.get_submodule(maker).weight, plain.get_submodule(maker).weight)
    assert torch.equal(float_again(model, lambda: model(TOKENS)), before)
    qz.convert(model)
    assert not any("smoothing" in key for key in model.state_dict())
    with torch.no_grad():
        assert torch.isfinite(model(TOKENS)).all()


def test_modules_without_names_fold_apart():
    # By numbers alone, what the norm makes and what no module makes look alike.
    model = filled(nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 80), nn.GELU(), nn.Linear(80, 48)))
    qz.quantize(model, config({"smoothquant": {"fold": True}}, inputs=TOKEN))
    with pytest.warns(qz.QuantizeWarning, match="not folded"), torch.no_grad():
        model(randn(24, 48))
    assert folded(model) == {"1"}


@every_config
@pytest.mark.parametrize("norm", [Norm, OnePlusNorm])
def test_scales_that_are_not_exact_fold_up_to_single_roundings(given, norm):
    model = decoder(norm=norm)
    plain = copy.deepcopy(model)
    run(model, given)
    assert folded(model) == ALL
    for maker, layers in (readers(NORMS) | readers(ROWS) | {"norm": ["head"]}).items():
        old, new = plain.get_submodule(maker), model.get_submodule(maker)
        if isinstance(old, Norm):
            scale = old.factor() / new.factor().double()
        else:
            # A row is divided as a whole, and its bias: every number by the same, rounded once.
            rows, divided = (torch.cat((each.weight, each.bias[:, None]), 1) for each in (old, new))
            quotients = rows / divided.double()
            assert (quotients.amax(1) * (1 - EPS / 2) <= quotients.amin(1) * (1 + EPS / 2)).all()
            scale = quotients[:, 0]
        for name in layers:
            assert_multiplies(model, name, scale)


def assert_multiplies(model, name, scale):
    """In floating point the layer multiplies its inputs by ``scale`` ``[c]``, known up to ``eps / 2`` of itself.

    One input that is 1 and others that are 0 show a column of the weight. Its product with the scale and the sum with
    the bias are each rounded by ``eps / 2`` of themselves; sums with zeros are exact.
    """
    layer = model.get_submodule(name)
    shown = float_again(model, lambda: layer(torch.eye(layer.in_features))).double().T
    bias = 0 if layer.bias is None else layer.bias.double()[:, None]
    expected = layer.weight.double() * scale
    # 1.001 for products of these terms.
    bound = 1.001 * EPS / 2 * (2 * expected.abs() + (expected + bias).abs())
    assert ((shown - bias - expected).abs() <= bound).all(), name


@pytest.mark.parametrize("given", [SMOOTHQUANT, STATIC], ids=["token", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [Norm, OnePlusNorm])
def test_layers_make_up_for_what_the_rounded_norm_really_divides_by(given, dtype, norm):
    model = decoder(norm=norm, dtype=dtype)
    plain = copy.deepcopy(model)
    run(model, given)
    assert folded(model) == ALL
    for maker, layers in (readers(NORMS) | {"norm": ["head"]}).items():
        # In float32, from what the weights are in their dtype. Quotients are rounded alike everywhere.
        old, new = (each.get_submodule(maker).float().factor() for each in (copy.deepcopy(plain), copy.deepcopy(model)))
        for name in layers:
            layer = model.get_submodule(name)
            expected = round_to_nearest(layer.weight.float() * (old / new), Scheme())
            assert torch.equal(layer.solution.weight.codes, expected.codes)
            assert torch.equal(layer.solution.weight.scale, expected.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [Norm, OnePlusNorm, partial(nn.LayerNorm, C)], ids=["weight", "1 + weight", "bias"])
def test_every_form_of_norm_in_both_precisions(norm, dtype, monkeypatch):
    powers_of_two(monkeypatch)
    model = decoder(norm=norm, dtype=dtype)
    before, _ = run(model, AWQ)
    assert folded(model) == ALL
    assert before.dtype == dtype
    assert torch.equal(float_again(model, lambda: model(TOKENS)), before)


def normed(monkeypatch=None):
    """A norm and a layer behind it, quantized with a folded scale and with one at run time; and the norm as it was."""
    if monkeypatch is not None:
        powers_of_two(monkeypatch)
    # One layer behind the norm: the common scale is its own.
    models, x = [], randn(50, C, seed=2)
    for fold in (True, False):
        model = nn.Sequential(Norm(), filled(nn.Linear(C, 16)))
        with torch.no_grad():
            model[0].weight.copy_(randn(C, seed=1).exp())
        plain = copy.deepcopy(model[0])
        qz.quantize(model, config({"awq": {"fold": fold}}, weights=INT4))
        model(x)
        models.append(model)
    return *models, plain, x


def test_the_folded_form_computes_what_the_scale_at_run_time_computes(monkeypatch):
    model, other, plain, x = normed(monkeypatch)
    a, b = model[1].solution, other[1].solution
    assert folded(model) == {"1"}
    assert torch.equal(plain.weight / model[0].weight, b.smoothing)
    assert not torch.equal(plain.weight, model[0].weight)
    assert torch.equal(a.weight.codes, b.weight.codes)
    assert torch.equal(a.weight.scale, b.weight.scale)
    assert torch.equal(model(x), other(x))


def test_the_folded_scale_is_the_one_at_run_time():
    model, other, plain, _ = normed()
    assert folded(model) == {"1"}
    # The new weight is a quotient that was rounded once.
    divided, expected = model[0].weight.double(), plain.weight / other[1].solution.smoothing.double()
    assert ((divided - expected).abs() <= EPS / 2 * expected.abs()).all()


@every_config
def test_relu_keeps_channels_apart(given, monkeypatch):
    powers_of_two(monkeypatch)
    model = decoder(Ungated, activation=functional.relu)
    before, _ = run(model, given)
    assert {"blocks.0.down", "blocks.1.down"} <= folded(model)
    assert torch.equal(float_again(model, lambda: model(TOKENS)), before)


@pytest.mark.parametrize("block", [Block, Tiled])
@pytest.mark.parametrize("kv", [1, 2, HEADS])
@pytest.mark.parametrize("given", [AWQ, SMOOTHQUANT], ids=["awq", "smoothquant"])
def test_heads_that_share_their_values_get_one_scale(block, kv, given, monkeypatch):
    powers_of_two(monkeypatch)
    model = decoder(block, kv=kv)
    layer = model.blocks[0].o
    with torch.no_grad():
        layer.bias.zero_()
    plain = copy.deepcopy(model)
    before, _ = run(model, given)
    assert folded(model) == ALL
    assert torch.equal(float_again(model, lambda: model(TOKENS)), before)
    # Inputs of a single 1 show the weights times the scale; everything is exact.
    shown = float_again(model, lambda: model.blocks[0].o(torch.eye(C)))
    scale = shown[:, 0] / layer.weight[0]
    assert torch.equal(shown, (layer.weight * scale).T)
    width = C // HEADS
    serve = torch.tensor([h % kv if block is Tiled else h // (HEADS // kv) for h in range(HEADS)])
    values = (plain.blocks[0].v.bias / model.blocks[0].v.bias).view(kv, width)
    assert torch.equal(scale.view(HEADS, width), values[serve])


def test_blocks_with_other_numbers_of_heads(monkeypatch):
    powers_of_two(monkeypatch)
    model = decoder()
    model.blocks[1] = decoder(kv=2).blocks[1]
    before, _ = run(model, AWQ)
    assert folded(model) == ALL
    assert torch.equal(float_again(model, lambda: model(TOKENS)), before)


@dataclasses.dataclass
class Opaque:
    y: torch.Tensor


def test_outputs_in_an_object_are_compared():
    model = filled(Chained(behind=lambda y, h: Opaque(y)))
    qz.quantize(model, config({"smoothquant": {"fold": True}}, inputs=TOKEN))
    with pytest.warns(qz.QuantizeWarning, match="up: scale at run time"), torch.no_grad():
        model(randn(4, 8, C))
    assert folded(model) == {"down"}


def test_masked_outputs_are_compared_where_they_are_finite():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(C), nn.Linear(C, 8)

        def forward(self, x):
            return self.layer(self.norm(x)).index_fill(-1, torch.tensor([0]), -torch.inf)

    model = filled(Masked())
    qz.quantize(model, config({"smoothquant": {"fold": True}}, inputs=TOKEN))
    with torch.no_grad():
        model(randn(4, 8, C))
    assert folded(model) == {"layer"}
