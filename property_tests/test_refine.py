from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from property_tests.laws import assert_pure, same_bits
from property_tests.oracles import U64, loss_noise, members, numpy64, row_losses, spread, total_noise, values64
from property_tests.strategies import correlated_tokens, normal_matrices, seeds, weight_schemes, whole_quantized
from quantize.core import QParams, QTensor, Scheme, quantize, refine, round_to_nearest

F64 = torch.float64
sizes = st.integers(1, 9)


def problem(data, c=sizes):
    weight = data.draw(normal_matrices(st.integers(1, 4), c, F64))
    x = data.draw(correlated_tokens(st.integers(1, 20), st.just(weight.shape[1])))
    return weight, x.T @ x


def losses(weight, q, gram):
    """Row by row, and their sum with strategy tensor; beside it the magnitudes of the change."""
    delta = values64(q) - numpy64(weight)
    rows = row_losses(delta, numpy64(gram))
    return (rows.sum() if q.scheme.strategy == "tensor" else rows), np.abs(delta)


def whole_problem(data):
    """Quarters as weights and whole numbers as tokens: every product and sum below is exact in float64."""
    n, c = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    source = np.random.default_rng(data.draw(seeds))
    weight, x = source.integers(-40, 41, (n, c)) / 4, source.integers(-2, 3, (data.draw(st.integers(1, 6)), c))
    return torch.from_numpy(weight), torch.from_numpy((x.T @ x).astype(float)), source


@given(st.data(), weight_schemes(), st.sampled_from([1, 7, 16, 17, 128]), st.sampled_from([torch.float32, F64]))
def test_a_sweep_is_its_recursion(data, scheme, block_size, dtype):
    # Eighths below 2^16, and steps that are powers of two: exact in any order of addition, ties included.
    n, c, source = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40)), np.random.default_rng(data.draw(seeds))
    base, reference = source.integers(-40, 41, (2, n, c)) / 4
    coupling = source.integers(-3, 4, (c, c)) / 2
    order = source.permutation(c)
    params = whole_quantized(source, n, c, scheme).params
    params = params._replace(scale=params.scale.to(dtype))
    q = assert_pure(
        lambda *a: refine.sweep(*a, params, scheme, torch.from_numpy(order), block_size=block_size),
        *(torch.from_numpy(m).to(dtype) for m in (base, reference, coupling)),
    )
    scale, zero = spread(q)
    steps = np.zeros((n, 0))
    for place, j in enumerate(order):
        target = base[:, j] + steps @ coupling[:place, place]
        # numpy rounds ties to even.
        codes = np.clip(np.rint(target / scale[:, j]) + zero[:, j], scheme.qmin, scheme.qmax)
        assert q.codes[:, j].tolist() == codes.tolist()
        steps = np.column_stack([steps, reference[:, j] - (codes - zero[:, j]) * scale[:, j]])
    same_bits(q.params, params)


@given(st.data(), weight_schemes(), st.sampled_from([1, 7, 16, 17, 128]), st.integers(1, 3))
def test_a_stack_is_swept_as_each_of_its_matrices(data, scheme, block_size, e):
    # Exact as above, so that the order of additions cannot be told: the same bits.
    n, c, source = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40)), np.random.default_rng(data.draw(seeds))
    base, reference = (torch.from_numpy(source.integers(-40, 41, (e, n, c)) / 4) for _ in range(2))
    coupling = torch.from_numpy(source.integers(-3, 4, (e, c, c)) / 2)
    order = torch.from_numpy(np.stack([source.permutation(c) for _ in range(e)]))
    alone = [whole_quantized(source, n, c, scheme).params for _ in range(e)]
    params = QParams(*(torch.stack(each) for each in zip(*alone, strict=True) if each[0] is not None))
    q = refine.sweep(base, reference, coupling, params, scheme, order, block_size=block_size)
    for i in range(e):
        each = base[i], reference[i], coupling[i], alone[i], scheme, order[i]
        same_bits(q.codes[i], refine.sweep(*each, block_size=block_size).codes)


@given(st.data(), weight_schemes())
def test_a_round_of_descent_is_its_loop(data, scheme):
    # Signs as tokens, times powers of two: the diagonal is a power of two, so that all is exact. Some channels are
    # dead. No move raises the loss, so that the guard has nothing to give back.
    n, c, source = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6)), np.random.default_rng(data.draw(seeds))
    x = source.choice([-1.0, 1.0], (16, c)) * source.choice([0.0, 1.0, 2.0], c)
    gram, weight = x.T @ x, source.integers(-40, 41, (n, c)) / 4
    q = whole_quantized(source, n, c, scheme)
    moved = assert_pure(refine.descend, torch.from_numpy(weight), q, torch.from_numpy(gram))
    scale, zero = spread(q)
    codes = numpy64(q.codes).copy()
    for i in range(n):
        for j in np.flatnonzero(gram.diagonal()):
            pull = ((codes[i] - zero[i]) * scale[i] - weight[i]) @ gram[j]
            best = (codes[i, j] - zero[i, j]) - pull / gram[j, j] / scale[i, j]
            codes[i, j] = np.clip(np.rint(best) + zero[i, j], scheme.qmin, scheme.qmax)
    assert np.array_equal(numpy64(moved.codes), codes)
    same_bits(moved.params, q.params)


@given(st.data(), weight_schemes())
def test_descent_raises_no_row(data, scheme):
    weight, gram = problem(data)
    q = round_to_nearest(weight, scheme)
    moved = refine.descend(weight, q, gram)
    before, after = (values64(each) - numpy64(weight) for each in (q, moved))
    noise = loss_noise(np.maximum(np.abs(before), np.abs(after)), numpy64(gram))
    assert (row_losses(after, numpy64(gram)) <= row_losses(before, numpy64(gram)) + noise).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_channel_of_vanishing_power_spoils_no_row(symmetric):
    # A subnormal number on the diagonal has no finite reciprocal: what the loop makes of that must not be kept.
    source = np.random.default_rng(0)
    # What the channels have in common makes codes move.
    x, weight = source.normal(size=(40, 6)) + 3 * source.normal(size=(40, 1)), source.normal(size=(4, 6))
    x[:, 2] *= 1e-158
    gram = x.T @ x
    q = round_to_nearest(torch.from_numpy(weight), Scheme(4, symmetric))
    moved = refine.descend(torch.from_numpy(weight), q, torch.from_numpy(gram))
    before, after = (values64(each) - weight for each in (q, moved))
    noise = loss_noise(np.maximum(np.abs(before), np.abs(after)), gram)
    assert (row_losses(after, gram) <= row_losses(before, gram) + noise).all()
    # The others move as they do without it: what it adds to their sums is below any rounding.
    gram[2], gram[:, 2] = 0, 0
    assert torch.equal(moved.codes, refine.descend(torch.from_numpy(weight), q, torch.from_numpy(gram)).codes)
    assert not torch.equal(moved.codes, q.codes)


def test_a_row_without_a_loss_is_not_kept():
    # The products overflow to inf - inf for the first weight, and to nothing for the second.
    weight, gram = torch.zeros(1, 2), torch.tensor([[3e38, -3e38], [-3e38, 3e38]])
    far, exact = (QTensor(torch.tensor([[k, k]], dtype=torch.int8), torch.ones(1, 1), None, Scheme()) for k in (9, 0))
    chosen, taken, errors = refine.better_rows(weight, far, exact, gram)
    assert errors[0].isnan().all()
    assert taken.all()
    assert not chosen.codes.any()


@given(st.data(), weight_schemes())
def test_descent_ends_where_no_single_code_can_move(data, scheme):
    weight, gram = problem(data, st.integers(1, 4))
    q, last = round_to_nearest(weight, scheme), None
    # Every round lowers the loss of a row or leaves its codes, and there are finitely many codes.
    while last is None or not torch.equal(q.codes, last):
        q, last = refine.descend(weight, q, gram), q.codes
    here = values64(q) - numpy64(weight)
    for j in range(weight.shape[1]):
        for step in (-1, 1):
            codes = q.codes.clone()
            codes[:, j] = (codes[:, j] + step).clamp(scheme.qmin, scheme.qmax)
            other = values64(QTensor(codes, *q.params, scheme)) - numpy64(weight)
            noise = loss_noise(np.maximum(np.abs(here), np.abs(other)), numpy64(gram))
            assert (row_losses(other, numpy64(gram)) >= row_losses(here, numpy64(gram)) - noise).all()


@given(st.data(), weight_schemes(), st.booleans())
def test_refitting_scales_raises_nothing(data, scheme, mirrored):
    weight, gram = problem(data)
    mirrored = mirrored and scheme.symmetric
    q = round_to_nearest(weight, scheme)
    # Mirrored, a scale is negative, and stays so.
    q = quantize(weight, QParams(-q.scale), scheme) if mirrored else q
    fitted = assert_pure(refine.refit, weight, q, gram)
    (before, old), (after, new) = losses(weight, q, gram), losses(weight, fitted, gram)
    noise = (total_noise if scheme.strategy == "tensor" else loss_noise)(np.maximum(old, new), numpy64(gram))
    assert np.all(after <= before + noise)
    assert torch.equal(fitted.codes, q.codes)
    assert (fitted.scale * q.scale > 0).all()


@given(st.data(), weight_schemes())
def test_a_refitted_scale_is_the_least_squares_scale(data, scheme):
    weight, gram, source = whole_problem(data)
    n, c = weight.shape
    scheme = Scheme(4, scheme.symmetric, scheme.strategy, scheme.group_size)
    q = whole_quantized(source, n, c, scheme)
    fitted = refine.refit(weight, q, gram)
    exact = [[Fraction(value) for value in row] for row in numpy64(gram).tolist()]
    old, zero = spread(q)
    codes, scale, w = numpy64(q.codes) - zero, old.copy(), numpy64(weight)
    where = members(scheme, n, c)
    for group in sorted({pair for row in where for pair in row}):
        inside = [(i, j) for i in range(n) for j in range(c) if where[i][j] == group]
        # In exact rationals, with the new scales of the groups before: the slope and the curvature of the parabola.
        # Beside them, the sum of the magnitudes in the slope.
        slope = curve = Fraction(0)
        size = 0.0
        for i, j in inside:
            k = Fraction(codes[i, j])
            values = [Fraction(codes[i, m]) * Fraction(scale[i, m]) - Fraction(w[i, m]) for m in range(c)]
            slope += k * sum(value * exact[j][m] for m, value in enumerate(values))
            curve += k * sum(Fraction(codes[i, m]) * exact[j][m] for m in range(c) if where[i][m] == group)
            size += sum(
                abs(codes[i, j] * codes[i, m] * gram[j, m]) * max(abs(scale[i, m]), abs(old[i, m])) for m in range(c)
            )
            size += sum(abs(codes[i, j] * w[i, m] * gram[j, m]) for m in range(c))
        new = fitted.scale[group].item()
        if curve == 0:
            best, bound = old[inside[0]], 0.0
        else:
            best = Fraction(old[inside[0]]) - slope / curve
            # Every group before added a product of c terms to the slope; then a quotient and a difference are rounded.
            bound = 2 * (group[1] * (c + 4) + n * c) * U64 * size.item() / float(curve) + 2 * U64 * abs(float(best))
            bound += 2 * U64 * abs(float(slope / curve))
            # What would change its sign stays.
            best = best if best * Fraction(old[inside[0]]) > 0 else Fraction(old[inside[0]])
        assert abs(Fraction(new) - Fraction(best)) <= bound
        for i, j in inside:
            scale[i, j] = new


@given(st.data(), weight_schemes(), st.booleans())
def test_the_better_rows_are_chosen_exactly(data, scheme, shared):
    weight, gram, source = whole_problem(data)
    a, b = (whole_quantized(source, *weight.shape, scheme) for _ in range(2))
    # Equal rows, to see which of equals wins, and one scale for both, with which rows are apart in every strategy.
    same = torch.from_numpy(source.random(len(weight)) < 0.3)[:, None]
    # An equal copy is as good as the same tensor.
    params = [None if tensor is None else tensor.clone() for tensor in a.params]
    b = QTensor(torch.where(same, a.codes, b.codes), *(params if shared else b.params), scheme)
    chosen, taken, errors = assert_pure(refine.better_rows, weight, a, b, gram)
    rows = [row_losses(values64(q) - numpy64(weight), numpy64(gram)) for q in (a, b)]
    assert errors.tolist() == [each.tolist() for each in rows]
    alike = torch.equal(a.scale, b.scale) and (a.zero_point is None or torch.equal(a.zero_point, b.zero_point))
    if scheme.strategy == "tensor" and not alike:
        rows = [np.full(len(weight), each.sum()) for each in rows]
    expected = rows[1] < rows[0]
    assert taken.tolist() == expected.tolist()
    for i, second in enumerate(expected):
        mine, other = values64(chosen)[i], values64(b if second else a)[i]
        assert mine.tolist() == other.tolist()
        assert torch.equal(chosen.codes[i], (b if second else a).codes[i])


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, float("inf"), float("nan")]), min_size=1, max_size=6))
def test_the_least_cost_wins_and_the_first_of_equals(costs):
    place = assert_pure(refine.least, torch.arange(len(costs)), torch.tensor(costs)).item()
    read = [float("inf") if cost != cost else cost for cost in costs]
    assert place == read.index(min(read))
