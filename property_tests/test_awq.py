import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from property_tests.laws import assert_pure, same_bits
from property_tests.oracles import U32, U64, loss_noise, lost64, numpy64, row_losses, total_noise, values64
from property_tests.strategies import correlated_tokens, input_schemes, normal_matrices, seeds, weight_schemes
from quantize.core import LayerSpec, Scheme, awq, quantize, ranges, round_to_nearest, shrinkage
from quantize.core.observers import Range, SumState

F64 = torch.float64
every_width = weight_schemes(bits=(2, 3, 4, 8))


def outputs_error(weight, x, scale, scheme):
    """Run the layer on the tokens, scaled, rounded and divided again: the squared error, and how far it may be off.

    An output is two sums over ``c`` channels of an operand that was rounded twice, here; the square is summed over all.
    The core sums the tokens up first, and then two sums over ``c``.
    """
    q = values64(round_to_nearest(weight * scale, scheme))
    tokens, w, s = numpy64(x), numpy64(weight), numpy64(scale)
    magnitude = ((np.abs(tokens) @ (np.abs(q / s) + np.abs(w)).T) ** 2).sum()
    here, core = 2 * (w.shape[1] + 4) + len(x) * len(w), len(x) + 2 * w.shape[1] + len(w) + 4
    return ((tokens / s @ q.T - tokens @ w.T) ** 2).sum(), (here + core) * U64 * magnitude


def statistic(x):
    return x.abs().mean(0), SumState(x.T @ x, torch.tensor(len(x)))


@given(st.data(), every_width, st.integers(1, 6))
def test_the_chosen_scale_is_the_best_by_running_the_layer(data, scheme, grids_num):
    weight = data.draw(normal_matrices(st.integers(1, 5), st.integers(1, 9), F64))
    x = data.draw(correlated_tokens(st.integers(1, 20), st.just(weight.shape[1])))
    options = awq.Options(grids_num=grids_num, clip=False, shrink=0.0)
    chosen = assert_pure(lambda *a: awq.common_scale(LayerSpec(scheme), options, *a), [weight], statistic(x))
    grid = [awq.candidate_scale(x.abs().mean(0), i / grids_num) for i in range(grids_num)]
    assert any(torch.equal(chosen, s) for s in grid)
    mine, bound = outputs_error(weight, x, chosen, scheme)
    for other, noise in (outputs_error(weight, x, s, scheme) for s in grid):
        assert mine <= other + bound + noise


def trusted(gram, rho):
    return [gram, (1 - rho) * gram + rho * np.diag(np.diag(gram))]


def scaled_row_losses(q, scale, weight, gram, rho):
    """Both errors of every output channel, ``[2, n]``; beside them, the magnitudes of the change."""
    delta = values64(q) / numpy64(scale) - numpy64(weight)
    return np.stack([row_losses(delta, h) for h in trusted(gram, rho)]), np.abs(delta)


def assert_kept_where_both_errors_fall(weight, x, scale, spec, signed, rho):
    """The law of `round_scaled`; returns in how many rows the two errors disagree, and how many scales are negative."""
    scheme, gram = spec.weight, x.T @ x
    options = awq.Options(signed_scale=signed)
    q, errors = assert_pure(lambda *a: awq.round_scaled(*a, spec, options, rho), weight, scale, gram)
    plain = round_to_nearest(weight * scale, scheme)
    # The ranges are searched for the scaled weight, with what its errors cost.
    params = ranges.search(
        weight * scale, scheme, gram.diagonal() / scale.square(), steps=8, signed=signed and spec.inputs is None
    )
    searched = quantize(weight * scale, params, scheme)
    (before, old), (after, new) = (
        scaled_row_losses(each, scale, weight, numpy64(gram), rho) for each in (plain, searched)
    )
    mine, _ = scaled_row_losses(q, scale, weight, numpy64(gram), rho)
    sizes = np.maximum(old, new)
    # Another product and sum for a mean of two losses.
    noise = 2 * loss_noise(sizes, numpy64(gram))
    if scheme.strategy == "tensor":
        before, after, mine = (each.sum(1, keepdims=True) for each in (before, after, mine))
        noise = np.array([total_noise(sizes, numpy64(gram))])
    better, worse = (after < before - noise).all(0), (after > before + noise).any(0)
    for i in range(len(weight)):
        row = 0 if scheme.strategy == "tensor" else i
        allowed = [plain] * (not better[row]) + [searched] * (not worse[row])
        assert any(
            torch.equal(q.codes[i], each.codes[i]) and np.array_equal(values64(q)[i], values64(each)[i])
            for each in allowed
        )
    assert (mine <= before + noise).all()
    # The errors are those of what was kept.
    total = total_noise(sizes, numpy64(gram))
    assert (np.abs(numpy64(errors) - mine.sum(1)) <= total).all()
    # Without the search it is plain rounding.
    same_bits(awq.round_scaled(weight, scale, gram, spec, awq.Options(clip=False), rho)[0], plain)
    disagree = ((after < before - noise).any(0) & worse).sum()
    return disagree, (q.scale < 0).sum().item()


@given(st.data(), every_width, st.floats(0, 1), st.booleans(), st.sampled_from([None, Scheme(8, True, "token")]))
def test_a_searched_range_is_kept_where_both_errors_fall(data, scheme, rho, signed, inputs):
    weight = data.draw(normal_matrices(st.integers(1, 5), st.integers(1, 9), F64))
    x = data.draw(correlated_tokens(st.integers(1, 20), st.just(weight.shape[1])))
    scale = data.draw(normal_matrices(st.just(1), st.just(weight.shape[1]), F64))[0].abs().clamp(0.1, 10)
    assert_kept_where_both_errors_fall(weight, x, scale, LayerSpec(scheme, inputs), signed, rho)


@pytest.mark.parametrize("strategy", ["channel", "group"])
def test_many_rows_of_which_some_keep_their_range(strategy):
    source = torch.Generator().manual_seed(0)
    # Channels with much in common, so that errors count another way with the correlations than without.
    x = torch.randn(40, 8, generator=source, dtype=F64) + 2 * torch.randn(40, 1, generator=source, dtype=F64)
    weight, scale = torch.randn(100, 8, generator=source, dtype=F64), torch.rand(8, generator=source, dtype=F64) + 0.5
    scheme = Scheme(4, True, strategy, 8 if strategy == "group" else None)
    disagree, negative = assert_kept_where_both_errors_fall(weight, x, scale, LayerSpec(scheme), True, 0.5)
    # Rows of both kinds: about half have the longer tail above.
    assert disagree > 5
    assert negative > 20
    for spec, signed in ((LayerSpec(scheme), False), (LayerSpec(scheme, Scheme(8, True, "token")), True)):
        assert assert_kept_where_both_errors_fall(weight, x, scale, spec, signed, 0.5)[1] == 0


@given(st.data(), every_width, st.sampled_from([0.0, 4.0]), st.booleans())
def test_the_result_never_loses_on_the_tokens_nor_without_chance(data, scheme, shrink, clip):
    weight = data.draw(normal_matrices(st.integers(1, 5), st.integers(1, 9), F64))
    x = data.draw(correlated_tokens(st.integers(1, 20), st.just(weight.shape[1])))
    options = awq.Options(grids_num=7, clip=clip, shrink=shrink)
    rho = shrinkage.intensity(statistic(x)[1], shrink).item()
    solution = awq.solve(LayerSpec(scheme), options, weight, statistic(x))
    one = torch.ones(weight.shape[1], dtype=F64)
    mine, new = scaled_row_losses(solution.weight, solution.smoothing, weight, numpy64(x.T @ x), rho)
    rounded, old = scaled_row_losses(round_to_nearest(weight, scheme), one, weight, numpy64(x.T @ x), rho)
    noise = total_noise(np.maximum(old, new), numpy64(x.T @ x))
    # The choice between candidates is one of quotients to the error of the first one: three more roundings of each.
    noise = noise + 8 * U64 * np.maximum(mine, rounded).sum(1)
    assert (mine.sum(1) <= rounded.sum(1) + noise).all()


def test_what_is_exact_on_the_tokens_is_not_given_up():
    # One token: the errors of two channels cancel, so that plain rounding loses nothing. What it loses without the
    # correlations is no reason to lose something.
    x = torch.tensor([[3.0, 2.0, 3.0]], dtype=F64)
    weight = torch.tensor([[-17.0, -26.0, -22.0]], dtype=F64) / 256
    for clip in (False, True):
        options = awq.Options(grids_num=4, clip=clip)
        statistic_ = (x.abs().mean(0), SumState(x.T @ x, torch.tensor(200)))
        solution = awq.solve(LayerSpec(Scheme(4)), options, weight, statistic_)
        assert shrinkage.intensity(statistic_[1], 4.0) > 0
        assert solution.baseline_error == 0
        assert solution.error == 0


@given(normal_matrices(st.integers(1, 5), st.integers(1, 9), F64), weight_schemes(), st.floats(0.001, 1000))
def test_equal_inputs_give_the_identity(weight, scheme, magnitude):
    c = weight.shape[1]
    equal = torch.full((c,), magnitude, dtype=F64), SumState(torch.eye(c, dtype=F64), torch.tensor(100))
    scale = awq.common_scale(LayerSpec(scheme), awq.Options(), [weight], equal)
    assert torch.equal(scale, torch.ones(c, dtype=F64))


@given(st.floats(0, 1), st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=6))
def test_candidates_are_normalized_and_safe(ratio, magnitudes):
    absmean = torch.tensor([0.0, *magnitudes])
    scale = assert_pure(lambda m: awq.candidate_scale(m, ratio), absmean)
    assert scale[0] == 1
    assert torch.isfinite(scale).all()
    # The exponent is a difference of logarithms times the ratio. With the largest of them as the unit, a logarithm is
    # off by two roundings of float32, the middle by three; difference, ratio and product are one rounding each of 2
    # units: 11. The exponential adds two of the result. Two scales are compared, with an expectation in float64; terms
    # of second order are less than a thousandth of these.
    largest = np.abs(np.log(numpy64(absmean[1:]))).max()
    bound = 2 * (11 * largest + 2) * U32 * 1.001
    assert abs((scale[1:].double().max() * scale[1:].double().min()).item() - 1) <= bound
    expected = numpy64(absmean[1:]) ** ratio
    np.testing.assert_allclose(numpy64(scale[1:]) / numpy64(scale[1]), expected / expected[0], rtol=bound, atol=0)


def test_one_large_channel_is_protected():
    source = torch.Generator().manual_seed(0)
    x = torch.randn(500, 16, generator=source, dtype=F64)
    x[:, 3] *= 30
    weight = torch.randn(8, 16, generator=source, dtype=F64)
    scheme = Scheme(4)
    scale = awq.common_scale(LayerSpec(scheme), awq.Options(clip=False), [weight], statistic(x))
    assert scale.argmax() == 3
    # The channel carries 900 of 915 parts of the power. A scale twice that of the others takes three quarters of its
    # part away, and rows whose step the channel does not set pay nothing for it: half is a bound with room.
    rounded, _ = outputs_error(weight, x, torch.ones_like(scale), scheme)
    assert outputs_error(weight, x, scale, scheme)[0] < 0.5 * rounded


@given(st.data(), every_width, st.none() | input_schemes(), st.booleans(), st.sampled_from([0.0, 4.0]))
def test_a_common_scale_is_the_best_for_the_sum_of_the_errors(data, scheme, inputs, clip, shrink):
    c = data.draw(st.integers(2, 8))
    weights = data.draw(st.lists(normal_matrices(st.integers(1, 3), st.just(c), F64), min_size=1, max_size=3))
    x = data.draw(correlated_tokens(st.integers(1, 20), st.just(c)))
    spec, options = LayerSpec(scheme, inputs), awq.Options(grids_num=4, clip=clip, shrink=shrink)
    sums = statistic(x)
    if inputs is not None:
        sums += (Range(x.amin(0).clamp(max=0), x.amax(0).clamp(min=0)),)
    chosen = assert_pure(lambda *a: awq.common_scale(spec, options, *a), weights, sums)
    gram, rho = numpy64(x.T @ x), shrinkage.intensity(sums[1], shrink).item()
    candidates = [awq.candidate_scale(sums[0], i / 4) for i in range(4)]
    costs, noises = [], []
    for s in candidates:
        cost, noise = np.zeros(2), 0.0
        for weight in weights:
            q, _ = awq.round_scaled(weight, s, x.T @ x, spec, options, rho)
            rows, sizes = scaled_row_losses(q, s, weight, gram, rho)
            cost, noise = cost + rows.sum(1), noise + total_noise(sizes, gram)
            if inputs is not None:
                # What the inputs lose counts with the squares of the scaled weights: positive terms only, with sums
                # over tokens, rows and channels, and 30 more operations.
                lost = lost64(inputs, numpy64(x), numpy64(s)) @ (numpy64(weight * s) ** 2).sum(0)
                cost, noise = cost + lost, noise + 2 * (len(x) + 2 * c + 33) * U64 * lost
        costs.append(cost)
        # The sum over the weights.
        noises.append(noise + 4 * U64 * cost.max())
    place = [k for k, s in enumerate(candidates) if torch.equal(chosen, s)]
    assert place
    # Each relative to the first candidate. Where that loses nothing, only what loses nothing is as good; where it loses
    # nothing but for rounding, nothing can be said.
    if (costs[0] > 1e6 * noises[0]).all():
        lowest = [(cost - noise) / (costs[0] + noises[0]) for cost, noise in zip(costs, noises, strict=True)]
        highest = [(cost + noise) / (costs[0] - noises[0]) for cost, noise in zip(costs, noises, strict=True)]
        assert min(lowest[k].max() for k in place) <= min(each.max() for each in highest)
    # Given to the solver, it is what the solver finds by itself.
    alone = awq.solve(spec, options, weights[0], sums)
    same_bits(alone, awq.solve(spec, options, weights[0], sums, awq.common_scale(spec, options, weights[:1], sums)))


@given(st.integers(2, 8), seeds)
def test_tied_channels_get_one_scale_by_their_mean(c, seed):
    source = np.random.default_rng(seed)
    absmean, tie = source.integers(0, 9, c).astype(float), source.integers(0, 3, c)
    weight, x = torch.from_numpy(source.normal(size=(2, c))), torch.from_numpy(source.normal(size=(9, c)))
    spec, options = LayerSpec(Scheme(4)), awq.Options(grids_num=4)
    sums = SumState(x.T @ x, torch.tensor(9))
    # Whole numbers: a mean is one rounded quotient.
    means = np.array([absmean[tie == number].sum() / (tie == number).sum() for number in tie])
    scale = awq.common_scale(spec, options, [weight], (torch.from_numpy(absmean), sums), torch.from_numpy(tie))
    assert torch.equal(scale, awq.common_scale(spec, options, [weight], (torch.from_numpy(means), sums)))
    assert all(len(set(scale[torch.from_numpy(tie == number)].tolist())) == 1 for number in tie)
