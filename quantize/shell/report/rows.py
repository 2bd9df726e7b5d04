"""What a report holds, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One layer. ``stage``: ``calibrating``, ``quantized`` (float weights kept) or ``converted``.

    ``tokens``: input vectors seen in calibration. ``weight_sqnr``: signal to quantization noise of the weight in dB.
    ``error`` and ``baseline_error``: ``tr(delta H delta^T)`` of the layer and of plain rounding, where the algorithm
    knows them. ``notes``: what happened on the way. ``kernel``: what a converted layer computes with, and in
    ``kernel_reason`` why not with a faster one.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    weights: str
    inputs: str | None
    algorithm: str
    stage: str
    tokens: int
    weight_sqnr: float | None = None
    error: float | None = None
    baseline_error: float | None = None
    notes: Mapping[str, float] = field(default_factory=dict)
    kernel: str | None = None
    kernel_reason: str | None = None

    @property
    def name(self) -> str:
        """The first name of the layer."""
        return self.names[0]


@dataclass(frozen=True)
class Skipped:
    """A module that holds a weight matrix and stays as it is; ``asked`` where ``skip_layers`` says so."""

    name: str
    reason: str
    asked: bool = False
