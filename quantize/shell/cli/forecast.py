"""The forecast of a run for ``--dry-run``, made without weights, text and calibration."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from textwrap import fill
from typing import Any

import torch.utils._pytree as pytree
from torch import nn

from quantize.core import gptq
from quantize.shell.budget import FORMATS
from quantize.shell.calibrate.layer import CalibrationLinear
from quantize.shell.calibrate.session import Session
from quantize.shell.cli import sizes
from quantize.shell.config import Config, Schedule
from quantize.shell.deploy.kernels import Layout
from quantize.shell.disk.parts import MERGED
from quantize.shell.plan import Plan, swap
from quantize.shell.report.report import Report
from quantize.shell.report.rows import Row, reasons, share
from quantize.shell.report.text import WIDTH


@dataclass(frozen=True)
class Forecast:
    """The layers as a report before calibration, bytes before and after, and the memory that calibration needs.

    - ``most``: why ``after`` is only an upper limit; empty if it is exact.
    - ``memory``: estimated bytes in addition to the model and a forward pass. ``how``: what they are for.
    - ``chosen``: whether calibration will choose the formats of the weights; those in the report then mean nothing.
    """

    report: Report
    before: sizes.Bytes
    after: sizes.Bytes
    most: str
    memory: int
    how: str
    chosen: bool

    def __str__(self) -> str:
        lines = [
            f"{count:,} layers: {told}" for told, count in Counter(map(self._format, self.report.rows)).most_common()
        ]
        if skipped := self.report.skipped:
            elements = sum(each.elements for each in skipped)
            lines += [f"{share(elements, self.report.elements)} stay in floating point:"]
            lines += [f"  {names}: {reason}" for names, reason in reasons(skipped)]
        lines += [f"matched nothing: {word!r}" for word in self.report.unmatched]
        lines += sizes.told(self.before, self.after)
        lines += [f"  at most: {self.most}"] * bool(self.most)
        memory = f"about {_size(self.memory)} above the model and a forward pass" if self.memory else "none"
        lines += [f"memory of calibration: {memory}", *[f"  {self.how}"] * bool(self.how)]
        return "\n".join(fill(line, WIDTH, subsequent_indent="    ", break_on_hyphens=False) for line in lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        told = {"report": self.report.as_dict(), "bytes": sizes.plain(self.before, self.after)}
        for row in told["report"]["layers"] if self.chosen else ():
            row["weights"] = None
        return {**told, "at_most": self.most or None, "memory": {"bytes": self.memory, "how": self.how}}

    def _format(self, row: Row) -> str:
        weights = f"one of {len(FORMATS)} formats of" if self.chosen else row.weights
        return f"{weights} weights, {row.inputs or 'float'} inputs, {row.algorithm}"


def forecast(model: nn.Module, planned: Plan, config: Config, tokens: int, *, budget: float | None = None) -> Forecast:
    """What ``config`` will do to ``model``, an outline that cannot be used afterwards.

    ``tokens``: the number of tokens that calibrate. ``budget``: the share of the bytes of weights for which formats are
    chosen before, by gptq in one pass.
    """
    layers = _layers(config, planned)
    memory = [_memory(layers, tokens)]
    swap(model, planned.views)
    after, most = dict[nn.Module, int](), ""
    for layer in layers:
        smoothed = layer.algorithm.scale is not None
        layout = Layout(layer.spec, layer.out_features, layer.in_features, layer.weight.dtype)
        after[layer] = sizes.packed(layout, smoothed=smoothed)
        most = most or "scales that are folded into other modules take less" * (smoothed and config.schedule.fold)
    if budget is not None:
        after = {layer: int(budget * layer.weight.nbytes) for layer in layers}
        most = f"the budget of {budget:g}, in which scales count as {layers[0].weight.dtype}"
        choosing = replace(config, name="gptq", options=gptq.Options(), schedule=Schedule())
        memory.append(_memory(_layers(choosing, planned), tokens))
    rows = tuple(replace(layer.record(), stage="planned") for layer in layers)
    report = Report(rows, planned.skipped, planned.unmatched, elements=planned.elements)
    before = sizes.before(model, planned.layers)
    swap(model, dict(zip(planned.layers, layers, strict=True)))
    return Forecast(report, before, sizes.after(model, after), most, *max(memory), chosen=budget is not None)


def _layers(config: Config, planned: Plan) -> list[CalibrationLinear]:
    session = Session(config, planned)
    return [CalibrationLinear(layer, names, session) for layer, names in planned.layers.items()]


def _memory(layers: list[CalibrationLinear], tokens: int) -> tuple[int, str]:
    """The bytes that calibration needs, and what they are for."""
    if all(layer.algorithm.data_free for layer in layers):
        return 0, ""
    # Layers that loaders compute as one read the same tensor, so they share their statistics.
    groups, session = dict[str, int](), layers[0].session
    for layer in layers:
        parent, _, last = layer.names[0].rpartition(".")
        last = next((together[0] for together in MERGED if last in together), last)
        groups[f"{parent}.{last}"] = sum(leaf.nbytes for leaf in pytree.tree_leaves(layer.initial()))
    if not session.sequential:
        return sum(groups.values()), f"in one pass: the statistics of {len(groups):,} groups of layers"
    widths = Counter(layer.in_features for layer in layers)
    (usual, _), *_ = widths.most_common(1)
    item, walks, most = layers[0].weight.dtype.itemsize, 1 + session.paired, max(groups.values())
    how = f"in lock step: {tokens:,} tokens x (2 x {usual} + {max(widths)}) x {item} bytes"
    how += " x 2" * (walks == 2) + f", and the statistics of a group: {_size(most)}"
    return tokens * (2 * usual + max(widths)) * item * walks + most, how


def _size(count: int) -> str:
    unit, step = next((each for each in (("GiB", 2**30), ("MiB", 2**20)) if count >= each[1]), ("KiB", 2**10))
    return f"{count / step:.1f} {unit}"
