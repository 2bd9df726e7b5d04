"""The report of a model: a value that prints as text, draws a picture, and becomes plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantize.shell.config import refusal
from quantize.shell.report import picture, text
from quantize.shell.report.rows import Row, Skipped, plain


@dataclass(frozen=True)
class Report:
    """One row for each quantized layer, and one entry with a reason for each module left in floating point.

    ``unmatched``: entries of ``skip_layers`` and patterns of ``quant_cfg`` that matched no name. ``remarks``: other
    wishes of the config that were not met. ``elements``: the number of elements of all weight matrices of the model.
    ``print`` shows a summary, :meth:`table` gives every layer, and :meth:`as_dict` gives plain values for JSON.
    """

    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...]
    unmatched: tuple[str, ...]
    remarks: tuple[str, ...] = ()
    elements: int = 0

    def __str__(self) -> str:
        return text.summary(self.rows, self.skipped, self.unmatched, self.remarks, self.elements)

    def table(self) -> str:
        """All layers in the order of the model, with all their values, as lines of at most 100 columns."""
        return text.table(self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return {
            "layers": [plain(row) for row in self.rows],
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
        figure = picture.draw(self.rows, self.skipped)
        try:
            figure.savefig(path, dpi=150)
        except OSError as error:
            raise refusal("plot", f"{path} ({error})", "a file that can be written") from None
