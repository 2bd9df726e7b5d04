"""The kernel for Ascend 910B and 910C, on the operators of torch_npu. Calls follow their documentation.

- weights alone: ``npu_weight_quant_batchmatmul``, with int8 codes, or int4 codes packed eight to an int32;
- static int8 inputs: ``npu_quantize`` and ``npu_quant_matmul``. The scales of the first contain the smoothing, and the
  int32 bias of the second contains the zero point of the inputs;
- int8 inputs with a scale for each token: ``npu_dynamic_quant`` and ``npu_quant_matmul``.

With quantized inputs the operators accept no zero point of the weight, so it is subtracted from the int8 codes.

The operators are looked up when they are called. The model is then on the device, so torch_npu has been imported.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor

from quantize.core import Solution, linear, packing
from quantize.shell.deploy.kernels import reference
from quantize.shell.deploy.kernels.reference import Layout


def obstacle(solved: Solution, bias: Tensor | None, dtype: torch.dtype) -> str | None:
    """See :class:`.Kernel`."""
    scheme, inputs, (n, c) = solved.weight.scheme, solved.inputs, solved.weight.codes.shape
    alone, size, dynamic = inputs is None, scheme.group_size, inputs is not None and solved.static is None
    reasons = {
        f"{dtype} is neither float16 nor bfloat16": dtype not in (torch.float16, torch.bfloat16),
        f"{n} outputs and {c} inputs: at most 65535 of each are taken": max(n, c) > 65535,
        f"no operator takes int{scheme.bits} weights": scheme.bits not in (4, 8),
        f"{n} outputs are not a multiple of 8": alone and scheme.bits == 4 and n % 8,
        f"group_size {size} is not a multiple of 32 below {c}": size is not None and (size % 32 or size >= c),
        "npu_dynamic_quant is symmetric": dynamic and inputs is not None and not inputs.symmetric,
    }
    return next((reason for reason, holds in reasons.items() if holds), None) or _values(solved, bias, dtype)


def _values(solved: Solution, bias: Tensor | None, dtype: torch.dtype) -> str | None:
    """The reason why the operators cannot hold the numbers of a layer, whose format they accept; or None."""
    weight = solved.weight if solved.inputs is None else linear.centered(solved.weight)
    if weight is None:
        return "codes of the weight minus their zero point do not fit the int8 of npu_quant_matmul"
    if solved.static is None:
        factors = None if solved.smoothing is None else 1 / solved.smoothing
        scale = weight.scale if solved.inputs is None else factors
        # Rounding to a dtype only loses more than this outside its normal range.
        if scale is None or ((scale.to(dtype).to(scale.dtype) - scale).abs() <= 2.0**-8 * scale.abs()).all():
            return None
        return f"scales from {scale.min().item():.3g} to {scale.max().item():.3g} do not fit {dtype}"
    held, folded = prepare(solved, dtype), linear.integer_bias(weight, solved.static).cpu().double()
    if bias is not None:
        # In float64, so that an overflow of int32 is seen.
        folded = folded + torch.round(bias.detach().cpu().double() / held["output_scale"].cpu().double())
    # The sum of the products is added to this.
    reach = 2**31 - weight.codes.shape[1] * 2**14
    if not bool(((folded >= -reach) & (folded < reach)).all()):
        return "bias and zero point of the inputs do not fit the int32 bias of npu_quant_matmul"
    finite = bool(held["input_multiplier"].isfinite().all())
    return None if finite else "an input scale whose reciprocal is too large for float32"


def prepare(solved: Solution, dtype: torch.dtype) -> dict[str, Tensor]:
    """See :class:`.Kernel`. The result has the exact parameters, besides those of the operators."""
    static, held = solved.static, reference.parameters(solved)
    weight = solved.weight if solved.inputs is None else linear.centered(solved.weight)
    assert weight is not None
    words = weight.scheme.bits == 4 and solved.inputs is None
    held["codes"] = (packing.pack_int4(weight.codes.T, torch.int32) if words else weight.codes).contiguous()
    if solved.inputs is None:
        rows = {"antiquant_scale": weight.scale.to(dtype)}
        if weight.zero_point is not None:
            rows["antiquant_offset"] = -weight.zero_point.to(dtype)
        # The shapes become [1], [1, n] or [g, n].
        held.update({name: row.flatten() if row.numel() == 1 else row.T.contiguous() for name, row in rows.items()})
    elif static is None:
        held["output_scale"] = weight.scale.float().flatten()
        if solved.smoothing is not None:
            held["smooth_scales"] = (1 / solved.smoothing).to(dtype)
    else:
        scale, unit = static.scale.flatten(), (weight.scale * static.scale).float().flatten()
        multiplier = (1 / (scale if solved.smoothing is None else scale * solved.smoothing)).float()
        if dtype == torch.float16:
            # The operator truncates the mantissa to 10 bits, so it is rounded to 10 bits before.
            mantissa, exponent = torch.frexp(unit.cpu())
            unit = torch.ldexp(torch.round(mantissa * 2**11) / 2**11, exponent).to(unit.device)
        held["input_multiplier"], held["output_scale"] = multiplier, unit
        if static.zero_point is not None:
            held["input_offset"] = static.zero_point.float().flatten().expand_as(multiplier).contiguous()
            held["output_offset"] = linear.integer_bias(weight, static).to(torch.int32)
    return held


def unpack(held: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """See :class:`.Kernel`."""
    codes = held["codes"]
    if layout.spec.inputs is None:
        return packing.unpack_int4(codes, layout.n).T.contiguous() if codes.dtype == torch.int32 else codes
    zero_point = reference.zero_point(held)
    return codes if zero_point is None else codes + zero_point


def forward(x: Tensor, held: Mapping[str, Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
    """See :class:`.Kernel`."""
    if x.dtype != layout.dtype:
        return reference.compute(x, reference.restore(held, layout, unpack), bias)
    # The operators refuse tensors without elements.
    if x.numel() == 0:
        return x.new_zeros(*x.shape[:-1], layout.n)
    matmul = _weights_alone if layout.spec.inputs is None else _integers
    return matmul(rearrange(x, "... c -> (...) c"), held, layout, bias).reshape(*x.shape[:-1], layout.n)


def _weights_alone(x: Tensor, held: Mapping[str, Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
    return torch.ops.npu.npu_weight_quant_batchmatmul(  # type: ignore[no-any-return] # operators are untyped
        linear.smooth(x, held.get("smoothing")).to(x.dtype),
        held["codes"] if held["codes"].dtype == torch.int32 else held["codes"].T,
        held["antiquant_scale"],
        antiquant_offset=held.get("antiquant_offset"),
        # By the documentation, the bias is float32 for bfloat16, and float16 for float16.
        bias=bias if bias is None or x.dtype == torch.float16 else bias.float(),
        antiquant_group_size=layout.spec.weight.group_size or 0,
    )


def _integers(x: Tensor, held: Mapping[str, Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
    if "input_multiplier" in held:
        # In float32, because scales of 16 bits would change codes.
        multiplier, offset = held["input_multiplier"], held.get("input_offset")
        codes, scale = torch.ops.npu.npu_quantize(x.float(), multiplier, offset, torch.qint8, -1, False), None
        total = held.get("output_offset")
        if bias is not None:
            # In units of the sum. Each call computes this again, because the bias may have been changed.
            units = torch.round(bias.float() / held["output_scale"]).to(torch.int32)
            total = units if total is None else units + total
    else:
        codes, scale = torch.ops.npu.npu_dynamic_quant(x, smooth_scales=held.get("smooth_scales"))
        total = None if bias is None else bias.float()
    # The weight has to be a transposed view. In a contiguous copy the operator would not see the transpose.
    return torch.ops.npu.npu_quant_matmul(  # type: ignore[no-any-return] # operators are untyped
        codes, held["codes"].T, held["output_scale"], pertoken_scale=scale, bias=total, output_dtype=layout.dtype
    )
