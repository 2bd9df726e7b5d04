"""Kernels, and the choice between them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from quantize.core import Solution
from quantize.shell.deploy.kernels import cpu, npu, reference
from quantize.shell.deploy.kernels.contract import Kernel, Layout

__all__ = ["KERNELS", "Kernel", "Layout", "choose"]

KERNELS: dict[str, Kernel] = {
    name: cast("Kernel", module) for name, module in (("reference", reference), ("cpu", cpu), ("npu", npu))
}


def choose(
    solved: Solution, bias: Tensor | None, dtype: torch.dtype, wanted: str | None = None
) -> tuple[str, str | None]:
    """The kernel for a layer where its codes are, and why it is not a better one.

    The kernel ``wanted`` if it can serve; else the one for the device; else ``reference``, which can always.
    """
    device = solved.weight.codes.device.type
    own = [name for name, kernel in KERNELS.items() if kernel.DEVICES is not None and device in kernel.DEVICES]
    reasons: list[str] = []
    for name in [*([] if wanted is None else [wanted]), *own]:
        reason = _obstacle(KERNELS[name], device, solved, bias, dtype)
        if reason is None:
            return name, "; ".join(reasons) or None
        reasons.append(f"{name}: {reason}")
    return "reference", "; ".join(dict.fromkeys(reasons)) or None


def _obstacle(kernel: Kernel, device: str, solved: Solution, bias: Tensor | None, dtype: torch.dtype) -> str | None:
    if kernel.DEVICES is not None and device not in kernel.DEVICES:
        return f"its tensors are on {device!r}, not on {' or '.join(map(repr, sorted(kernel.DEVICES)))}"
    return kernel.obstacle(solved, bias, dtype)
