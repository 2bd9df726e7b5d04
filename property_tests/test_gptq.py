"""GPTQ against the paper's loop, against Babai's nearest plane, and against brute force."""

import dataclasses
import itertools
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given
from hypothesis import strategies as st

from property_tests.laws import assert_nearest, assert_pure, same_bits
from property_tests.oracles import U32, U64, half_even, loss_noise, lost64, numpy64, row_losses, total_noise, values64
from property_tests.strategies import correlated_tokens, input_schemes, normal_matrices, seeds, weight_schemes
from quantize.core import (
    LayerSpec,
    QParams,
    QTensor,
    Scheme,
    correction,
    dequantize,
    gptq,
    input_loss,
    linear,
    ranges,
    refine,
    round_to_nearest,
    shrinkage,
)
from quantize.core.observers import PairedState, Range, SumState

F64 = torch.float64
sizes = st.integers(2, 9)


def state(x):
    return SumState(x.T @ x, torch.tensor(len(x)))


def exact_loop(weight, gram, lowest, highest):
    """Equations 2 and 3 of the paper in rationals, for a step of 1: the rounded weight."""
    c = len(gram)
    # The inverse, by Gauss and Jordan on [H, I].
    rows = [[Fraction(v) for v in gram[i]] + [Fraction(int(i == j)) for j in range(c)] for i in range(c)]
    for j in range(c):
        rows[j] = [v / rows[j][j] for v in rows[j]]
        for i in set(range(c)) - {j}:
            rows[i] = [v - rows[i][j] * p for v, p in zip(rows[i], rows[j], strict=True)]
    made = []
    for row in weight:
        w, inverse = [Fraction(v) for v in row], [list(r[c:]) for r in rows]
        for j in range(c):
            rounded = Fraction(min(max(half_even(w[j]), lowest), highest))
            error = (w[j] - rounded) / inverse[j][j]
            w = [*w[:j], rounded, *(w[k] - error * inverse[k][j] for k in range(j + 1, c))]
            # Without column j, which is decided: one step of elimination.
            inverse = [
                [inverse[i][k] - inverse[i][j] * inverse[j][k] / inverse[j][j] for k in range(c)] for i in range(c)
            ]
        made.append([int(v) for v in w])
    return np.array(made)


bits_and_ends = st.builds(Scheme, st.sampled_from([2, 4, 8]), st.booleans(), st.sampled_from(["tensor", "channel"]))


@given(bits_and_ends, st.integers(1, 3), st.integers(3, 5), seeds, st.booleans(), st.sampled_from([1, 3, 128]))
def test_whole_numbers_give_the_papers_codes(scheme, n, c, seed, act_order, block_size):
    # H = U D U^T with whole numbers in U and powers of 4 in D: its factorization is exact on every processor. The
    # weights are quarters, and each row reaches both ends of a grid with step 1. So ties are frequent, and exact.
    source = np.random.default_rng(seed)
    upper = np.triu(source.integers(-1, 2, (c, c)), 1) + np.eye(c)
    gram = upper * 4.0 ** np.arange(c)[::-1] @ upper.T
    zero = 0 if scheme.symmetric else int(source.integers(scheme.qmin, scheme.qmax + 1))
    lowest, highest = scheme.qmin - zero, scheme.qmax - zero
    weight = source.integers(4 * lowest, 4 * highest + 1, (n, c)) / 4
    for row in weight:
        row[source.permutation(c)[:2]] = lowest, highest
    expected = exact_loop(weight, gram, lowest, highest) + zero
    # The diagonal falls. So act-order, from any order of the channels, goes through them in this one.
    assert (np.diff(np.diag(gram)) < 0).all()
    order = source.permutation(c) if act_order else np.arange(c)
    options = dataclasses.replace(gptq.PAPER, damp=0.0, act_order=act_order, block_size=block_size)
    statistic = SumState(torch.from_numpy(gram[order][:, order]), torch.tensor(100))
    q = assert_pure(
        lambda *a: gptq.solve(LayerSpec(scheme), options, *a), torch.from_numpy(weight[:, order]), statistic
    ).weight
    assert (q.scale == 1).all()
    assert np.array_equal(q.codes.numpy(), expected[:, order])


def paper_targets(weight, gram, values, damp):
    """Algorithm 1 of the paper, with ``values`` as the decisions: the number that each column is rounded from.

    Beside it, how far float64 may be off. The paper inverts H, factors the inverse, and subtracts the error of a column
    from all columns to the right. The condition number of H is at most c / damp + 1: its trace over the damping. The
    inverse is off by that many roundings, its factor by as many times that, and a row of the factor over its diagonal
    by the root of it once more. The factor of the core, without an inverse, is off by less.
    """
    c, w, h = len(gram), weight.copy(), gram.copy()
    mean, dead = np.diag(h).mean(), np.diag(h) == 0
    h[dead, dead] = 1
    upper = np.linalg.cholesky(np.linalg.inv(h + damp * mean * np.eye(c))).T
    size = np.abs(w)
    for j in range(c):
        scaled = (w[:, j] - values[:, j]) / upper[j, j]
        w[:, j + 1 :] -= np.outer(scaled, upper[j, j + 1 :])
        size[:, j + 1 :] += np.abs(np.outer(scaled, upper[j, j + 1 :]))
    return w, (c + 1) ** 2 * (c / damp + 1) ** 2.5 * U64 * size


def plane_targets(weight, x, values, damp):
    """Babai in the space of the outputs, like :func:`paper_targets`: project what is left onto axes, one by one.

    The axes are those of a QR factorization. The damping is a set of further tokens, one a channel. Channels are
    orthogonalized from the last to the first, so that the first is decided with all the others still free. The axes
    are off by the root of the condition number of H, and so is the quotient by the diagonal: together the condition
    number, times the length of what they project.
    """
    t, c = x.shape
    damping = damp * (x**2).sum(0).mean()
    tokens = np.vstack([x, np.sqrt(damping) * np.eye(c)])
    directions = np.linalg.qr(tokens[:, ::-1])[0][:, ::-1]
    targets, margin = np.zeros(weight.shape), np.zeros(weight.shape)
    left, lengths = weight @ tokens.T, np.sqrt((tokens**2).sum(0))
    size = (np.abs(weight) + np.abs(values)) @ lengths
    for j in range(c):
        axis = directions[:, j]
        targets[:, j] = (left @ axis) / (tokens[:, j] @ axis)
        margin[:, j] = 8 * (t + 2 * c) * c * (c / damp + 1) * U64 * size / abs(tokens[:, j] @ axis)
        left = left - np.outer(values[:, j], tokens[:, j])
    return targets, margin


@given(normal_matrices(st.integers(1, 4), sizes, F64), st.data(), weight_schemes(), st.sampled_from([0.01, 0.1, 1.0]))
def test_paper_options_give_the_papers_codes(weight, data, scheme, damp):
    x = data.draw(correlated_tokens(st.integers(1, 20), st.just(weight.shape[1])))
    q = gptq.solve(LayerSpec(scheme), dataclasses.replace(gptq.PAPER, damp=damp), weight, state(x)).weight
    assert torch.equal(q.scale, round_to_nearest(weight, scheme).scale)
    assert_nearest(q, *paper_targets(numpy64(weight), numpy64(x.T @ x), values64(q), damp))
    assert_nearest(q, *plane_targets(numpy64(weight), numpy64(x), values64(q), damp))


@given(normal_matrices(st.integers(1, 4), sizes, F64), st.data(), weight_schemes(), st.sampled_from([0.01, 0.1, 1.0]))
def test_act_order_is_the_loop_on_permuted_channels(weight, data, scheme, damp):
    x = data.draw(correlated_tokens(st.integers(1, 20), st.just(weight.shape[1])))
    options = dataclasses.replace(gptq.PAPER, act_order=True, damp=damp)
    gram = numpy64(x.T @ x)
    order = np.argsort(-np.diag(gram), kind="stable")
    q = gptq.solve(LayerSpec(scheme), options, weight, state(x)).weight
    found = paper_targets(numpy64(weight)[:, order], gram[order][:, order], values64(q)[:, order], damp)
    back = np.argsort(order)
    assert_nearest(q, *(each[:, back] for each in found))


def assert_factors(upper, pivots, total, u):
    """``U diag(d) U^T`` is ``total`` but for rounding; returns by how much it may be off.

    Cholesky is exact for a matrix that is off by c + 1 roundings of ``|U| diag(d) |U|^T``. Columns and pivots are
    rounded 3 times more, the damped diagonal c + 3 times in the core and in the test, and the product here c + 2 times.
    """
    upper, pivots = numpy64(upper), numpy64(pivots)
    bound = (4 * len(pivots) + 12) * u * (np.abs(upper) * pivots @ np.abs(upper).T)
    assert (np.abs(upper * pivots @ upper.T - total) <= bound).all()
    assert not np.tril(upper, -1).any()
    assert (np.diag(upper) == 1).all()
    assert (pivots > 0).all()
    return bound


@given(st.data(), weight_schemes(), st.sampled_from([0.01, 0.3]))
def test_the_error_is_a_sum_over_pivots(data, scheme, damp):
    weight = data.draw(normal_matrices(st.integers(1, 4), sizes, F64))
    x = data.draw(correlated_tokens(st.integers(1, 20), st.just(weight.shape[1])))
    gram = x.T @ x
    upper, pivots, used = assert_pure(refine.factor, gram, damp)
    assert used == damp
    # A dead channel gets a pivot of 1 above the damping.
    h = numpy64(gram)
    total = h + damp * np.diag(h).mean() * np.eye(len(h)) + np.diag(np.diag(h) == 0)
    bound = assert_factors(upper, pivots, total, U64)
    options = dataclasses.replace(gptq.PAPER, damp=damp)
    change = values64(gptq.solve(LayerSpec(scheme), options, weight, state(x)).weight) - numpy64(weight)
    by_pivots = ((change @ numpy64(upper)) ** 2 @ numpy64(pivots)).sum()
    # What the factors are off by, and two products and two sums over channels and one over rows on either side.
    magnitude = np.abs(numpy64(upper)) * numpy64(pivots) @ np.abs(numpy64(upper)).T
    evaluation = (4 * len(h) + 2 * len(change) + 8) * U64 * row_losses(np.abs(change), magnitude).sum()
    assert abs(row_losses(change, total).sum() - by_pivots) <= row_losses(np.abs(change), bound).sum() + evaluation


@given(normal_matrices(st.integers(1, 4), sizes, F64), st.data(), weight_schemes(), st.booleans())
def test_the_options_are_steps_before_and_after_the_pass(weight, data, scheme, act_order):
    x = data.draw(correlated_tokens(st.integers(1, 20), st.just(weight.shape[1])))
    spec, gram = LayerSpec(scheme), x.T @ x
    plain = dataclasses.replace(gptq.PAPER, act_order=act_order)

    def solved(statistic, **changed):
        return gptq.solve(spec, dataclasses.replace(plain, **changed), weight, statistic).weight

    # The same calls on the same numbers: the same bits.
    q = solved(state(x))
    # Errors of the ranges cost what the pivots say, in the order of the columns.
    diagonal = numpy64(gram.diagonal())
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(len(diagonal))
    _, pivots, _ = refine.factor(gram[order][:, order].T.contiguous().mT, plain.damp)
    importance = torch.from_numpy(np.where(diagonal == 0, 0.0, numpy64(pivots)[np.argsort(order)]))
    for signed in (False, True):
        searched = solved(state(x), search_range=True, signed_scale=signed)
        same_bits(searched.params, ranges.search(weight, scheme, importance, signed=signed))
    shrunk = shrinkage.shrink(gram, shrinkage.intensity(state(x), 4.0))
    same_bits(solved(state(x), shrink=4.0), solved(SumState(shrunk, torch.tensor(len(x)))))
    for sweeps in (1, 2):
        q = refine.refit(weight, refine.descend(weight, q, gram), gram)
        same_bits(solved(state(x), sweeps=sweeps), q)


@given(normal_matrices(st.integers(1, 4), sizes, F64), st.data(), weight_schemes(), st.booleans())
def test_independent_channels_are_rounded(weight, data, scheme, act_order):
    diagonal = data.draw(normal_matrices(st.just(1), st.just(weight.shape[1]), F64))[0].abs()
    options = gptq.Options(act_order=act_order, search_range=False)
    q = gptq.solve(LayerSpec(scheme), options, weight, SumState(torch.diag(diagonal), torch.tensor(100))).weight
    assert torch.equal(q.codes, round_to_nearest(weight, scheme).codes)


@given(st.integers(2, 4), st.data())
def test_brute_force_bounds_descent_and_the_guard(c, data):
    weight = data.draw(normal_matrices(st.integers(1, 3), st.just(c), F64))
    x = data.draw(correlated_tokens(st.integers(1, 12), st.just(c)))
    scheme, gram = Scheme(2, True, "channel"), numpy64(x.T @ x)
    rounded = round_to_nearest(weight, scheme)
    fixed = gptq.Options(search_range=False, shrink=0.0)
    guarded = gptq.solve(LayerSpec(scheme), fixed, weight, state(x)).weight
    descended = refine.descend(weight, guarded, x.T @ x)
    changes = [values64(q) - numpy64(weight) for q in (descended, guarded, rounded)]
    every = np.array(list(itertools.product(range(-2, 2), repeat=c)))
    for i in range(len(weight)):
        best = every * rounded.scale[i].item() - numpy64(weight[i])
        # The codes that any of these chose are among all codes, so that no row is below the optimum but for rounding.
        optimum = row_losses(best, gram).min()
        noise = loss_noise(np.abs(best).max(0)[None], gram)[0]
        found = [row_losses(change[[i]], gram)[0] for change in changes]
        assert optimum <= found[0] + noise
        assert found[0] <= found[1] + noise
        assert found[1] <= found[2] + noise


def test_feedback_alone_can_lose_to_rounding():
    # H and w worked by hand: rounding gives 0.484375, the unguarded pass 0.984375. Sixty-fourths: both are exact. The
    # last column is reached at a tie, and costs the same with either code.
    gram = torch.tensor([[3, 0, -2], [0, 1, -1], [-2, -1, 3]], dtype=F64)
    weight = torch.tensor([[0.375, -1.25, 0.0]], dtype=F64)
    scheme = Scheme(4)
    unit = QParams(torch.ones(1, 1, dtype=F64))
    upper, _, _ = refine.factor(gram, 0.0)
    passed = refine.sweep(weight, weight, upper, unit, scheme, torch.arange(3))
    rounded = QTensor(torch.tensor([[0, -1, 0]], dtype=torch.int8), unit.scale, None, scheme)
    found = [row_losses(values64(q) - numpy64(weight), numpy64(gram)).item() for q in (rounded, passed)]
    assert found == [0.484375, 0.984375]


def test_more_error_in_the_weights_buys_less_in_the_outputs():
    source = torch.Generator().manual_seed(0)
    # The common part of the mix carries 9 of 10 parts of the power, in one direction that the feedback makes errors
    # leave: less than half of the error of rounding is a bound with much room.
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


@given(st.integers(1, 4), st.integers(1, 4), weight_schemes(), st.integers(-3, 3), seeds, st.data())
def test_weights_on_the_grid_come_back(n, g, scheme, exponent, seed, data):
    # Every group reaches both ends of its grid, and its step is a power of two: the ranges give exactly that step back.
    size = 2 * g if scheme.group_size is None else scheme.group_size
    size, source = max(size, 2), np.random.default_rng(seed)
    scheme = Scheme(scheme.bits, scheme.symmetric, scheme.strategy, scheme.group_size and size)
    c = size * (g if scheme.group_size else 1)
    codes = source.integers(scheme.qmin, scheme.qmax + 1, (n, c))
    codes[:, ::size], codes[:, 1::size] = scheme.qmin, scheme.qmax
    zero = 0 if scheme.symmetric else int(source.integers(scheme.qmin, scheme.qmax + 1))
    values = torch.from_numpy((codes - zero) * 2.0**exponent)
    x = data.draw(correlated_tokens(st.integers(1, 20), st.just(c)))
    q = gptq.solve(LayerSpec(scheme), gptq.Options(search_range=False), values, state(x)).weight
    assert np.array_equal(q.codes.numpy(), codes)
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
    if damp:
        assert solution.notes["damp"] == torch.tensor(damp)
    else:
        assert solution.notes["damp"] > 0
    indefinite = torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    upper, pivots, grown = refine.factor(indefinite, damp)
    # The lowest eigenvalue is -2, and damping grows tenfold from 0.01 or 1e-6: 1 is too little, 10 is enough. Seven
    # products are rounded at most.
    assert abs(grown - 10) <= 7 * U64 * 10
    assert_factors(upper, pivots, numpy64(indefinite) + grown.item() * np.eye(2), U32)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gram_matrix_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="gram: NaN or inf"):
        refine.factor(torch.tensor([[1.0, bad], [bad, 1.0]]), 0.01)


def test_a_huge_gram_matrix_is_solved():
    huge = SumState(3e38 * torch.eye(8), torch.tensor(9))
    plain = gptq.solve(LayerSpec(Scheme(4)), gptq.Options(search_range=False), torch.eye(8), huge)
    # Its channels are independent: plain rounding.
    assert torch.equal(plain.weight.codes, round_to_nearest(torch.eye(8), Scheme(4)).codes)
    # With a search, one of the scales with which an only number comes back but for rounding.
    solution = gptq.solve(LayerSpec(Scheme(4)), gptq.Options(), torch.eye(8), huge)
    torch.testing.assert_close(dequantize(solution.weight), torch.eye(8), rtol=4 * U32, atol=0)


def test_ranges_are_searched_by_the_pivots_and_not_by_the_diagonal():
    # Two channels that all but agree: the second one makes up for what the first one rounds off, so an error of the
    # first counts next to nothing. Its outlier is clipped, though the diagonals are the same.
    x = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [2.0**-10, 0.0, 0.0]], dtype=F64)
    weight, options = torch.tensor([[3.0, 0.3, 0.2]], dtype=F64), gptq.Options(act_order=False, shrink=0.0, damp=0.0)
    _, pivots, _ = refine.factor(x.T @ x, 0.0)
    # Exact but for rounding: the first channel given the second, 2 + 2^-20 - 2.
    assert pivots[0].item() == pytest.approx(2.0**-20, rel=1e-6, abs=0)
    found = gptq.solve(LayerSpec(Scheme(4)), options, weight, state(x)).weight
    searched = gptq.solve(LayerSpec(Scheme(4)), dataclasses.replace(options, guard=False), weight, state(x)).weight
    same_bits(searched.params, ranges.search(weight, Scheme(4), pivots, signed=True))
    by_diagonal = ranges.search(weight, Scheme(4), (x.T @ x).diagonal(), signed=True)
    assert searched.scale.abs().item() < 0.5 * by_diagonal.scale.abs().item()
    assert row_losses(values64(found) - numpy64(weight), numpy64(x.T @ x)) <= row_losses(
        values64(round_to_nearest(weight, Scheme(4))) - numpy64(weight), numpy64(x.T @ x)
    ) + loss_noise(np.abs(values64(found)) + np.abs(numpy64(weight)), numpy64(x.T @ x))


def test_dead_channels_have_no_say_in_the_ranges():
    # The outlier meets nothing but zeros.
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    x[:, 1] = 0
    weight = torch.tensor([[0.1, 8.0, -0.25, 0.3]], dtype=F64)
    found = gptq.solve(LayerSpec(Scheme(4)), gptq.Options(), weight, state(x)).weight
    # Its full range has a step of 1 or more: all the rest would be 0. The least range is 0.4 of that.
    assert found.scale.abs().item() < 0.5
    assert found.codes[0, 2] != 0


whole_inputs = st.tuples(input_schemes(), st.integers(1, 3), st.integers(2, 6), seeds, st.booleans())


def drawn_inputs(t, c, source, paired):
    """Whole tokens with correlated channels, and their statistic, also with whole numbers that are missing."""
    x = torch.from_numpy((source.integers(-9, 10, (t, c)) + source.integers(-9, 10, (t, 1))).astype(float))
    missing = torch.from_numpy(source.integers(-3, 4, (t, c)).astype(float))
    seen = PairedState(state(x), missing.T @ x) if paired else state(x)
    return x, (Range(x.amin(0).clamp(max=0), x.amax(0).clamp(min=0)), seen)


row_scaled = weight_schemes(("tensor", "channel"), bits=(3, 4, 8))


@given(whole_inputs, row_scaled, st.sampled_from([0.0, 0.5, 1.0]), st.booleans())
def test_quantized_inputs_are_solved_as_what_a_layer_meets(drawn, scheme, strength, smoothed):
    inputs, n, c, seed, paired = drawn
    source = np.random.default_rng(seed)
    x, statistic = drawn_inputs(20, c, source, paired)
    weight = torch.from_numpy(source.normal(size=(n, c)))
    s = torch.from_numpy(2.0 ** source.integers(-2, 3, c)) if smoothed else None
    options = gptq.Options(asymmetric=strength)
    solve = partial(gptq.solve, LayerSpec(scheme, inputs), options)
    solution = assert_pure(solve, weight, statistic, s) if smoothed else assert_pure(solve, weight, statistic)
    # Scales are positive, with whichever option.
    assert (solution.weight.scale > 0).all()
    effective = input_loss.rounded_statistic(inputs, statistic, s)
    unsigned = dataclasses.replace(options, signed_scale=False)
    alone = gptq.solve(LayerSpec(scheme), unsigned, weight * s if smoothed else weight, effective)
    same_bits(
        (solution.weight, solution.error, solution.baseline_error), (alone.weight, alone.error, alone.baseline_error)
    )
    gram = statistic[1].gram if paired else statistic[1]
    same_bits(solution.notes, {**alone.notes, **input_loss.loss_notes(inputs, weight, statistic[0], gram, s)})
    assert solution.inputs == inputs
    divisor = torch.ones(c, dtype=F64) if s is None else s
    assert solution.smoothing is s or torch.equal(solution.smoothing, s)
    expected = linear.input_params(x / divisor, inputs) if inputs.strategy == "tensor" else None
    assert (solution.static is None) == (expected is None)
    if expected is not None:
        same_bits(solution.static, expected)
    # Powers of two: the smoothed weight, for the smoothed inputs, is the same problem to the last bit.
    ranges_, seen = statistic
    outer = divisor * divisor[:, None]
    gram = SumState(state(x).total / outer, torch.tensor(len(x)))
    smooth = (
        Range(ranges_.low / divisor, ranges_.high / divisor),
        PairedState(gram, seen.cross / outer) if paired else gram,
    )
    same_bits(solve(weight * divisor, smooth).weight, solution.weight)


@given(whole_inputs, row_scaled, st.booleans())
def test_errors_with_quantized_inputs_are_those_on_what_is_met(drawn, scheme, guard):
    inputs, n, c, seed, paired = drawn
    source = np.random.default_rng(seed)
    x, statistic = drawn_inputs(20, c, source, paired)
    weight, s = torch.from_numpy(source.normal(size=(n, c))), torch.from_numpy(source.random(c) + 0.5)
    solution = gptq.solve(LayerSpec(scheme, inputs), gptq.Options(guard=guard), weight, statistic, s)
    # The Gram matrix of the smoothed tokens and what rounding them loses, from the tokens.
    tokens, divisor = numpy64(x), numpy64(s)
    lost = lost64(inputs, tokens, divisor)
    gram = (tokens / divisor).T @ (tokens / divisor) + np.diag(lost)
    target = numpy64(correction.corrected(weight * s, input_loss.rounded_statistic(inputs, statistic, s), 0.5))
    found = []
    for q, stated in (
        (solution.weight, solution.error),
        (round_to_nearest(weight * s, scheme), solution.baseline_error),
    ):
        change = values64(q) - target
        found.append(row_losses(change, gram).sum())
        # The matrices are sums over the tokens, and about 30 more operations.
        noise = total_noise(np.abs(change), gram)
        noise += 2 * (len(x) + 40) * U64 * row_losses(np.abs(change), np.abs(tokens / divisor).T @ np.abs(
            tokens / divisor) + np.diag(lost)).sum()  # fmt: skip
        assert abs(stated.item() - found[-1]) <= noise
    assert not guard or solution.error <= solution.baseline_error * (1 + 2 * n * U64)


@given(whole_inputs, row_scaled, st.integers(1, 3), st.booleans())
def test_weights_with_quantized_inputs_are_solved_together_and_in_stacks(drawn, scheme, number, smoothed):
    inputs, n, c, seed, paired = drawn
    source = np.random.default_rng(seed)
    spec, options = LayerSpec(scheme, inputs), gptq.Options()
    weights = torch.from_numpy(source.normal(size=(number, n, c)))
    several = [drawn_inputs(20, c, source, paired)[1] for _ in range(number)]
    s = torch.from_numpy(2.0 ** source.integers(-2, 3, (number, c))) if smoothed else None
    together = gptq.solve_together(spec, options, list(weights), several[0], s[0] if smoothed else None)
    stacked = assert_pure(
        lambda *a: gptq.solve_stack(spec, options, *a),
        weights,
        pytree.tree_map(lambda *each: torch.stack(each), *several),
        *([s] if smoothed else []),
    )
    for k in range(number):
        smoothing = s[[0, k]] if smoothed else (None, None)
        first, own = (
            gptq.solve(spec, options, weights[k], its, each)
            for its, each in zip((several[0], several[k]), smoothing, strict=True)
        )
        # Of numbers drawn from a continuum no code is on a tie, so that the order of additions does not show.
        assert torch.equal(together[k].weight.codes, first.weight.codes)
        assert torch.equal(stacked.weight.codes[k], own.weight.codes)
        same_bits(
            (together[k].smoothing, together[k].static, together[k].inputs), (first.smoothing, first.static, inputs)
        )
        assert stacked.inputs == own.inputs == inputs
        if inputs.strategy == "tensor":
            # Exact: a quotient of whole numbers and powers of two each, rounded once or twice.
            same_bits(tuple(each[k] for each in stacked.static if each is not None), tuple(
                each for each in own.static if each is not None))  # fmt: skip
        assert stacked.notes.keys() == own.notes.keys()


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


def correction_noise(weight, x, missing):
    """How far two computations of the correction may lie apart, ``[n, 1]`` in units of the columns ``[c]`` below.

    The unknowns are scaled so that every column of the tokens, with its further token, has length 1. The normal
    equations then have eigenvalues from 1/2 to c. Their matrix is a sum over t tokens, factored by Cholesky: off by at
    most (t + 3 c + 8) c roundings; the right side is a sum over tokens and channels. A solution by least squares is off
    by about the condition number, 2 c, times as much as those.
    """
    t, c = x.shape
    return 16 * (t + 3 * c + 8) * c**2 * U64 * (np.abs(weight) @ np.sqrt((missing**2).sum(0)))[:, None]


@given(paired_tokens, st.sampled_from([0.25, 0.5, 1.0]))
def test_the_correction_is_a_ridge_regression_of_what_is_missing(drawn, strength):
    weight, x, seed = drawn
    missing, statistic = arrived(x, seed)
    moved = numpy64(assert_pure(correction.corrected, weight, statistic, strength))
    tokens, lack, w = numpy64(x), numpy64(missing), numpy64(weight)
    alive = (tokens != 0).any(0)
    # As further tokens: one a channel, as large as all that it saw or as what it lacks, for which nothing is missing.
    power = (tokens**2).sum(0)
    ridge = np.diag(np.sqrt(np.maximum(np.maximum(power, np.abs((lack * tokens).sum(0))), 1e-4 * power.mean())))
    stacked, goal = np.vstack([tokens, ridge])[:, alive], np.vstack([lack @ w.T, np.zeros((len(ridge), len(w)))])
    unit = np.linalg.norm(stacked, axis=0)
    change = np.zeros(w.shape)
    change[:, alive] = np.linalg.lstsq(stacked / unit, goal, rcond=None)[0].T / unit
    bound = np.zeros(w.shape)
    bound[:, alive] = strength * correction_noise(w, tokens, lack) / unit
    # A row that would move further than its root mean square goes a part of the way, by a quotient of a noisy size.
    size, most = np.abs(change).max(1), np.sqrt((w**2).mean(1))
    change = change * np.where(size > most, most / np.where(size > 0, size, 1), 1)[:, None]
    bound = bound + bound.max(1, keepdims=True)
    # Adding the change to the weight rounds, and subtracting the weight again.
    assert (
        np.abs(moved - w - strength * change)
        <= bound + 8 * U64 * np.abs(change) + 2 * U64 * (np.abs(w) + np.abs(moved))
    ).all()


@given(paired_tokens, st.sampled_from([0.1, 0.5, 1.0]))
def test_a_corrected_layer_is_nearer_to_the_float_model(drawn, strength):
    weight, x, seed = drawn
    missing, statistic = arrived(x, seed)
    moved = numpy64(correction.corrected(weight, statistic, strength))
    tokens, lack, w = numpy64(x), numpy64(missing), numpy64(weight)

    def distances(v):
        return ((tokens @ v.T - (tokens + lack) @ w.T) ** 2).sum(0)

    # In the norm of the tokens the rest is multiplied by I - strength K with 0 <= K <= I: it cannot grow. No column of
    # the tokens is longer than its unit, so an error of the correction moves the outputs by at most c times itself;
    # products, differences and sums are rounded as well.
    t, c = x.shape
    off = c * correction_noise(w, tokens, lack)[:, 0]
    sizes = ((np.abs(tokens) @ (np.abs(moved) + np.abs(w)).T + np.abs(lack) @ np.abs(w).T) ** 2).sum(0)
    noise = 2 * np.sqrt(distances(w)) * off + off**2 + 2 * (t + 2 * c + 8) * U64 * sizes
    assert (distances(moved) <= distances(w) + noise).all()


@given(paired_tokens, st.booleans())
def test_errors_are_those_against_the_corrected_weight(drawn, guard):
    weight, x, seed = drawn
    _, statistic = arrived(x, seed)
    solution = gptq.solve(LayerSpec(Scheme(4)), gptq.Options(guard=guard), weight, statistic)
    target, gram = numpy64(correction.corrected(weight, statistic, 0.5)), numpy64(statistic.gram.total)
    # The baseline rounds the weight itself.
    for q, stated in (
        (solution.weight, solution.error),
        (round_to_nearest(weight, Scheme(4)), solution.baseline_error),
    ):
        change = values64(q) - target
        assert abs(stated.item() - row_losses(change, gram).sum()) <= total_noise(np.abs(change), gram)


def test_nothing_missing_corrects_nothing():
    x = torch.randn(20, 6, dtype=F64, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(3, 6, dtype=F64, generator=torch.Generator().manual_seed(2))
    spec, options = LayerSpec(Scheme(4)), gptq.Options()
    plain = gptq.solve(spec, options, weight, state(x))
    paired = gptq.solve(spec, options, weight, PairedState(state(x), torch.zeros(6, 6, dtype=F64)))
    assert torch.equal(plain.weight.codes, paired.weight.codes)
    assert paired.notes["corrected"] == 0


def test_what_is_missing_is_made_up_for_by_the_codes():
    # Inputs that arrive a fifth too small: after half of the correction, half of it lost to the ridge, 1/16 is made up.
    x = torch.eye(4, dtype=F64) * 10
    statistic = PairedState(state(x), 0.25 * x.T @ x)
    weight = torch.full((1, 4), 0.8, dtype=F64)
    solution = gptq.solve(LayerSpec(Scheme(8)), gptq.Options(), weight, statistic)
    # One entry a channel: about a dozen roundings, of the correction and of one code and scale.
    assert dequantize(solution.weight)[0].tolist() == pytest.approx([0.85] * 4, rel=16 * U64, abs=0)
    # The change is a seventeenth of the moved weight, so that the rounding of the latter counts 17 times.
    assert solution.notes["corrected"].item() == pytest.approx(0.0625, rel=32 * U64, abs=0)


def test_a_channel_that_nearly_vanished_moves_no_weight_by_more_than_itself():
    x = torch.randn(200, 6, dtype=F64, generator=torch.Generator().manual_seed(0))
    original = x.clone()
    original[:, 2] = 0
    original[:3, 2], x[:, 2] = 1, 0
    x[:3, 2] = 2.0**-7
    statistic = PairedState(state(x), (original - x).T @ x)
    # Alone, the channel would be multiplied by 128. Powers of two: exact.
    assert statistic.cross[2, 2] / statistic.gram.total[2, 2] == 127
    weight = torch.eye(6, dtype=F64)
    assert (correction.corrected(weight, statistic, 0.5) - weight)[2].abs().max() <= 0.5


@pytest.mark.parametrize("faint", [1e-2, 1e-4, 1e-8, 1e-21])
def test_errors_are_not_regressed_on_a_channel_that_is_nearly_nothing(faint):
    source = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=source)
    x[:, 3] = faint * x[:, 3].abs()
    # What is missing has nothing to do with the inputs.
    missing = 0.3 * torch.randn(400, 6, generator=source)
    statistic = PairedState(state(x), missing.T @ x)
    weight = torch.randn(8, 6, generator=source)
    moved = correction.corrected(weight, statistic, 1.0)
    assert torch.isfinite(moved).all()
    change = (moved - weight).abs()
    # A regression coefficient of noise on noise: 0.3 / sqrt(400), five of them in six channels, halved by the ridge;
    # on the faint channel at most the root mean square of the row.
    assert (change <= weight.square().mean(1, keepdim=True).sqrt() * (1 + 1e-6)).all()
    assert (change[:, [0, 1, 2, 4, 5]] <= 5 * 6 * 0.3 / 20 / 2 * weight.abs().amax(1, keepdim=True)).all()


@given(weight_schemes(), correlated_tokens(st.integers(1, 12), st.just(6)), st.integers(1, 3), seeds, st.booleans())
def test_weights_that_read_the_same_inputs_are_solved_together(scheme, x, number, seed, corrects):
    source = np.random.default_rng(seed)
    weights = [torch.from_numpy(source.normal(size=(n + 1, 6))) for n in range(number)]
    statistic = state(x)
    if corrects:
        missing = torch.from_numpy(source.normal(size=tuple(x.shape))) / 8
        statistic = PairedState(statistic, missing.T @ x)
    options, spec = gptq.Options(), LayerSpec(scheme)
    together = assert_pure(gptq.solve_together, spec, options, weights, statistic)
    assert len(together) == number
    for weight, found in zip(weights, together, strict=True):
        alone = gptq.solve(spec, options, weight, statistic)
        # Rows are independent, and numbers drawn from a continuum are on no tie.
        assert torch.equal(found.weight.codes, alone.weight.codes)
        assert found.weight.codes.untyped_storage().nbytes() == found.weight.codes.nbytes
        assert found.notes.keys() == alone.notes.keys()
        assert torch.equal(found.notes["kept_rounding"], alone.notes["kept_rounding"])
        # The corrected weight is moved by a solve of linear equations: only without one is it the same to the last bit.
        if not corrects:
            same_bits(found.weight.params, alone.weight.params)
            delta = numpy64(dequantize(found.weight) - weight)
            rounded = numpy64(dequantize(round_to_nearest(weight, scheme)) - weight)
            noise = total_noise(np.maximum(np.abs(delta), np.abs(rounded)), numpy64(statistic.total))
            assert abs(found.error.item() - alone.error.item()) <= noise
            assert abs(found.baseline_error.item() - alone.baseline_error.item()) <= noise
