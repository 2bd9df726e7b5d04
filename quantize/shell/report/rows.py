"""What a report holds, as values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from typing import Any

from quantize.core import Scheme

# What experts in one line have in common beside their names.
_FORMAT = attrgetter("shape", "weights", "inputs", "algorithm", "stage", "kernel", "kernel_reason")
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


def folded(items: Iterable[Any], alike: Callable[[Any], object] = _FORMAT) -> list[tuple[str, list[Any]]]:
    """Items with ``names``, under titles: ``alike`` experts that differ in their number alone are together.

    The title of one item is its names, that of 64 experts ``experts.*.up (64)``.
    """
    groups: dict[Any, list[Any]] = {}
    for i, item in enumerate(items):
        names = [*map(starred, item.names)]
        groups.setdefault(i if names == [*item.names] else (*names, alike(item)), []).append(item)
    return [(" = ".join(map(starred, first.names)) + f" ({1 + len(rest)})" if rest else " = ".join(first.names),
             [first, *rest]) for first, *rest in groups.values()]  # fmt: skip


def starred(name: str) -> str:
    """``name`` with a star for the number of an expert: equal for what differs in it alone."""
    return _EXPERT.sub("*", name, count=1)


def span(values: Iterable[float]) -> str:
    """The least and the most of ``values``, as ``0.01..0.04``."""
    held = sorted(values)
    return "..".join(dict.fromkeys(f"{each:g}" for each in (held[0], held[-1])))


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
