import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from property_tests.laws import assert_pure, same_bits
from property_tests.oracles import U32, U64, members, numpy64
from property_tests.strategies import input_schemes, integer_matrices, normal_matrices, sizes, weight_schemes
from quantize.core import QTensor, Scheme, dequantize, fake_quantize, linear, metrics, round_to_nearest

int8 = st.integers(-128, 127)
row_scaled = weight_schemes(("tensor", "channel"))


@given(st.data(), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 5, 1023, 1024, 1025, 2049]))
def test_the_integer_matmul_is_exact(data, t, n, c):
    # Mostly the extremes, which make the largest sums.
    extremes = st.sampled_from([-128, 127]) | int8
    a, b = (data.draw(hnp.arrays(np.int8, (rows, c), elements=extremes, fill=int8)) for rows in (t, n))
    y = assert_pure(linear.int_matmul, torch.from_numpy(a), torch.from_numpy(b))
    assert y.dtype == torch.int32
    assert (y.numpy() == a.astype(np.int64) @ b.astype(np.int64).T).all()


@pytest.mark.parametrize("c", [1025, 1026, 2049])
def test_sums_beyond_the_integers_of_float32_are_exact(c):
    # 1024 products of 2^14 make 2^24; one more that is odd is the first sum that float32 cannot hold.
    a = torch.full((1, c), -128, dtype=torch.int8)
    a[0, -1] = 1
    assert linear.int_matmul(a, a).item() == (c - 1) * 2**14 + 1


def problem(data, dtype=torch.float32):
    t, n, c = (data.draw(sizes) for _ in range(3))
    x = data.draw(normal_matrices(st.just(t), st.just(c))).to(dtype)
    weight = data.draw(normal_matrices(st.just(n), st.just(c))).to(dtype)
    bias = data.draw(st.none() | normal_matrices(st.just(1), st.just(n)).map(lambda b: b[0].to(dtype)))
    return x, weight, bias


@given(st.data(), row_scaled, input_schemes())
def test_the_integer_layer_is_the_float64_product_of_its_operands(data, weights, inputs):
    x, weight, bias = problem(data)
    q, w = round_to_nearest(x, inputs), round_to_nearest(weight, weights)
    y = numpy64(assert_pure(linear.integer_linear, q, w, bias))
    left, right = operand64(q), operand64(w)
    offset = 0 if bias is None else numpy64(bias)
    magnitude = np.abs(left) @ np.abs(right).T + np.abs(offset)
    # Two scales, and the bias: three roundings of float32. The sum of the codes' products is at most 9 * 255^2 < 2^24.
    # The expectation rounds once for each of the c products and the bias, in float64.
    bound = (1 + U32) ** 3 - 1 + (x.shape[1] + 2) * U64
    assert (np.abs(y - (left @ right.T + offset)) <= bound * magnitude).all()


def unit(codes, zero):
    """Codes ``[r, c]`` with step 1 and a zero point for each row, or none."""
    scheme = Scheme(8, zero is None, "channel")
    zero = None if zero is None else torch.from_numpy(zero)[:, None]
    return QTensor(torch.from_numpy(codes), torch.ones(len(codes), 1), zero, scheme)


def python_sums(left, z_left, right, z_right):
    """``sum of (q_x - z_x)(q_w - z_w)`` in the integers of Python, as float32 holds them."""

    # Arrays of objects: every number is an int of Python.
    x, w = (
        codes.astype(object) - (0 if zero is None else zero.astype(object)[:, None])
        for codes, zero in ((left, z_left), (right, z_right))
    )
    # Below 2^53, so that the way over float64 rounds once.
    return (x @ w.T).astype(np.float64).astype(np.float32)


@given(st.data(), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 5, 300]), st.booleans(), st.booleans())
def test_sums_with_zero_points_are_those_of_python(data, t, n, c, shifted_inputs, shifted_weights):
    extremes = st.sampled_from([-128, 127]) | int8
    a, b = (data.draw(hnp.arrays(np.int8, (rows, c), elements=extremes, fill=int8)) for rows in (t, n))
    z_a, z_b = (
        data.draw(hnp.arrays(np.int8, rows, elements=extremes)) if shifted else None
        for rows, shifted in ((t, shifted_inputs), (n, shifted_weights))
    )
    y = assert_pure(linear.integer_linear, unit(a, z_a), unit(b, z_b))
    assert y.dtype == torch.float32
    # With scales of 1 nothing but the sum is rounded, once.
    assert np.array_equal(y.numpy(), python_sums(a, z_a, b, z_b))


# The last length of int32, the first of int64, the first at which 255^2 c is above 2^31, and one beyond 2^32.
@pytest.mark.parametrize("c", [2**15 - 1, 2**15, 33026, 70000])
@pytest.mark.parametrize("shifted", [(True, True), (True, False), (False, True)])
def test_long_sums_with_zero_points_do_not_wrap(c, shifted):
    # Signs that make the terms as large as they can be, and the sum, alone and against each other.
    for left, right in itertools.product((-128, 127), repeat=2):
        a, b = (np.full((2, c), code, dtype=np.int8) for code in (left, right))
        # Odd sums: one that lost its last bits would show.
        a[1, ::3], b[1, ::2] = 5, -3
        z_a, z_b = (
            np.array([-1 - code, code], dtype=np.int8) if with_zero else None
            for code, with_zero in zip((left, right), shifted, strict=True)
        )
        y = linear.integer_linear(unit(a, z_a), unit(b, z_b))
        assert np.array_equal(y.numpy(), python_sums(a, z_a, b, z_b))


@pytest.mark.parametrize(("zero", "codes"), [(-1, None), (0, [-128, 127]), (1, None)])
def test_codes_that_do_not_fit_are_not_centered(zero, codes):
    whole = torch.tensor([[-128, 127]], dtype=torch.int8)
    found = linear.centered(
        QTensor(whole, torch.ones(1, 1), torch.tensor([[zero]], dtype=torch.int8), Scheme(8, False))
    )
    assert (found and found.codes[0].tolist()) == codes


@given(st.data(), weight_schemes(bits=(2, 4, 7, 8)), st.integers(0, 2**31))
def test_centered_codes_are_the_same_numbers(data, scheme, seed):
    n, c = data.draw(sizes), data.draw(sizes)
    source = np.random.default_rng(seed)
    codes = source.integers(scheme.qmin, scheme.qmax + 1, (n, c))
    # Now and then without the ends, so that 8 bits fit as well.
    codes = codes // data.draw(st.sampled_from([1, 2]))
    shape = scheme.grid_shape(n, c)
    zero = None if scheme.symmetric else torch.from_numpy(source.integers(scheme.qmin, scheme.qmax + 1, shape)).to(
        torch.int8)  # fmt: skip
    scale = torch.from_numpy(source.random(shape) + 0.5).float()
    q = QTensor(torch.from_numpy(codes).to(torch.int8), scale, zero, scheme)
    found = assert_pure(linear.centered, q)
    where = members(scheme, n, c)
    exact = [[int(codes[i, j]) - (0 if zero is None else int(zero[where[i][j]])) for j in range(c)] for i in range(n)]
    fits = all(-128 <= code <= 127 for row in exact for code in row)
    assert (found is not None) == fits
    assert fits or scheme.bits == 8
    if found is not None:
        assert found.codes.dtype == torch.int8
        assert found.codes.tolist() == exact
        assert found.zero_point is None
        assert found.scheme == Scheme(8, True, scheme.strategy, scheme.group_size)
        same_bits((found.scale, dequantize(found)), (q.scale, dequantize(q)))
        x = round_to_nearest(torch.from_numpy(source.normal(size=(3, c))).float(), Scheme(8, False, "token"))
        if scheme.strategy != "group":
            # The same whole numbers, and the same products with the scales.
            same_bits(linear.integer_linear(x, found), linear.integer_linear(x, q))


@given(st.data(), row_scaled.map(lambda s: Scheme(s.bits, True, s.strategy)), st.booleans())
def test_the_integer_bias_makes_one_product_the_layer(data, weights, symmetric):
    x, weight, bias = problem(data)
    inputs = Scheme(8, symmetric, "tensor")
    q, w = round_to_nearest(x, inputs), round_to_nearest(weight, weights)
    held = assert_pure(linear.integer_bias, w, q.params, bias)
    assert held.dtype == torch.int64
    assert held.shape == (len(weight),)
    # In units of both scales, whose product float64 holds exactly, all but the bias is a whole number.
    unit = numpy64(q.scale) * numpy64(w.scale).T
    zero = 0 if symmetric else q.zero_point.numpy().astype(np.int64)
    expected = (q.codes.numpy().astype(np.int64) - zero) @ w.codes.numpy().astype(np.int64).T
    rest = q.codes.numpy().astype(np.int64) @ w.codes.numpy().astype(np.int64).T + held.numpy() - expected
    offset = np.zeros(len(weight)) if bias is None else numpy64(bias)
    # Rounded to half a unit. The unit is rounded to float32 before it divides: U32 and, of second order, its square;
    # another square covers the quotients of float64.
    assert (np.abs(rest - offset / unit) <= 0.5 + (U32 + 2 * U32**2) * np.abs(offset / unit)).all()
    assert bias is not None or not rest.any()


def operand64(q: QTensor):
    zero = 0 if q.zero_point is None else numpy64(q.zero_point)
    return (numpy64(q.codes) - zero) * numpy64(q.scale)


@given(st.data(), row_scaled, input_schemes(), st.booleans())
def test_inputs_are_smoothed_and_rounded_by_their_own_ranges(data, weights, inputs, smoothed):
    x, weight, bias = problem(data)
    w, smoothing = round_to_nearest(weight, weights), torch.linspace(0.5, 2, x.shape[1]) if smoothed else None
    divided = x / smoothing if smoothed else x
    # A scale for each token, or one for all from the ranges of the channels: the range of all that is smoothed.
    low, high = x.amin(0).clamp(max=0), x.amax(0).clamp(min=0)
    static = linear.static_params(low, high, inputs, smoothing=smoothing) if inputs.strategy == "tensor" else None
    q = round_to_nearest(divided, inputs)
    same_bits(linear.input_params(divided, inputs, static), q.params)
    y = linear.quantized_linear(x, w, bias, inputs=inputs, smoothing=smoothing, static=static)
    assert torch.equal(y, linear.integer_linear(q, w, bias))


@pytest.mark.parametrize(
    ("dtype", "u"), [(torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)]
)
@given(st.data(), row_scaled, input_schemes(), st.booleans())
def test_fake_and_real_differ_by_rounding_only(dtype, u, data, weights, inputs, smoothed):
    x, weight, bias = problem(data, dtype)
    # At most 1: a float16 that overflowed would have no error to speak of.
    x, weight = x / x.abs().amax(), weight / weight.abs().amax()
    bias = None if bias is None else bias / bias.abs().amax()
    smoothing = torch.linspace(0.5, 2, x.shape[1]) if smoothed else None
    static = None
    if inputs.strategy == "tensor":
        low, high = x.float().amin(0).clamp(max=0), x.float().amax(0).clamp(min=0)
        static = linear.static_params(low, high, inputs, smoothing=smoothing)
    w = round_to_nearest(weight, weights)
    options = {"inputs": inputs, "smoothing": smoothing, "static": static}
    real = linear.quantized_linear(x, w, bias, **options)
    fake = linear.fake_quantized_linear(x, w, bias, **options)
    assert real.dtype == fake.dtype == dtype
    tokens = linear.smooth(x, smoothing).float()
    entered = fake_quantize(tokens, linear.input_params(tokens, inputs, static), inputs)
    left, right = numpy64(entered.abs()), numpy64(dequantize(w).abs())
    magnitude = left @ right.T + (0 if bias is None else numpy64(bias.abs()))
    # The bound that fake_quantized_linear states. Where float16 is subnormal it rounds to multiples of 2^-24, so each
    # operand and each of three results may be off by half of that beside.
    half_step = 2.0**-25 if dtype == torch.float16 else 0.0
    beside = half_step * (left.sum(1)[:, None] + right.sum(1) + 3)
    assert (np.abs(numpy64(real) - numpy64(fake)) <= (5 * u + (x.shape[1] + 8) * U32) * magnitude + beside).all()


@given(st.data(), weight_schemes())
def test_weight_only_is_the_product_with_the_dequantized_weight(data, weights):
    x, weight, bias = problem(data)
    w = round_to_nearest(weight, weights)
    y = numpy64(linear.quantized_linear(x, w, bias))
    left, right = numpy64(x), numpy64(dequantize(w))
    offset = 0 if bias is None else numpy64(bias)
    magnitude = np.abs(left) @ np.abs(right).T + np.abs(offset)
    # A sum of c products and the bias: c + 1 roundings of float32, and as many of float64 here.
    assert (np.abs(y - (left @ right.T + offset)) <= (x.shape[1] + 2) * U32 * magnitude).all()
    assert torch.equal(linear.fake_quantized_linear(x, w, bias), linear.quantized_linear(x, w, bias))


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 2, 3), (0, 3), (2, 1, 2, 1, 3)])
def test_leading_axes_are_kept(shape):
    w = round_to_nearest(torch.ones(4, 3), Scheme())
    for inputs in (None, Scheme(strategy="token")):
        assert linear.quantized_linear(torch.ones(shape), w, inputs=inputs).shape == (*shape[:-1], 4)


def test_weights_whose_scale_does_not_leave_the_sum_are_refused():
    x = round_to_nearest(torch.ones(2, 4), Scheme(strategy="token"))
    with pytest.raises(ValueError, match="accepted with quantized inputs: strategy tensor or channel"):
        linear.integer_linear(x, round_to_nearest(torch.ones(3, 4), Scheme(strategy="group", group_size=2)))


@given(integer_matrices(c=st.just(5), bound=7), integer_matrices(c=st.just(5), bound=7))
def test_output_error_is_the_squared_error_of_the_outputs(delta, x):
    # Whole numbers, at most 9 * 9 * (5 * 49)^2 < 2^24: equal to the last bit.
    expected = (numpy64(x) @ numpy64(delta).T) ** 2
    gram = x.T @ x
    assert assert_pure(metrics.row_error, delta, gram).tolist() == expected.sum(0).tolist()
    assert assert_pure(metrics.output_error, delta, gram).item() == expected.sum()


@given(normal_matrices(sizes, sizes), st.floats(0.001, 1))
def test_sqnr_is_a_ratio_of_powers(x, noise):
    y = x * (1 + noise)
    result = assert_pure(metrics.sqnr, x, y).item()
    power, error = (numpy64(x) ** 2).sum(), ((numpy64(x) - numpy64(y)) ** 2).sum()
    expected = 10 * np.log10(power / error)
    # Each power: a difference, a quotient, both twice by the square, a square, and a sum of all elements. Their
    # quotient, in dB, and then a logarithm of at most one unit in the last place, and the factor 10.
    relative = (2 * (x.numel() + 5) + 1) * U32
    assert abs(result - expected) <= 10 / np.log(10) * relative + 4 * U32 * abs(expected)
    assert metrics.sqnr(x, x).item() == torch.inf
