"""The matmuls of torch for the CPU, in forms that they do not misread, and int4 weights as one of them takes them.

``_weight_int4pack_mm_for_cpu`` computes ``x W^T`` with ``W = code * scale + zero`` in groups of 32, 64, 128 or 256
inputs, scale and zero in bfloat16. Its packed form depends on the processor; :func:`block_rows` asks for it, so that
codes come back exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from quantize.core import QTensor, Scheme

# The second operand of _int_mm is reordered at each call, unless there is one row: a loop wins for large weights.
_ROWS, _LARGE = 8, 1 << 20
_SIZES = (256, 128, 64, 32)
# What the probe of the processor found, once it ran. A compiler takes it as a constant; it cannot follow the probe.
_found: list[int] = []


def aligned(x: Tensor) -> Tensor:
    """``x`` in rows, beginning at a multiple of 64 bytes, the widest load: some operators crash on other addresses."""
    if torch.compiler.is_exporting() or (x.is_contiguous() and x.data_ptr() % 64 == 0):
        return x.contiguous()
    return x.clone(memory_format=torch.contiguous_format)


def _opaque(matmul: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``matmul`` of tokens ``[t, c]`` and codes in ``n`` rows: a compiler calls it and does not look inside.

    An exported graph has the operators of torch alone.
    """
    operator = torch.library.custom_op(f"quantize::{matmul.__name__}", matmul, mutates_args=())

    @operator.register_fake
    def _(x: Tensor, codes: Tensor, *_rest: object) -> Tensor:
        return x.new_empty(x.shape[0], codes.shape[0], dtype=x.dtype if x.is_floating_point() else torch.int32)

    @functools.wraps(matmul)
    def call(*args: Tensor | int) -> Tensor:
        compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        y: Tensor = operator(*args) if compiled else matmul(*args)
        return y

    return call


@_opaque
def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """:func:`quantize.core.linear.int_matmul` by ``torch._int_mm``."""
    # The operator misreads a single row with a stride of 0, as compilers make it: a graph adds a row of zeros.
    if torch.compiler.is_exporting():
        return torch._int_mm(torch.constant_pad_nd(a, (0, 0, 0, 1)), b.T)[:-1]
    a = a if a.stride(0) else a.new_empty(a.shape).copy_(a)
    if 1 < a.shape[0] <= _ROWS and b.numel() >= _LARGE:
        return torch.cat([torch._int_mm(row, b.T) for row in torch.split(a, 1)])
    return torch._int_mm(a, b.T)


@_opaque
def int8pack_mm(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """``torch._weight_int8pack_mm`` of bfloat16 tokens ``[t, c]``, aligned codes ``[n, c]`` and scales ``[n]``."""
    return torch._weight_int8pack_mm(aligned(x), codes, scale)


@_opaque
def int4pack_mm(x: Tensor, words: Tensor, group_size: int, scale_and_zero: Tensor) -> Tensor:
    """``torch._weight_int4pack_mm_for_cpu`` of bfloat16 tokens ``[t, c]``, and a weight of :func:`pack`."""
    return torch._weight_int4pack_mm_for_cpu(aligned(x), words, group_size, scale_and_zero)


def group_size(scheme: Scheme, c: int) -> int | None:
    """In which groups the operator takes int4 weights of ``c`` inputs, scales of rows repeated; None: in none."""
    return next((size for size in _SIZES if c % size == 0 and scheme.group_size in (None, size)), None)


def pack(weight: QTensor) -> tuple[Tensor, Tensor]:
    """Bytes ``[n, c / 2]``, and a pair of scale and zero for each group of each row ``[g, n, 2]``."""
    n, c = weight.codes.shape
    # The zero of the rounded scale: with that of the exact one, the errors of both would meet every input of a group.
    scale = weight.scale.to(torch.bfloat16).to(weight.scale.dtype)
    zero = torch.zeros_like(scale) if weight.zero_point is None else -weight.zero_point * scale
    pairs = torch.stack([scale, zero], -1).expand(n, c // (group_size(weight.scheme, c) or c), 2)
    words = torch._convert_weight_to_int4pack_for_cpu(weight.codes.to(torch.int32) + 8, 1)
    return words, rearrange(pairs, "n g p -> g n p").to(torch.bfloat16).contiguous()


def unpack(words: Tensor, block: int) -> Tensor:
    """The int8 codes ``[n, c]`` of :func:`pack`.

    ``block`` rows lie together, column by column; a byte has row ``d`` below and row ``d + block / 2`` above.
    """
    return rearrange(_columns(words, block) - 8, "n c d -> (n d) c")


def dequantize(words: Tensor, pairs: Tensor, zero_point: Tensor | None) -> Tensor:
    """The weight ``[n, c]``, a transposed view, in bfloat16: each product of a code and a scale is rounded once."""
    scale = pairs[..., 0].contiguous()
    codes = rearrange(_columns(words, block_rows()), "n (g k) d -> g k (n d)", g=len(scale))
    zero = 8 if zero_point is None else 8 + zero_point.T.expand(scale.shape)[:, None]
    return rearrange((codes - zero).to(scale.dtype) * scale[:, None], "g k n -> n (g k)")


def _columns(words: Tensor, block: int) -> Tensor:
    """Codes plus 8, int8, in the order of the words: ``[n / block, c, block]``."""
    columns = rearrange(words.view(-1), "(n c d) -> n c d", c=words.shape[1] * 2, d=block // 2)
    return torch.cat([columns.bitwise_and(0xF), columns.bitwise_right_shift(4)], -1).view(torch.int8)


def block_rows() -> int:
    """How many rows torch packs together on this processor; 0 where it is not as :func:`unpack` knows it."""
    if not _found:
        random = torch.Generator("cpu").manual_seed(0)
        codes = torch.randint(-8, 8, (64, 32), generator=random, dtype=torch.int8, device="cpu")
        words = torch._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32) + 8, 1)
        _found.append(next((size for size in (64, 32) if torch.equal(unpack(words, size), codes)), 0))
    return _found[0]
