"""What a report holds, as values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from quantize.core import Scheme

_EXPERT = re.compile(r"(?<=\bexperts\.)\d+(?=\.|$)")


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

    @property
    def ratio(self) -> float | None:
        """The error over that of plain rounding; None where the algorithm does not know them."""
        return None if self.error is None or not self.baseline_error else self.error / self.baseline_error


@dataclass(frozen=True)
class Skipped:
    """A module that holds a weight matrix and stays as it is; ``asked`` where ``skip_layers`` says so.

    ``elements``: those of its own matrices; what several modules share belongs to the first of them.
    """

    name: str
    reason: str
    asked: bool = False
    elements: int = 0


def share(elements: int, of: int) -> str:
    """How much of the model ``elements`` are, in words."""
    return f"{100 * elements / max(of, 1):.1f} % of the model's weights"


def folded(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """Rows with their titles: those of ``experts`` that differ in the number of the expert alone are together.

    The title of one row is its names, that of 64 experts ``experts.*.up (64)``.
    """
    groups: dict[Any, list[Row]] = {}
    for i, row in enumerate(rows):
        names, like = _starred(row), (row.shape, row.weights, row.inputs, row.algorithm, row.stage)
        key = (names, *like, row.kernel, row.kernel_reason)
        groups.setdefault(i if names == " = ".join(row.names) else key, []).append(row)
    return [(" = ".join(first.names) if not rest else f"{_starred(first)} ({1 + len(rest)})", [first, *rest])
            for first, *rest in groups.values()]  # fmt: skip


def _starred(row: Row) -> str:
    return " = ".join(map(starred, row.names))


def starred(name: str) -> str:
    """``name`` with a star for the number of an expert: equal for what differs in it alone."""
    return _EXPERT.sub("*", name, count=1)


def as_plain(row: Row) -> dict[str, Any]:
    """The row as dicts, lists, strings and numbers; ``weight_sqnr`` may be infinite."""
    return {**asdict(row), "names": list(row.names), "shape": list(row.shape)}


def from_plain(held: Mapping[str, Any]) -> Row:
    """Undo :func:`as_plain`.

    Raises:
        KeyError, TypeError, ValueError: something else made ``held``.
    """
    inputs = None if held["inputs"] is None else Scheme(**held["inputs"])
    known = {"names": tuple(held["names"]), "shape": tuple(held["shape"]), "inputs": inputs}
    return Row(**{**held, **known, "weights": Scheme(**held["weights"])})
