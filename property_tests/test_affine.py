from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from property_tests.laws import assert_pure, same_bits
from property_tests.oracles import exact_ranges, exact_scale, half_even, members
from property_tests.strategies import matrices, normal_matrices, seeds, sizes, weight_schemes, whole_quantized
from quantize.core import (
    QParams,
    Scheme,
    dequantize,
    fake_quantize,
    from_groups,
    group_ranges,
    qparams,
    quantize,
    round_to_nearest,
    to_groups,
)

# Unit roundoffs: the largest relative error of one operation.
U, V = Fraction(1, 2**24), Fraction(1, 2**53)
TINY = Fraction(torch.finfo(torch.float32).tiny)


def assert_scale(scale, low, high, scheme, u):
    """``scale`` is the rule of the format, but for the roundings of its own formula."""
    exact = max(exact_scale(low, high, scheme.bits, scheme.symmetric), TINY)
    # Symmetric: one rounded division. Asymmetric: a rounded difference before it, of two halves, each of which may be
    # off by half of the smallest subnormal number, 2^-150 in float32.
    halves = 0 if scheme.symmetric else Fraction(2, 2**150) / ((2**scheme.bits - 1) / Fraction(2))
    bound = (1 + u) ** (1 if scheme.symmetric else 2)
    assert abs(Fraction(scale) - exact) <= exact * (bound - 1) + halves * bound


@given(matrices(), weight_schemes())
def test_grouping_loses_nothing_and_fills_with_zeros(x, scheme):
    groups = assert_pure(to_groups, x, scheme)
    assert groups.shape[:2] == scheme.grid_shape(*x.shape)
    same_bits(from_groups(groups, scheme, tuple(x.shape)), x)
    assert groups.count_nonzero() == x.count_nonzero()
    assert groups.numel() - x.numel() == (-x.shape[1] % (scheme.group_size or 1)) * x.shape[0]


@given(matrices(), weight_schemes())
def test_ranges_are_exact(x, scheme):
    low, high = assert_pure(group_ranges, x, scheme)
    for (i, j), (expected_low, expected_high) in exact_ranges(x, scheme).items():
        assert Fraction(low[i, j].item()) == expected_low
        assert Fraction(high[i, j].item()) == expected_high


@given(matrices(), weight_schemes())
def test_scale_is_the_rule_of_the_format(x, scheme):
    params = assert_pure(qparams, *group_ranges(x, scheme), scheme)
    assert params.scale.dtype == torch.float32
    assert (params.zero_point is None) == scheme.symmetric
    for (i, j), (low, high) in exact_ranges(x, scheme).items():
        assert_scale(params.scale[i, j].item(), low, high, scheme, U)
        if not scheme.symmetric:
            position = scheme.qmin - low / Fraction(params.scale[i, j].item())
            # A rounded quotient and a rounded sum, both below 256.
            assert abs(params.zero_point[i, j].item() - position) <= Fraction(1, 2) + 2 * 256 * U


@given(matrices(), weight_schemes())
def test_error_is_at_most_half_a_step_where_nothing_clips(x, scheme):
    q = assert_pure(round_to_nearest, x, scheme)
    assert q.codes.dtype == torch.int8
    where = members(scheme, *x.shape)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            group = where[i][j]
            scale = Fraction(q.scale[group].item())
            zero = 0 if q.zero_point is None else q.zero_point[group].item()
            code = q.codes[i, j].item()
            assert scheme.qmin <= code <= scheme.qmax
            exact = Fraction(x[i, j].item()) / scale
            unclipped = half_even(exact) + zero
            # The float32 quotient is off by U relatively, so the code is within half a step and that much.
            slack = Fraction(1, 2) + abs(exact) * U
            if scheme.qmin <= unclipped <= scheme.qmax:
                assert abs(code - zero - exact) <= slack
            else:
                assert code == (scheme.qmin if unclipped < scheme.qmin else scheme.qmax)
                # The ranges put the clipped value at most one code outside of the grid.
                assert abs(code - zero - exact) <= 1 + slack


@given(sizes, sizes, weight_schemes(), seeds)
def test_ties_go_to_the_even_code(n, c, scheme, seed):
    # Quarters of a step that is a power of two: every quotient is exact, and one in four is a tie.
    source = np.random.default_rng(seed)
    params, where = whole_quantized(source, n, c, scheme).params, members(scheme, n, c)
    quarters = source.integers(4 * scheme.qmin - 8, 4 * scheme.qmax + 9, (n, c))
    x = torch.from_numpy(quarters / 4) * torch.tensor([[params.scale[g].item() for g in row] for row in where])
    codes = assert_pure(quantize, x.double(), params, scheme).codes
    for i in range(n):
        for j in range(c):
            zero = 0 if params.zero_point is None else params.zero_point[where[i][j]].item()
            rounded = half_even(Fraction(int(quarters[i, j]), 4)) + zero
            assert codes[i, j].item() == min(max(rounded, scheme.qmin), scheme.qmax)


@given(matrices(), weight_schemes())
def test_dequantize_multiplies_the_codes(x, scheme):
    q = round_to_nearest(x, scheme)
    y = assert_pure(dequantize, q)
    where = members(scheme, *x.shape)
    codes, scale = q.codes.numpy().astype(np.float32), q.scale.numpy()
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            zero = 0 if q.zero_point is None else q.zero_point[where[i][j]].item()
            assert y[i, j].item() == (codes[i, j] - np.float32(zero)) * scale[where[i][j]]


@given(matrices(), weight_schemes())
def test_fake_quantize_is_the_round_trip(x, scheme):
    params = round_to_nearest(x, scheme).params
    same_bits(assert_pure(fake_quantize, x, params, scheme), dequantize(quantize(x, params, scheme)))


@given(matrices(), weight_schemes())
def test_quantizing_again_changes_nothing(x, scheme):
    q = round_to_nearest(x, scheme)
    same_bits(quantize(dequantize(q), q.params, scheme), q)


@given(matrices(), weight_schemes())
def test_zero_is_exact(x, scheme):
    params = round_to_nearest(x, scheme).params
    assert not dequantize(quantize(torch.zeros_like(x), params, scheme)).any()


@given(matrices(bound=2.0**60), weight_schemes(), st.integers(-20, 20))
def test_scaling_by_a_power_of_two_is_exact(x, scheme, exponent):
    # Away from the subnormal numbers multiplying by a power of two commutes with every rounding.
    x = torch.where(x.abs() < 2.0**-60, 0.0, x)
    q, scaled = round_to_nearest(x, scheme), round_to_nearest(x * 2.0**exponent, scheme)
    assert torch.equal(q.codes, scaled.codes)
    alive = (to_groups(x, scheme) != 0).any(-1)
    assert torch.equal(torch.where(alive, q.scale * 2.0**exponent, 1.0), scaled.scale)


@given(matrices(), st.integers(1, 7), st.sampled_from([4, 8]), st.booleans())
def test_a_ragged_last_group_is_its_slice_alone(x, size, bits, symmetric):
    q = round_to_nearest(x, Scheme(bits, symmetric, "group", size))
    for group, start in enumerate(range(0, x.shape[1], size)):
        alone = round_to_nearest(x[:, start : start + size], Scheme(bits, symmetric, "channel"))
        assert torch.equal(q.codes[:, start : start + size], alone.codes)
        assert torch.equal(q.scale[:, group : group + 1], alone.scale)
        if q.zero_point is not None:
            assert torch.equal(q.zero_point[:, group : group + 1], alone.zero_point)


@given(matrices(bound=60000.0, dtype=np.float16), weight_schemes(), st.sampled_from([torch.float16, torch.bfloat16]))
def test_half_precision_is_quantized_as_the_float32_of_the_same_value(x, scheme, dtype):
    x = x.to(dtype)
    same_bits(round_to_nearest(x, scheme), round_to_nearest(x.float(), scheme))


@given(normal_matrices(sizes, sizes, torch.float64), weight_schemes())
def test_float64_keeps_its_precision(x, scheme):
    q = round_to_nearest(x, scheme)
    assert q.scale.dtype == torch.float64
    for (i, j), (low, high) in exact_ranges(x, scheme).items():
        assert_scale(q.scale[i, j].item(), low, high, scheme, V)


def test_tiny_rows_are_not_zeroed():
    x = torch.tensor([[1e-9, -2e-9], [1e-40, -1e-40]])
    q = round_to_nearest(x, Scheme(bits=8))
    assert q.codes[0].tolist() == [64, -128]
    # A row below the smallest normal number has no scale of its own, and nothing is divided by zero.
    assert q.scale[1].item() == torch.finfo(torch.float32).tiny
    assert torch.isfinite(dequantize(q)).all()


def test_the_widest_range_does_not_overflow():
    largest = torch.finfo(torch.float32).max
    q = round_to_nearest(torch.tensor([[-largest, largest]]), Scheme(bits=8, symmetric=False))
    assert torch.isfinite(q.scale).all()
    assert q.codes.tolist() == [[-128, 127]]


@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
def test_an_empty_matrix_has_unit_scales(strategy):
    scheme = Scheme(strategy=strategy, group_size=4 if strategy == "group" else None)
    q = round_to_nearest(torch.zeros(0, 8), scheme)
    assert q.codes.shape == (0, 8)
    assert q.scale.shape == scheme.grid_shape(0, 8)
    assert (q.scale == 1).all()


def test_infinities_clip():
    q = quantize(torch.tensor([[torch.inf, -torch.inf]]), QParams(torch.tensor([[0.5]])), Scheme(bits=4))
    assert q.codes.tolist() == [[7, -8]]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"bits": 9}, "bits: 9; accepted: an int from 2 to 8"),
        ({"bits": "8"}, "bits: '8'; accepted: an int from 2 to 8"),
        ({"strategy": "group", "group_size": 32.0}, "group_size: 32.0; accepted: a positive int"),
        ({"strategy": "row"}, "strategy: 'row'; accepted: one of tensor, channel, group, token"),
        ({"strategy": "group"}, "group_size: None; accepted: a positive int with strategy 'group'"),
        ({"group_size": 32}, "group_size: 32; accepted: None with strategy 'channel'"),
    ],
)
def test_a_scheme_that_means_nothing_is_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        Scheme(**arguments)


def test_a_range_up_to_the_largest_half_stays_finite():
    # The step is 374.5 and the zero point -48: the code 127 stands for 65540, which is above the largest half, 65504.
    x = torch.tensor([[65504.0, -30000.0]], dtype=torch.float16)
    scheme = Scheme(8, symmetric=False, strategy="tensor")
    params = qparams(*group_ranges(x, scheme), scheme)
    made = fake_quantize(x, params, scheme)
    assert made.dtype == torch.float16
    assert torch.isfinite(made).all()
    assert (made.double() - x.double()).abs().max() <= params.scale.item()
