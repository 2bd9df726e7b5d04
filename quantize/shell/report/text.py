"""What was done to every layer: as data and as text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from statistics import median_low
from typing import Any

from quantize.shell.config import refusal
from quantize.shell.report import picture
from quantize.shell.report.rows import Row, Skipped, as_plain, folded, share, span

_HEADER = ("layer", "shape", "weights", "inputs", "algorithm", "stage", "kernel", "tokens", "SQNR dB", "error/minmax")


@dataclass(frozen=True)
class Report:
    """One row a quantized layer, one entry a module left in floating point with its reason.

    ``unmatched``: entries of ``skip_layers`` that matched no name. ``remarks``: what else was not done as asked.
    ``elements``: those of all weight matrices of the model. Prints as a table; :meth:`as_dict` gives plain values,
    ready for JSON.
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
            "unmatched_skip_layers": list(self.unmatched),
            "remarks": list(self.remarks),
            "elements": self.elements,
        }

    def plot(self, path: str | Path) -> None:
        """Draw the errors of the layers, before and after, into the file ``path``: ``.png``, ``.pdf`` or ``.svg``.

        Raises:
            QuantizeError: another suffix, a file that cannot be written, no layer solved yet, or no matplotlib.
        """
        path = picture.check(path)
        figure = picture.draw(self.rows, self.skipped)
        try:
            figure.savefig(path, dpi=150)
        except OSError as error:
            raise refusal("plot", f"{path} ({error})", "a file that can be written") from None

    def __str__(self) -> str:
        slower: dict[str | None, list[str]] = {}
        for title, (row, *_) in folded(self.rows):
            slower.setdefault(row.kernel_reason, []).append(title)
        left = share(sum(skipped.elements for skipped in self.skipped), self.elements)
        lines = table(self.rows)
        for heading, entries in {
            "not as asked": self.remarks,
            "why not a faster kernel": [
                f"{reason}: {', '.join(titles)}" for reason, titles in slower.items() if reason
            ],
            f"{left} stay in floating point": [f"{s.name or 'the model'}: {s.reason}" for s in self.skipped],
            "entries of skip_layers that matched nothing": [*map(repr, self.unmatched)],
        }.items():
            lines += ["", f"{heading} ({len(entries)})", *(f"  {entry}" for entry in entries)] if entries else []
        return "\n".join(lines)


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


def _plain(row: Row) -> dict[str, Any]:
    plain = {**as_plain(row), "weights": str(row.weights), "inputs": row.inputs and str(row.inputs)}
    del plain["fell_back"]
    # JSON has no infinity: the ratio of a weight that is exact is no number there.
    return {**plain, "algorithm": _algorithm(row), "weight_sqnr": None if row.weight_sqnr == inf else row.weight_sqnr}
