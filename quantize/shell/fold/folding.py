"""Move the scale of a layer's inputs into the module that makes them: proposed, verified, and else left as it is.

Source: Lin et al. 2024, AWQ, section 4, and Xiao et al. 2023, SmoothQuant, section 4, where tables of architectures say
which module that is. Here a module is proposed because its output was seen to be the input, or because it is a linear
layer that ran shortly before and has as many channels. Each proposal is tried with scales that are powers of two:
products with them are exact, so that nothing in the model may change by a single bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantize.core import affine
from quantize.shell import offload
from quantize.shell.fold.outputs import Outputs
from quantize.shell.fold.producers import Foldable, Readers, Run, Trace, magnitudes, width

# What gives the divisor ``[c]`` for layers, equal where the given rows ``[c]`` of their producer are.
Scale = Callable[[Sequence[Foldable], Tensor | None], Tensor]


class _Refuted(BaseException):
    """Ends a run that has shown a fold to be wrong."""


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
        """Divide the producer's rows by ``scale``, one for each; the readers multiply. Returns what undoes this."""
        first, own = self.readers.layers[0], self.producer._parameters["weight"]
        assert own is not None
        given = self._divisor = scale.to(offload.device(first), affine.working_dtype(first.weight))

        def divided(name: str, old: Tensor) -> Tensor:
            wide, divisor = old.to(given.device, given.dtype), given if old.ndim == 1 else given[:, None]
            new = (1 + wide) / divisor - 1 if self.one_plus and name == "weight" else wide / divisor
            return new.to(old.dtype)

        if own.ndim == 1:
            # The new weight is rounded to its dtype: the layers make up for what was really divided.
            old = offload.weight(self.producer, type(self.producer).__name__).detach()
            wide, new = (each.to(given.dtype) + self.one_plus for each in (old, divided("weight", old)))
            self._divisor = torch.where(torch.isfinite(wide / new) & (wide / new > 0), wide / new, given)
        with ExitStack() as undo:
            undo.callback(self._hand, None)
            undo.callback(offload.change(self.producer, ("weight", "bias"), divided))
            self._hand(self._divisor)
            return undo.pop_all().close

    def _hand(self, divisor: Tensor | None) -> None:
        for layer in self.readers.layers:
            layer.folded = divisor if divisor is None or self.rows is None else divisor[self.rows]

    def probe(self) -> Tensor:
        """Powers of two, small and large in turn over the rows: they leave none as it is, and tell rows apart."""
        # So far apart that functions such as relu6, linear in a part of their range, show. Half precision ends earlier.
        far = 1 if self.one_plus else 3 if self.readers.dtype == torch.float16 else 10
        rows, random = torch.arange(width(self.producer), device="cpu"), torch.Generator("cpu").manual_seed(0)
        less = torch.randint(far // 2 + 1, rows.shape, generator=random, device="cpu")
        return torch.exp2((rows % 2 * 2 - 1) * (far - less))

    def check(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """End the run unless what a reader reads is divided; finds out :attr:`rows`."""
        sums, expected = magnitudes(args[0] if args else kwargs["input"]), self.readers.sums
        for rows in self._arrangements():
            scale = self._divisor if rows is None else self._divisor[rows]
            # 1 + weight is rounded, and so is all before it: a channel that is not divided is off by a factor of two.
            if ((sums * scale - expected).abs() <= expected * self.one_plus / 4).all():
                self.rows = rows
                return self._hand(self._divisor)
        raise _Refuted

    def _arrangements(self) -> Sequence[Tensor | None]:
        """What :attr:`rows` may be: heads of any width, each read several times in succession, or all in turn."""
        rows, c = width(self.producer), len(self.readers.sums)
        if self.rows is not None or rows == c:
            return [self.rows]
        inputs = torch.arange(c, device=self.readers.sums.device)
        heads = (d for d in range(rows, 0, -1) if rows % d == 0)
        # Of a silent channel nothing is known.
        return [inputs // (d * c // rows) * d + inputs % d for d in heads] if self.readers.sums.all() else []


def fold(root: nn.Module, units: Sequence[Sequence[Foldable]], run: Run, scale: Scale) -> list[str]:
    """Fold the scales of all layers wherever a ``run`` proves that it is right; returns what is not folded, and why.

    Writes :attr:`Foldable.folded` and the producers' parameters. The float model computes what it computed before.
    """
    trace = Trace(root)
    outputs = Outputs(trace.watch(run))
    if refused := outputs.refused or trace.missed():
        return [f"all scales at run time: {refused}"]
    found = trace.readers(units)
    folds = _proven(root, found, outputs, run)
    with ExitStack() as undo:
        # From the end: what the rows of a layer are divided by is known before its own columns get a scale.
        for each in reversed(folds):
            wanted = scale(each.readers.layers, each.rows)
            if each.rows is not None:
                wanted = wanted.new_ones(width(each.producer)).scatter(0, each.rows, wanted)
            undo.callback(each.apply(wanted))
        kept = not folds or outputs.near(_tried(run, []), sum(map(len, units)))
        for each in folds:
            each.readers.reason = "" if kept else "the model's outputs would change"
        if kept:
            undo.pop_all()
    told = ((", ".join(layer.names[0] for layer in each.layers), each.reason) for each in found if each.reason)
    return [f"{names}: scale at run time, {reason}" for names, reason in told]


def _proven(root: nn.Module, found: list[Readers], outputs: Outputs, run: Run) -> list[Fold]:
    """The proposals that hold, none of them applied."""
    names = {module: re.sub(r"\d+", "#", name) for name, module in root.named_modules()}
    proposals: dict[tuple[object, str, str, bool], list[Fold]] = {}
    for readers in found:
        for producer in readers.producers:
            for one_plus in (False,) if isinstance(producer, nn.Linear) else (False, True):
                # What is alike in all blocks of a model holds in all of them or is taken to hold in none.
                relation = type(producer), names[producer], names[readers.layers[0]], one_plus
                proposals.setdefault(relation, []).append(Fold(readers, producer, one_plus))
    proven: list[Fold] = []
    for (*_, one_plus), alike in proposals.items():
        taken = {end for each in proven for end in (each.readers, each.producer)}
        new: list[Fold] = []
        for each in alike:
            if taken.isdisjoint((each.readers, each.producer)):
                taken |= {each.readers, each.producer}
                new.append(each)
        # What is not exact would hide whether others are: it is tried alone.
        folds = new if one_plus else [*(each for each in proven if not each.one_plus), *new]
        if new and (after := _tried(run, folds)) is not None:
            near = one_plus and outputs.near(after, sum(len(each.readers.layers) for each in folds))
            proven += new if near or outputs.bits == after.bits else []
    return proven


def _tried(run: Run, folds: Sequence[Fold]) -> Outputs | None:
    """What the model gives while ``folds`` are probed; None where the inputs of a reader or the model refuse."""
    with ExitStack() as undo:
        for each in folds:
            undo.callback(each.apply(each.probe()))
            for layer in each.readers.layers:
                undo.enter_context(layer.register_forward_pre_hook(each.check, with_kwargs=True))
        try:
            return Outputs(run())
        except (_Refuted, Exception):
            return None
