"""What was done to every layer of a model, as values; and the names of layers, shortened by what they share."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate
from math import inf
from operator import attrgetter
from typing import Any

from quantize.core import Scheme

# What experts in one line have in common beside their names.
_FORMAT = attrgetter("shape", "weights", "inputs", "algorithm", "stage", "kernel", "kernel_reason")
_EXPERT = re.compile(r"(?<=\bexperts\.)\d+(?=\.|$)")
# A number between the dots of a name, alone or in a sentence.
_NUMBER = re.compile(r"(?<![^. ])\d+(?=[.,:]|$)")
# Names in a list, before they are put together.
_MOST = 10


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

    @property
    def rank(self) -> tuple[bool, float, float]:
        """Sorts the worst layer first: by ``ratio``, after those the layers without one, by ``weight_sqnr``."""
        return self.ratio is None, -(self.ratio or 0), inf if self.weight_sqnr is None else self.weight_sqnr


@dataclass(frozen=True)
class Skipped:
    """A module that holds a weight matrix and stays as it is; ``asked`` where ``skip_layers`` says so.

    ``elements``: those of its own matrices; what several modules share belongs to the first of them.
    """

    name: str
    reason: str
    asked: bool = False
    elements: int = 0


def algorithm(row: Row) -> str:
    """What solved the layer, in words."""
    return f"minmax ({row.tokens or 'no'} tokens)" if row.fell_back else row.algorithm


def folded(items: Iterable[Any], alike: Callable[[Any], object] = _FORMAT) -> list[tuple[str, list[Any]]]:
    """Items with ``names``, under titles: ``alike`` experts that differ in their number alone are together.

    The title of one item is its names, that of 64 experts ``experts.*.up (64)``.
    """
    groups: dict[Any, list[Any]] = {}
    for i, item in enumerate(items):
        names = tuple(map(starred, item.names))
        groups.setdefault(i if names == item.names else (names, alike(item)), []).append(item)
    return [(" = ".join(map(starred, first.names)) + f" ({1 + len(rest)})" if rest else " = ".join(first.names),
             [first, *rest]) for first, *rest in groups.values()]  # fmt: skip


def starred(name: str) -> str:
    """``name`` with a star for the number of an expert: equal for what differs in it alone."""
    return _EXPERT.sub("*", name, count=1)


def gathered(names: Iterable[str]) -> list[tuple[str, int]]:
    """Lines for ``names``, and how many each stands for: more than ten have stars for numbers, first those of experts.

    ``model.layers.3.mlp.experts.* (60)`` stands for 60 names.
    """
    names = [*names]
    groups: dict[object, list[str]] = {i: [name] for i, name in enumerate(names)}
    for star in (starred, partial(_NUMBER.sub, "*")):
        if len(groups) > _MOST:
            groups = {}
            for name in names:
                groups.setdefault(star(name), []).append(name)
    return [(f"{title} ({len(held)})" if len(held) > 1 else held[0], len(held)) for title, held in groups.items()]


def listed(names: Iterable[str]) -> list[str]:
    """The lines of :func:`gathered`; where they are more than ten, the last counts the others."""
    lines = gathered(names)
    others = sum(count for _, count in lines[_MOST:])
    return [line for line, _ in lines[:_MOST]] + [f"{others} more"] * bool(others)


def reasons(skipped: Iterable[Skipped]) -> list[tuple[str, str]]:
    """What was ``skipped``, and why: the names of every reason as :func:`listed`."""
    names: dict[str, list[str]] = {}
    for each in skipped:
        names.setdefault(each.reason, []).append(each.name or "the model")
    return [(line, reason) for reason, held in names.items() for line in listed(held)]


def shortened(names: Sequence[str], room: int) -> tuple[list[str], str]:
    """``names``, with ``..`` for the prefix that most of them share, if one is longer than ``room``; and the prefix."""
    # No name begins with a dot, so that names stay as different as they are.
    if max(map(len, names)) <= room or any(name.startswith("..") for name in names):
        return [*names], ""
    shared = Counter(part for name in names for part in accumulate(name.split(".")[:-1], "{}{}.".format, initial=""))
    prefix = max(shared, key=lambda part: (shared[part] - 1) * len(part))
    if shared[prefix] == 1 or len(prefix) <= 2:
        return [*names], ""
    return [f"..{name.removeprefix(prefix)}" if name.startswith(prefix) else name for name in names], prefix


def span(values: Iterable[float]) -> str:
    """The least and the most of ``values``, as ``0.01..0.04``."""
    held = sorted(values)
    return "..".join(dict.fromkeys(f"{each:g}" for each in (held[0], held[-1])))


def share(elements: int, of: int) -> str:
    """How much of the model ``elements`` are, in words."""
    return f"{100 * elements / max(of, 1):.1f} % of the model's weights"


def plain(row: Row) -> dict[str, Any]:
    """The row as values ready for JSON, with formats in words."""
    told = {**as_plain(row), "weights": str(row.weights), "inputs": row.inputs and str(row.inputs)}
    del told["fell_back"]
    # JSON has no infinity: the ratio of a weight that is exact is no number there.
    return {**told, "algorithm": algorithm(row), "weight_sqnr": None if row.weight_sqnr == inf else row.weight_sqnr}


def as_plain(row: Row) -> dict[str, Any]:
    """The row as dicts, lists, strings and numbers; ``weight_sqnr`` may be infinite."""
    return {**asdict(row), "names": list(row.names), "shape": list(row.shape)}


def from_plain(held: Mapping[str, Any]) -> Row:
    """Undo :func:`as_plain`; KeyError, TypeError or ValueError where something else made ``held``."""
    inputs = None if held["inputs"] is None else Scheme(**held["inputs"])
    known = {"names": tuple(held["names"]), "shape": tuple(held["shape"]), "inputs": inputs}
    return Row(**{**held, **known, "weights": Scheme(**held["weights"])})
