"""The rows of a report, which say what was done to each layer; and lists of layer names in a short form."""

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

# Experts share a line only if these are equal.
_FORMAT = attrgetter("shape", "weights", "inputs", "algorithm", "stage", "kernel", "kernel_reason")
_EXPERT = re.compile(r"(?<=\bexperts\.)\d+(?=\.|$)")
# A number between dots in a name. The name may be part of a sentence.
_NUMBER = re.compile(r"(?<![^. ])\d+(?=[.,:]|$)")
# Up to so many names are listed one by one.
_MOST = 10


@dataclass(frozen=True)
class Row:
    """One layer. ``stage``: ``calibrating``, ``quantized`` (float weights kept) or ``converted``.

    ``inputs``: None for floating point. ``tokens``: input vectors seen in calibration. ``fell_back``: too few of them
    for the ``algorithm``, so minmax was used instead. ``weight_sqnr``: signal to noise ratio of the weight in dB.
    ``error`` and ``baseline_error``: ``tr(delta H delta^T)`` of the layer and of plain rounding, where the algorithm
    knows them. ``notes``: numbers that the algorithm adds. ``kernel``: the kernel of a converted layer.
    ``kernel_reason``: why it is not a faster one.
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
        """The error divided by that of plain rounding; None if one is unknown, or the latter is 0."""
        return None if self.error is None or not self.baseline_error else self.error / self.baseline_error

    @property
    def rank(self) -> tuple[bool, float, float]:
        """Sort key, the worst layer first: by ``ratio``, then layers without one by ``weight_sqnr``."""
        return self.ratio is None, -(self.ratio or 0), inf if self.weight_sqnr is None else self.weight_sqnr


@dataclass(frozen=True)
class Skipped:
    """A module with a weight matrix that is not quantized; ``asked``: the config says so.

    ``elements``: the number of elements of its own matrices. A shared matrix counts for its first module.
    """

    name: str
    reason: str
    asked: bool = False
    elements: int = 0


def algorithm(row: Row) -> str:
    """The algorithm that solved the layer, in words."""
    return f"minmax ({row.tokens or 'no'} tokens)" if row.fell_back else row.algorithm


def folded(items: Iterable[Any], alike: Callable[[Any], object] = _FORMAT) -> list[tuple[str, list[Any]]]:
    """Groups of ``items``, which have ``names``, with titles. Experts that differ only in their number form a group.

    They also have the same ``alike``. The title of one item is its names, that of 64 experts ``experts.*.up (64)``.
    """
    groups: dict[Any, list[Any]] = {}
    for i, item in enumerate(items):
        names = tuple(map(starred, item.names))
        groups.setdefault(i if names == item.names else (names, alike(item)), []).append(item)
    return [(" = ".join(map(starred, first.names)) + f" ({1 + len(rest)})" if rest else " = ".join(first.names),
             [first, *rest]) for first, *rest in groups.values()]  # fmt: skip


def starred(name: str) -> str:
    """``name`` with a star in place of the number of an expert."""
    return _EXPERT.sub("*", name, count=1)


def gathered(names: Iterable[str]) -> list[tuple[str, int]]:
    """Lines for ``names``, and the number of names in each line.

    If there are more than ten, stars replace the numbers of experts; if still more than ten, all numbers.
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
    """The first ten lines of :func:`gathered`, and if there are more names, a line with their number."""
    lines = gathered(names)
    others = sum(count for _, count in lines[_MOST:])
    return [line for line, _ in lines[:_MOST]] + [f"{others} more"] * bool(others)


def reasons(skipped: Iterable[Skipped]) -> list[tuple[str, str]]:
    """Pairs of names and reasons: for each reason, the modules that were ``skipped``, as :func:`listed`."""
    names: dict[str, list[str]] = {}
    for each in skipped:
        names.setdefault(each.reason, []).append(each.name or "the model")
    return [(line, reason) for reason, held in names.items() for line in listed(held)]


def shortened(names: Sequence[str], room: int) -> tuple[list[str], str]:
    """``names`` with ``..`` for a prefix that most share, if a name is longer than ``room``; and this prefix."""
    # This is only done if no name begins with dots, so that different names stay different.
    if max(map(len, names)) <= room or any(name.startswith("..") for name in names):
        return [*names], ""
    shared = Counter(part for name in names for part in accumulate(name.split(".")[:-1], "{}{}.".format, initial=""))
    prefix = max(shared, key=lambda part: (shared[part] - 1) * len(part))
    if shared[prefix] == 1 or len(prefix) <= 2:
        return [*names], ""
    return [f"..{name.removeprefix(prefix)}" if name.startswith(prefix) else name for name in names], prefix


def span(values: Iterable[float]) -> str:
    """The smallest and the largest of ``values``, as ``0.01..0.04``."""
    held = sorted(values)
    return "..".join(dict.fromkeys(f"{each:g}" for each in (held[0], held[-1])))


def share(elements: int, of: int) -> str:
    """The share of the model that ``elements`` are, in words."""
    return f"{100 * elements / max(of, 1):.1f} % of the model's weights"


def plain(row: Row) -> dict[str, Any]:
    """The row as values ready for JSON, with formats in words."""
    told = {**as_plain(row), "weights": str(row.weights), "inputs": row.inputs and str(row.inputs)}
    del told["fell_back"]
    # JSON has no infinity, so the SQNR of an exact weight becomes null.
    return {**told, "algorithm": algorithm(row), "weight_sqnr": None if row.weight_sqnr == inf else row.weight_sqnr}


def as_plain(row: Row) -> dict[str, Any]:
    """The row as dicts, lists, strings and numbers; ``weight_sqnr`` may be infinite."""
    return {**asdict(row), "names": list(row.names), "shape": list(row.shape)}


def from_plain(held: Mapping[str, Any]) -> Row:
    """Undo :func:`as_plain`; KeyError, TypeError or ValueError if something else made ``held``."""
    inputs = None if held["inputs"] is None else Scheme(**held["inputs"])
    known = {"names": tuple(held["names"]), "shape": tuple(held["shape"]), "inputs": inputs}
    return Row(**{**held, **known, "weights": Scheme(**held["weights"])})
