"""What models and layers under calibration are given: any shape, no tokens, too few, numbers that are not finite."""

import copy
import warnings

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

import quantize as qz
from quantize.core import Scheme, dequantize, fake_quantize, round_to_nearest
from tests.models import (
    TENSOR,
    TOKEN,
    WEIGHTS,
    assert_same_snapshot,
    config,
    filled,
    mlp,
    randn,
    rounding_bound,
    snapshot,
    solutions,
)
from tests.zoo.layers import Idle, Moody, TwoExperts


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (2, 1, 3, 64), (1, 2, 1, 3, 64)])
def test_batches_have_any_number_of_axes(shape):
    model, x = mlp(), randn(*shape)
    qz.quantize(model, config(inputs=TENSOR))
    model(x)
    assert model(x).shape == (*shape[:-1], 32)
    assert qz.report(model).rows[0].tokens == x.numel() // 64


def test_an_empty_batch_counts_and_changes_no_statistic():
    model = mlp()
    qz.quantize(model, config(inputs=TENSOR, batch_num=2))
    model(torch.zeros(0, 64))
    model(randn(3, 64))
    assert qz.report(model).rows[0].tokens == 3
    qz.convert(model)
    assert model(torch.zeros(0, 64)).shape == (0, 32)


def test_layers_take_their_input_by_name():
    model = nn.Sequential(nn.Linear(8, 8))
    qz.quantize(model, config(inputs=TOKEN))
    x = randn(2, 8)
    for _ in range(2):
        assert model[0](input=x).shape == (2, 8)
        model(x)
    qz.convert(model)
    assert model[0](input=x).shape == (2, 8)


def test_a_forward_that_raises_counts_for_nothing():
    model = filled(Moody())
    qz.quantize(model, config(inputs=TENSOR, batch_num=2))
    model(torch.ones(1, 4))
    kept = pytree.tree_leaves(copy.deepcopy(model.state_dict()))
    model.fail = True
    with pytest.raises(RuntimeError, match="in the middle"):
        model(torch.full((1, 4), 1000.0))
    model.a(torch.full((1, 4), 1000.0))
    model.fail = False
    for a, b in zip(kept, pytree.tree_leaves(model.state_dict()), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    model(torch.full((1, 4), 2.0))
    assert model.a.solution.static.scale == torch.tensor(2.0) / 127
    assert [row.tokens for row in qz.report(model).rows] == [2, 2]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("algorithm", ["minmax", "gptq"])
def test_inputs_that_are_not_finite_name_the_layer(bad, algorithm):
    model = mlp()
    qz.quantize(model, config(algorithm, inputs=TENSOR if algorithm == "minmax" else None, batch_num=2))
    model(randn(20, 64))
    x = randn(20, 64)
    x[1, 3] = bad
    with pytest.raises(qz.QuantizeError, match="layer '0': NaN or inf in batch 2; accepted: finite inputs"):
        model(x)
    with pytest.raises(qz.QuantizeError, match="1 of 2 batches seen"):
        qz.convert(model)
    model(randn(20, 64))
    qz.convert(model)
    assert torch.isfinite(model(randn(20, 64))).all()


def test_weights_that_are_not_finite_name_the_layer():
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    before = snapshot(model)
    with pytest.raises(qz.QuantizeError, match="layer '2': a weight with NaN or inf"):
        qz.quantize(model, config())
    assert_same_snapshot(before, snapshot(model))
    qz.quantize(model, config(skip_layers="2"))
    assert [row.name for row in qz.report(model).rows] == ["0"]


def test_weights_that_break_during_calibration_name_the_layer():
    model = mlp()
    qz.quantize(model, config(inputs=TENSOR))
    with torch.no_grad():
        model[2].weight[0, 0] = torch.inf
    with pytest.raises(qz.QuantizeError, match="layer '2': a weight with NaN or inf"):
        model(randn(2, 64))
    with torch.no_grad():
        model[2].weight[0, 0] = 0
    qz.finish(model)
    qz.convert(model)


def test_a_row_of_zeros_stays_zero():
    model = filled(nn.Sequential(nn.Linear(8, 4, bias=False)))
    with torch.no_grad():
        model[0].weight[1] = 0
    qz.quantize(model, config(inputs=TOKEN))
    model(randn(2, 8))
    qz.convert(model)
    y = model(randn(3, 8))
    assert not y[:, 1].any()
    assert y[:, [0, 2, 3]].all()
    assert not model(torch.zeros(1, 8)).any()


def test_a_group_size_that_does_not_divide_the_channels():
    model = filled(nn.Sequential(nn.Linear(80, 4)))
    weight = model[0].weight.detach().clone()
    qz.quantize(model, config(weights={**WEIGHTS, "strategy": "group", "group_size": 32}))
    expected = round_to_nearest(weight, Scheme(8, True, "group", 32))
    assert model[0].solution.weight.scale.shape == (4, 3)
    qz.convert(model)
    assert torch.equal(dequantize(model[0].solution.weight), dequantize(expected))


@pytest.mark.filterwarnings("ignore::quantize.QuantizeWarning")
def test_a_layer_that_no_token_reached_falls_back_to_minmax():
    model = filled(Idle())
    weight = model.idle.weight.detach().clone()
    qz.quantize(model, config(inputs=TENSOR))
    with pytest.warns(qz.QuantizeWarning, match="no token reached 1 of 2 layers, which fall back to minmax: idle"):
        model(randn(3, 8))
    row = qz.report(model).rows[1]
    assert (row.algorithm, row.fell_back, row.inputs, row.tokens) == ("minmax", True, Scheme(8, True, "token"), 0)
    told = qz.report(model).as_dict()["layers"][1]
    assert (told["algorithm"], told["inputs"]) == ("minmax (no tokens)", "int8 token symmetric")
    qz.convert(model)
    assert torch.equal(model.idle.codes, round_to_nearest(weight, Scheme()).codes)
    # No range was seen: each token brings its own.
    x = randn(3, 8) * 1e4
    middle = model.used(x)
    token = Scheme(8, True, "token")
    entered = fake_quantize(middle, round_to_nearest(middle, token).params, token)
    expected = entered @ dequantize(model.idle.solution.weight).T + model.idle.bias
    assert ((model(x, wake=True) - expected).abs() <= rounding_bound(model.idle, middle)).all()


@pytest.mark.parametrize("algorithm", ["gptq", "awq"])
@pytest.mark.parametrize(("tokens", "told"), [(15, "minmax (15 tokens)"), (16, None)])
def test_a_layer_that_few_tokens_reached_falls_back_to_minmax(algorithm, tokens, told):
    model = filled(TwoExperts())
    weight = model.experts[0].weight.detach().clone()
    qz.quantize(model, config(algorithm, weights={**WEIGHTS, "type": "int4"}))
    x = randn(50, 32)
    x[:, 0] = x[:, 0].abs()
    x[:tokens, 0] *= -1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(x)
    rounded = round_to_nearest(weight, Scheme(4))
    same = torch.equal(solutions(model)["experts.0"].weight.codes, rounded.codes)
    rows = qz.report(model).rows
    assert [row.tokens for row in rows] == [tokens, 50 - tokens]
    assert [(row.algorithm, row.fell_back) for row in rows] == [(algorithm, told is not None), (algorithm, False)]
    assert [row["algorithm"] for row in qz.report(model).as_dict()["layers"]] == [told or algorithm, algorithm]
    assert same == (told is not None)
    messages = [str(each.message) for each in caught if issubclass(each.category, qz.QuantizeWarning)]
    expected = f"fewer than 16 tokens reached 1 of 2 layers, which fall back to minmax: experts.0 ({tokens})"
    assert messages == ([expected] if told else [])


@pytest.mark.parametrize("algorithm", ["gptq", "awq"])
@pytest.mark.parametrize(("first", "then"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_a_model_may_be_cast_during_calibration(algorithm, first, then):
    model = mlp(c=32, hidden=16, dtype=first)
    qz.quantize(model, config(algorithm, batch_num=2))
    model(randn(20, 32, dtype=first))
    model.to(then)
    model(randn(20, 32, dtype=then))
    assert [row.tokens for row in qz.report(model).rows] == [40, 40]
    qz.convert(model)
    y = model(randn(4, 32, dtype=then))
    assert torch.isfinite(y).all()
    assert y.dtype == then
