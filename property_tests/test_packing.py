import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from property_tests.laws import assert_pure
from quantize.core.packing import pack_int4, unpack_int4

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


def test_a_stack_packs_under_vmap():
    stack = torch.randint(-8, 8, (3, 4, 9), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    mapped = torch.func.vmap(pack_int4)(stack)
    assert torch.equal(mapped, pack_int4(stack))
