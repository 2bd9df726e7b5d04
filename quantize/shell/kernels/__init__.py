"""Kernels, and the choice between them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from quantize.core import Solution
from quantize.shell.kernels import cpu, npu, reference
from quantize.shell.kernels.contract import Kernel, Layout

__all__ = ["KERNELS", "Kernel", "Layout", "choose", "obstacle"]

KERNELS: dict[str, Kernel] = {
    name: cast("Kernel", module) for name, module in (("reference", reference), ("cpu", cpu), ("npu", npu))
}


def choose(solved: Solution, bias: Tensor | None, dtype: torch.dtype) -> tuple[str, str | None]:
    """The kernel for a layer where its codes are: the device's own, or else ``reference`` and why."""
    reasons = []
    for name, kernel in KERNELS.items():
        if kernel.DEVICES is not None and solved.weight.codes.device.type in kernel.DEVICES:
            reason = kernel.obstacle(solved, bias, dtype)
            if reason is None:
                return name, None
            reasons.append(f"{name}: {reason}")
    return "reference", "; ".join(reasons) or None


def obstacle(name: str, solved: Solution, bias: Tensor | None, dtype: torch.dtype) -> str | None:
    """Why the kernel ``name`` cannot serve this layer where it is, or None."""
    kernel, device = KERNELS[name], solved.weight.codes.device.type
    if kernel.DEVICES is not None and device not in kernel.DEVICES:
        return f"its tensors are on {device!r}, not on {' or '.join(map(repr, sorted(kernel.DEVICES)))}"
    return kernel.obstacle(solved, bias, dtype)
