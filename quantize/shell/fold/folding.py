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
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantize.shell.fold.folds import Fold
from quantize.shell.fold.outputs import Outputs, visible
from quantize.shell.fold.producers import Foldable, Readers, Run, find, width

# The divisor ``[c]`` for layers that read one tensor, equal where the given channels of its producer are.
Scale = Callable[[Sequence[Foldable], Tensor | None], Tensor]


class _Refuted(BaseException):
    """Ends a run that has shown a fold to be wrong."""


def fold(root: nn.Module, units: Sequence[Sequence[Foldable]], run: Run, scale: Scale) -> list[str]:
    """Fold the scales of all layers wherever that is proven in a ``run``; returns what stays at run time, and why.

    What is folded is on the layers afterwards, in :attr:`Foldable.folded`, and in the producers' parameters. The float
    model computes what it computed before.
    """
    found, outputs = find(root, units, run)
    folds = _proven(root, found, outputs, run)
    with ExitStack() as undo:
        # From the end: what the rows of a layer are divided by is known before its own columns get a scale.
        for each in reversed(folds):
            undo.callback(each.apply(scale(each.readers.layers, each.rows)))
            each.readers.reason = ""
        after = _tried(run, {}, lambda *_: True) if folds else outputs
        if after is not None and outputs.near(after, sum(map(len, units))):
            undo.pop_all()
        else:
            for each in folds:
                each.readers.reason = "the model's outputs would change"
    return [
        f"{', '.join(layer.names[0] for layer in readers.layers)}: scale at run time, {readers.reason}"
        for readers in found
        if readers.reason
    ]


def _proven(root: nn.Module, found: list[Readers], outputs: Outputs, run: Run) -> list[Fold]:
    """The proposals that hold, none of them applied."""
    names = {module: re.sub(r"\d+", "#", name) for name, module in root.named_modules()}
    proposals: dict[tuple[str, str, bool, bool], list[Fold]] = {}
    for readers in found:
        first = readers.layers[0]
        for producer in readers.producers:
            for one_plus in (False,) if isinstance(producer, nn.Linear) else (False, True):
                # What is alike in all blocks of a model holds in all of them or is taken to hold in none.
                relation = names[producer], names[first], one_plus, width(producer) != first.in_features
                proposals.setdefault(relation, []).append(Fold(readers, producer, one_plus))
    proven: list[Fold] = []
    for (_, _, one_plus, copies), alike in proposals.items():
        taken = {end for each in proven for end in (each.readers, each.producer)}
        new: list[Fold] = []
        for each in alike:
            if taken.isdisjoint((each.readers, each.producer)):
                taken |= {each.readers, each.producer}
                new.append(each)
        # What is not exact would hide whether others are: it is tried alone.
        basis = [] if one_plus else [each for each in proven if not each.one_plus]
        if new and (not copies or _found_rows(new, basis, run)) and _hold([*basis, *new], outputs, run):
            proven += new
    return proven


def _found_rows(new: list[Fold], basis: list[Fold], run: Run) -> bool:
    """Find out which channel of its producer each input is a copy of, as where heads share their values.

    There is one run for each ternary digit of a channel's number. Every channel of a producer is multiplied by two to
    the power of that digit. The digit is read where the layers get it, and is made up for there, so that the rest of
    the run is as ever.
    """
    rows: dict[Fold, Any] = dict.fromkeys(new, 0)
    digits: dict[Fold, Tensor] = {}

    def read(each: Fold, arrived: Tensor) -> bool:
        expected = each.readers.sample
        if each in rows:
            ratio = (expected.abs().sum(0) / arrived.abs().sum(0)).double()
            exponents = ratio.log2().nan_to_num(nan=0.0).round().clamp(-1, 1)
            digits[each] = exponents.to(torch.int64) + 1
            for layer in each.readers.layers:
                layer.folded = each.powers(exponents)
        # Nothing can be read off a channel that is silent in these tokens.
        return each not in rows or bool(expected.any(0).all())

    step = 1
    while step < max(width(each.producer) for each in new):
        scales = {each: each.probe() for each in basis}
        scales |= {each: each.powers(torch.arange(width(each.producer)) // step % 3 - 1) for each in new}
        digits.clear()
        if _tried(run, scales, read) is None or digits.keys() != rows.keys():
            return False
        rows = {each: rows[each] + step * digits[each] for each in new}
        step *= 3
    for each in new:
        each.rows = rows[each]
    return all(bool((rows[each] < width(each.producer)).all()) for each in new)


def _hold(folds: list[Fold], outputs: Outputs, run: Run) -> bool:
    """Whether with all of ``folds`` every layer gets its inputs divided, and the model gives what it gave."""
    found = _tried(run, {each: each.probe() for each in folds}, _divided)
    if found is None or not any(each.one_plus for each in folds):
        return found is not None and found.bits == outputs.bits
    return outputs.near(found, sum(len(each.readers.layers) for each in folds))


def _divided(each: Fold, arrived: Tensor) -> bool:
    expected, scale = each.readers.sample, each.readers.layers[0].folded
    assert scale is not None
    found = (arrived.to(scale.dtype) * scale).to(expected.dtype)
    if not each.one_plus:
        return torch.equal(found, expected)
    # 1 + weight is rounded, and so is all before it: but a channel that is not divided is off by a factor of two.
    off, size = (found - expected).float().abs().sum(0), expected.float().abs().sum(0)
    return bool((off <= size / 4).all())


def _tried(run: Run, scales: Mapping[Fold, Tensor], right: Callable[[Fold, Tensor], bool]) -> Outputs | None:
    """What the model gives with ``scales``, taken back afterwards.

    None where what a layer gets is not ``right``, or where the model itself refuses.
    """

    def before(each: Fold, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arrived = each.readers.arrived(args[0] if args else kwargs["input"])
        if arrived is None or not right(each, arrived):
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
