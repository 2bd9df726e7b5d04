import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from property_tests.laws import assert_pure, same_bits
from property_tests.oracles import U32, U64, numpy64, row_losses, total_noise, values64
from property_tests.strategies import correlated_tokens, normal_matrices, seeds, weight_schemes
from quantize.core import LayerSpec, Scheme, awq, round_to_nearest
from quantize.core.observers import SumState

F64 = torch.float64


def change(weight, scale, scheme):
    """``Q(W s) / s - W``, by the same three operations as in the core: the same to the bit."""
    return values64(round_to_nearest(weight * scale, scheme)) / numpy64(scale) - numpy64(weight)


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


@given(st.data(), weight_schemes(), st.integers(1, 6))
def test_the_chosen_scale_is_the_best_by_running_the_layer(data, scheme, grids_num):
    weight = data.draw(normal_matrices(st.integers(1, 5), st.integers(1, 9), F64))
    x = data.draw(correlated_tokens(st.integers(1, 20), st.just(weight.shape[1])))
    absmean = x.abs().mean(0)
    chosen = assert_pure(lambda *a: awq.search_scale(*a, scheme, grids_num=grids_num), weight, absmean, x.T @ x)
    grid = [awq.candidate_scale(absmean, i / grids_num) for i in range(grids_num)]
    assert any(torch.equal(chosen, s) for s in grid)
    mine, bound = outputs_error(weight, x, chosen, scheme)
    for other, noise in (outputs_error(weight, x, s, scheme) for s in grid):
        assert mine <= other + bound + noise


@given(st.data(), weight_schemes(), st.floats(0, 1))
def test_the_chosen_scale_never_loses_on_the_tokens_nor_without_chance(data, scheme, rho):
    weight = data.draw(normal_matrices(st.integers(1, 5), st.integers(1, 9), F64))
    x = data.draw(correlated_tokens(st.integers(1, 20), st.just(weight.shape[1])))
    gram = numpy64(x.T @ x)
    chosen = awq.search_scale(weight, x.abs().mean(0), x.T @ x, scheme, grids_num=7, rho=rho)
    mine, rounded = change(weight, chosen, scheme), change(weight, torch.ones_like(chosen), scheme)
    noise = total_noise(np.maximum(np.abs(mine), np.abs(rounded)), gram)
    for h in (gram, (1 - rho) * gram + rho * np.diag(np.diag(gram))):
        assert row_losses(mine, h).sum() <= row_losses(rounded, h).sum() + noise


@given(normal_matrices(st.integers(1, 5), st.integers(1, 9), F64), weight_schemes(), st.floats(0.001, 1000))
def test_equal_inputs_give_the_identity(weight, scheme, magnitude):
    c = weight.shape[1]
    scale = awq.search_scale(weight, torch.full((c,), magnitude, dtype=F64), torch.eye(c, dtype=F64), scheme)
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
    scale = awq.search_scale(weight, x.abs().mean(0), x.T @ x, scheme)
    assert scale.argmax() == 3
    # The channel carries 900 of 915 parts of the power. A scale twice that of the others takes three quarters of its
    # part away, and rows whose step the channel does not set pay nothing for it: half is a bound with room.
    rounded, _ = outputs_error(weight, x, torch.ones_like(scale), scheme)
    assert outputs_error(weight, x, scale, scheme)[0] < 0.5 * rounded


@given(st.data(), st.sampled_from(["tensor", "channel", "group"]))
def test_a_common_scale_is_the_best_for_the_sum_of_the_errors(data, strategy):
    c = data.draw(st.integers(2, 8))
    several = st.lists(normal_matrices(st.integers(1, 3), st.just(c), F64), min_size=1, max_size=3)
    weights = data.draw(several)
    x = data.draw(correlated_tokens(st.integers(1, 20), st.just(c)))
    scheme = Scheme(4, True, strategy, 3 if strategy == "group" else None)
    options = awq.Options(grids_num=4, shrink=0.0)
    statistic = (x.abs().mean(0), SumState(x.T @ x, torch.tensor(len(x))))
    chosen = awq.common_scale(LayerSpec(scheme), options, weights, statistic)
    gram = numpy64(x.T @ x)
    mine = np.vstack([change(w, chosen, scheme) for w in weights])
    for i in range(4):
        other = np.vstack([change(w, awq.candidate_scale(statistic[0], i / 4), scheme) for w in weights])
        noise = total_noise(np.maximum(np.abs(mine), np.abs(other)), gram)
        assert row_losses(mine, gram).sum() <= row_losses(other, gram).sum() + noise
    # Given to the solver, it is what the solver finds by itself.
    alone = awq.solve(LayerSpec(scheme), options, weights[0], statistic)
    given_ = awq.solve(LayerSpec(scheme), options, weights[0], statistic, awq.common_scale(
        LayerSpec(scheme), options, weights[:1], statistic))  # fmt: skip
    same_bits(alone, given_)


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
