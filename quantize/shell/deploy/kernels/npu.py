"""The operators of torch_npu, on Ascend 910B and 910C, in the forms that their documentation accepts.

- weights alone: ``npu_weight_quant_batchmatmul``, int8 as it is and int4 eight to an int32;
- static int8 inputs: ``npu_quantize`` and ``npu_quant_matmul``, with the smoothing in the scales of the first, and the
  zero point of the inputs in the int32 bias of the second;
- int8 inputs with a scale for each token: ``npu_dynamic_quant`` and ``npu_quant_matmul``.

The operators are looked up when they are called: whoever moves a model to such a device has imported torch_npu.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import rearrange, reduce
from torch import Tensor

from quantize.core import QTensor, Solution, linear, packing
from quantize.shell.deploy.kernels import reference
from quantize.shell.deploy.kernels.contract import Layout

DEVICES = frozenset({"npu"})
_LONGEST = 65535
_PER_WORD = 8
# Scales are rounded to the dtype of the inputs; below its normal range they would lose more than this.
_LOSS = 2.0**-8


def obstacle(solved: Solution, bias: Tensor | None, dtype: torch.dtype) -> str | None:
    """See :class:`.Kernel`."""
    weight, inputs = solved.weight, solved.inputs
    n, c = weight.codes.shape
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{dtype} is neither float16 nor bfloat16"
    if max(n, c) > _LONGEST:
        return f"{n} outputs and {c} inputs: at most {_LONGEST} of each are taken"
    if weight.scheme.bits not in (4, 8) or (inputs is not None and weight.scheme.bits != 8):
        return f"no operator takes int{weight.scheme.bits} weights and {inputs or 'float'} inputs"
    if inputs is None:
        return _obstacle_of_weights(weight, dtype)
    if solved.static is not None:
        folded = _folded_bias(solved, bias, dtype)
        # The sum of the products may come on top.
        low, high = -(2**31) + c * 2**14, 2**31 - 1 - c * 2**14
        fits = bool((folded >= low).all() & (folded <= high).all())
        if not fits:
            return "bias and zero point of the inputs do not fit the int32 bias of npu_quant_matmul"
        multiplier = _multiplier(solved)
        return None if bool(multiplier.isfinite().all()) else "an input scale too small to be divided by in float32"
    if not inputs.symmetric:
        return "npu_dynamic_quant is symmetric"
    return None if solved.smoothing is None else _loss(1 / solved.smoothing, dtype)


def _obstacle_of_weights(weight: QTensor, dtype: torch.dtype) -> str | None:
    scheme, (n, c) = weight.scheme, weight.codes.shape
    if scheme.bits == 4 and n % _PER_WORD:
        return f"{n} outputs are no multiple of {_PER_WORD}"
    size = scheme.group_size
    if size is not None and (size % 32 or not 32 <= size < c):
        return f"group_size {size} is no multiple of 32 below {c}"
    return _loss(weight.scale, dtype)


def prepare(solved: Solution, _bias: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """See :class:`.Kernel`; the exact parameters stay beside the operators' own."""
    weight, held = solved.weight, reference.prepare(solved)
    if solved.static is not None:
        held["input_multiplier"] = multiplier = _multiplier(solved)
        if solved.static.zero_point is not None:
            held["input_offset"] = solved.static.zero_point.float().flatten().expand_as(multiplier).contiguous()
            held["output_offset"] = _folded_bias(solved, None, dtype).to(torch.int32).to(weight.codes.device)
        held["output_scale"] = _output_scale(solved, dtype).to(weight.codes.device)
    elif solved.inputs is None:
        if weight.scheme.bits == 4:
            held["codes"] = packing.pack_int4(weight.codes.T, torch.int32).contiguous()
        held["antiquant_scale"] = _antiquant(weight.scale, dtype)
        if weight.zero_point is not None:
            held["antiquant_offset"] = -_antiquant(weight.zero_point, dtype)
    else:
        held["output_scale"] = weight.scale.float().flatten()
        if solved.smoothing is not None:
            held["smooth_scales"] = (1 / solved.smoothing).to(dtype)
    return held


def restore(held: Mapping[str, Tensor], layout: Layout) -> Solution:
    """See :class:`.Kernel`."""
    if held["codes"].dtype != torch.int32:
        return reference.restore(held, layout)
    return reference.solution(packing.unpack_int4(held["codes"], layout.n).T.contiguous(), held, layout)


def forward(x: Tensor, held: Mapping[str, Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
    """See :class:`.Kernel`."""
    if x.dtype != layout.dtype:
        return reference.compute(x, restore(held, layout), bias)
    # The operators refuse tensors without elements.
    if x.numel() == 0:
        return x.new_zeros(*x.shape[:-1], layout.n)
    tokens = rearrange(x, "... c -> (...) c")
    if layout.spec.inputs is None:
        y = _weight_only(tokens, held, layout, bias)
    elif "input_scale" in held:
        y = _static(tokens, held, layout, bias)
    else:
        y = _dynamic(tokens, held, layout, bias)
    return y.reshape(*x.shape[:-1], layout.n)


def _weight_only(x: Tensor, held: Mapping[str, Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
    codes, scale = held["codes"], held["antiquant_scale"]
    tokens = linear.smooth(x, held.get("smoothing")).to(x.dtype)
    # The documented bias is float32 for bfloat16, and float16 for float16.
    bias = bias if bias is None or scale.dtype == torch.float16 else bias.float()
    return torch.ops.npu.npu_weight_quant_batchmatmul(  # type: ignore[no-any-return] # operators are untyped
        tokens,
        codes if codes.dtype == torch.int32 else codes.T,
        scale,
        antiquant_offset=held.get("antiquant_offset"),
        bias=bias,
        antiquant_group_size=layout.spec.weight.group_size or 0,
    )


def _static(x: Tensor, held: Mapping[str, Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
    multiplier, offset = held["input_multiplier"], held.get("input_offset")
    # In float32: scales of 16 bits would move codes.
    codes = torch.ops.npu.npu_quantize(x.float(), multiplier, offset, torch.qint8, -1, False)
    total = held.get("output_offset")
    if bias is not None:
        # In units of the sum; anew at each call, since a bias may be written to.
        units = torch.round(bias.float() / held["output_scale"]).to(torch.int32)
        total = units if total is None else units + total
    return _quant_matmul(codes, held, layout, bias=total)


def _dynamic(x: Tensor, held: Mapping[str, Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
    codes, scale = torch.ops.npu.npu_dynamic_quant(x, smooth_scales=held.get("smooth_scales"))
    return _quant_matmul(codes, held, layout, pertoken_scale=scale, bias=None if bias is None else bias.float())


def _quant_matmul(codes: Tensor, held: Mapping[str, Tensor], layout: Layout, **more: Tensor | None) -> Tensor:
    # A transposed view: made contiguous, the operator would no longer see the transpose.
    return torch.ops.npu.npu_quant_matmul(  # type: ignore[no-any-return] # operators are untyped
        codes, held["codes"].T, held["output_scale"], output_dtype=layout.dtype, **more
    )


def _multiplier(solved: Solution) -> Tensor:
    """``1 / (input scale * smoothing)``, float32 ``[c]`` or ``[1]``."""
    assert solved.static is not None
    scale = solved.static.scale.flatten()
    return (1 / (scale if solved.smoothing is None else scale * solved.smoothing)).float()


def _output_scale(solved: Solution, dtype: torch.dtype) -> Tensor:
    """``[n]`` or ``[1]`` float32, on the CPU: what a unit of the integer sum is worth with static inputs.

    For float16 outputs the operator cuts the mantissa to 10 bits; rounded to them here, nothing is left to cut, and
    the error is at most 2^-11 of the scale.
    """
    assert solved.static is not None
    scale = (solved.weight.scale * solved.static.scale).float().flatten().cpu()
    if dtype != torch.float16:
        return scale
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp(torch.round(mantissa * 2**11) / 2**11, exponent)


def _folded_bias(solved: Solution, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``round(bias / scale) - zero_point * sum_c codes``, ``[n]``, in float64 on the CPU: there an overflow shows."""
    assert solved.static is not None
    codes, zero_point = solved.weight.codes, solved.static.zero_point
    folded = torch.zeros(codes.shape[0], dtype=torch.float64)
    if bias is not None:
        folded = torch.round(bias.detach().cpu().double() / _output_scale(solved, dtype).double())
    if zero_point is None:
        return folded
    sums = reduce(codes.to(torch.int32), "n c -> n", "sum").cpu()
    return folded - zero_point.cpu().double().flatten() * sums


def _loss(scale: Tensor, dtype: torch.dtype) -> str | None:
    rounded = scale.to(dtype).to(scale.dtype)
    if bool(((rounded - scale).abs() <= _LOSS * scale).all()):
        return None
    return f"scales from {scale.min().item():.3g} to {scale.max().item():.3g} do not fit {dtype}"


def _antiquant(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """``[1]``, ``[1, n]`` or ``[g, n]``, as ``npu_weight_quant_batchmatmul`` takes scales and offsets."""
    rows = parameter.to(dtype).T.contiguous()
    return rows.flatten() if rows.numel() == 1 else rows
