"""The integer and packed matmuls that ship with torch for the CPU.

Chosen by measurement on x86 with AVX-512 and VNNI. ``_int_mm`` is exact and several times faster than a float matmul
of the same shape. The packed matmuls are fast in bfloat16 and for few tokens; in other dtypes they are scalar code,
slower than dequantizing.

- int8 inputs: ``_int_mm``; the very bits of ``reference``.
- int8 weights alone, one scale a tensor or a channel: in bfloat16 ``_weight_int8pack_mm`` for a few tokens, and for
  more the weight dequantized in bfloat16; in float32 and float16 :func:`fixed_point_linear`.
- int4 weights alone, in bfloat16: ``_weight_int4pack_mm_for_cpu``, and for many tokens the weight dequantized.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from quantize.core import QTensor, Solution, linear
from quantize.shell.deploy.kernels import packed, reference
from quantize.shell.deploy.kernels.reference import Layout

# Up to so many tokens the packed matmuls of int8 and int4 win over one of the dequantized weight.
_FEW_INT8, _FEW_INT4 = 16, 64
# With fewer outputs, splitting the tokens costs more than the integer matmul saves.
_OUTPUTS = 1024


def obstacle(solved: Solution, _bias: Tensor | None, dtype: torch.dtype) -> str | None:
    """See :class:`.Kernel`."""
    scheme, inputs, (n, c) = solved.weight.scheme, solved.inputs, solved.weight.codes.shape
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{dtype} is none of float32, float16, bfloat16"
    if reference.narrow(scheme):
        block = packed.block_rows()
        if inputs is not None or scheme.bits != 4:
            return f"no matmul takes int{scheme.bits} weights and {inputs or 'float'} inputs"
        if dtype != torch.bfloat16:
            return f"the matmul of packed int4 is fast in bfloat16 only, not in {dtype}"
        if packed.group_size(scheme, c) is None:
            return f"{scheme} of {c} inputs is not in whole groups of 32, 64, 128 or 256"
        if not block:
            return "torch packs int4 for this processor in an order that is unknown here"
        return f"{n} outputs are no multiple of {block}" if n % block else None
    if scheme.strategy == "group":
        return "no matmul takes int8 groups"
    if inputs is None and dtype == torch.bfloat16:
        return None
    if inputs is None and n < _OUTPUTS:
        return f"with fewer than {_OUTPUTS} outputs in {dtype} it is no faster"
    if c == 1:
        return "a single input: torch._int_mm misreads a column"
    if c >= 1 << 17:
        return f"{c} inputs: sums may not fit int32"
    return None if exact_int_mm() else "torch._int_mm is not exact on this processor"


def prepare(solved: Solution, _bias: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """See :class:`.Kernel`; the exact scales stay beside those of the operators."""
    weight, held = solved.weight, reference.prepare(solved)
    if reference.narrow(weight.scheme):
        del held["codes"]
        held["packed"], held["scale_and_zero"] = packed.pack(weight)
    elif solved.inputs is None and dtype == torch.bfloat16:
        held["codes"] = packed.aligned(held["codes"])
        held["row_scale"] = weight.scale.to(dtype).expand(len(weight.codes), 1).flatten().contiguous()
    return held


def restore(held: Mapping[str, Tensor], layout: Layout) -> Solution:
    """See :class:`.Kernel`."""
    if "packed" in held:
        return reference.solution(packed.unpack(held["packed"], packed.block_rows()), held, layout)
    return reference.restore(held, layout)


def forward(x: Tensor, held: Mapping[str, Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
    """See :class:`.Kernel`."""
    if layout.spec.inputs is not None or x.dtype != layout.dtype:
        return reference.compute(x, restore(held, layout), bias, matmul=packed.int_mm)
    tokens = linear.smooth(x.reshape(-1, layout.c), held.get("smoothing")).to(x.dtype)
    if "row_scale" in held:
        y = _int8(tokens, held, layout, bias)
    elif "packed" in held:
        y = _int4(tokens, held, layout, bias)
    else:
        y = fixed_point_linear(tokens, restore(held, layout).weight, bias).to(x.dtype)
    return y.reshape(*x.shape[:-1], layout.n)


def _int8(x: Tensor, held: Mapping[str, Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
    codes, scale, zero_point = held["codes"], held["row_scale"], held.get("zero_point")
    # An exported graph is made for any number of tokens. Of tokens in other lengths the operator reads past the end.
    few = not torch.compiler.is_exporting() and 0 < x.shape[0] <= _FEW_INT8
    if zero_point is None and layout.c % 16 == 0 and few:
        y = packed.int8pack_mm(x, codes, scale)
        return y if bias is None else y + bias
    # bfloat16 holds all integers up to 256.
    codes = codes.to(x.dtype) if zero_point is None else codes.to(x.dtype) - zero_point
    return torch.nn.functional.linear(x, codes * scale[:, None], bias)


def _int4(x: Tensor, held: Mapping[str, Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
    words, pairs = held["packed"], held["scale_and_zero"]
    if torch.compiler.is_exporting() or x.shape[0] <= _FEW_INT4:
        y = packed.int4pack_mm(x, words, layout.c // len(pairs), pairs)
        return y if bias is None else y + bias
    return torch.nn.functional.linear(x, packed.dequantize(words, pairs, reference.zero_point(held)), bias)


def fixed_point_linear(x: Tensor, weight: QTensor, bias: Tensor | None) -> Tensor:
    """``x W^T + bias`` of float tokens ``[t, c]`` and int8 weights, a scale a tensor or a channel, by integer matmuls.

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
    step = x.abs().amax(1, keepdim=True).float() / (127 * 256**2)
    step = step.clamp(min=torch.finfo(torch.float32).tiny)
    fixed = torch.round(x / step).to(torch.int32)
    # A byte minus 128 is a digit, in two's complement: its highest bit turned. The addition carries to the next.
    offset = 0x80 * (1 + 256 + 256**2)
    digits = (fixed + offset).bitwise_xor(offset)[..., None].view(torch.int8)[..., :3]
    # One call for all digits: the weight is read once.
    sums = packed.int_mm(digits.permute(2, 0, 1).reshape(3 * t, c), weight.codes)
    # With a zero point large sums cancel.
    wide = torch.float32 if weight.zero_point is None else torch.float64
    low, middle, high = sums.view(3, t, weight.codes.shape[0]).to(wide).unbind()
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
