"""The integer and packed matmuls that ship with torch for the CPU.

Chosen by measurement on x86 with AVX-512 and VNNI. ``_int_mm`` is exact and several times faster than a float matmul
of the same shape. The packed matmuls are fast in bfloat16 and for few tokens; in other dtypes they are scalar code,
slower than dequantizing.

- int8 inputs: ``_int_mm``; the very bits of ``reference``.
- int8 weights alone, one scale a tensor or a channel: in bfloat16 ``_weight_int8pack_mm`` for a few tokens, and for
  more the weight dequantized in bfloat16; in float32 and float16 :func:`fixed_point_linear`.
- int4 weights alone, in bfloat16: see :mod:`~quantize.shell.deploy.kernels.nibbles`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from quantize.core import QTensor, Solution, linear
from quantize.shell.deploy.kernels import nibbles, packed, reference
from quantize.shell.deploy.kernels.contract import Layout

DEVICES = frozenset({"cpu"})
# Up to so many tokens _weight_int8pack_mm wins over a matmul of the dequantized weight.
_FEW = 16
# The length of a token must be a multiple of this, or _weight_int8pack_mm reads past its end.
_INT8PACK = 16
# With fewer outputs, splitting the tokens costs more than the integer matmul saves.
_OUTPUTS = 1024
# So many products of two int8 fill an int32.
_LONGEST = 1 << 17
# Fixed point: digits of a byte, the highest up to 127.
_DIGITS = 3


def obstacle(solved: Solution, _bias: Tensor | None, dtype: torch.dtype) -> str | None:
    """See :class:`.Kernel`."""
    weight, scheme = solved.weight, solved.weight.scheme
    n, c = weight.codes.shape
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{dtype} is none of float32, float16, bfloat16"
    if reference.narrow(scheme):
        return nibbles.obstacle(solved, dtype)
    if scheme.strategy == "group":
        return "no matmul takes int8 groups"
    if solved.inputs is None and dtype == torch.bfloat16:
        return None
    if solved.inputs is None and n < _OUTPUTS:
        return f"with fewer than {_OUTPUTS} outputs in {dtype} it is no faster"
    if c == 1:
        return "a single input: torch._int_mm misreads a column"
    if c >= _LONGEST:
        return f"{c} inputs: sums may not fit int32"
    return None if exact_int_mm() else "torch._int_mm is not exact on this processor"


def prepare(solved: Solution, _bias: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """See :class:`.Kernel`."""
    weight = solved.weight
    if reference.narrow(weight.scheme):
        return nibbles.prepare(solved)
    held, n = reference.prepare(solved), len(weight.codes)
    if solved.inputs is None and dtype == torch.bfloat16:
        held["codes"] = packed.aligned(held["codes"])
        held["row_scale"] = weight.scale.to(dtype).expand(n, 1).flatten().contiguous()
    return held


def restore(held: Mapping[str, Tensor], layout: Layout) -> Solution:
    """See :class:`.Kernel`."""
    return nibbles.restore(held, layout) if reference.narrow(layout.spec.weight) else reference.restore(held, layout)


def forward(x: Tensor, held: Mapping[str, Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
    """See :class:`.Kernel`."""
    if reference.narrow(layout.spec.weight):
        return nibbles.forward(x, held, layout, bias)
    s = restore(held, layout)
    if s.inputs is not None:
        return reference.compute(x, s, bias, matmul=int_mm)
    if x.dtype != layout.dtype:
        return reference.compute(x, s, bias)
    tokens = linear.smooth(x.reshape(-1, layout.c), s.smoothing).to(x.dtype)
    if "row_scale" not in held:
        y = fixed_point_linear(tokens, s.weight, bias)
    elif s.weight.zero_point is None and layout.c % _INT8PACK == 0 and few(tokens, _FEW):
        y = packed.int8pack_mm(tokens, s.weight.codes, held["row_scale"])
        y = y if bias is None else y + bias
    else:
        # bfloat16 holds all integers up to 256.
        codes = s.weight.codes.to(x.dtype)
        codes = codes if s.weight.zero_point is None else codes - s.weight.zero_point
        y = torch.nn.functional.linear(tokens, codes * held["row_scale"][:, None], bias)
    return y.to(x.dtype).reshape(*x.shape[:-1], layout.n)


def few(tokens: Tensor, most: int) -> bool:
    """Whether ``tokens`` ``[t, c]`` are from 1 to ``most``; an exported graph is made for more."""
    return not torch.compiler.is_exporting() and 0 < tokens.shape[0] <= most


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """:func:`quantize.core.linear.int_matmul` by ``torch._int_mm``."""
    if torch.compiler.is_exporting():
        # In the operators of torch alone. A row of zeros more: a single row may come with a stride that is misread.
        return torch._int_mm(torch.constant_pad_nd(a, (0, 0, 0, 1)), b.T)[:-1]
    return packed.int_mm(a, b)


def fixed_point_linear(
    x: Tensor, weight: QTensor, bias: Tensor | None, *, matmul: Callable[[Tensor, Tensor], Tensor] = int_mm
) -> Tensor:
    """``x W^T + bias`` of float tokens ``[t, c]`` and int8 weights, a scale a tensor or a channel, by integer matmuls.

    ``matmul`` has to be exact: :func:`int_mm` where :func:`exact_int_mm` says so, or
    :func:`quantize.core.linear.int_matmul`.

    A token is rounded to multiples of ``step = max(max|x| / (127 * 2^16), 2^-126)``, which has 24 bits as float32 has,
    and split into three digits of a byte; the product of each digit with the codes is exact. With ``u`` = 2^-24 and
    ``m = |x| |W|^T + |bias|``::

        |error| <= step * sum |W| + 8 u m

    1. ``x / step`` is at most 2^23: its rounding errors are below 1/2, and rounding it to an integer adds 1/2;
    2. three sums become float32 (``u`` each) and are added (``2 u``; with a zero point all in float64); two scales
       multiply (``2 u``), and the bias is added (``u``).

    A token with NaN or inf gives NaN or inf.
    """
    t, c = x.shape
    step = x.abs().amax(1, keepdim=True).float() / (127 * 256 ** (_DIGITS - 1))
    step = step.clamp(min=torch.finfo(torch.float32).tiny)
    fixed = torch.round(x / step).to(torch.int32)
    # A byte minus 128 is a digit, in two's complement: its highest bit turned. The addition carries to the next.
    offset = 0x80 * (1 + 256 + 256**2)
    digits = (fixed + offset).bitwise_xor(offset)[..., None].view(torch.int8)[..., :_DIGITS]
    # One call for all digits: the weight is read once.
    sums = matmul(digits.permute(2, 0, 1).reshape(_DIGITS * t, c), weight.codes)
    # With a zero point large sums cancel.
    wide = torch.float32 if weight.zero_point is None else torch.float64
    low, middle, high = sums.view(_DIGITS, t, weight.codes.shape[0]).to(wide).unbind()
    total = (high * 256 + middle) * 256 + low
    if weight.zero_point is not None:
        total = total - fixed.sum(1, keepdim=True) * weight.zero_point.T.to(wide)
    # The scales first: the total times one of them may overflow.
    y: Tensor = total.float() * (step * weight.scale.T)
    return y if bias is None else y + bias


@functools.cache
def exact_int_mm() -> bool:
    """Whether ``torch._int_mm`` is exact here: without VNNI, sums of neighbours may saturate at 16 bits."""
    random = torch.Generator("cpu").manual_seed(0)
    for t, n, c in ((1, 33, 1030), (2, 64, 64), (40, 7, 515)):
        a, b = (torch.randint(0, 2, (rows, c), generator=random, device="cpu") * 255 - 128 for rows in (t, n))
        a[0], b[0] = -128, -128
        a, b = a.to(torch.int8), b.to(torch.int8)
        if not torch.equal(torch._int_mm(a, b.T), linear.int_matmul(a, b)):
            return False
    return True
