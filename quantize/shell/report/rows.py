"""What was done to every layer of a model: as values, as plain data and as text."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import inf
from operator import attrgetter
from pathlib import Path
from statistics import median_low
from typing import Any

from quantize.core import Scheme
from quantize.shell.config import refusal
from quantize.shell.report import picture

_HEADER = ("layer", "shape", "weights", "inputs", "algorithm", "stage", "kernel", "tokens", "SQNR dB", "error/minmax")
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


@dataclass(frozen=True)
class Report:
    """One row a quantized layer, one entry a module left in floating point with its reason.

    ``unmatched``: entries of ``skip_layers`` and patterns of ``quant_cfg`` that matched no name. ``remarks``: what else
    was not done as asked. ``elements``: those of all weight matrices of the model. Prints as a table; :meth:`as_dict`
    gives plain values, ready for JSON.
    """

    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...]
    unmatched: tuple[str, ...]
    remarks: tuple[str, ...] = ()
    elements: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return {
            "layers": [_plain(row) for row in self.rows],
            "skipped": [asdict(skipped) for skipped in self.skipped],
            "unmatched": list(self.unmatched),
            "remarks": list(self.remarks),
            "elements": self.elements,
        }

    def plot(self, path: str | Path) -> None:
        """Draw the errors of the layers, before and after, into the file ``path``: ``.png``, ``.pdf`` or ``.svg``.

        Raises:
            QuantizeError: another suffix, a file that cannot be written, no layer solved yet, or no matplotlib.
        """
        path = picture.check(path)
        figure = picture.draw(folded(self.rows), self.skipped)
        try:
            figure.savefig(path, dpi=150)
        except OSError as error:
            raise refusal("plot", f"{path} ({error})", "a file that can be written") from None

    def __str__(self) -> str:
        slower: dict[str | None, list[str]] = {}
        for title, (row, *_) in folded(self.rows):
            slower.setdefault(row.kernel_reason, []).append(title)
        left, lines = share(sum(skipped.elements for skipped in self.skipped), self.elements), table(self.rows)
        for heading, entries in {
            "not as asked": self.remarks,
            "static inputs that cost most; what to add to quant_cfg": _mends(self.rows),
            "why not a faster kernel": [f"{reason}: {', '.join(slower[reason])}" for reason in slower if reason],
            f"{left} stay in floating point": [f"{s.name or 'the model'}: {s.reason}" for s in self.skipped],
            "entries of skip_layers and quant_cfg that matched nothing": [*map(repr, self.unmatched)],
        }.items():
            lines += ["", f"{heading} ({len(entries)})", *(f"  {entry}" for entry in entries)] if entries else []
        return "\n".join(lines)


# Below this part of the outputs' power, what static inputs cost is not worth a scale for each token.
_COSTLY = 0.01


# Loaders compute these as one: they need one format.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def _mends(rows: Iterable[Row]) -> list[str]:
    """The entries of ``quant_cfg`` that give tokens scales of their own where static inputs cost most; worst first."""
    losses: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        static, token = row.notes.get("static_loss", 0.0), row.notes.get("token_loss", 0.0)
        if static > max(_COSTLY, 4 * token):
            last = row.name.rpartition(".")[2]
            # A number alone would match the ends of others.
            losses.setdefault(row.name if last.isdigit() else last, []).append((static, token))
    mends = []
    for name, found in sorted(losses.items(), key=lambda item: -max(item[1])[0]):
        keys = next((group for group in _TOGETHER if name in group), (name,))
        form = "{'type': 'int8', 'symmetric': True, 'strategy': 'token'}"
        entries = ", ".join(f"'*{glob.escape(key)}.inputs': {form}" for key in keys)
        told = f"layers like {name!r} ({len(found)}): the worst loses {max(found)[0]:.1%} of its outputs' power"
        mends.append(f"{told}, with a scale a token {max(found)[1]:.1%}: {entries}")
    return mends


def table(rows: Iterable[Row]) -> list[str]:
    """A header, a line for each of ``rows``, and lines with what happened on the way; experts folded to one line.

    Of experts the tokens are the least, the median and the most, and the errors those of the worst.
    """
    groups = folded(rows)
    cells = [_HEADER, *(_cells(title, group) for title, group in groups)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, tuple("-" * width for width in widths))
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    for title, group in groups:
        notes = {key: span(row.notes[key] for row in group if key in row.notes) for row in group for key in row.notes}
        lines += [f"{title}: {', '.join(map(' '.join, notes.items()))}"] * bool(notes)
    return lines


def _cells(title: str, group: list[Row]) -> tuple[str, ...]:
    row, tokens = group[0], [each.tokens for each in group]
    sqnrs = [each.weight_sqnr for each in group if each.weight_sqnr is not None]
    ratios = [each.ratio for each in group if each.ratio is not None]
    reached = (min(tokens), median_low(tokens), max(tokens)) if len(group) > 1 else tokens
    return (title, "x".join(map(str, row.shape)), str(row.weights), str(row.inputs or "float"), _algorithm(*group),
            row.stage, row.kernel or "", "/".join(map(str, reached)),
            f"{min(sqnrs):.1f}" if sqnrs else "", f"{max(ratios):.3f}" if ratios else "")  # fmt: skip


def _algorithm(row: Row, *others: Row) -> str:
    fallen = sum(each.fell_back for each in (row, *others))
    if fallen and not others:
        return f"minmax ({row.tokens or 'no'} tokens)"
    return row.algorithm + f" ({fallen} fell back to minmax)" * bool(fallen)


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


def span(values: Iterable[float]) -> str:
    """The least and the most of ``values``, as ``0.01..0.04``."""
    held = sorted(values)
    return "..".join(dict.fromkeys(f"{each:g}" for each in (held[0], held[-1])))


def share(elements: int, of: int) -> str:
    """How much of the model ``elements`` are, in words."""
    return f"{100 * elements / max(of, 1):.1f} % of the model's weights"


def _plain(row: Row) -> dict[str, Any]:
    told = {**as_plain(row), "weights": str(row.weights), "inputs": row.inputs and str(row.inputs)}
    del told["fell_back"]
    # JSON has no infinity: the ratio of a weight that is exact is no number there.
    return {**told, "algorithm": _algorithm(row), "weight_sqnr": None if row.weight_sqnr == inf else row.weight_sqnr}


def as_plain(row: Row) -> dict[str, Any]:
    """The row as dicts, lists, strings and numbers; ``weight_sqnr`` may be infinite."""
    return {**asdict(row), "names": list(row.names), "shape": list(row.shape)}


def from_plain(held: Mapping[str, Any]) -> Row:
    """Undo :func:`as_plain`; KeyError, TypeError or ValueError where something else made ``held``."""
    inputs = None if held["inputs"] is None else Scheme(**held["inputs"])
    known = {"names": tuple(held["names"]), "shape": tuple(held["shape"]), "inputs": inputs}
    return Row(**{**held, **known, "weights": Scheme(**held["weights"])})
