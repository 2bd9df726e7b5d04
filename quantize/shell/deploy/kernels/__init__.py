"""The kernels, and the choice between them. Each kernel holds a solved layer in its own form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from quantize.core import Solution
from quantize.shell.deploy.kernels import cpu, cpu_bf16, npu, reference
from quantize.shell.deploy.kernels.reference import Layout

__all__ = ["KERNELS", "OWN", "PARTIAL", "Kernel", "Layout", "choose"]


class Kernel(Protocol):
    """The interface of a module in this folder. ``held`` is the result of :meth:`prepare`."""

    def obstacle(self, solved: Solution, bias: Tensor | None, dtype: torch.dtype, /) -> str | None:
        """The reason why the kernel cannot serve this layer, or None. The device of the tensors does not count."""

    def prepare(self, solved: Solution, dtype: torch.dtype, /) -> dict[str, Tensor]:
        """The tensors of the layer: ``codes`` in the form of the kernel, :func:`.reference.parameters`, and others."""

    def unpack(self, held: Mapping[str, Tensor], layout: Layout) -> Tensor:
        """The int8 codes ``[n, c]``, exactly."""

    def forward(self, x: Tensor, held: Mapping[str, Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
        """``[..., n]`` for ``x`` ``[..., c]``, in its dtype, as :func:`quantize.core.linear.quantized_linear`."""


KERNELS: dict[str, Kernel] = {"reference": reference, "cpu": cpu, "cpu-bf16": cpu_bf16, "npu": npu}
# The default kernel of a type of device. On other devices it is ``reference``, which runs everywhere. A kernel named
# ``cpu-...`` or ``npu-...`` runs on the same device, but only on request.
OWN = {"cpu": "cpu", "npu": "npu"}
# On request, these serve the layers that they can, and the other layers get the default kernel.
PARTIAL = frozenset({"cpu-bf16"})


def choose(
    solved: Solution, bias: Tensor | None, dtype: torch.dtype, wanted: str | None = None
) -> tuple[str, str | None]:
    """The kernel for a layer on the device of its codes, and the reasons why preferred ones cannot serve, or None.

    It is the first that can serve of: the kernel ``wanted``, the default of the device, ``reference``.
    """
    device = solved.weight.codes.device.type
    own = OWN.get(device, "reference")
    reasons: list[str] = []
    for name in dict.fromkeys((wanted or own, own)):
        home = name.partition("-")[0]
        elsewhere = None if home in (own, "reference") else f"its tensors are on {device!r}, not on {home!r}"
        if (reason := elsewhere or KERNELS[name].obstacle(solved, bias, dtype)) is None:
            return name, "; ".join(reasons) or None
        reasons.append(f"{name}: {reason}")
    return "reference", "; ".join(reasons)
