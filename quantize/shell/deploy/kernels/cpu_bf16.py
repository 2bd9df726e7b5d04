"""The kernel for int4 weights in float32 and float16 models, on the bfloat16 matmuls of :mod:`.cpu`; on request only.

Tokens are rounded to bfloat16, and results are converted back. With ``u`` = 2^-8, ``v`` = 2^-24, ``r`` the unit
roundoff of the model's dtype, and ``m`` the sum of ``|x| (|code| + |zero_point|) |scale|`` over the ``c`` inputs::

    |error| <= (5 u + 11 u^2 + (c + 4) v) m + 2 r (|y| + |bias|)

1. a token, a scale, its zero, the weight of a code, and the result are rounded to bfloat16 (``5 u``, and at most
   ``11 u^2`` from products of these terms);
2. products are summed in float32 (``c v``; ``4 v`` for the remaining products);
3. the result, and its sum with the bias, are rounded to the model's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantize.core import Solution, linear
from quantize.shell.deploy.kernels import cpu, reference
from quantize.shell.deploy.kernels.reference import Layout


def obstacle(solved: Solution, bias: Tensor | None, dtype: torch.dtype) -> str | None:
    """See :class:`.Kernel`."""
    if dtype not in (torch.float32, torch.float16):
        return f"{dtype} is neither float32 nor float16"
    if solved.inputs is not None or not reference.narrow(solved.weight.scheme):
        return "it takes int4 weights and float inputs only"
    return cpu.obstacle(solved, bias, torch.bfloat16)


def prepare(solved: Solution, _dtype: torch.dtype) -> dict[str, Tensor]:
    """See :class:`.Kernel`."""
    return cpu.prepare(solved, torch.bfloat16)


unpack = cpu.unpack


def forward(x: Tensor, held: Mapping[str, Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
    """See :class:`.Kernel`."""
    if x.dtype != layout.dtype:
        return reference.compute(x, reference.restore(held, layout, unpack), bias)
    tokens = linear.smooth(x.reshape(-1, layout.c), held.get("smoothing")).to(torch.bfloat16)
    y = cpu.int4_linear(tokens, held, layout, None).to(x.dtype)
    return (y if bias is None else y + bias).reshape(*x.shape[:-1], layout.n)
