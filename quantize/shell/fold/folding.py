"""Move the scale of a layer's inputs into the module that produces them: propose a producer, verify it, then fold.

Source: Lin et al. 2024, AWQ, section 4, and Xiao et al. 2023, SmoothQuant, section 4. There, tables of architectures
name the producer. Here a module is proposed if its output is the input of the layer, or if it is a linear layer that
ran shortly before and has as many channels. Each proposal is tried with scales that are powers of two. Products with
these are exact, so a correct proposal does not change a single bit of the model's outputs.
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

# A function that returns the divisor ``[c]`` for layers; it is equal where the given rows ``[c]`` of the producer are.
Scale = Callable[[Sequence[Foldable], Tensor | None], Tensor]


class _Refuted(BaseException):
    """Ends a run once a fold has turned out wrong."""


@dataclass(eq=False)
class Fold:
    """One candidate: the scale of the inputs of ``readers`` moves into the rows of the weight of ``producer``.

    ``one_plus``: the producer multiplies by 1 + weight, so the scaled weight is rounded. ``rows`` ``[c]``: the output
    channel of the producer that each input copies; None if they have the same numbers.
    """

    readers: Readers
    producer: nn.Module
    one_plus: bool = False
    rows: Tensor | None = None

    def apply(self, scale: Tensor) -> Callable[[], None]:
        """Divide the producer's rows by ``scale``, one for each; the readers multiply. The result undoes this."""
        first, own = self.readers.layers[0], self.producer._parameters["weight"]
        assert own is not None
        given = self._divisor = scale.to(offload.device(first), affine.working_dtype(first.weight))

        def divided(name: str, old: Tensor) -> Tensor:
            wide, divisor = old.to(given.device, given.dtype), given if old.ndim == 1 else given[:, None]
            new = (1 + wide) / divisor - 1 if self.one_plus and name == "weight" else wide / divisor
            return new.to(old.dtype)

        if own.ndim == 1:
            # The new weight is rounded to its dtype. The layers multiply by the quotient of old and rounded weight.
            old = offload.weight(self.producer, type(self.producer).__name__).detach()
            wide, new = (each.to(given.dtype) + self.one_plus for each in (old, divided("weight", old)))
            self._divisor = torch.where(torch.isfinite(wide / new) & (wide / new > 0), wide / new, given)
        with ExitStack() as undo:
            undo.callback(self._set_folded, None)
            undo.callback(offload.change(self.producer, ("weight", "bias"), divided))
            self._set_folded(self._divisor)
            return undo.pop_all().close

    def _set_folded(self, divisor: Tensor | None) -> None:
        for layer in self.readers.layers:
            layer.folded = divisor if divisor is None or self.rows is None else divisor[self.rows]

    def probe(self) -> Tensor:
        """Random powers of two for the rows, small and large in turn: every row changes, and rows can be told apart."""
        # So far apart that they reveal piecewise linear functions, such as relu6; float16 has a smaller range.
        far = 1 if self.one_plus else 3 if self.readers.dtype == torch.float16 else 10
        rows, random = torch.arange(width(self.producer), device="cpu"), torch.Generator("cpu").manual_seed(0)
        less = torch.randint(far // 2 + 1, rows.shape, generator=random, device="cpu")
        return torch.exp2((rows % 2 * 2 - 1) * (far - less))

    def check(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check that the inputs of a reader are divided, else end the run; sets :attr:`rows`."""
        sums, expected = magnitudes(args[0] if args else kwargs["input"]), self.readers.sums
        for rows in self._arrangements():
            scale = self._divisor if rows is None else self._divisor[rows]
            # 1 + weight is rounded, so a small error is accepted; an undivided channel is off by a factor of two.
            if ((sums * scale - expected).abs() <= expected * self.one_plus / 4).all():
                self.rows = rows
                return self._set_folded(self._divisor)
        raise _Refuted

    def _arrangements(self) -> Sequence[Tensor | None]:
        """Candidates for :attr:`rows`: heads of any width, each read several times in succession, or all as one."""
        rows, c = width(self.producer), len(self.readers.sums)
        if self.rows is not None or rows == c:
            return [self.rows]
        inputs = torch.arange(c, device=self.readers.sums.device)
        heads = (d for d in range(rows, 0, -1) if rows % d == 0)
        # A channel of zeros does not show which row it copies.
        return [inputs // (d * c // rows) * d + inputs % d for d in heads] if self.readers.sums.all() else []


def fold(root: nn.Module, units: Sequence[Sequence[Foldable]], run: Run, scale: Scale) -> list[str]:
    """Fold the scales of all layers where a ``run`` proves it right; returns the layers that are not folded, and why.

    It writes :attr:`Foldable.folded` and the parameters of the producers. The outputs of the float model stay the same.
    """
    trace = Trace(root)
    outputs = Outputs(trace.watch(run))
    if refused := outputs.refused or trace.missed():
        return [f"all scales at run time: {refused}"]
    found = trace.readers(units)
    folds = _proven(root, found, outputs, run)
    with ExitStack() as undo:
        # In reverse order, so that the rows of a layer are divided before its own columns get a scale.
        for each in reversed(folds):
            wanted = scale(each.readers.layers, each.rows)
            if each.rows is not None:
                wanted = wanted.new_ones(width(each.producer)).scatter(0, each.rows, wanted)
            undo.callback(each.apply(wanted))
        kept = not folds or outputs.near(_probed_outputs(run, []), sum(map(len, units)))
        for each in folds:
            each.readers.reason = "" if kept else "the model's outputs would change"
        if kept:
            undo.pop_all()
    told = ((", ".join(layer.names[0] for layer in each.layers), each.reason) for each in found if each.reason)
    return [f"{names}: scale at run time, {reason}" for names, reason in told]


def _proven(root: nn.Module, found: list[Readers], outputs: Outputs, run: Run) -> list[Fold]:
    """The proposals that are right; none of them is applied afterwards."""
    names = {module: re.sub(r"\d+", "#", name) for name, module in root.named_modules()}
    proposals: dict[tuple[object, str, str, bool], list[Fold]] = {}
    for readers in found:
        for producer in readers.producers:
            for one_plus in (False,) if isinstance(producer, nn.Linear) else (False, True):
                # Corresponding proposals of all blocks are accepted or rejected together.
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
        # Inexact proposals are tried alone, because their errors would hide those of others.
        folds = new if one_plus else [*(each for each in proven if not each.one_plus), *new]
        if new and (after := _probed_outputs(run, folds)) is not None:
            near = one_plus and outputs.near(after, sum(len(each.readers.layers) for each in folds))
            proven += new if near or outputs.bits == after.bits else []
    return proven


def _probed_outputs(run: Run, folds: Sequence[Fold]) -> Outputs | None:
    """The outputs of the model while ``folds`` are probed; None if the inputs of a reader are wrong or it fails."""
    with ExitStack() as undo:
        for each in folds:
            undo.callback(each.apply(each.probe()))
            for layer in each.readers.layers:
                undo.enter_context(layer.register_forward_pre_hook(each.check, with_kwargs=True))
        try:
            return Outputs(run())
        except (_Refuted, Exception):
            return None
