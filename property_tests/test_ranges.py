"""The search of ranges against its list of candidates, spelled out with loops in float64."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from property_tests.laws import assert_pure, same_bits
from property_tests.oracles import U64, members, numpy64, values64
from property_tests.strategies import normal_matrices, seeds, weight_schemes
from quantize.core import QParams, Scheme, affine, dequantize, quantize, ranges

F64 = torch.float64
every_width = weight_schemes(bits=(2, 3, 4, 8))


class Candidate(NamedTuple):
    """One way to round a group: its error and scale, and how far off float64 may be in each."""

    error: float
    scale: float
    zero: int
    noise: float
    spread: float


def tried(x, importance, scale, zero, scheme, fit):
    """Round the numbers ``x`` of one group, and move the scale to the best one for these codes.

    1. The scale is three rounded operations, so a change ``e = x - k s`` is off by 5 roundings of ``|x| + |e|``. Sums
       of ``m`` products add ``m + 2`` more, and what the fit takes off is a quotient of such sums, at most the error.
       Below, ``r = 8 (m + 8)`` roundings cover all of these, for both sides.
    2. By Cauchy and Schwarz an error ``E = sum i e^2`` is then off by at most ``r sqrt(E S) + r^2 S`` with
       ``S = sum i (|x| + |e|)^2``, and the scale by ``r`` times itself and times ``sum i |e k| / sum i k^2``.
    """
    codes = np.clip(np.rint(x / scale) + zero, scheme.qmin, scheme.qmax) - zero
    e = x - codes * scale
    error, size = sum(importance * e**2), sum(importance * (np.abs(x) + np.abs(e)) ** 2)
    r = 8 * (len(x) + 8) * U64
    noise, spread = r * (error * size) ** 0.5 + r**2 * size, r * abs(scale)
    pull, curve = sum(importance * e * codes), sum(importance * codes**2)
    if fit and curve > 0:
        spread += r * sum(importance * np.abs(e * codes)) / curve
        # A scale that would lose half of itself, or its sign, stays.
        if (scale + pull / curve) / scale > 0.5:
            error, scale = max(error - pull**2 / curve, 0.0), scale + pull / curve
    return Candidate(error, scale, zero, noise, spread)


def candidates(x, importance, scheme, steps, smallest, signed):
    """The full range as it is, and then every range of the list, with all that is tried for it."""
    lowest, highest = scheme.qmin, scheme.qmax
    found = []
    for share in [None, *(1 - (1 - smallest) * i / max(steps - 1, 1) for i in range(steps))]:
        low, high = ((share or 1.0) * end for end in (min(0.0, *x), max(0.0, *x)))
        if low == high == 0:
            scale, zeros = 1.0, [0 if scheme.symmetric else lowest]
        elif scheme.symmetric and -low > high:
            scale, zeros = low / lowest, [0]
        elif scheme.symmetric:
            # The upper tail is the longer one: with a sign it reaches the lowest code.
            scale, zeros = high / (lowest if signed and share else highest), [0]
        else:
            scale = (high - low) / (highest - lowest)
            exact = lowest - low / scale
            zeros = sorted({int(np.floor(exact)), int(np.ceil(exact))}) if share else [int(np.rint(exact))]
        found += [tried(x, importance, scale, min(max(z, lowest), highest), scheme, share is not None) for z in zeros]
    return found


def groups(weight, importance, scheme):
    """The members of every group and their importances: ``{index of the scale: ([k], [k])}``."""
    found = {}
    for i, row in enumerate(members(scheme, *weight.shape)):
        for j, group in enumerate(row):
            pair = found.setdefault(group, ([], []))
            pair[0].append(weight[i, j].item())
            pair[1].append(importance[j].item())
    return {group: (np.array(x), np.array(i)) for group, (x, i) in found.items()}


def problem(data):
    weight = data.draw(normal_matrices(st.integers(1, 4), st.integers(1, 9), F64))
    importance = data.draw(normal_matrices(st.just(1), st.just(weight.shape[1]), F64))[0].abs()
    # Where nothing matters all candidates are equal.
    importance[: data.draw(st.sampled_from([0, 0, 3]))] = 0
    return weight, importance


# Few candidates that are near to each other, so that several beat the full range, beside those of the default.
@given(st.data(), every_width, st.sampled_from([0, 1, 2, 5, 20]), st.sampled_from([0.4, 0.9]), st.booleans())
def test_the_search_takes_the_best_of_its_candidates(data, scheme, steps, smallest, signed):
    weight, importance = problem(data)
    found = assert_pure(
        lambda *a: ranges.search(*a, steps=steps, smallest=smallest, signed=signed), weight, scheme, importance
    )
    full = affine.qparams(*affine.group_ranges(weight, scheme), scheme)
    errors = ranges.weighted_error(weight, found, scheme, importance)
    for group, (x, weights) in groups(weight, importance, scheme).items():
        listed = candidates(x, weights, scheme, steps, smallest, signed)
        scale = found.scale[group].item()
        zero = 0 if scheme.symmetric else found.zero_point[group].item()
        same = [k for k, each in enumerate(listed) if each.zero == zero and abs(each.scale - scale) <= each.spread]
        assert same
        least = min(each.error + each.noise for each in listed)
        assert min(listed[k].error - listed[k].noise for k in same) <= least
        # Kept as it is, the full range is not fitted; it wins where nothing is better.
        if all(listed[0].error + listed[0].noise < each.error - each.noise for each in listed[1:]):
            assert scale == full.scale[group].item()
        if not weights.any():
            assert scale == full.scale[group].item()
            assert scheme.symmetric or zero == full.zero_point[group].item()
        # What was found, used as any other scale: nearest codes are no worse than those that it was fitted to.
        again = tried(x, weights, scale, zero, scheme, fit=False)
        assert again.error <= least + max(listed[k].noise for k in same) + again.noise
        assert abs(errors[group].item() - again.error) <= again.noise


@given(st.data(), every_width, st.booleans())
def test_no_group_is_above_plain_rounding(data, scheme, signed):
    weight, importance = problem(data)
    full = affine.qparams(*affine.group_ranges(weight, scheme), scheme)
    found = ranges.search(weight, scheme, importance, signed=signed)
    costs = [np.zeros(tuple(full.scale.shape)) for _ in range(3)]
    where, i = members(scheme, *weight.shape), numpy64(importance)
    deltas = [np.abs(values64(quantize(weight, params, scheme)) - numpy64(weight)) for params in (found, full)]
    for row, columns in enumerate(where):
        for j, group in enumerate(columns):
            costs[0][group] += i[j] * deltas[0][row, j] ** 2
            costs[1][group] += i[j] * deltas[1][row, j] ** 2
            costs[2][group] += i[j] * (abs(weight[row, j].item()) + max(delta[row, j] for delta in deltas)) ** 2
    # The bound of `tried`, with the sum over the sizes alone, which no error exceeds.
    assert (costs[0] <= costs[1] + 2 * 8 * (weight.numel() + 8) * U64 * costs[2]).all()


@given(st.integers(1, 3), st.integers(2, 5), st.integers(1, 3), every_width, seeds, st.booleans(), st.integers(-3, 3))
def test_weights_on_the_grid_come_back(n, size, g, scheme, seed, ends, exponent):
    # Every group reaches both ends of its grid, and its step is a power of two: the full range gives exactly that step.
    # Weights that are at the ends only are on the grid of many a candidate, but for rounding.
    source = np.random.default_rng(seed)
    scheme = Scheme(scheme.bits, scheme.symmetric, scheme.strategy, size if scheme.group_size else None)
    codes = source.integers(scheme.qmin, scheme.qmax + 1, (n, size * g))
    if ends:
        codes = source.choice([scheme.qmin, scheme.qmax], codes.shape)
    codes[:, ::size], codes[:, 1::size] = scheme.qmin, scheme.qmax
    zero = 0 if scheme.symmetric else int(source.integers(scheme.qmin, scheme.qmax + 1))
    for dtype in (torch.float32, F64):
        weight = torch.from_numpy((codes - zero) * 2.0**exponent).to(dtype)
        importance = torch.from_numpy(source.random(size * g)).to(dtype)
        for signed in (False, True):
            found = ranges.search(weight, scheme, importance, signed=signed)
            same_bits(found, affine.qparams(*affine.group_ranges(weight, scheme), scheme))
            assert torch.equal(dequantize(quantize(weight, found, scheme)), weight)


@given(st.integers(1, 3), st.integers(2, 5), st.integers(1, 3), every_width, seeds, st.integers(-3, 3))
def test_with_a_sign_the_longer_tail_reaches_the_lowest_code(n, size, g, scheme, seed, exponent):
    # The grid upside down: the upper tail is one code longer than a positive scale has codes for it. The number one
    # step above 0 is on no grid that ends with one code less.
    source = np.random.default_rng(seed)
    scheme = Scheme(scheme.bits, True, scheme.strategy, size if scheme.group_size else None)
    codes = source.integers(scheme.qmin, scheme.qmax + 1, (n, size * g))
    codes[:, ::size], codes[:, 1::size] = scheme.qmin, -1
    weight = torch.from_numpy(codes * -(2.0**exponent))
    importance = torch.from_numpy(source.random(size * g) + 0.5)
    found = ranges.search(weight, scheme, importance, signed=True)
    assert (found.scale == -(2.0**exponent)).all()
    q = quantize(weight, found, scheme)
    assert np.array_equal(q.codes.numpy(), codes)
    # Without one, scales are positive, and the error is not 0 anywhere.
    plain = ranges.search(weight, scheme, importance)
    assert (plain.scale > 0).all()
    assert (ranges.weighted_error(weight, plain, scheme, importance) > 0).all()
    # The other way round a negative scale has no use.
    assert (ranges.search(-weight, scheme, importance, signed=True).scale == 2.0**exponent).all()


def test_the_zero_point_is_not_always_the_nearest_one():
    scheme, source = Scheme(4, False), np.random.default_rng(0)
    weight, importance = source.normal(size=(60, 8)), source.random(8)
    found = ranges.search(torch.from_numpy(weight), scheme, torch.from_numpy(importance), steps=4)
    others = 0
    for i, row in enumerate(weight):
        # The same list, and those of it whose zero point is the nearest to the exact one of its range.
        listed = candidates(row, importance, scheme, 4, 0.4, signed=False)
        exact = -8 - min(0.0, *row) * 15 / (max(0.0, *row) - min(0.0, *row))
        best, nearest = (min(some, key=lambda each: each.error) for some in (
            listed, [each for each in listed if each.zero == np.rint(exact)]))  # fmt: skip
        assert found.zero_point[i].item() == best.zero
        assert abs(found.scale[i].item() - best.scale) <= best.spread
        others += best.error + best.noise < nearest.error - nearest.noise
    # Drawn from a continuum, about half of the rows.
    assert others > 10


@given(st.data(), every_width, st.booleans())
def test_rows_are_searched_apart(data, scheme, signed):
    x = data.draw(normal_matrices(st.integers(2, 5), st.integers(1, 6), F64))
    importance = torch.rand(x.shape[1], dtype=F64, generator=torch.Generator().manual_seed(0))
    whole = ranges.search(x, scheme, importance, steps=6, signed=signed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "_MOST_ELEMENTS", 2 * x.shape[1])
        same_bits(ranges.search(x, scheme, importance, steps=6, signed=signed), whole)


@given(st.integers(1, 3), every_width, seeds, st.booleans())
def test_a_stack_is_searched_as_each_of_its_matrices(e, scheme, seed, signed):
    source = torch.Generator().manual_seed(seed)
    stack, importance = (torch.randn(e, *shape, generator=source, dtype=F64) for shape in ((3, 8), (8,)))
    importance = importance.abs()

    def search(weight, its):
        found = ranges.search(weight, scheme, its, steps=6, signed=signed)
        return tuple(each for each in found if each is not None)

    together = ranges.search(stack, scheme, importance, steps=6, signed=signed)
    mapped = torch.func.vmap(search)(stack, importance)
    for k in range(e):
        alone = search(stack[k], importance[k])
        same_bits(tuple(each[k] for each in together if each is not None), alone)
        same_bits(tuple(each[k] for each in mapped[1:]), alone[1:])
        # A map may add in another order. Candidates with the same codes are then one, but for rounding: the bounds of
        # `tried`, for the scale of the codes that were chosen.
        params = QParams(*alone)
        for group, (x, weights) in groups(stack[k], importance[k], scheme).items():
            zero = 0 if scheme.symmetric else params.zero_point[group].item()
            spread = tried(x, weights, params.scale[group].item(), zero, scheme, fit=True).spread
            assert abs(mapped[0][k][group].item() - params.scale[group].item()) <= spread


def test_an_outlier_that_does_not_matter_is_clipped():
    weight = torch.tensor([[0.1, -0.2, 0.3, 8.0]])
    scheme = Scheme(4)
    found = ranges.search(weight, scheme, torch.tensor([1.0, 1.0, 1.0, 0.0]))
    # The smallest range is 0.4 of the whole, with a step of 0.457: 0.3 is the code 1, all the rest is 0. The fitted
    # scale meets it, but for a quotient and a sum that are rounded.
    assert found.scale.item() == pytest.approx(0.3, rel=4 * 2.0**-24, abs=0)
    kept = ranges.search(weight, scheme, torch.ones(4))
    assert kept.scale.item() > 2 * found.scale.item()


@pytest.mark.parametrize("signed", [False, True])
def test_ranges_without_numbers_and_without_bounds(signed):
    zero = ranges.search(torch.zeros(2, 3), Scheme(4), torch.ones(3), signed=signed)
    assert (zero.scale == 1).all()
    # The squares overflow: nothing is better than the full range.
    huge = torch.tensor([[3e38, 1e38, -2e38]])
    found = ranges.search(huge, Scheme(4), torch.ones(3), signed=signed)
    same_bits(found, affine.qparams(*affine.group_ranges(huge, Scheme(4)), Scheme(4)))
