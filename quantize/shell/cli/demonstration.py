"""Quantize a model, and measure it before and after."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantize.shell.api import convert, quantize, report
from quantize.shell.calibrate.layer import CalibrationLinear
from quantize.shell.cli.subjects import Subject
from quantize.shell.config import QuantizeWarning, parse
from quantize.shell.deploy.layer import QuantizedLinear
from quantize.shell.progress import progress
from quantize.shell.report.text import Report

CONFIG: dict[str, Any] = {
    "batch_num": 4,
    "quant_cfg": {
        "weights": {"type": "int8", "symmetric": True, "strategy": "channel"},
        "inputs": {"type": "int8", "symmetric": True, "strategy": "token"},
    },
    "algorithm": "minmax",
}


@dataclass(frozen=True)
class Outcome:
    """A report, ``sizes`` in bytes before and after, and what the held-out text gave. Prints as lines.

    ``measured``: what the subject gave before and after, ``[t, ...]`` each, or nothing; ``comparison``: that in a line.
    """

    report: Report
    sizes: Mapping[str, tuple[int, int]]
    measured: tuple[Tensor, ...]
    comparison: str

    def __str__(self) -> str:
        sizes = [f"{what}: {before:,} bytes before, {after:,} after ({after / before:.3f} x)"
                 for what, (before, after) in self.sizes.items()]  # fmt: skip
        return "\n".join([str(self.report), "", *sizes, self.comparison]).rstrip()


def demonstrate(
    subject: Subject,
    config: object,
    text: Sequence[str],
    *,
    batch: int = 4,
    evaluate: bool = True,
    converted: Callable[[nn.Module], None] = lambda _: None,
) -> Outcome:
    """Quantize ``subject.model`` in place, calibrated on a part of the lines ``text``; measure it on the rest.

    ``batch``: lines or rows in a forward pass. ``evaluate``: whether to measure. ``converted`` gets the converted model
    before it is measured.

    Raises:
        QuantizeError: a config or model that is not accepted, or not enough text.
    """
    parsed = parse(config)
    batches = 0 if parsed.algorithm.data_free else parsed.batch_num
    calibration, held = subject.split(text, batches, batch, evaluate=evaluate)
    model = subject.model
    measured = _measured(subject, held, "float")
    # The report, printed in full, says the same.
    with warnings.catch_warnings(action="ignore", category=QuantizeWarning):
        quantize(model, config)
        before = _sizes(model)
        for each in progress(calibration, "calibrate", unit="batch", total=batches):
            subject(each)
    convert(model)
    converted(model)
    measured += _measured(subject, held, "quantized")
    sizes = {what: (before[what], after) for what, after in _sizes(model).items()}
    return Outcome(report(model), sizes, measured, subject.compared(*measured) if measured else "")


def _measured(subject: Subject, held: Sequence[Any], what: str) -> tuple[Tensor, ...]:
    found = [subject(each) for each in progress(held, f"measure, {what}", unit="batch")]
    return (torch.cat(found),) if found else ()


def _sizes(model: nn.Module) -> dict[str, int]:
    layers = [module for module in model.modules() if isinstance(module, (CalibrationLinear, QuantizedLinear))]
    measured: dict[str, list[nn.Module]] = {"quantized layers": [*layers], "whole model": [model]}
    return {what: sum(tensor.nbytes for module in modules for tensor in (*module.parameters(), *module.buffers()))
            for what, modules in measured.items()}  # fmt: skip
