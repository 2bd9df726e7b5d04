"""Formats under a budget, against brute force over all assignments and against the continuous optimum."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from property_tests.laws import assert_pure
from property_tests.oracles import U64
from property_tests.strategies import seeds
from quantize.core import budget

INF = float("inf")


@st.composite
def tables(draw, whole=True):
    """Errors and sizes ``[l][f]``, and a limit that the smallest formats keep.

    ``whole`` errors are small integers, so that every sum, and every comparison of two quotients, is exact in float64.
    """
    layers, formats = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    one = st.integers(0, 12).map(float) if whole else st.floats(0, 1e6, allow_subnormal=False)
    errors = [[draw(one | st.just(INF)) for _ in range(formats)] for _ in range(layers)]
    sizes = [[draw(st.integers(0, 9)) for _ in range(formats)] for _ in range(layers)]
    assume(all(min(row) < INF for row in errors))
    pairs = [list(zip(*row, strict=True)) for row in zip(errors, sizes, strict=True)]
    least = sum(min(size for error, size in row if error < INF) for row in pairs)
    return errors, sizes, draw(st.integers(least, least + 20))


def assign(errors, sizes, limit):
    given_ = torch.tensor(errors, dtype=torch.float64), torch.tensor(sizes)
    return assert_pure(lambda *a: budget.assign(*a, limit), *given_)


def best(errors, sizes, limit):
    """The least sum of errors within the limit, by looking at every assignment."""
    found = INF
    for choice in itertools.product(range(len(errors[0])), repeat=len(errors)):
        if sum(row[f] for row, f in zip(sizes, choice, strict=True)) <= limit:
            found = min(found, sum(row[f] for row, f in zip(errors, choice, strict=True)))
    return found


def corners(errors, sizes):
    """The formats on the lower hull of one layer, by size, from the definition: for some price of size, the first best.

    A format is on the hull if it is the smallest one with the least ``error + price * size`` for some price above 0.
    Prices between the slopes of all pairs of formats, and beyond them, are all that need be tried.
    """
    points = sorted({(s, Fraction(e)) for e, s in zip(errors, sizes, strict=True) if e < INF})
    slopes = sorted({(a[1] - b[1]) / (b[0] - a[0]) for a, b in itertools.combinations(points, 2) if a[0] < b[0]})
    slopes = [Fraction(0), *(slope for slope in slopes if slope > 0)]
    prices = [(a + b) / 2 for a, b in itertools.pairwise(slopes)] + [slopes[-1] + 1]
    return sorted({min(points, key=lambda point: (point[1] + price * point[0], point[0])) for price in prices})


def steps(errors, sizes):
    """``(gain, size)`` of all steps between neighbours on the hulls, the largest gain per size first."""
    found = [
        (a[1] - b[1], b[0] - a[0])
        for row in zip(errors, sizes, strict=True)
        for a, b in itertools.pairwise(corners(*row))
    ]
    return sorted(found, key=lambda step: step[0] / step[1], reverse=True)


def continuous(errors, sizes, limit):
    """The least sum of errors where a layer may take parts of formats: steps in order, and a fraction of the last."""
    first = [corners(*row)[0] for row in zip(errors, sizes, strict=True)]
    total, left = sum(point[1] for point in first), limit - sum(point[0] for point in first)
    for gain, size in steps(errors, sizes):
        part = min(Fraction(left, size), Fraction(1))
        total, left = total - part * gain, left - part * size
    return total


def assert_between_the_bound_and_one_step_above_it(errors, sizes, limit):
    found, optimum = assign(errors, sizes, limit), best(errors, sizes, limit)
    choice = found.choice.tolist()
    assert found.choice.dtype == torch.int64
    assert sum(row[f] for row, f in zip(sizes, choice, strict=True)) <= limit
    assert found.error.item() == sum(row[f] for row, f in zip(errors, choice, strict=True)) < INF
    # Whole numbers, but for the fraction of one step: a quotient, a product and a difference are rounded.
    slack = 4 * U64 * sum(max(e for e in row if e < INF) for row in errors)
    assert abs(Fraction(found.bound.item()) - continuous(errors, sizes, limit)) <= slack
    assert found.bound.item() <= optimum + slack
    assert optimum <= found.error.item()
    assert found.error.item() <= found.bound.item() + max((float(gain) for gain, _ in steps(errors, sizes)), default=0)


@given(tables())
def test_the_sum_of_the_errors_is_near_the_bound(table):
    assert_between_the_bound_and_one_step_above_it(*table)


def test_many_tables_with_limits_that_matter():
    # Larger ones than those that hypothesis starts from: four layers, four formats, half of the sizes that are left.
    source, exact = np.random.default_rng(0), 0
    for _ in range(60):
        errors, sizes = source.integers(0, 30, (4, 4)).astype(float), source.integers(0, 10, (4, 4))
        limit = int(sizes.min(1).sum() + sizes.max(1).sum()) // 2
        assert_between_the_bound_and_one_step_above_it(errors.tolist(), sizes.tolist(), limit)
        exact += assign(errors.tolist(), sizes.tolist(), limit).error == best(errors.tolist(), sizes.tolist(), limit)
    # Not all of them are solved exactly, so that the bound and the step are tried.
    assert 30 < exact < 60


@given(tables(), st.integers(0, 12))
def test_a_limit_on_a_corner_is_met_by_the_optimum(table, place):
    errors, sizes, _ = table
    taken = steps(errors, sizes)[:place]
    # As many of the best steps as there are, and not a part of one: the continuous optimum is an assignment.
    limit = sum(corners(*row)[0][0] for row in zip(errors, sizes, strict=True)) + sum(size for _, size in taken)
    found = assign(errors, sizes, limit)
    assert found.error.item() == found.bound.item() == best(errors, sizes, limit) == continuous(errors, sizes, limit)


@given(tables(whole=False))
def test_errors_that_are_no_whole_numbers(table):
    errors, sizes, _ = table
    found, optimum = assign(*table), best(*table)
    # Sums over the layers and the steps, of which there are fewer than formats in all.
    slack = 2 * (sum(map(len, errors)) + 4) * U64 * sum(max(e for e in row if e < INF) for row in errors)
    assert found.bound.item() <= optimum + slack
    assert optimum <= found.error.item() + slack
    assert found.error.item() <= found.bound.item() + slack + max(
        (float(gain) for gain, _ in steps(errors, sizes)), default=0
    )


@given(st.integers(3, 6), seeds)
def test_gains_that_are_equal_but_for_rounding_lose_no_step(formats, seed):
    # Formats on one straight line: rounding makes the later of two equal gains per size the larger one at times.
    source = np.random.default_rng(seed)
    sizes = np.sort(source.choice(13, formats, replace=False)) + 1
    errors = source.random() * (15 - sizes)
    found = assign([errors.tolist()], [sizes.tolist()], int(sizes[-1]))
    assert found.error.item() == found.bound.item() == errors[-1]


def test_a_straight_line_that_rounding_bends():
    errors = [7.100862921723335, 4.733908614482224, 4.142170037671946, 3.5504314608616676, 2.95869288405139]
    found = assign([[*errors, 2.366954307241112]], [[3, 7, 8, 9, 10, 11]], 11)
    assert found.choice.tolist() == [5]
    assert found.bound == found.error == 2.366954307241112


def test_a_step_that_does_not_fit_makes_room_for_those_behind_it():
    # The step of the first layer gains most per size and does not fit; that of the second does.
    found = assign([[9.0, 0.0], [2.0, 0.0]], [[0, 4], [0, 3]], 3)
    assert found.choice.tolist() == [0, 1]
    assert found.error.item() == 9
    # Three quarters of the first step.
    assert found.bound.item() == 4.25


def test_no_layers_need_nothing():
    found = assign(torch.zeros(0, 3).tolist(), torch.zeros(0, 3, dtype=torch.int64).tolist(), 0)
    assert (found.choice.dtype, found.choice.numel(), found.error, found.bound) == (torch.int64, 0, 0, 0)


@given(tables(), st.integers(1, 30))
def test_what_cannot_be_met_is_refused(table, short):
    errors, sizes, _ = table
    least = sum(corners(*row)[0][0] for row in zip(errors, sizes, strict=True))
    with pytest.raises(ValueError, match=f"limit: {least - short}; accepted: at least {least}, the size of the small"):
        assign(errors, sizes, least - short)
    with pytest.raises(ValueError, match=f"layer {len(errors)} has none below inf; accepted: a format for every layer"):
        assign([*errors, [INF] * len(errors[0])], [*sizes, sizes[0]], 10**6)
