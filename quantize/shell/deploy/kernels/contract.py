"""What a kernel is: it keeps a solved layer in the form that it computes with, and gives it back exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantize.core import LayerSpec, Solution


@dataclass(frozen=True)
class Layout:
    """What is known of a deployed layer apart from its tensors.

    ``n`` outputs and ``c`` inputs, in the format ``spec``; ``dtype`` is that of the float layer, and of its inputs.
    """

    spec: LayerSpec
    n: int
    c: int
    dtype: torch.dtype


class Kernel(Protocol):
    """A module in this folder. ``held`` are the tensors of :meth:`prepare`."""

    @property
    def DEVICES(self) -> frozenset[str] | None:  # noqa: N802 - a constant
        """The types of device that it runs on; None: on all."""

    def obstacle(self, solved: Solution, bias: Tensor | None, dtype: torch.dtype) -> str | None:
        """Why the kernel cannot serve this layer, or None: shapes, formats, dtypes, values; not the device."""

    def prepare(self, solved: Solution, bias: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors to keep, by name; ``bias`` itself is kept by the layer."""

    def restore(self, held: Mapping[str, Tensor], layout: Layout) -> Solution:
        """Undo :meth:`prepare`: the same codes and parameters, bit for bit."""

    def forward(self, x: Tensor, held: Mapping[str, Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
        """``[..., c]`` to ``[..., n]`` in the dtype of ``x``, as :func:`quantize.core.linear.quantized_linear`."""
