"""What was done to every layer: as data and as text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantize.shell.report import picture
from quantize.shell.report.rows import Row, Skipped


@dataclass(frozen=True)
class Report:
    """One row a quantized layer, one entry a module left in floating point with its reason.

    ``unmatched``: entries of ``skip_layers`` that matched no name. ``remarks``: what else was not done as asked. Prints
    as a table; :meth:`as_dict` gives plain values, ready for JSON.
    """

    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...]
    unmatched: tuple[str, ...]
    remarks: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return {
            "layers": [_plain(row) for row in self.rows],
            "skipped": [asdict(skipped) for skipped in self.skipped],
            "unmatched_skip_layers": list(self.unmatched),
            "remarks": list(self.remarks),
        }

    def plot(self, path: str | Path) -> None:
        """Draw the errors of all layers, before and after, into the file ``path``: ``.png``, ``.pdf`` or ``.svg``.

        Raises:
            QuantizeError: another suffix, a file that cannot be written, no layer solved yet, or no matplotlib.
        """
        picture.save(self.rows, self.skipped, path)

    def __str__(self) -> str:
        header = ("layer", "shape", "weights", "inputs", "algorithm", "stage", "kernel", "tokens", "SQNR dB",
                  "error/minmax")  # fmt: skip
        body = [_cells(row) for row in self.rows]
        widths = [max(len(line[i]) for line in (header, *body)) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                 for line in (header, tuple("-" * width for width in widths), *body)]  # fmt: skip
        lines += [f"{row.name}: {_notes(row.notes)}" for row in self.rows if row.notes]
        reasons = dict.fromkeys(row.kernel_reason for row in self.rows if row.kernel_reason)
        slower = [f"{reason}: {', '.join(row.name for row in self.rows if row.kernel_reason == reason)}"
                  for reason in reasons]  # fmt: skip
        for title, entries in (
            ("not as asked", list(self.remarks)),
            ("why not a faster kernel", slower),
            ("left in floating point", [f"{s.name or 'the model'}: {s.reason}" for s in self.skipped]),
            ("entries of skip_layers that matched nothing", [repr(word) for word in self.unmatched]),
        ):
            if entries:
                lines += ["", f"{title} ({len(entries)})", *(f"  {entry}" for entry in entries)]
        return "\n".join(lines)


def _plain(row: Row) -> dict[str, Any]:
    # JSON has no infinity: the ratio of a weight that is exact is no number there.
    exact = row.weight_sqnr is not None and math.isinf(row.weight_sqnr)
    sqnr = None if exact else row.weight_sqnr
    return {**asdict(row), "names": list(row.names), "shape": list(row.shape), "weight_sqnr": sqnr}


def _cells(row: Row) -> tuple[str, ...]:
    ratio = "" if not row.baseline_error or row.error is None else f"{row.error / row.baseline_error:.3f}"
    sqnr = "" if row.weight_sqnr is None else f"{row.weight_sqnr:.1f}"
    shape = "x".join(map(str, row.shape))
    inputs = row.inputs or "float"
    return (" = ".join(row.names), shape, row.weights, inputs, row.algorithm, row.stage, row.kernel or "",
            str(row.tokens), sqnr, ratio)  # fmt: skip


def _notes(notes: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in notes.items())
