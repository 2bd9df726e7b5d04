"""From float over calibrating and quantized to converted: what each stage computes, and which calls it takes."""

import warnings

import pytest
import torch
from torch import nn

import quantize as qz
from quantize.core import Scheme, dequantize, linear, minmax, round_to_nearest
from tests.models import TENSOR, TOKEN, assert_same_snapshot, config, filled, mlp, randn, snapshot


def test_the_documented_example_quantizes_float32():
    model = mlp()
    x = randn(8, 64)
    before = model(x)
    qz.quantize(
        model,
        {
            "batch_num": 1,
            "quant_cfg": {"weights": {"type": "int8", "symmetric": True, "strategy": "tensor"}},
            "algorithm": {"minmax"},
        },
    )
    after = model(x)
    assert not torch.equal(after, before)
    expected, bound = rounded_by_hand(model, x)
    assert ((after - expected).abs() <= bound).all()
    assert [row.name for row in qz.report(model).rows] == ["0", "2"]


def rounded_by_hand(model, x):
    """Two layers with a relu between them and one int8 scale for each weight, in float64; and how far float32 may be.

    A layer whose inputs are off by ``d`` is off by ``d |W|^T``, and by one ``u`` of the sum of all magnitudes for each
    of the ``c`` products, for the sum with the bias, and for a scale that is multiplied before or after.
    """
    y, off, u = x.double(), torch.zeros_like(x, dtype=torch.float64), 2.0**-24
    for layer in (model[0], model[2]):
        weight, bias = layer.weight.detach(), layer.bias.detach().double()
        low, high = weight.min(), weight.max()
        scale = -low / 128 if -low > high else high / 127
        weight = ((weight / scale).round().clamp(-128, 127) * scale).double()
        most = (y.abs() + off) @ weight.abs().T + bias.abs()
        off = off @ weight.abs().T + (weight.shape[1] + 3) * u * most
        y = y @ weight.T + bias
        y = y if layer is model[2] else y.relu()
    return y, off


def test_none_means_the_weight_only_preset():
    model = mlp()
    with pytest.warns(qz.QuantizeWarning, match="'lm_head' of skip_layers or quant_cfg matched nothing"):
        qz.quantize(model)
    (row, _) = qz.report(model).rows
    assert (row.weights, row.inputs, row.algorithm) == (qz.core.Scheme(8, True, "channel"), None, "minmax")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("inputs", [None, TOKEN, TENSOR], ids=["weight-only", "token", "tensor"])
def test_a_layer_computes_what_the_core_says(dtype, inputs):
    model = filled(nn.Sequential(nn.Linear(64, 32))).to(dtype)
    layer, batches = model[0], [randn(6, 64, seed=seed, dtype=dtype) for seed in (1, 2, 3)]
    weight = layer.weight.detach().clone()
    plain = [model(x) for x in batches]
    qz.quantize(model, config(inputs=inputs, batch_num=2))
    if inputs is not None:
        assert all(torch.equal(model(x), y) for x, y in zip(batches[:2], plain[:2], strict=True))
    scheme = None if inputs is None else Scheme(8, True, inputs["strategy"])
    static = None
    if scheme is not None and scheme.strategy == "tensor":
        seen = torch.cat(batches[:2]).to(torch.float64 if dtype == torch.float64 else torch.float32)
        static = linear.static_params(seen.amin(0).clamp(max=0), seen.amax(0).clamp(min=0), scheme)
    quantized = round_to_nearest(weight, Scheme())
    options = {"inputs": scheme, "static": static}
    expected = linear.fake_quantized_linear(batches[2], quantized, layer.bias, **options)
    assert torch.equal(model(batches[2]), expected)
    assert not torch.equal(expected, plain[2])
    qz.convert(model, kernel="reference")
    assert torch.equal(model(batches[2]), linear.quantized_linear(batches[2], quantized, layer.bias, **options))
    assert model(batches[2]).dtype == dtype
    assert model[0].scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_all_batches_are_used_and_later_ones_change_nothing():
    model = filled(nn.Sequential(nn.Linear(4, 4)))
    qz.quantize(model, config(inputs=TENSOR, batch_num=3))
    for peak in (1.0, 5.0, 2.0):
        model(torch.full((1, 4), peak))
    assert model[0].solution.static.scale == torch.tensor(5.0) / 127
    kept = model[0].solution
    model(torch.full((1, 4), 100.0))
    assert model[0].solution is kept
    assert qz.report(model).rows[0].tokens == 3


def test_dynamic_inputs_take_any_length_after_calibration():
    model = mlp()
    qz.quantize(model, config(inputs=TOKEN))
    model(randn(2, 7, 64))
    assert model(randn(5, 3, 64)).shape == (5, 3, 32)


def test_the_result_of_a_token_does_not_depend_on_its_neighbours():
    # Integers of int8 with scale 1, of tokens and weights: every sum of their products is exact in any order.
    codes = [torch.randint(-127, 127, shape, generator=torch.Generator().manual_seed(0)).float()
             for shape in ((8, 16), (4, 16))]  # fmt: skip
    for each in codes:
        each[:, 0] = 127
    weight, x = codes
    model = nn.Sequential(nn.Linear(16, 8))
    with torch.no_grad():
        model[0].weight.copy_(weight)
        model[0].bias.copy_(torch.arange(8))
    qz.quantize(model, config(inputs=TOKEN))
    model(x)
    assert torch.equal(model(x), x @ weight.T + torch.arange(8))
    for i in range(4):
        assert torch.equal(model(x[i : i + 1])[0], model(x)[i])


def test_the_result_of_a_token_does_not_depend_on_its_neighbours_after_conversion():
    model, x = mlp(), randn(4, 64)
    qz.quantize(model, config(inputs=TOKEN))
    model(x)
    # Sums of integers are exact, and all else is done number by number: through both layers, bit for bit.
    qz.convert(model, kernel="reference")
    for i in range(4):
        assert torch.equal(model(x[i : i + 1])[0], model(x)[i])


def test_convert_before_the_end_says_what_is_missing():
    model = mlp()
    qz.quantize(model, config(inputs=TENSOR, batch_num=4))
    model(randn(2, 64))
    before = snapshot(model)
    with pytest.raises(qz.QuantizeError, match="1 of 4 batches seen; accepted: 3 more forward passes"):
        qz.convert(model)
    assert_same_snapshot(before, snapshot(model))


def test_finish_solves_with_what_was_seen():
    model = mlp()
    qz.quantize(model, config(inputs=TENSOR, batch_num=4))
    with pytest.raises(qz.QuantizeError, match="0 batches seen"):
        qz.finish(model)
    model(randn(2, 64))
    qz.finish(model)
    qz.finish(model)
    qz.convert(model)
    assert [row.tokens for row in qz.report(model).rows] == [2, 2]


@pytest.mark.parametrize("call", ["finish", "convert", "report"])
def test_a_float_model_is_refused(call):
    model = mlp()
    with pytest.raises(qz.QuantizeError, match="accepted: a model after quantize"):
        getattr(qz, call)(model)


def test_converting_twice_is_refused():
    model = mlp()
    qz.quantize(model, config())
    qz.convert(model)
    with pytest.raises(qz.QuantizeError, match="not calibrated"):
        qz.convert(model)


def test_converting_a_layer_itself_is_refused():
    model = mlp()
    qz.quantize(model, config())
    with pytest.raises(qz.QuantizeError, match="the layer itself"):
        qz.convert(model[0])


@pytest.mark.parametrize("stage", ["calibrating", "quantized", "converted"])
def test_quantizing_twice_is_refused_and_touches_nothing(stage):
    model = mlp()
    qz.quantize(model, config(inputs=TOKEN))
    if stage != "calibrating":
        model(randn(2, 64))
    if stage == "converted":
        qz.convert(model)
    assert {row.stage for row in qz.report(model).rows} == {stage}
    before = snapshot(model)
    with pytest.raises(qz.QuantizeError, match="layer '0' is quantized already"):
        qz.quantize(model, config())
    assert_same_snapshot(before, snapshot(model))


def test_converted_layers_hold_codes_and_no_float_weight():
    model = mlp()
    shapes = [model[i].weight.shape for i in (0, 2)]
    qz.quantize(model, config())
    qz.convert(model)
    for i, (n, c) in zip((0, 2), shapes, strict=True):
        layer = model[i]
        assert isinstance(layer, qz.QuantizedLinear)
        assert [name for name, _ in layer.named_parameters()] == ["bias"]
        assert layer.codes.dtype == torch.int8
        # 1 byte a weight, 4 a scale, 4 a bias.
        assert sum(t.nbytes for t in (*layer.parameters(), *layer.buffers())) == n * c + 8 * n


@pytest.mark.parametrize("algorithm", ["minmax", "awq"])
def test_an_owner_may_read_the_weight_of_a_converted_layer(algorithm):
    model = mlp().bfloat16()
    weight = model[0].weight.detach().clone()
    qz.quantize(model, config(algorithm))
    model(randn(40, 64, dtype=torch.bfloat16))
    solved = model[0].solution
    expected = dequantize(round_to_nearest(weight, Scheme()))
    if algorithm == "awq":
        expected = dequantize(solved.weight) / solved.smoothing
    qz.convert(model)
    assert torch.equal(model[0].weight, expected.to(torch.bfloat16))


def test_an_interrupted_solve_can_be_finished(monkeypatch):
    model = mlp()
    qz.quantize(model, config(inputs=TENSOR))
    plain = mlp()
    solve, calls = minmax.solve, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return solve(*arguments)

    monkeypatch.setattr(minmax, "solve", interrupted)
    x = randn(3, 64)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    assert torch.equal(model(x), plain(x))
    with pytest.raises(qz.QuantizeError, match="interrupted"):
        qz.convert(model)
    qz.finish(model)
    assert len(calls) == 3
    qz.convert(model)


def test_a_quiet_model_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = mlp()
        qz.quantize(model, config(inputs=TENSOR))
        model(randn(2, 64))
        qz.convert(model)
