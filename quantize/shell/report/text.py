"""What was done to every layer: as data and as text."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantize.shell.config import refusal
from quantize.shell.report import picture
from quantize.shell.report.rows import Row, Skipped, as_plain

_HEADER = ("layer", "shape", "weights", "inputs", "algorithm", "stage", "kernel", "tokens", "SQNR dB", "error/minmax")


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
        path = picture.check(path)
        figure = picture.draw(self.rows, self.skipped)
        try:
            figure.savefig(path, dpi=150)
        except OSError as error:
            raise refusal("plot", f"{path} ({error})", "a file that can be written") from None

    def __str__(self) -> str:
        table = [_HEADER, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        table.insert(1, tuple("-" * width for width in widths))
        lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
        slower: dict[str, list[str]] = {}
        for row in self.rows:
            if row.notes:
                lines.append(f"{row.name}: {', '.join(f'{key} {value:g}' for key, value in row.notes.items())}")
            if row.kernel_reason:
                slower.setdefault(row.kernel_reason, []).append(row.name)
        for title, entries in {
            "not as asked": self.remarks,
            "why not a faster kernel": [f"{reason}: {', '.join(names)}" for reason, names in slower.items()],
            "left in floating point": [f"{s.name or 'the model'}: {s.reason}" for s in self.skipped],
            "entries of skip_layers that matched nothing": [repr(word) for word in self.unmatched],
        }.items():
            if entries:
                lines += ["", f"{title} ({len(entries)})", *(f"  {entry}" for entry in entries)]
        return "\n".join(lines)


def _plain(row: Row) -> dict[str, Any]:
    plain = as_plain(row)
    if plain.pop("fell_back"):
        plain["algorithm"] = f"minmax ({row.tokens or 'no'} tokens)"
    # JSON has no infinity: the ratio of a weight that is exact is no number there.
    exact = row.weight_sqnr is not None and math.isinf(row.weight_sqnr)
    return {**plain, "weights": str(row.weights), "inputs": row.inputs and str(row.inputs),
            "weight_sqnr": None if exact else row.weight_sqnr}  # fmt: skip


def _cells(row: Row) -> tuple[str, ...]:
    plain = _plain(row)
    ratio = "" if not row.baseline_error or row.error is None else f"{row.error / row.baseline_error:.3f}"
    sqnr = "" if row.weight_sqnr is None else f"{row.weight_sqnr:.1f}"
    return (" = ".join(row.names), "x".join(map(str, row.shape)), plain["weights"], plain["inputs"] or "float",
            plain["algorithm"], row.stage, row.kernel or "", str(row.tokens), sqnr, ratio)  # fmt: skip
