import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from property_tests.laws import assert_pure, same_bits
from property_tests.oracles import members, numpy64
from property_tests.strategies import correlated_tokens, normal_matrices, weight_schemes
from quantize.core import QTensor, Scheme, affine, dequantize, metrics, ranges, refine, round_to_nearest

F64 = torch.float64
sizes = st.integers(1, 12)


def problem(data, c=sizes):
    weight = data.draw(normal_matrices(st.integers(1, 5), c, F64))
    x = data.draw(correlated_tokens(st.integers(1, 30), st.just(weight.shape[1])))
    return weight, x.T @ x


def row_losses(weight, q, gram):
    return metrics.row_error(dequantize(q) - weight, gram)


def noise(weight, gram):
    return 1e-12 * gram.diagonal().sum() * (1 + weight.square().sum())


@given(st.data(), weight_schemes(), st.sampled_from([1, 3, 128]))
def test_a_sweep_is_its_recursion(data, scheme, block_size):
    base = data.draw(normal_matrices(st.integers(1, 4), sizes, F64))
    n, c = base.shape
    reference = data.draw(normal_matrices(st.just(n), st.just(c), F64))
    coupling = data.draw(normal_matrices(st.just(c), st.just(c), F64))
    order = torch.tensor(data.draw(st.permutations(range(c))))
    params = round_to_nearest(base, scheme).params
    q = assert_pure(
        lambda *a: refine.sweep(*a, params, scheme, order, block_size=block_size), base, reference, coupling
    )
    where, scale = members(scheme, n, c), numpy64(params.scale)
    zero = np.zeros_like(scale) if params.zero_point is None else numpy64(params.zero_point)
    for i in range(n):
        steps = []
        for place, j in enumerate(order.tolist()):
            s, z = scale[where[i][j]], zero[where[i][j]]
            target = base[i, j].item() + sum(step * coupling[k, place].item() for k, step in enumerate(steps))
            code = np.clip(np.rint(target / s) + z, scheme.qmin, scheme.qmax)
            assert q.codes[i, j].item() == code
            steps.append(reference[i, j].item() - (code - z) * s)


@given(st.data(), weight_schemes())
def test_descent_raises_no_row(data, scheme):
    weight, gram = problem(data)
    q = round_to_nearest(weight, scheme)
    moved = assert_pure(refine.descend, weight, q, gram)
    assert (row_losses(weight, moved, gram) <= row_losses(weight, q, gram) + noise(weight, gram)).all()
    assert torch.equal(moved.scale, q.scale)


@given(st.data(), weight_schemes())
def test_descent_ends_where_no_single_code_can_move(data, scheme):
    weight, gram = problem(data, st.integers(1, 4))
    q = round_to_nearest(weight, scheme)
    for _ in range(60):
        q = refine.descend(weight, q, gram)
    losses = row_losses(weight, q, gram)
    for j in range(weight.shape[1]):
        for step in (-1, 1):
            codes = q.codes.clone()
            codes[:, j] = (codes[:, j] + step).clamp(scheme.qmin, scheme.qmax)
            other = row_losses(weight, QTensor(codes, *q.params, scheme), gram)
            assert (other >= losses - noise(weight, gram)).all()


@given(st.data(), weight_schemes())
def test_refitting_scales_raises_nothing(data, scheme):
    weight, gram = problem(data)
    q = round_to_nearest(weight, scheme)
    fitted = assert_pure(refine.refit, weight, q, gram)
    before, after = row_losses(weight, q, gram), row_losses(weight, fitted, gram)
    if scheme.strategy == "tensor":
        before, after = before.sum(), after.sum()
    assert (after <= before + noise(weight, gram)).all()
    assert torch.equal(fitted.codes, q.codes)
    assert (fitted.scale > 0).all()


@given(st.data())
def test_a_refitted_channel_is_the_least_squares_scale(data):
    weight = data.draw(normal_matrices(st.integers(1, 3), sizes, F64))
    x = data.draw(correlated_tokens(st.integers(1, 30), st.just(weight.shape[1])))
    q = round_to_nearest(weight, Scheme(4))
    fitted = refine.refit(weight, q, x.T @ x)
    for i in range(len(weight)):
        made, wanted = numpy64(x) @ numpy64(q.codes[i]), numpy64(x) @ numpy64(weight[i])
        power = made @ made
        if power > 1e-9 * (1 + wanted @ wanted):
            best = (made @ wanted) / power
            # The error at the least squares scale, unless that is not positive.
            if best > 0:
                expected = ((best * made - wanted) ** 2).sum()
                actual = ((fitted.scale[i].item() * made - wanted) ** 2).sum()
                assert actual == pytest.approx(expected, rel=1e-6, abs=1e-9 * (1 + wanted @ wanted))


@given(st.data(), weight_schemes())
def test_the_better_rows_are_at_least_as_good_as_both(data, scheme):
    weight, gram = problem(data)
    a = round_to_nearest(weight, scheme)
    b = affine.quantize(weight, a.params._replace(scale=a.scale * 0.8), scheme)
    chosen, taken, errors = assert_pure(refine.better_rows, weight, a, b, gram)
    assert torch.equal(errors[1], row_losses(weight, b, gram))
    losses = [row_losses(weight, q, gram) for q in (chosen, a, b)]
    if scheme.strategy == "tensor":
        losses = [loss.sum() for loss in losses]
    assert (losses[0] <= torch.minimum(losses[1], losses[2]) + noise(weight, gram)).all()
    assert torch.equal(chosen.codes, torch.where(taken[:, None], b.codes, a.codes))


@given(st.data(), weight_schemes())
def test_rows_are_searched_apart(data, scheme):
    x = data.draw(normal_matrices(st.integers(2, 7), st.integers(1, 9), F64))
    importance = torch.rand(x.shape[1], dtype=F64, generator=torch.Generator().manual_seed(0))
    whole = ranges.search(x, scheme, importance)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "_TOGETHER", 2 * x.shape[1])
        same_bits(ranges.search(x, scheme, importance), whole)


@given(st.data(), weight_schemes())
def test_a_searched_range_is_the_best_candidate_and_never_worse(data, scheme):
    weight = data.draw(normal_matrices(st.integers(1, 5), sizes, F64))
    importance = data.draw(normal_matrices(st.just(1), st.just(weight.shape[1]), F64))[0].abs()
    found = assert_pure(ranges.search, weight, scheme, importance)
    plain = round_to_nearest(weight, scheme).params
    errors = [ranges.weighted_error(weight, params, scheme, importance) for params in (found, plain)]
    assert (errors[0] <= errors[1]).all()
    where = members(scheme, *weight.shape)
    expected = np.zeros(tuple(plain.scale.shape))
    q = dequantize(affine.quantize(weight, found, scheme))
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            expected[where[i][j]] += importance[j].item() * (weight[i, j] - q[i, j]).item() ** 2
    np.testing.assert_allclose(numpy64(errors[0]), expected, rtol=1e-9, atol=1e-300)


def test_an_outlier_that_does_not_matter_is_clipped():
    weight = torch.tensor([[0.1, -0.2, 0.3, 8.0]])
    scheme = Scheme(4)
    found = ranges.search(weight, scheme, torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert found.scale.item() < round_to_nearest(weight, scheme).scale.item() / 2
    kept = ranges.search(weight, scheme, torch.ones(4))
    assert kept.scale.item() > found.scale.item()


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, float("inf"), float("nan")]), min_size=1, max_size=6))
def test_the_least_cost_wins_and_the_first_of_equals(costs):
    place = assert_pure(refine.least, torch.arange(len(costs)), torch.tensor(costs)).item()
    read = [float("inf") if cost != cost else cost for cost in costs]
    assert place == read.index(min(read))
