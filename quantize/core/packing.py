"""Pack several low-bit codes into one machine word, and unpack them."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

_BITS = 4
# The bits of a word: the CPU kernel and files take bytes, the Ascend operators int32.
_WIDTHS = {torch.uint8: 8, torch.int32: 32}


def pack_int4(codes: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Pack int4 ``codes`` ``[..., c]`` into words ``[..., ceil(c / r)]``, ``r`` = 2 for uint8 and 8 for int32.

    Element ``j`` of a word is at bits ``4j ... 4j+3``, in two's complement. A last word that is not full ends with
    zeros. ``codes`` is int8 with values from -8 to 7; ``dtype`` is that of the words.

    Raises:
        ValueError: a ``dtype`` that is neither uint8 nor int32.

    >>> pack_int4(torch.tensor([1, -2, 7], dtype=torch.int8)).tolist()
    [225, 7]
    """
    return _words(codes.to(torch.int32).bitwise_and(0xF), _BITS, _per_word(dtype)).to(dtype)


def pack_offset(codes: Tensor, bits: int) -> Tensor:
    """Pack signed ``codes`` ``[..., c]`` into int32 words ``[..., ceil(c * bits / 32)]``, in offset binary.

    Element ``j`` of a word is at bits ``bits * j`` and up, as the unsigned ``code + 2^(bits-1)``. A last word that is
    not full ends with zeros. ``codes`` is int8 with values of ``bits`` bits.

    Source: compressed-tensors, format ``pack-quantized``, for widths that divide 32.

    Raises:
        ValueError: ``bits`` other than 4 and 8.

    >>> pack_offset(torch.tensor([-8, 0, 7], dtype=torch.int8), 4).tolist()
    [3968]
    """
    if bits not in (4, 8):
        raise ValueError(f"bits: {bits}; accepted: 4 or 8")
    return _words(codes.to(torch.int32) + (1 << (bits - 1)), bits, 32 // bits)


def unpack_int4(words: Tensor, length: int) -> Tensor:
    """Undo :func:`pack_int4`: ``words`` ``[..., g]``, uint8 or int32, to int8 codes ``[..., length]``.

    Raises:
        ValueError: words of another dtype.

    >>> unpack_int4(torch.tensor([225, 7], dtype=torch.uint8), 3).tolist()
    [1, -2, 7]
    """
    r = _per_word(words.dtype)
    # One shift for each element, in the width of the words: several times faster than shifts along an axis.
    nibbles = torch.stack([words.bitwise_right_shift(_BITS * j).bitwise_and(0xF) for j in range(r)], -1)
    # Two's complement: 8 to 15 stand for -8 to -1.
    signed = nibbles.bitwise_xor(8).to(torch.int8) - 8
    return rearrange(signed, "... g r -> ... (g r)")[..., :length]


def _words(fields: Tensor, bits: int, r: int) -> Tensor:
    missing = -fields.shape[-1] % r
    words = rearrange(torch.constant_pad_nd(fields, (0, missing)), "... (g r) -> ... g r", r=r)
    shifts = torch.arange(0, bits * r, bits, dtype=torch.int32, device=fields.device)
    # The bits of different elements do not overlap, so their sum is their union. It may wrap to a negative int32.
    return words.bitwise_left_shift(shifts).sum(-1, dtype=torch.int32)


def _per_word(dtype: torch.dtype) -> int:
    if dtype not in _WIDTHS:
        raise ValueError(f"dtype: {dtype}; accepted: one of {', '.join(map(str, _WIDTHS))}")
    return _WIDTHS[dtype] // _BITS
