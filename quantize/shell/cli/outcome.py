"""One run, which calibrates, converts, writes and measures a model; and its outcome."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantize.shell import api
from quantize.shell.calibrate.layer import calibrated
from quantize.shell.cli import sizes
from quantize.shell.cli.subjects import Subject
from quantize.shell.config import MAX_BATCHES, QuantizeWarning, parse
from quantize.shell.progress import progress
from quantize.shell.report.report import Report


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run: a report, bytes before and after, and measurements on held-out text. Prints as lines.

    ``measured``: the outputs of the subject before and after, ``[t, ...]`` each, or empty. ``comparison``: a line that
    compares them. ``numbers``: the numbers of that line, by name.
    """

    report: Report
    before: sizes.Bytes
    after: sizes.Bytes
    measured: Sequence[Tensor]
    comparison: str
    numbers: Mapping[str, float]

    def __str__(self) -> str:
        report = str(self.report).replace("print(report(model).table())", "--verbose")
        return "\n".join([report, "", *sizes.told(self.before, self.after), self.comparison]).rstrip()

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        told = {"report": self.report.as_dict(), "bytes": sizes.plain(self.before, self.after)}
        return {**told, "comparison": dict(self.numbers) or None}


def demonstrate(
    subject: Subject,
    config: Any,
    calibration: Sequence[Any],
    held: Sequence[Any],
    *,
    write: Callable[[nn.Module], None] | None = None,
) -> Outcome:
    """Quantize ``subject.model`` in place; measure it before and after on ``held``, unless that is empty.

    ``calibration`` and ``held`` are batches of ``subject.split``. ``write`` is called with the converted model before
    it is measured.
    """
    parse(config)
    model = subject.model
    measured = _measured(subject, held, "float")
    # The printed report says the same.
    with warnings.catch_warnings(action="ignore", category=QuantizeWarning):
        # No batch is the last, so that solving begins after the progress bar of the batches has ended.
        api.quantize(model, {**config, "batch_num": MAX_BATCHES})
        before = sizes.before(model, calibrated(model))
        for each in progress(calibration, "calibrate", unit="batch"):
            subject(each)
        api.finish(model)
    api.convert(model)
    if write is not None:
        write(model)
    measured += _measured(subject, held, "quantized")
    comparison, numbers = subject.compared(*measured) if measured else ("", {})
    return Outcome(api.report(model), before, sizes.converted(model), measured, comparison, numbers)


def _measured(subject: Subject, held: Sequence[Any], what: str) -> list[Tensor]:
    found = [subject(each) for each in progress(held, f"measure, {what}", unit="batch")]
    return [torch.cat(found)] if found else []
