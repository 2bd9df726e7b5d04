"""The matmuls of torch that :mod:`.cpu` calls, in forms that they do not misread; a compiler leaves them alone."""

from __future__ import annotations

import torch
from torch import Tensor

# The second operand of _int_mm is reordered at each call, unless there is one row: a loop wins for large weights.
_ROWS, _LARGE = 8, 1 << 20
# Bytes: the widest load of a processor.
_ALIGNMENT = 64


def aligned(x: Tensor) -> Tensor:
    """``x`` in rows, beginning where the widest loads may: a kernel that assumes it dies of anything else."""
    if x.is_contiguous() and x.data_ptr() % _ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def eager_int_mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` of int8 matrices ``[t, c]`` and ``[n, c]`` in int32."""
    # A single row may come with stride 0 from a compiler, which the operator misreads.
    a = a if a.stride(0) else a.new_empty(a.shape).copy_(a)
    if 1 < a.shape[0] <= _ROWS and b.numel() >= _LARGE:
        return torch.cat([torch._int_mm(row, b.T) for row in torch.split(a, 1)])
    return torch._int_mm(a, b.T)


def eager_int8pack_mm(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """See :func:`int8pack_mm`."""
    return torch._weight_int8pack_mm(aligned(x), codes, scale)


def eager_int4pack_mm(x: Tensor, codes: Tensor, group_size: int, scale_and_zero: Tensor) -> Tensor:
    """See :func:`int4pack_mm`."""
    return torch._weight_int4pack_mm_for_cpu(aligned(x), codes, group_size, scale_and_zero)


_int_mm = torch.library.custom_op("quantize::int_mm", eager_int_mm, mutates_args=())
_int8pack_mm = torch.library.custom_op("quantize::int8pack_mm", eager_int8pack_mm, mutates_args=())
_int4pack_mm = torch.library.custom_op("quantize::int4pack_mm", eager_int4pack_mm, mutates_args=())


@_int_mm.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=torch.int32)


@_int8pack_mm.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


@_int4pack_mm.register_fake
def _(x: Tensor, codes: Tensor, group_size: int, scale_and_zero: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` of int8 matrices ``[t, c]`` and ``[n, c]`` in int32."""
    return _int_mm(a, b) if torch.compiler.is_compiling() else eager_int_mm(a, b)


def int8pack_mm(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """``torch._weight_int8pack_mm`` of bfloat16 tokens ``[t, c]``, aligned codes ``[n, c]`` and scales ``[n]``."""
    y: Tensor = (_int8pack_mm if torch.compiler.is_compiling() else eager_int8pack_mm)(x, codes, scale)
    return y


def int4pack_mm(x: Tensor, codes: Tensor, group_size: int, scale_and_zero: Tensor) -> Tensor:
    """``torch._weight_int4pack_mm_for_cpu`` of bfloat16 tokens ``[t, c]``."""
    if torch.compiler.is_exporting():
        # In the operators of torch alone.
        return torch._weight_int4pack_mm_for_cpu(x.contiguous(), codes, group_size, scale_and_zero)
    matmul = _int4pack_mm if torch.compiler.is_compiling() else eager_int4pack_mm
    y: Tensor = matmul(x, codes, group_size, scale_and_zero)
    return y
