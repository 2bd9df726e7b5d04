"""Move the scale of a layer's inputs into the module that makes them: proposed, verified, and else left as it is.

Source: Lin et al. 2024, AWQ, section 4, and Xiao et al. 2023, SmoothQuant, section 4, where tables of architectures say
which module that is. Here a module is proposed because its output was seen to be the input, or because it is a linear
layer that ran shortly before and has as many channels. Each proposal is tried with scales that are powers of two:
products with them are exact, so that nothing in the model may change by a single bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantize.core import affine
from quantize.shell import offload
from quantize.shell.fold.outputs import Outputs, visible
from quantize.shell.fold.producers import Foldable, Readers, Run, find, magnitudes, width

# What gives the divisor ``[c]`` for layers, equal where the given rows ``[c]`` of their producer are.
Scale = Callable[[Sequence[Foldable], Tensor | None], Tensor]


@dataclass(eq=False)
class Fold:
    """One candidate: the scale of what ``readers`` read moves into the weight of ``producer``, one row a channel.

    ``one_plus``: the producer multiplies by 1 + weight, which is rounded. ``rows`` ``[c]``: the output channel of the
    producer that each input is a copy of, where that is not the channel with the same number.
    """

    readers: Readers
    producer: nn.Module
    one_plus: bool = False
    rows: Tensor | None = None

    def apply(self, scale: Tensor) -> Callable[[], None]:
        """Divide what the producer gives by ``scale`` ``[c]``; the readers multiply by it. Returns what undoes this."""
        first, own = self.readers.layers[0], self.producer._parameters["weight"]
        assert own is not None
        scale = scale.to(offload.device(first), affine.working_dtype(first.weight))
        rows = scale if self.rows is None else scale.new_ones(width(self.producer)).scatter(0, self.rows, scale)

        def divided(name: str, old: Tensor) -> Tensor:
            wide, divisor = old.to(rows.device, rows.dtype), rows if old.ndim == 1 else rows[:, None]
            new = (1 + wide) / divisor - 1 if self.one_plus and name == "weight" else wide / divisor
            return new.to(old.dtype)

        if own.ndim == 1:
            # The new weight is rounded to its dtype: the layers make up for what was really divided.
            old = offload.weight(self.producer, type(self.producer).__name__).detach()
            wide, new = (each.to(scale.dtype) + self.one_plus for each in (old, divided("weight", old)))
            scale = torch.where(torch.isfinite(wide / new) & (wide / new > 0), wide / new, scale)
        with ExitStack() as undo:
            undo.callback(self._hand, None)
            undo.callback(offload.change(self.producer, ("weight", "bias"), divided))
            self._hand(scale)
            return undo.pop_all().close

    def _hand(self, scale: Tensor | None) -> None:
        for layer in self.readers.layers:
            layer.folded = scale

    def probe(self) -> Tensor:
        """A scale that is small and large in turn over the channels of the producer: it leaves none as it is."""
        rows = torch.arange(len(self.readers.sums)) if self.rows is None else self.rows
        # So far apart that functions such as relu6, linear in a part of their range, show. Half precision ends earlier.
        far = 1 if self.one_plus else 3 if self.readers.dtype == torch.float16 else 10
        return torch.exp2((rows % 2 * 2 - 1) * far)


class _Refuted(BaseException):
    """Ends a run that has shown a fold to be wrong."""


def fold(root: nn.Module, units: Sequence[Sequence[Foldable]], run: Run, scale: Scale) -> list[str]:
    """Fold the scales of all layers wherever a ``run`` proves that it is right; returns what is not folded, and why.

    Writes :attr:`Foldable.folded` and the producers' parameters. The float model computes what it computed before.
    """
    found, outputs = find(root, units, run)
    folds = _proven(root, found, outputs, run)
    with ExitStack() as undo:
        # From the end: what the rows of a layer are divided by is known before its own columns get a scale.
        for each in reversed(folds):
            undo.callback(each.apply(scale(each.readers.layers, each.rows)))
        kept = not folds or outputs.near(_tried(run, {}), sum(map(len, units)))
        for each in folds:
            each.readers.reason = "" if kept else "the model's outputs would change"
        if kept:
            undo.pop_all()
    told = ((", ".join(layer.names[0] for layer in each.layers), each.reason) for each in found if each.reason)
    return [f"{names}: scale at run time, {reason}" for names, reason in told]


def _proven(root: nn.Module, found: list[Readers], outputs: Outputs, run: Run) -> list[Fold]:
    """The proposals that hold, none of them applied."""
    names = {module: re.sub(r"\d+", "#", name) for name, module in root.named_modules()}
    proposals: dict[tuple[object, str, str, bool, bool], list[Fold]] = {}
    for readers in found:
        for producer in readers.producers:
            for one_plus in (False,) if isinstance(producer, nn.Linear) else (False, True):
                # What is alike in all blocks of a model holds in all of them or is taken to hold in none.
                ends = type(producer), names[producer], names[readers.layers[0]]
                relation = *ends, one_plus, width(producer) < len(readers.sums)
                proposals.setdefault(relation, []).append(Fold(readers, producer, one_plus))
    proven: list[Fold] = []
    for (*_, one_plus, copies), alike in proposals.items():
        taken = {end for each in proven for end in (each.readers, each.producer)}
        new: list[Fold] = []
        for each in alike:
            if taken.isdisjoint((each.readers, each.producer)):
                taken |= {each.readers, each.producer}
                new.append(each)
        if not new or (copies and not _found_rows(new, run)):
            continue
        # What is not exact would hide whether others are: it is tried alone.
        folds = new if one_plus else [*(each for each in proven if not each.one_plus), *new]
        after = _tried(run, {each: each.probe() for each in folds})
        if outputs == after or (one_plus and outputs.near(after, sum(len(each.readers.layers) for each in folds))):
            proven += new
    return proven


def _found_rows(folds: list[Fold], run: Run) -> bool:
    """Find out which channel of its producer each input is a copy of, as where heads share their values.

    There is one run for each ternary digit of the channels' numbers. A producer multiplies each channel by two to the
    power of its digit. The layers read the digit off their inputs and make up for it: the rest of the run is as ever.
    """
    digits: dict[tuple[Fold, int], Tensor] = {}

    def read(step: int, each: Fold, sums: Tensor) -> bool:
        exponents = (each.readers.sums / sums).log2().nan_to_num().round().clamp(-1, 1)
        digits[each, step] = step * (exponents.to(torch.int64) + 1)
        for layer in each.readers.layers:
            layer.folded = torch.exp2(exponents)
        # Nothing can be read off a silent channel.
        return bool(each.readers.sums.all())

    steps = [3**place for place in range(32) if 3**place < max(width(each.producer) for each in folds)]
    for step in steps:
        scales = {each: torch.exp2(torch.arange(width(each.producer)) // step % 3 - 1) for each in folds}
        if _tried(run, scales, partial(read, step)) is None or any((each, step) not in digits for each in folds):
            return False
    for each in folds:
        # What is wrong is refuted later.
        each.rows = torch.stack([digits[each, step] for step in steps]).sum(0).clamp(max=width(each.producer) - 1)
    return True


def _divided(each: Fold, sums: Tensor) -> bool:
    scale, expected = each.readers.layers[0].folded, each.readers.sums
    assert scale is not None
    # 1 + weight is rounded, and so is all before it: but a channel that is not divided is off by a factor of two.
    return bool(((sums * scale - expected).abs() <= expected * each.one_plus / 4).all())


def _tried(run: Run, scales: Mapping[Fold, Tensor], right: Callable[..., bool] = _divided) -> Outputs | None:
    """What the model gives with ``scales``, which are taken back; None where it, or ``right`` at a layer, refuses."""

    def before(each: Fold, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not right(each, magnitudes(args[0] if args else kwargs["input"])):
            raise _Refuted

    with ExitStack() as undo:
        for each, scale in scales.items():
            undo.callback(each.apply(scale))
            for layer in each.readers.layers:
                undo.enter_context(layer.register_forward_pre_hook(partial(before, each), with_kwargs=True))
        try:
            return Outputs.of([*visible(run())])
        except (_Refuted, Exception):
            return None
