"""The kernel for the CPU, on the integer and packed matmuls that ship with torch.

It follows measurements on x86 with AVX-512 and VNNI. ``_int_mm`` is exact and several times faster than a float matmul
of the same shape. The packed matmuls are fast for few tokens in bfloat16. In other dtypes they are scalar code, which
is slower than dequantizing.

- int8 inputs: :func:`.integers.quantized_linear`, for codes of any width. The result equals that of ``reference``.
- int8 weights alone, with one scale for the tensor or each channel: ``_weight_int8pack_mm`` for a few tokens in
  bfloat16; :func:`.integers.fixed_point_linear` for large weights in float32 and float16; else a float matmul of the
  codes, whose result is scaled. This one may overflow for tokens above 2^127 / (255 c).
- int4 weights alone, in bfloat16: ``_weight_int4pack_mm_for_cpu`` for few tokens, else a matmul of the dequantized
  weight. The operator computes ``W = code * scale + zero`` in groups of inputs, with scale and zero in bfloat16. The
  order of its packed codes depends on the processor. :func:`block_rows` finds it out, so that unpacking is exact.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor

from quantize.core import Scheme, Solution, linear
from quantize.shell.deploy.kernels import integers, operators, reference
from quantize.shell.deploy.kernels.reference import Layout

# Up to so many tokens, the packed matmuls of int8 and int4 are faster than one of the dequantized weight.
_FEW_INT8, _FEW_INT4 = 16, 64
# With fewer codes, splitting the tokens costs more than the integer matmul saves.
_CODES = 1 << 18


def obstacle(solved: Solution, _bias: Tensor | None, dtype: torch.dtype) -> str | None:
    """See :class:`.Kernel`."""
    scheme, inputs, (n, c) = solved.weight.scheme, solved.inputs, solved.weight.codes.shape
    alone, half = inputs is None, dtype == torch.bfloat16
    packed = alone and reference.narrow(scheme)
    block = block_rows() if packed else 0
    reasons = {
        f"{dtype} is none of float32, float16, bfloat16": dtype not in (torch.float32, torch.float16, torch.bfloat16),
        f"no matmul takes int{scheme.bits} weights and float inputs": packed and scheme.bits != 4,
        f"the matmul of packed int4 is fast in bfloat16 only, not in {dtype}": packed and not half,
        f"{scheme} of {c} inputs is not in whole groups of 32, 64, 128 or 256": packed and not _group_size(scheme, c),
        "torch packs int4 for this processor in an order that is unknown here": packed and not block,
        f"{n} outputs are not a multiple of {block}": block and n % block,
        f"no matmul takes int{scheme.bits} groups": scheme.strategy == "group" and not packed,
    }
    reasons |= {} if alone else _no_sums(c)
    return next((reason for reason, holds in reasons.items() if holds), None)


def _no_sums(c: int) -> dict[str, bool]:
    """The reasons why :mod:`.integers` may not serve ``c`` inputs, and whether each one holds."""
    return {
        "a single input: torch._int_mm misreads a column": c == 1,
        f"{c} inputs: sums may not fit int32": c > 1 << 16,
        "torch._int_mm is not exact on this processor": not operators.exact_int_mm(),
    }


def prepare(solved: Solution, dtype: torch.dtype) -> dict[str, Tensor]:
    """See :class:`.Kernel`. The result has the exact scales, besides the rounded ones of the operators."""
    weight, held = solved.weight, reference.parameters(solved)
    (n, c), scale = weight.codes.shape, weight.scale.to(torch.bfloat16)
    if solved.inputs is None and reference.narrow(weight.scheme):
        # The zero is made from the rounded scale, so that its error counts ``code - zero_point`` times only.
        wide = scale.to(weight.scale.dtype)
        zero = torch.zeros_like(wide) if weight.zero_point is None else -weight.zero_point * wide
        pairs = torch.stack([wide, zero], -1).expand(n, c // (_group_size(weight.scheme, c) or c), 2)
        words = torch._convert_weight_to_int4pack_for_cpu(weight.codes.to(torch.int32) + 8, 1)
        block = block_rows()
        held["codes"] = words.view(n // block, c, block // 2)
        held["scale_and_zero"] = rearrange(pairs, "n g p -> g n p").to(torch.bfloat16).contiguous()
    elif solved.inputs is None and dtype == torch.bfloat16:
        held["codes"] = operators.aligned(weight.codes)
        held["row_scale"] = scale.expand(n, 1).flatten().contiguous()
    elif solved.inputs is None and (n * c < _CODES or any(_no_sums(c).values())):
        held["codes"] = weight.codes.contiguous()
    else:
        held |= integers.prepare(weight)
    return held


def unpack(held: Mapping[str, Tensor], _layout: Layout) -> Tensor:
    """See :class:`.Kernel`."""
    return rows(held["codes"]) if "scale_and_zero" in held else held["codes"]


def forward(x: Tensor, held: Mapping[str, Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
    """See :class:`.Kernel`."""
    tokens = x.reshape(-1, layout.c)
    if layout.spec.inputs is not None:
        return integers.quantized_linear(tokens, held, layout, bias).reshape(*x.shape[:-1], layout.n)
    if x.dtype != layout.dtype:
        return reference.compute(x, reference.restore(held, layout, unpack), bias)
    tokens = linear.smooth(tokens, held.get("smoothing")).to(x.dtype)
    if "scale_and_zero" in held:
        y = int4_linear(tokens, held, layout, bias)
    elif "row_scale" in held:
        y = _int8(tokens, held, layout, bias)
    elif "sums" in held:
        y = integers.fixed_point_linear(tokens, held, bias).to(x.dtype)
    else:
        y = _scaled(tokens.float(), held["codes"], held["scale"].T, held.get("zero_point"), bias).to(x.dtype)
    return y.reshape(*x.shape[:-1], layout.n)


def _int8(x: Tensor, held: Mapping[str, Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
    codes, scale, zero_point = held["codes"], held["row_scale"], held.get("zero_point")
    # An exported graph serves any number of tokens. Unless 16 divides c, the operator reads past the end.
    few = not torch.compiler.is_exporting() and 0 < x.shape[0] <= _FEW_INT8
    if zero_point is None and layout.c % 16 == 0 and few:
        y = operators.int8pack_mm(x, codes, scale)
        return y if bias is None else y + bias
    return _scaled(x, codes, scale, zero_point, bias)


def _scaled(x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None) -> Tensor:
    # This is exact: even bfloat16 holds all integers up to 256.
    codes = codes.to(x.dtype) if zero_point is None else codes.to(x.dtype) - zero_point
    y = torch.nn.functional.linear(x, codes) * scale
    return y if bias is None else y + bias


def int4_linear(x: Tensor, held: Mapping[str, Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
    """``x W^T + bias`` of bfloat16 tokens ``[t, c]`` and packed int4 weights: ``[t, n]``."""
    words, pairs = held["codes"], held["scale_and_zero"]
    if torch.compiler.is_exporting() or x.shape[0] <= _FEW_INT4:
        y = operators.int4pack_mm(x, words.view(layout.n, -1), layout.c // len(pairs), pairs)
        return y if bias is None else y + bias
    scale, zero_point = pairs[..., 0].contiguous(), reference.zero_point(held)
    zero = 8 if zero_point is None else 8 + zero_point.T.expand(scale.shape)[:, None]
    codes = rearrange(_columns(words), "m (g k) d -> g k (m d)", g=len(scale))
    # Each product of a code and a scale is rounded once; the weight is a transposed view.
    weight = rearrange((codes - zero).to(scale.dtype) * scale[:, None], "g k n -> n (g k)")
    return torch.nn.functional.linear(x, weight, bias)


def rows(words: Tensor) -> Tensor:
    """Unpack the words ``[n / block, c, block / 2]`` of the int4 operator into int8 codes ``[n, c]``.

    A block of rows is stored column by column. A byte holds row ``d`` in its low bits, and row ``d + block / 2`` in its
    high bits.
    """
    return rearrange(_columns(words) - 8, "m c d -> (m d) c")


def _columns(words: Tensor) -> Tensor:
    """Codes plus 8, int8, in the order of the words: ``[n / block, c, block]``."""
    return torch.cat([words.bitwise_and(0xF), words.bitwise_right_shift(4)], -1).view(torch.int8)


@functools.cache
def block_rows() -> int:
    """The number of rows that torch packs into a block on this processor; 0 if :func:`rows` cannot unpack them."""
    random = torch.Generator("cpu").manual_seed(0)
    codes = torch.randint(-8, 8, (64, 32), generator=random, dtype=torch.int8, device="cpu")
    words = torch._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32) + 8, 1)
    known = (block for block in (64, 32) if torch.equal(rows(words.view(-1, 32, block // 2)), codes))
    return next(known, 0)


def _group_size(scheme: Scheme, c: int) -> int | None:
    """The group size for the int4 operator on ``c`` inputs, or None; scales of rows are repeated for each group."""
    return next((size for size in (256, 128, 64, 32) if c % size == 0 and scheme.group_size in (None, size)), None)
