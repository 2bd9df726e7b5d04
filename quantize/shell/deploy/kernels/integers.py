"""Linear layers on ``torch._int_mm`` with unsigned tokens, for weights with one scale for the tensor or each channel.

x86 multiplies unsigned bytes by signed ones. With AVX-512 and VNNI, unsigned tokens took half the time of signed ones
for one token, and a tenth less for many. Small layers spend most of their time on starting operators, so this code uses
few. The operator of oneDNN on packed weights, ``onednn.qlinear_pointwise``, is no faster up to 4 million codes, takes
twice the time for one token, and needs the codes in a tensor that can be neither copied nor exported.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import reduce
from torch import Tensor

from quantize.core import QParams, QTensor, Scheme, affine, linear
from quantize.shell.deploy.kernels import operators, reference
from quantize.shell.deploy.kernels.reference import Layout

# This added to int8 codes gives unsigned bytes; it flips the highest bit.
_MIDDLE = 128
# Sums of so many products may overflow int32, if tokens or weights have a zero point.
_INT32_LENGTH = 1 << 15


def prepare(weight: QTensor) -> dict[str, Tensor]:
    """The codes in the best form for :func:`.operators.int_mm`, and ``sums`` ``[1, n]`` of codes minus zero point."""
    sums = reduce(weight.codes.to(torch.int64), "n c -> 1 n", "sum")
    if weight.zero_point is not None:
        sums = sums - weight.codes.shape[1] * weight.zero_point.to(torch.int64).T
    return {"codes": operators.spaced(weight.codes), "sums": sums.to(torch.int32)}


def quantized_linear(x: Tensor, held: Mapping[str, Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
    """:func:`quantize.core.linear.quantized_linear` of int8 tokens ``[t, c]``, bit for bit."""
    inputs = layout.spec.inputs
    assert inputs is not None
    x, dtype = linear.smooth(x, held.get("smoothing")), x.dtype
    x = x.to(affine.working_dtype(x))
    scale, zero_point = _params(x, held, inputs)
    codes = (x / scale).round_()
    codes = codes if zero_point is None else codes.add_(zero_point)
    codes = codes.clamp_(inputs.qmin, inputs.qmax).to(torch.int8).bitwise_xor_(-_MIDDLE).to(torch.uint8)
    total = _products(codes, held, _MIDDLE if zero_point is None else zero_point.to(torch.int32) + _MIDDLE)
    y = total * scale * held["scale"].T
    return (y if bias is None else y + bias).to(dtype)


def _params(x: Tensor, held: Mapping[str, Tensor], inputs: Scheme) -> QParams:
    if "input_scale" in held:
        return QParams(held["input_scale"], held.get("input_zero_point"))
    if not inputs.symmetric:
        return linear.input_params(x, inputs)
    # This is affine.qparams in fewer steps. A range need not contain 0, because its longer tail is the same. A token of
    # zeros may have any scale, because its sums are 0.
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    scale = torch.where(-low > high, low / inputs.qmin, high / inputs.qmax)
    return QParams(scale.clamp(min=torch.finfo(x.dtype).tiny))


def _products(tokens: Tensor, held: Mapping[str, Tensor], middle: Tensor | int) -> Tensor:
    """``sum_c (tokens - middle) (codes - zero_point)`` ``[t, n]`` for tokens ``[t, c]`` in uint8: exact integers.

    With ``q`` and ``z`` for codes and zero point, and ``u - m`` for tokens minus ``middle``::

        sum_c (u - m) (q - z) = sum_c u q - m sum_c (q - z) - z sum_c u

    Each term fits int32 for ``c <= 2^16``, and so does the whole; with a zero point, for ``c < _INT32_LENGTH``.
    """
    total, zero_point = operators.int_mm(tokens, held["codes"]), reference.zero_point(held)
    if tokens.shape[1] >= _INT32_LENGTH and (zero_point is not None or isinstance(middle, Tensor)):
        total = total.to(torch.int64)
    if isinstance(middle, Tensor):
        total = total - middle.to(total.dtype) * held["sums"]
    else:
        total = total.sub_(held["sums"], alpha=middle)
    if zero_point is not None:
        total = total - tokens.sum(1, keepdim=True, dtype=total.dtype) * zero_point.T
    return total


def fixed_point_linear(x: Tensor, held: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    """``x W^T + bias`` of float tokens ``[t, c]`` and int8 weights: ``[t, n]`` in float32.

    A token is rounded to multiples of ``step = max(max|x| / (127 * 2^16), 2^-126)``, which has 24 bits as float32 has.
    It is split into three digits of one byte, and the product of each digit with the weight is exact. With
    ``u`` = 2^-24 and ``m = |x| |W|^T + |bias|``::

        |error| <= step * sum |W| + 8 u m

    1. ``x / step`` is at most 2^23: its rounding errors are below 1/2, and rounding it to an integer adds 1/2;
    2. three sums become float32 (``u`` each) and are added (``2 u``); two scales multiply (``2 u``), and the bias is
       added (``u``).

    A token with NaN or inf gives NaN or inf.
    """
    t, c = x.shape
    step = x.abs().amax(1, keepdim=True).float() / (127 * 256**2)
    step = step.clamp_(min=torch.finfo(torch.float32).tiny)
    # The digits are the three low bytes minus 128. The fourth byte is 0.
    fixed = (x / step).round_().to(torch.int32) + _MIDDLE * (1 + 256 + 256**2)
    digits = fixed[..., None].view(torch.uint8).permute(2, 0, 1)[:3]
    # One call for all digits reads the weight only once.
    sums = _products(digits.reshape(3 * t, c), held, _MIDDLE).float()
    low, middle, high = sums.view(3, t, sums.shape[1]).unbind()
    total = high.add(middle, alpha=1 / 256).add_(low, alpha=1 / 256**2)
    # The scales are multiplied first, because the total times one of them may overflow; a step alone may underflow.
    y: Tensor = total * (step * 256**2 * held["scale"].T)
    return y if bias is None else y + bias
