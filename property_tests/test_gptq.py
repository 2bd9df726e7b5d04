"""GPTQ against the paper's loop, against Babai's nearest plane, and against brute force."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from property_tests.laws import assert_pure
from property_tests.oracles import members, numpy64
from property_tests.strategies import correlated_tokens, normal_matrices, weight_schemes
from quantize.core import LayerSpec, QParams, Scheme, dequantize, gptq, metrics, refine, round_to_nearest
from quantize.core.observers import PairedState, SumState

F64 = torch.float64
sizes = st.integers(2, 12)


def state(x):
    return SumState(x.T @ x, torch.tensor(len(x)))


def quantizer(scheme, params, shape):
    """Codes of one column, in float64 loops: ``(column, j) -> (codes, values)``."""
    where = members(scheme, *shape)
    scale = numpy64(params.scale)
    zero = np.zeros_like(scale) if params.zero_point is None else numpy64(params.zero_point)

    def nearest(column, j):
        s = np.array([scale[where[i][j]] for i in range(shape[0])])
        z = np.array([zero[where[i][j]] for i in range(shape[0])])
        codes = np.clip(np.rint(column / s) + z, scheme.qmin, scheme.qmax)
        return codes, (codes - z) * s

    return nearest


def paper_loop(weight, gram, scheme, params, damp):
    """Algorithm 1 of the paper: inverse, its upper Cholesky factor, and the update of all columns to the right."""
    w = numpy64(weight).copy()
    h = numpy64(gram).copy()
    mean = np.diag(h).mean()
    dead = np.diag(h) == 0
    h[dead, dead] = 1
    h += damp * mean * np.eye(len(h))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    nearest = quantizer(scheme, params, w.shape)
    codes = np.zeros_like(w)
    for j in range(w.shape[1]):
        codes[:, j], value = nearest(w[:, j], j)
        scaled = (w[:, j] - value) / upper[j, j]
        w[:, j:] -= np.outer(scaled, upper[j, j:])
    return codes


def nearest_plane(weight, x, damp_mean, scheme, params):
    """Babai in the space of the outputs: project what is left onto the axes of a QR factorization, one by one.

    The damping is a set of further tokens, one a channel. Channels are orthogonalized from the last to the first, so
    that the first is decided with all the others still free.
    """
    c = x.shape[1]
    tokens = np.vstack([numpy64(x), np.sqrt(damp_mean) * np.eye(c)])
    directions, _ = np.linalg.qr(tokens[:, ::-1])
    directions = directions[:, ::-1]
    nearest = quantizer(scheme, params, tuple(weight.shape))
    codes = np.zeros(weight.shape)
    left = numpy64(weight) @ tokens.T
    for j in range(c):
        axis = directions[:, j]
        position = (left @ axis) / (tokens[:, j] @ axis)
        codes[:, j], value = nearest(position, j)
        left = left - np.outer(value, tokens[:, j])
    return codes


def damped(x, scheme_damp):
    return scheme_damp * (numpy64(x) ** 2).sum(0).mean()


@given(normal_matrices(st.integers(1, 4), sizes, F64), st.data(), weight_schemes())
def test_paper_options_give_the_papers_codes(weight, data, scheme):
    x = data.draw(correlated_tokens(st.integers(1, 30), st.just(weight.shape[1])))
    if not x.any():
        x = x + 1
    q = gptq.solve(LayerSpec(scheme), gptq.PAPER, weight, state(x)).weight
    params = round_to_nearest(weight, scheme).params
    assert np.array_equal(numpy64(q.codes), paper_loop(weight, state(x).total, scheme, params, 0.01))
    if (x != 0).any(0).all():
        assert np.array_equal(numpy64(q.codes), nearest_plane(weight, x, damped(x, 0.01), scheme, params))


@given(normal_matrices(st.integers(1, 4), sizes, F64), st.data(), st.floats(0.001, 1), st.booleans())
def test_act_order_is_the_loop_on_permuted_channels(weight, data, damp, symmetric):
    x = data.draw(correlated_tokens(st.integers(1, 30), st.just(weight.shape[1]))) + 0.01
    scheme = Scheme(4, symmetric, "channel")
    options = gptq.Options(act_order=True, damp=damp, search_range=False, shrink=0.0, sweeps=0, guard=False)
    gram = state(x).total
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    q = gptq.solve(LayerSpec(scheme), options, weight, state(x)).weight
    params = round_to_nearest(weight, scheme).params
    expected = paper_loop(weight[:, order], gram[order][:, order], scheme, params, damp)
    assert np.array_equal(numpy64(q.codes)[:, order], expected)


@given(normal_matrices(st.integers(1, 4), sizes, F64), st.data(), weight_schemes())
def test_the_error_is_a_sum_over_pivots(weight, data, scheme):
    x = data.draw(correlated_tokens(st.integers(20, 40), st.just(weight.shape[1]))) + 0.01
    gram = state(x).total
    upper, pivots, damp = assert_pure(gptq.factor, gram, 0.01)
    total = gram + damp * gram.diagonal().mean() * torch.eye(len(gram), dtype=F64)
    torch.testing.assert_close(upper @ torch.diag(pivots) @ upper.T, total, rtol=1e-9, atol=1e-9 * total.max().item())
    assert torch.equal(upper.tril(-1), torch.zeros_like(upper))
    assert torch.allclose(upper.diagonal(), torch.ones_like(pivots))
    q = gptq.solve(LayerSpec(scheme), gptq.PAPER, weight, state(x)).weight
    change = weight - dequantize(q)
    residual = change @ upper
    assert metrics.output_error(change, total).item() == pytest.approx((residual**2 @ pivots).sum().item(), rel=1e-8)


@given(normal_matrices(st.integers(1, 4), sizes, F64), st.data(), weight_schemes(), st.booleans())
def test_independent_channels_are_rounded(weight, data, scheme, act_order):
    diagonal = data.draw(normal_matrices(st.just(1), st.just(weight.shape[1]), F64))[0].abs()
    options = gptq.Options(act_order=act_order, search_range=False)
    q = gptq.solve(LayerSpec(scheme), options, weight, SumState(torch.diag(diagonal), torch.tensor(100))).weight
    assert torch.equal(q.codes, round_to_nearest(weight, scheme).codes)


@given(normal_matrices(st.integers(1, 4), st.integers(2, 40), F64), st.data(), weight_schemes())
def test_blocks_are_a_matter_of_speed(weight, data, scheme):
    x = data.draw(correlated_tokens(st.integers(1, 60), st.just(weight.shape[1])))
    codes = [
        gptq.solve(LayerSpec(scheme), gptq.Options(block_size=size), weight, state(x)).weight.codes
        for size in (1, 7, 128, weight.shape[1])
    ]
    assert all(torch.equal(codes[0], other) for other in codes[1:])


@given(st.integers(2, 5), st.data())
def test_brute_force_bounds_descent_and_the_guard(c, data):
    weight = data.draw(normal_matrices(st.integers(1, 3), st.just(c), F64))
    x = data.draw(correlated_tokens(st.integers(1, 12), st.just(c)))
    scheme, gram = Scheme(2, True, "channel"), state(x).total
    rounded = round_to_nearest(weight, scheme)
    every = torch.tensor(list(itertools.product(range(-2, 2), repeat=c)), dtype=F64)
    optimum = sum(
        metrics.row_error(every * rounded.scale[i] - weight[i], gram).min().item() for i in range(len(weight))
    )

    def loss(q):
        return metrics.output_error(dequantize(q) - weight, gram).item()

    fixed = gptq.Options(search_range=False, shrink=0.0)
    guarded = gptq.solve(LayerSpec(scheme), fixed, weight, state(x)).weight
    descended = refine.descend(weight, guarded, gram)
    noise = 1e-12 * gram.diagonal().sum().item() * (1 + (weight**2).sum().item())
    assert optimum <= loss(descended) + noise
    assert loss(descended) <= loss(guarded) + noise
    assert loss(guarded) <= loss(rounded) + noise


def test_feedback_alone_can_lose_to_rounding():
    # H and w worked by hand: rounding gives 0.484375, the unguarded pass 0.984375.
    gram = torch.tensor([[3, 0, -2], [0, 1, -1], [-2, -1, 3]], dtype=F64)
    weight = torch.tensor([[0.375, -1.25, 0.0]], dtype=F64)
    scheme = Scheme(4)
    unit = QParams(torch.ones(1, 1, dtype=F64))
    upper, _, _ = gptq.factor(gram, 0.0)
    passed = refine.sweep(weight, weight, upper, unit, scheme, torch.arange(3))
    rounded = torch.tensor([[0.0, -1.0, 0.0]], dtype=F64)
    assert metrics.output_error(rounded - weight, gram).item() == 0.484375
    assert metrics.output_error(dequantize(passed) - weight, gram).item() == pytest.approx(0.984375, rel=1e-12)


def test_more_error_in_the_weights_buys_less_in_the_outputs():
    source = torch.Generator().manual_seed(0)
    mix = torch.randn(32, 32, generator=source, dtype=F64) + 3 * torch.ones(32, 32, dtype=F64)
    x = torch.randn(2000, 32, generator=source, dtype=F64) @ mix
    weight = torch.randn(16, 32, generator=source, dtype=F64)
    scheme = Scheme(4)
    rounded = round_to_nearest(weight, scheme)
    q = gptq.solve(LayerSpec(scheme), gptq.PAPER, weight, state(x)).weight
    assert (dequantize(q) - weight).square().sum() > (dequantize(rounded) - weight).square().sum()
    held_out = torch.randn(2000, 32, generator=source, dtype=F64) @ mix
    outputs = [((dequantize(each) - weight) @ held_out.T).square().sum() for each in (q, rounded)]
    assert outputs[0] < 0.5 * outputs[1]


@given(normal_matrices(st.integers(1, 4), sizes, F64), st.data(), weight_schemes())
def test_weights_on_the_grid_come_back(weight, data, scheme):
    x = data.draw(correlated_tokens(st.integers(1, 30), st.just(weight.shape[1])))
    on_grid = round_to_nearest(weight, scheme)
    values = dequantize(on_grid)
    # Every group reaches the end of the grid that fixes its scale, or it would not be on its own grid.
    again = round_to_nearest(values, scheme)
    if not torch.equal(dequantize(again), values):
        return
    q = gptq.solve(LayerSpec(scheme), gptq.Options(search_range=False), values, state(x)).weight
    assert torch.equal(dequantize(q), values)


def test_dead_channels_keep_their_rounded_weights():
    source = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=source, dtype=F64)
    x[:, [1, 4]] = 0
    weight = torch.randn(3, 6, generator=source, dtype=F64)
    options = gptq.Options(search_range=False, sweeps=1)
    solution = gptq.solve(LayerSpec(Scheme(4)), options, weight, state(x))
    rounded = round_to_nearest(weight, Scheme(4))
    assert torch.equal(solution.weight.codes[:, [1, 4]], rounded.codes[:, [1, 4]])
    assert solution.notes["dead_channels"].item() == 2


@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_a_factorization_that_fails_raises_the_damping_and_says_so(damp):
    x = torch.ones(1, 6)
    solution = gptq.solve(LayerSpec(Scheme(4)), gptq.Options(damp=damp, shrink=0.0), torch.eye(6), state(x))
    assert torch.isfinite(dequantize(solution.weight)).all()
    # One token: rank 1; undamped it does not factor.
    assert (solution.notes["damp"].item() == pytest.approx(0.01)) == (damp == 0.01)
    assert solution.notes["damp"].item() > 0
    indefinite = torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    upper, pivots, grown = gptq.factor(indefinite, damp)
    assert (pivots > 0).all()
    # The lowest eigenvalue is -2, and damping grows tenfold from 0.01 or 1e-6: 1 is too little, 10 is enough.
    assert grown == pytest.approx(10)
    torch.testing.assert_close(upper @ torch.diag(pivots) @ upper.T, indefinite + grown * torch.eye(2))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gram_matrix_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="gram: NaN or inf"):
        gptq.factor(torch.tensor([[1.0, bad], [bad, 1.0]]), 0.01)


def test_a_huge_gram_matrix_is_solved():
    solution = gptq.solve(
        LayerSpec(Scheme(4)), gptq.Options(), torch.eye(8), SumState(3e38 * torch.eye(8), torch.tensor(9))
    )
    assert torch.isfinite(dequantize(solution.weight)).all()


paired_tokens = st.integers(2, 8).flatmap(
    lambda c: st.tuples(
        normal_matrices(st.integers(1, 4), st.just(c), F64),
        correlated_tokens(st.integers(1, 30), st.just(c)),
        st.integers(0, 2**31),
    )
)


def arrived(x, seed):
    """What is missing of ``x``, and the statistic of both."""
    missing = 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=F64) * x.std()
    return missing, PairedState(state(x), missing.T @ x)


@given(paired_tokens, st.sampled_from([0.25, 0.5, 1.0]))
def test_the_correction_is_a_ridge_regression_of_what_is_missing(drawn, strength):
    weight, x, seed = drawn
    missing, statistic = arrived(x, seed)
    moved = assert_pure(gptq.corrected, weight, statistic, strength)
    tokens, target = numpy64(x), numpy64(missing) @ numpy64(weight).T
    alive = (tokens != 0).any(0)
    # As further tokens: one a channel, as large as all that it saw or as what it lacks, for which nothing is missing.
    lacks = np.abs((numpy64(missing) * tokens).sum(0))
    ridge = np.diag(np.sqrt(np.maximum((tokens**2).sum(0), lacks)))
    stacked, goal = np.vstack([tokens, ridge])[:, alive], np.vstack([target, np.zeros((x.shape[1], len(weight)))])
    change = np.zeros(weight.shape)
    change[:, alive] = np.linalg.lstsq(stacked / np.linalg.norm(stacked, axis=0), goal, rcond=None)[0].T
    change[:, alive] /= np.linalg.norm(stacked, axis=0)
    assert np.allclose(
        numpy64(moved - weight), strength * change, rtol=1e-8, atol=1e-10 * (np.abs(change).max() + 1e-300)
    )


@given(paired_tokens, st.sampled_from([0.1, 0.5, 1.0]))
def test_a_corrected_layer_is_nearer_to_the_float_model(drawn, strength):
    weight, x, seed = drawn
    missing, statistic = arrived(x, seed)
    moved = gptq.corrected(weight, statistic, strength)

    def distance(w):
        return (x @ w.T - (x + missing) @ weight.T).square().sum()

    # In the norm of the tokens the rest is multiplied by I - strength K with 0 <= K <= I: it cannot grow.
    assert distance(moved) <= distance(weight) * (1 + 1e-10)


def test_nothing_missing_corrects_nothing():
    x = torch.randn(20, 6, dtype=F64, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(3, 6, dtype=F64, generator=torch.Generator().manual_seed(2))
    spec, options = LayerSpec(Scheme(4)), gptq.Options(sequential=True)
    plain = gptq.solve(spec, options, weight, state(x))
    paired = gptq.solve(spec, options, weight, PairedState(state(x), torch.zeros(6, 6, dtype=F64)))
    assert torch.equal(plain.weight.codes, paired.weight.codes)
    assert paired.notes["corrected"] == 0


def test_what_is_missing_is_made_up_for_by_the_codes():
    # Inputs that arrive a fifth too small: after half of the correction, half of it lost to the ridge, 1/16 is made up.
    x = torch.eye(4, dtype=F64) * 10
    statistic = PairedState(state(x), 0.25 * x.T @ x)
    weight = torch.full((1, 4), 0.8, dtype=F64)
    solution = gptq.solve(LayerSpec(Scheme(8)), gptq.Options(sequential=True), weight, statistic)
    assert dequantize(solution.weight)[0].tolist() == pytest.approx([0.85] * 4)
    assert solution.notes["corrected"].item() == pytest.approx(0.0625)


def test_a_channel_that_nearly_vanished_moves_no_weight_by_more_than_itself():
    x = torch.randn(200, 6, dtype=F64, generator=torch.Generator().manual_seed(0))
    original = x.clone()
    original[:, 2] = 0
    original[:3, 2], x[:, 2] = 1, 0
    x[:3, 2] = 0.01
    statistic = PairedState(state(x), (original - x).T @ x)
    # Alone, the channel would be multiplied by a hundred.
    assert statistic.cross[2, 2] / statistic.gram.total[2, 2] == pytest.approx(99)
    weight = torch.eye(6, dtype=F64)
    assert (gptq.corrected(weight, statistic, 0.5) - weight)[2].abs().max() <= 0.5
