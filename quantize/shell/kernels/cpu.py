"""The integer and packed matmuls that ship with torch for the CPU.

Chosen by measurement on x86 with AVX-512 and VNNI. ``_int_mm`` is exact and several times faster than a float matmul
of the same shape. The packed matmuls are fast in bfloat16 and for few tokens; in other dtypes they are scalar code,
slower than dequantizing.

- int8 inputs: ``_int_mm``; the very bits of ``reference``.
- int8 weights alone, one scale a tensor or a channel: :func:`fixed_point_linear`; in bfloat16 ``_weight_int8pack_mm``
  for a few tokens, and the dequantized weight for many.
- int4 weights alone, in bfloat16: see :mod:`~quantize.shell.kernels.nibbles`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor

from quantize.core import QTensor, Solution, linear
from quantize.shell.kernels import nibbles, reference
from quantize.shell.kernels.contract import Layout

DEVICES = frozenset({"cpu"})
# Up to so many tokens _weight_int8pack_mm wins in bfloat16; from so many on, a matmul of the dequantized weight.
_FEW, _MANY = 6, 96
# The length of a token must be a multiple of this, or _weight_int8pack_mm reads past its end.
_INT8PACK = 16
# The second operand of _int_mm is reordered at each call, unless there is one row: a loop wins for large weights.
_ROWS, _LARGE = 8, 1 << 20
_DIGITS, _BASE = 3, 128


def obstacle(solved: Solution, _bias: Tensor | None, dtype: torch.dtype) -> str | None:
    """See :class:`~quantize.shell.kernels.contract.Kernel`."""
    weight, scheme = solved.weight, solved.weight.scheme
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{dtype} is none of float32, float16, bfloat16"
    if scheme.bits <= 4:
        return nibbles.obstacle(solved, dtype)
    if scheme.strategy == "group":
        return "no matmul takes int8 groups"
    if weight.codes.shape[1] == 1:
        return "a single input: torch._int_mm misreads a column"
    return None if exact_int_mm() else "torch._int_mm is not exact on this processor"


def prepare(solved: Solution, _bias: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """See :class:`~quantize.shell.kernels.contract.Kernel`."""
    weight = solved.weight
    if weight.scheme.bits <= 4:
        return nibbles.prepare(solved)
    held, (n, c) = reference.prepare(solved), weight.codes.shape
    if solved.inputs is None and dtype == torch.bfloat16 and weight.zero_point is None and c % _INT8PACK == 0:
        held["row_scale"] = weight.scale.to(dtype).expand(n, 1).flatten().contiguous()
    return held


def restore(held: Mapping[str, Tensor], layout: Layout) -> Solution:
    """See :class:`~quantize.shell.kernels.contract.Kernel`."""
    return nibbles.restore(held, layout) if layout.spec.weight.bits <= 4 else reference.restore(held, layout)


def forward(x: Tensor, held: Mapping[str, Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
    """See :class:`~quantize.shell.kernels.contract.Kernel`."""
    if layout.spec.weight.bits <= 4:
        return nibbles.forward(x, held, layout, bias)
    s = restore(held, layout)
    if s.inputs is not None:
        return reference.compute(x, s, bias, matmul=int_mm)
    # A compiled graph serves any number of tokens.
    t = None if torch.compiler.is_compiling() else x.numel() // layout.c
    if x.dtype == torch.float64 or t == 0 or (x.dtype == torch.bfloat16 and t is not None and t >= _MANY):
        return reference.compute(x, s, bias)
    tokens = linear.smooth(rearrange(x, "... c -> (...) c"), s.smoothing).to(x.dtype)
    row_scale = held.get("row_scale")
    if row_scale is not None and x.dtype == row_scale.dtype and t is not None and t <= _FEW:
        y = torch._weight_int8pack_mm(tokens.contiguous(), s.weight.codes, row_scale)
        y = y if bias is None else y + bias
    else:
        y = fixed_point_linear(tokens, s.weight, bias)
    return y.to(x.dtype).reshape(*x.shape[:-1], layout.n)


def fixed_point_linear(x: Tensor, weight: QTensor, bias: Tensor | None) -> Tensor:
    """``x W^T + bias`` of float tokens ``[t, c]`` and int8 weights, a scale a tensor or a channel, by integer matmuls.

    A token is rounded to multiples of ``step = max|x| / (127 * 2^14)`` and split into three digits of base 128, from
    -127 to 127; the product of each digit with the codes is exact. With ``u`` = 2^-24 and ``m = |x| |W|^T + |bias|``::

        |error| <= step * (1/2 + 1/8) * sum |W| + 8 u m

    1. ``x / step`` has 21 bits, and its division an error of half a bit in 24: ``step / 8``; rounding adds
       ``step / 2``;
    2. three sums become float32 (``u`` each) and are added (``2 u``), a zero point in float64; two scales multiply
       (``2 u``), and the bias is added (``u``).

    A token with NaN or inf gives NaN or inf.
    """
    step = x.abs().amax(1, keepdim=True).float() / ((_BASE - 1) * _BASE ** (_DIGITS - 1))
    step = step.clamp(min=torch.finfo(torch.float32).tiny)
    fixed = torch.round(x / step).to(torch.int32)
    digits, rest = [], fixed
    for _ in range(_DIGITS - 1):
        digit = (rest + _BASE // 2).bitwise_and(_BASE - 1) - _BASE // 2
        digits.append(digit)
        rest = (rest - digit).bitwise_right_shift(_BASE.bit_length() - 1)
    # One call for all digits: the weight is read once.
    rows = rearrange(torch.stack([*digits, rest]), "d t c -> (d t) c").to(torch.int8)
    sums = rearrange(int_mm(rows, weight.codes), "(d t) n -> d t n", d=_DIGITS)
    # With a zero point large sums cancel.
    wide = torch.float32 if weight.zero_point is None else torch.float64
    low, middle, high = sums.to(wide).unbind()
    total = (high * _BASE + middle) * _BASE + low
    if weight.zero_point is not None:
        total = total - fixed.sum(1, keepdim=True).to(wide) * rearrange(weight.zero_point, "n 1 -> 1 n")
    y: Tensor = total.float() * step * rearrange(weight.scale, "n 1 -> 1 n")
    return y if bias is None else y + bias


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """:func:`quantize.core.linear.int_matmul` by ``torch._int_mm``."""
    if torch.compiler.is_exporting():
        # In the operators of torch alone; a row of zeros, for the reason below.
        return torch._int_mm(torch.constant_pad_nd(a, (0, 0, 0, 1)), b.T)[:-1]
    return _opaque_int_mm(a, b) if torch.compiler.is_compiling() else _int_mm(a, b)


def _int_mm(a: Tensor, b: Tensor) -> Tensor:
    # A compiler may hand over a single row with stride 0, which the operator misreads.
    a = a if a.stride(0) else a.new_empty(a.shape).copy_(a)
    if 1 < a.shape[0] <= _ROWS and b.numel() >= _LARGE:
        return torch.cat([torch._int_mm(row, b.T) for row in torch.split(a, 1)])
    return torch._int_mm(a, b.T)


@torch.library.custom_op("quantize::int_mm", mutates_args=())
def _opaque_int_mm(a: Tensor, b: Tensor) -> Tensor:
    """As :func:`_int_mm`: a compiler leaves it alone."""
    return _int_mm(a, b)


@_opaque_int_mm.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=torch.int32)


@functools.cache
def exact_int_mm() -> bool:
    """Whether ``torch._int_mm`` is exact here: without VNNI, sums of neighbours may saturate at 16 bits."""
    random = torch.Generator().manual_seed(0)
    for t, n, c in ((1, 33, 1030), (2, 64, 64), (40, 7, 515)):
        a, b = (torch.randint(0, 2, (rows, c), generator=random) * 255 - 128 for rows in (t, n))
        a[0], b[0] = -128, -128
        a, b = a.to(torch.int8), b.to(torch.int8)
        if not torch.equal(torch._int_mm(a, b.T), linear.int_matmul(a, b)):
            return False
    return True
