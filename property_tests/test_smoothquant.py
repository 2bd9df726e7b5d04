import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from property_tests.laws import assert_pure
from property_tests.oracles import numpy64
from property_tests.strategies import correlated_tokens, normal_matrices
from quantize.core import LayerSpec, Scheme, channel_range, linear, round_to_nearest, smoothquant
from quantize.core.observers import Range, SumState

F64 = torch.float64
strengths = st.floats(0.01, 0.99)


@given(normal_matrices(st.integers(1, 5), st.integers(1, 9), F64), st.data(), strengths)
def test_smoothing_does_not_change_the_layer(weight, data, strength):
    x = data.draw(correlated_tokens(st.integers(1, 9), st.just(weight.shape[1])))
    input_amax, weight_amax = x.abs().amax(0), weight.abs().amax(0)
    s = assert_pure(lambda *a: smoothquant.smoothing_scale(*a, strength), input_amax, weight_amax)
    left, right = (numpy64(x) / numpy64(s)) @ (numpy64(weight) * numpy64(s)).T, numpy64(x) @ numpy64(weight).T
    magnitude = np.abs(numpy64(x)) @ np.abs(numpy64(weight)).T
    # Two roundings a product, and c additions on either side.
    assert (np.abs(left - right) <= (2 * weight.shape[1] + 4) * 2.0**-53 * magnitude).all()


@given(normal_matrices(st.just(2), st.integers(1, 9), F64), strengths)
def test_the_formula_and_its_ends(amax, strength):
    x, w = amax.abs()
    s = numpy64(smoothquant.smoothing_scale(x, w, strength))
    alive = (numpy64(x) > 0) & (numpy64(w) > 0)
    np.testing.assert_allclose(s[alive], (numpy64(x) ** strength / numpy64(w) ** (1 - strength))[alive], rtol=1e-12)
    assert (s[~alive] == 1).all()
    # Strength 0: the weights end with maximum 1 in every channel; strength 1: the inputs do.
    np.testing.assert_allclose((numpy64(w) * numpy64(smoothquant.smoothing_scale(x, w, 0.0)))[alive], 1, rtol=1e-12)
    np.testing.assert_allclose((numpy64(x) / numpy64(smoothquant.smoothing_scale(x, w, 1.0)))[alive], 1, rtol=1e-12)
    half = numpy64(smoothquant.smoothing_scale(x, w, 0.5))
    np.testing.assert_allclose((numpy64(x) / half)[alive], (numpy64(w) * half)[alive], rtol=1e-12)


@pytest.mark.parametrize(
    "pair", [(0.0, 1.0), (1.0, 0.0), (1e-38, 1.0), (1.0, 1e-38), (1e-45, 1e-45), (1e38, 1e-38), (1e-38, 1e38)]
)
@pytest.mark.parametrize("strength", [0.01, 0.5, 0.99])
def test_dead_and_tiny_channels_are_safe(pair, strength):
    x, w = (torch.tensor([value, 1.0]) for value in pair)
    s = smoothquant.smoothing_scale(x, w, strength)
    assert torch.isfinite(s).all()
    assert (s > 0).all()
    assert torch.isfinite(x / s).all()
    assert torch.isfinite(w * s).all()


@given(st.data(), st.booleans(), strengths)
def test_static_ranges_are_those_of_the_smoothed_tokens(data, symmetric, strength):
    weight = data.draw(normal_matrices(st.integers(1, 5), st.integers(1, 9), F64))
    x = data.draw(correlated_tokens(st.integers(1, 20), st.just(weight.shape[1])))
    inputs = Scheme(8, symmetric, "tensor")
    seen = Range(x.amin(0).clamp(max=0), x.amax(0).clamp(min=0))
    options = smoothquant.Options(smooth_strength=strength)
    solution = smoothquant.solve(LayerSpec(Scheme(), inputs), options, weight, seen)
    smoothed = linear.smooth(x, solution.smoothing)
    expected = linear.input_params(smoothed, inputs)
    torch.testing.assert_close(solution.static.scale, expected.scale, rtol=1e-12, atol=0)
    if not symmetric:
        assert torch.equal(solution.static.zero_point, expected.zero_point)


@given(normal_matrices(st.integers(1, 5), st.integers(1, 9), F64), st.data(), st.integers(-8, 8))
def test_weights_scale_by_powers_of_two_up_to_rounding(weight, data, exponent):
    x = data.draw(correlated_tokens(st.integers(1, 20), st.just(weight.shape[1])))
    spec, options = LayerSpec(Scheme(), Scheme(8, True, "token")), smoothquant.Options()
    seen = Range(x.amin(0).clamp(max=0), x.amax(0).clamp(min=0))
    a, b = (smoothquant.solve(spec, options, w, seen) for w in (weight, weight * 4.0**exponent))
    alive = (a.smoothing != 1) & (b.smoothing != 1)
    torch.testing.assert_close(a.smoothing[alive], (b.smoothing * 2.0**exponent)[alive], rtol=1e-12, atol=0)


@given(normal_matrices(st.integers(1, 5), st.integers(1, 9), F64), st.data(), st.sampled_from(["tensor", "token"]))
def test_the_search_takes_the_least_expected_error(weight, data, strategy):
    x = data.draw(correlated_tokens(st.integers(1, 20), st.just(weight.shape[1])))
    spec = LayerSpec(Scheme(), Scheme(8, True, strategy))
    seen, gram = Range(x.amin(0).clamp(max=0), x.amax(0).clamp(min=0)), SumState(x.T @ x, torch.tensor(len(x)))
    chosen = assert_pure(lambda *a: smoothquant.search_scale(spec, *a, grids_num=5), weight, seen, gram)
    amax = x.abs().amax(0), weight.abs().amax(0)
    candidates = [torch.ones(weight.shape[1], dtype=F64)]
    candidates += [smoothquant.smoothing_scale(*amax, i / 5) for i in range(6)]
    errors = [smoothquant.expected_error(spec, weight, s, seen, gram).item() for s in candidates]
    assert smoothquant.expected_error(spec, weight, chosen, seen, gram).item() == min(errors)


def test_the_expected_error_is_about_the_real_one():
    # Uniform inputs of equal size: the assumptions of the estimate hold, so only chance is left.
    source = torch.Generator().manual_seed(0)
    x = torch.rand(4000, 16, generator=source, dtype=F64) * 2 - 1
    weight = torch.randn(8, 16, generator=source, dtype=F64)
    spec = LayerSpec(Scheme(), Scheme(8, True, "tensor"))
    seen, gram = Range(x.amin(0), x.amax(0)), SumState(x.T @ x, torch.tensor(len(x)))
    s = torch.ones(16, dtype=F64)
    expected = smoothquant.expected_error(spec, weight, s, seen, gram).item()
    q, static = round_to_nearest(weight, Scheme()), linear.static_params(seen.low, seen.high, spec.inputs)
    made = linear.fake_quantized_linear(x, q, inputs=spec.inputs, static=static)
    assert expected == pytest.approx((made - x @ weight.T).square().sum().item(), rel=0.05)


@pytest.mark.parametrize("strategy", ["tensor", "token"])
def test_the_search_finds_what_an_outlier_needs(strategy):
    source = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 32, generator=source, dtype=F64)
    # One channel 50 times as large: unsmoothed its step of 50 * 4 / 127 costs the others about 0.2 of their power;
    # shared between both sides, the steps cost about 0.01.
    x[:, 5] *= 50
    weight = torch.randn(16, 32, generator=source, dtype=F64)
    spec = LayerSpec(Scheme(), Scheme(8, True, strategy))
    seen, gram = Range(x.amin(0), x.amax(0)), SumState(x.T @ x, torch.tensor(len(x)))
    scales = [torch.ones(32, dtype=F64), smoothquant.search_scale(spec, weight, seen, gram, grids_num=20)]
    losses = []
    for s in scales:
        static = linear.static_params(seen.low, seen.high, spec.inputs, smoothing=s) if strategy == "tensor" else None
        q = round_to_nearest(weight * s, Scheme())
        made = linear.fake_quantized_linear(x, q, inputs=spec.inputs, smoothing=s, static=static)
        losses.append((made - x @ weight.T).square().sum().item())
    assert losses[1] < 0.2 * losses[0]


@given(st.data())
def test_a_common_divisor_meets_the_largest_of_the_weights(data):
    c = data.draw(st.integers(1, 8))
    weights = [data.draw(normal_matrices(st.integers(1, 3), st.just(c), F64)) for _ in range(3)]
    x = data.draw(normal_matrices(st.integers(1, 9), st.just(c), F64))
    seen = channel_range.finalize(channel_range.update(channel_range.init(c, dtype=F64), x))
    spec, options = LayerSpec(Scheme(), Scheme(strategy="token")), smoothquant.Options()
    # The weights one below the other are one layer.
    stacked = smoothquant.solve(spec, options, torch.cat(weights), seen)
    scale = smoothquant.common_scale(spec, options, weights, seen)
    assert torch.equal(scale, stacked.smoothing)
    parts = [smoothquant.solve(spec, options, w, seen, scale) for w in weights]
    assert torch.equal(torch.cat([part.weight.codes for part in parts]), stacked.weight.codes)
