import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from property_tests.laws import assert_pure
from quantize.core.packing import pack_int4, pack_offset, unpack_int4

codes = hnp.arrays(
    np.int8, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=19), elements=st.integers(-8, 7)
)
words = pytest.mark.parametrize(("dtype", "r"), [(torch.uint8, 2), (torch.int32, 8)])


@words
@given(codes)
def test_round_trip_and_bit_layout(dtype, r, values):
    packed = assert_pure(lambda q: pack_int4(q, dtype), torch.from_numpy(values))
    length = values.shape[-1]
    assert packed.dtype == dtype
    assert packed.shape == (*values.shape[:-1], -(-length // r))
    back = assert_pure(lambda w: unpack_int4(w, length), packed)
    assert back.dtype == torch.int8
    assert np.array_equal(back.numpy(), values)
    # An oracle by string: the word in binary, its nibbles from the right.
    for index in np.ndindex(packed.shape):
        bits = format(int(packed[index].item()) & (2 ** (4 * r) - 1), f"0{4 * r}b")
        for j in range(r):
            place = index[-1] * r + j
            expected = int(values[(*index[:-1], place)]) & 0xF if place < length else 0
            assert bits[len(bits) - 4 * (j + 1) : len(bits) - 4 * j] == format(expected, "04b")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float32])
def test_other_words_are_refused(dtype):
    with pytest.raises(ValueError, match=r"dtype: torch\..*; accepted: one of torch.uint8, torch.int32"):
        pack_int4(torch.zeros(4, dtype=torch.int8), dtype)
    with pytest.raises(ValueError, match="dtype: "):
        unpack_int4(torch.zeros(4, dtype=dtype), 4)


@pytest.mark.parametrize("bits", [4, 8])
@given(codes, st.integers(1, 16))
def test_offset_binary(bits, values, factor):
    values = np.clip(values.astype(np.int32) * factor, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(np.int8)
    packed = assert_pure(lambda q: pack_offset(q, bits), torch.from_numpy(values))
    r, length = 32 // bits, values.shape[-1]
    assert packed.dtype == torch.int32
    assert packed.shape == (*values.shape[:-1], -(-length // r))
    # An oracle by arithmetic: a word is the sum of its digits in base 2^bits, as Python's integers.
    for index in np.ndindex(packed.shape):
        digits = values[index[:-1]][index[-1] * r : (index[-1] + 1) * r]
        word = sum((int(digit) + 2 ** (bits - 1)) * 2 ** (bits * j) for j, digit in enumerate(digits))
        assert int(packed[index]) % 2**32 == word


@pytest.mark.parametrize("bits", [0, 2, 3, 16])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits: {bits}; accepted: 4 or 8"):
        pack_offset(torch.zeros(4, dtype=torch.int8), bits)


def test_a_stack_packs_under_vmap():
    stack = torch.randint(-8, 8, (3, 4, 9), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    mapped = torch.func.vmap(pack_int4)(stack)
    assert torch.equal(mapped, pack_int4(stack))
