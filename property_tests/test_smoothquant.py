import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from property_tests.laws import assert_pure, same_bits
from property_tests.oracles import U64, loss_noise, lost64, numpy64, row_losses, values64
from property_tests.strategies import correlated_tokens, normal_matrices
from quantize.core import LayerSpec, Scheme, gptq, linear, round_to_nearest, smoothquant
from quantize.core.observers import Range, SumState

F64 = torch.float64
strengths = st.floats(0.01, 0.99)


def observed(x):
    """The ranges of the channels, and the sums of their squares."""
    return Range(x.amin(0).clamp(max=0), x.amax(0).clamp(min=0)), SumState(x.square().sum(0), torch.tensor(len(x)))


def amplitudes(x, weight):
    return x.abs().amax(0), weight.abs().amax(0)


@given(normal_matrices(st.integers(1, 5), st.integers(1, 9), F64), st.data(), strengths)
def test_inputs_are_divided_by_what_multiplies_the_weight(weight, data, strength):
    x = data.draw(correlated_tokens(st.integers(1, 9), st.just(weight.shape[1])))
    seen = observed(x)
    spec, options = LayerSpec(Scheme(), Scheme(strategy="token")), smoothquant.Options(smooth_strength=strength)
    solution = assert_pure(lambda *a: smoothquant.solve(spec, options, *a), weight, seen)
    s = smoothquant.smoothing_scale(*amplitudes(x, weight), strength)
    assert torch.equal(solution.smoothing, s)
    same_bits(solution.weight, round_to_nearest(weight * s, Scheme()))
    assert torch.equal(linear.smooth(x, solution.smoothing), x / s)
    assert torch.equal(solution.effective_weight(), torch.from_numpy(values64(solution.weight)) / s)


@given(normal_matrices(st.just(2), st.integers(1, 9), F64), strengths)
def test_the_formula_and_its_ends(amax, strength):
    x, w = amax.abs()
    s = numpy64(smoothquant.smoothing_scale(x, w, strength))
    alive = (numpy64(x) > 0) & (numpy64(w) > 0)
    # On either side two powers, each within one unit in the last place, and a quotient: 5 roundings, and 10 for both.
    # What is compared at the ends is one more product.
    bound = {"rtol": 12 * U64, "atol": 0}
    np.testing.assert_allclose(s[alive], (numpy64(x) ** strength / numpy64(w) ** (1 - strength))[alive], **bound)
    assert (s[~alive] == 1).all()
    # Strength 0: the weights end with maximum 1 in every channel; strength 1: the inputs do.
    np.testing.assert_allclose((numpy64(w) * numpy64(smoothquant.smoothing_scale(x, w, 0.0)))[alive], 1, **bound)
    np.testing.assert_allclose((numpy64(x) / numpy64(smoothquant.smoothing_scale(x, w, 1.0)))[alive], 1, **bound)
    half = numpy64(smoothquant.smoothing_scale(x, w, 0.5))
    # Here the 5 roundings of the scale count on both sides.
    np.testing.assert_allclose((numpy64(x) / half)[alive], (numpy64(w) * half)[alive], **bound)


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
    seen = observed(x)
    options = smoothquant.Options(smooth_strength=strength)
    solution = smoothquant.solve(LayerSpec(Scheme(), inputs), options, weight, seen)
    smoothed = linear.smooth(x, solution.smoothing)
    expected = linear.input_params(smoothed, inputs)
    # A rounded division keeps the order: the extremes divided are the extremes of what was divided.
    same_bits(solution.static, expected)


@given(normal_matrices(st.integers(1, 5), st.integers(1, 9), F64), st.data(), st.integers(-8, 8))
def test_even_powers_of_two_leave_the_square_root(weight, data, exponent):
    # With strength 0.5 the divisor is a quotient of square roots, which are rounded correctly: all of it is exact.
    x = data.draw(correlated_tokens(st.integers(1, 20), st.just(weight.shape[1])))
    spec, options = LayerSpec(Scheme(), Scheme(8, True, "token")), smoothquant.Options()
    seen = observed(x)
    # A dead channel has divisor 1 whatever the weight is.
    weight[:, (x == 0).all(0)] = 0
    a, b = (smoothquant.solve(spec, options, w, seen) for w in (weight, weight * 4.0**exponent))
    alive = (x != 0).any(0)
    assert torch.equal(a.smoothing[alive], (b.smoothing * 2.0**exponent)[alive])
    assert torch.equal(a.weight.codes, b.weight.codes)


def expected64(spec, weight, s, x):
    """What rounding the weight and the inputs costs, and by how much two evaluations of that may differ."""
    gram, s, w = numpy64(x.T @ x), numpy64(s), numpy64(weight)
    reached = values64(round_to_nearest(weight * torch.from_numpy(s), spec.weight)) / s
    lost = (lost64(spec.inputs, numpy64(x), s) * ((w * s) ** 2).sum(0)).sum()
    # The first part is a quadratic form. The second has positive terms only: sums over tokens, channels and rows, and
    # 25 more operations.
    bound = loss_noise(np.abs(reached - w), gram).sum() + 2 * (len(x) + sum(w.shape) + 25) * U64 * lost
    # Adding up the rows, and both parts.
    total = row_losses(reached - w, gram).sum() + lost
    return total, bound + 2 * (w.shape[0] + 1) * U64 * abs(total)


input_schemes = st.builds(Scheme, st.just(8), st.booleans(), st.sampled_from(["tensor", "token"]))


@given(normal_matrices(st.integers(1, 5), st.integers(1, 9), F64), st.data(), input_schemes)
def test_the_search_takes_the_least_expected_error(weight, data, inputs):
    x = data.draw(correlated_tokens(st.integers(1, 20), st.just(weight.shape[1])))
    spec = LayerSpec(Scheme(), inputs)
    seen, gram = Range(x.amin(0).clamp(max=0), x.amax(0).clamp(min=0)), SumState(x.T @ x, torch.tensor(len(x)))
    chosen = assert_pure(lambda *a: smoothquant.search_scale(spec, *a, grids_num=3), weight, seen, gram)
    candidates = [torch.ones(weight.shape[1], dtype=F64)]
    candidates += [smoothquant.smoothing_scale(*amplitudes(x, weight), i / 3) for i in range(4)]
    assert any(torch.equal(chosen, s) for s in candidates)
    mine, bound = expected64(spec, weight, chosen, x)
    for s in candidates:
        other, noise = expected64(spec, weight, s, x)
        assert mine <= other + bound + noise
        assert abs(smoothquant.expected_error(spec, weight, s, seen, gram).item() - other) <= noise


def test_the_expected_error_is_about_the_real_one():
    # Uniform inputs of equal size: the assumptions of the estimate hold, so only chance is left. The inputs' part is a
    # mean over 32000 outputs of squares of nearly normal errors: its standard deviation is sqrt(2 / 32000) of it, 0.8
    # percent. The weights' part is exact. The bound is four of these.
    source = torch.Generator().manual_seed(0)
    x = torch.rand(4000, 16, generator=source, dtype=F64) * 2 - 1
    weight = torch.randn(8, 16, generator=source, dtype=F64)
    spec = LayerSpec(Scheme(), Scheme(8, True, "tensor"))
    seen, gram = Range(x.amin(0), x.amax(0)), SumState(x.T @ x, torch.tensor(len(x)))
    s = torch.ones(16, dtype=F64)
    expected = smoothquant.expected_error(spec, weight, s, seen, gram).item()
    q, static = round_to_nearest(weight, Scheme()), linear.static_params(seen.low, seen.high, spec.inputs)
    made = linear.fake_quantized_linear(x, q, inputs=spec.inputs, static=static)
    assert expected == pytest.approx((made - x @ weight.T).square().sum().item(), rel=4 * (2 / 32000) ** 0.5, abs=0)


@pytest.mark.parametrize("strategy", ["tensor", "token"])
def test_the_search_finds_what_an_outlier_needs(strategy):
    source = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 32, generator=source, dtype=F64)
    # One channel 50 times as large: unsmoothed its step of 50 * 4 / 127 costs the others about 0.2 of their power;
    # shared between both sides, the steps cost about 0.01. So 0.2 of the error is a bound with room on both sides.
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


@given(st.data(), input_schemes, st.sampled_from([0, 2]), st.booleans())
def test_rounded_by_gptq_the_smoothed_weight_is_that_of_gptq(data, inputs, grids_num, paired):
    weight = data.draw(normal_matrices(st.integers(1, 3), st.integers(2, 6), F64))
    x = data.draw(correlated_tokens(st.integers(1, 20), st.just(weight.shape[1])))
    spec, options = LayerSpec(Scheme(4), inputs), smoothquant.Options(grids_num=grids_num, rounding="gptq")
    algorithm = smoothquant.algorithm(spec, options)
    observer = algorithm.paired if paired else algorithm.observer
    state = observer.init(weight.shape[1], dtype=F64)
    originals = (1.1 * x,) if paired else ()
    statistic = observer.finalize(observer.update(state, x, *originals))
    # The divisor is that of rounding to nearest; by the ranges alone without a search.
    nearest = smoothquant.Options(grids_num=grids_num)
    gram = statistic[1].gram if paired else statistic[1]
    s = smoothquant.common_scale(spec, nearest, [weight], (statistic[0], gram))
    solution = assert_pure(algorithm.solve, weight, statistic)
    assert torch.equal(solution.smoothing, s)
    same_bits(solution, gptq.solve(spec, gptq.Options(), weight, statistic, s))
    # As given by a group of layers.
    same_bits(algorithm.solve(weight, statistic, s), solution)
    assert torch.equal(algorithm.scale([weight], statistic), s)


@given(st.data())
def test_a_common_divisor_meets_the_largest_of_the_weights(data):
    c = data.draw(st.integers(1, 8))
    weights = [data.draw(normal_matrices(st.integers(1, 3), st.just(c), F64)) for _ in range(3)]
    x = data.draw(normal_matrices(st.integers(1, 9), st.just(c), F64))
    seen = observed(x)
    spec, options = LayerSpec(Scheme(), Scheme(strategy="token")), smoothquant.Options()
    # The weights one below the other are one layer.
    stacked = smoothquant.solve(spec, options, torch.cat(weights), seen)
    scale = smoothquant.common_scale(spec, options, weights, seen)
    assert torch.equal(scale, stacked.smoothing)
    parts = [smoothquant.solve(spec, options, w, seen, scale) for w in weights]
    assert torch.equal(torch.cat([part.weight.codes for part in parts]), stacked.weight.codes)


@given(st.data(), st.integers(0, 2))
def test_tied_channels_get_one_divisor_by_their_largest(data, grids_num):
    weight = data.draw(normal_matrices(st.integers(1, 3), st.integers(2, 8), F64))
    c = weight.shape[1]
    x = data.draw(normal_matrices(st.integers(1, 9), st.just(c), F64))
    tie = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=c, max_size=c)))
    spec, options = LayerSpec(Scheme(), Scheme(strategy="token")), smoothquant.Options(grids_num=grids_num)
    seen, squares = observed(x)
    statistic = seen, SumState(x.T @ x, torch.tensor(len(x))) if grids_num else squares
    scale = smoothquant.common_scale(spec, options, [weight], statistic, tie)
    largest = [torch.stack([each[tie == number].max() for number in tie]) for each in amplitudes(x, weight)]
    candidates = [smoothquant.smoothing_scale(*largest, options.smooth_strength)]
    if grids_num:
        candidates = [smoothquant.smoothing_scale(*largest, i / grids_num) for i in range(grids_num + 1)]
        candidates.append(torch.ones_like(scale))
    assert any(torch.equal(scale, each) for each in candidates)
