"""The matmuls of torch for the CPU, called so that neither they nor compilers misread their arguments."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

# Up to _ROWS rows, one call for each row is faster if the weight has at least _LARGE codes.
_ROWS, _LARGE = 3, 1 << 20
# Rows whose length is a multiple of this compete for the same cache lines.
_APART = 1024


def aligned(x: Tensor) -> Tensor:
    """``x``, contiguous and aligned to 64 bytes, the widest load. Some operators crash on other addresses."""
    if torch.compiler.is_exporting() or (x.is_contiguous() and x.data_ptr() % 64 == 0):
        return x.contiguous()
    return x.clone(memory_format=torch.contiguous_format)


def _opaque(matmul: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``matmul``, of tokens ``[t, c]`` and a weight of ``n`` rows, as an operator that compilers do not look into.

    Exported graphs contain operators of torch only.
    """
    operator = torch.library.custom_op(f"quantize::{matmul.__name__}", matmul, mutates_args=())

    @operator.register_fake
    def _(x: Tensor, codes: Tensor, *_rest: object) -> Tensor:
        return x.new_empty(x.shape[0], codes.shape[0], dtype=x.dtype if x.is_floating_point() else torch.int32)

    def call(*args: Tensor | int) -> Tensor:
        compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        y: Tensor = operator(*args) if compiled else matmul(*args)
        return y

    return call


def spaced(codes: Tensor) -> Tensor:
    """``codes`` ``[n, c]``, with 64 bytes between rows that would else compete for the same cache lines."""
    n, c = codes.shape
    if c % _APART:
        return codes.contiguous()
    return codes.new_empty(n, c + 64)[:, :c].copy_(codes)


@_opaque
def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` ``[t, n]`` in int32, for ``a`` ``[t, c]`` in uint8 and ``b`` ``[n, c]`` in int8."""
    # Compilers give a single row a stride of 0, which the operator misreads. So a graph appends a row of zeros.
    if torch.compiler.is_exporting():
        return torch._int_mm(torch.constant_pad_nd(a, (0, 0, 0, 1)), b.T)[:-1]
    a = a if a.stride(0) else a.new_empty(a.shape).copy_(a)
    if 1 < a.shape[0] <= _ROWS and b.numel() >= _LARGE:
        return torch.cat([torch._int_mm(row, b.T) for row in torch.split(a, 1)])
    return torch._int_mm(a, b.T)


@functools.cache
def exact_int_mm() -> bool:
    """Whether :func:`int_mm` is exact on this processor. Without VNNI, sums of two products may saturate at 16 bits.

    Where torch has no matmul of these types, it raises, or warns and reads unsigned bytes as signed ones.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            return _exact_int_mm()
    except RuntimeError:
        return False


def _exact_int_mm() -> bool:
    random = torch.Generator("cpu").manual_seed(0)
    for t, n, c in ((1, 33, 1030), (2, 64, 64), (40, 7, 515), (3, 16, 2 * _APART)):
        signs = torch.randint(0, 2, (t + n, c), generator=random, device="cpu")
        a, b = torch.split(signs, [t, n])
        a, b = (a * 255).to(torch.uint8), (b * 255 - 128).to(torch.int8)
        a[0], b[0] = 255, -128
        expected = a.double() @ b.double().T
        if not torch.equal(torch._int_mm(a, spaced(b).T), expected.to(torch.int32)):
            return False
    return True


@_opaque
def int8pack_mm(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """``torch._weight_int8pack_mm`` of bfloat16 tokens ``[t, c]``, aligned codes ``[n, c]`` and scales ``[n]``."""
    return torch._weight_int8pack_mm(aligned(x), codes, scale)


@_opaque
def int4pack_mm(x: Tensor, words: Tensor, group_size: int, scale_and_zero: Tensor) -> Tensor:
    """``torch._weight_int4pack_mm_for_cpu`` of bfloat16 tokens ``[t, c]``, words, and pairs ``[g, n, 2]``."""
    return torch._weight_int4pack_mm_for_cpu(aligned(x), words, group_size, scale_and_zero)
