"""Kernels, and the choice between them. Each keeps a solved layer in the form that it computes with."""

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
    """A module in this folder. ``held`` are the tensors of :meth:`prepare`."""

    def obstacle(self, solved: Solution, bias: Tensor | None, dtype: torch.dtype, /) -> str | None:
        """Why the kernel cannot serve this layer, or None: shapes, formats, dtypes, values; not the device."""

    def prepare(self, solved: Solution, dtype: torch.dtype, /) -> dict[str, Tensor]:
        """The tensors to keep: ``codes`` in a form of its own, :func:`.reference.parameters`, and more."""

    def unpack(self, held: Mapping[str, Tensor], layout: Layout) -> Tensor:
        """The int8 codes ``[n, c]``, bit for bit."""

    def forward(self, x: Tensor, held: Mapping[str, Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
        """``[..., c]`` to ``[..., n]`` in the dtype of ``x``, as :func:`quantize.core.linear.quantized_linear`."""


KERNELS: dict[str, Kernel] = {"reference": reference, "cpu": cpu, "cpu-bf16": cpu_bf16, "npu": npu}
# The kernel for a type of device; all others have ``reference``, which runs everywhere. Kernels with more after this
# name, and a dash, run there when they are asked for.
OWN = {"cpu": "cpu", "npu": "npu"}
# Asked for by name, these leave the layers that they do not take to the usual choice.
PARTIAL = frozenset({"cpu-bf16"})


def choose(
    solved: Solution, bias: Tensor | None, dtype: torch.dtype, wanted: str | None = None
) -> tuple[str, str | None]:
    """The kernel for a layer where its codes are, and why it is not a better one.

    The kernel ``wanted`` if it can serve; else the one for the device; else ``reference``, which can always.
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
