"""What a report holds, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from quantize.core import Scheme


@dataclass(frozen=True)
class Row:
    """One layer. ``stage``: ``calibrating``, ``quantized`` (float weights kept) or ``converted``.

    ``inputs``: None for floating point. ``tokens``: input vectors seen in calibration. ``fell_back``: too few of them
    for the ``algorithm``, so minmax solved the layer. ``weight_sqnr``: signal to noise ratio of the weight in dB.
    ``error`` and ``baseline_error``: ``tr(delta H delta^T)`` of the layer and of plain rounding, where the algorithm
    knows them. ``notes``: what happened on the way. ``kernel``: what a converted layer computes with, and in
    ``kernel_reason`` why not with a faster one.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    weights: Scheme
    inputs: Scheme | None
    algorithm: str
    stage: str
    tokens: int
    weight_sqnr: float | None = None
    error: float | None = None
    baseline_error: float | None = None
    notes: Mapping[str, float] = field(default_factory=dict)
    kernel: str | None = None
    kernel_reason: str | None = None
    fell_back: bool = False

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


def as_plain(row: Row) -> dict[str, Any]:
    """The row as dicts, lists, strings and numbers; ``weight_sqnr`` may be infinite."""
    return {**asdict(row), "names": list(row.names), "shape": list(row.shape)}


def from_plain(held: Mapping[str, Any]) -> Row:
    """Undo :func:`as_plain`.

    Raises:
        KeyError, TypeError, ValueError: something else made ``held``.
    """
    (n, c), weights, inputs = held["shape"], Scheme(**held["weights"]), held["inputs"]
    known = {"shape": (n, c), "weights": weights, "inputs": None if inputs is None else Scheme(**inputs)}
    return Row(**{**held, **known, "names": tuple(held["names"])})
