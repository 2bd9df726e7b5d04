"""Move the scale of a layer's inputs into the module that makes them: proposed, verified, and else left as it is.

Source: Lin et al. 2024, AWQ, section 4, and Xiao et al. 2023, SmoothQuant, section 4, where tables of architectures say
which module that is. Here a module is proposed because its output was seen to be the input, or because it is a linear
layer that ran shortly before and has as many channels. Whether the proposal holds is tried out with scales that are
powers of two: products with them are exact, so that nothing in the model may change by a single bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantize.core import affine
from quantize.shell.fold.folds import MULTIPLIES, ONE_PLUS, ROWS, Fold, Form
from quantize.shell.fold.producers import Foldable, Group, Outputs, Run, find, hooked, width

# The divisor ``[c]`` for layers that read one tensor, equal where the given channels of its producer are.
Scale = Callable[[Sequence[Foldable], Tensor | None], Tensor]


class _Refuted(BaseException):
    """Ends a run that has shown a fold to be wrong."""


def fold(root: nn.Module, units: Sequence[Sequence[Foldable]], run: Run, scale: Scale) -> list[str]:
    """Fold the scales of all layers wherever that is proven in a ``run``; returns what stays at run time, and why.

    What is folded is on the layers afterwards, in :attr:`Foldable.folded`, and in the producers' parameters. The float
    model computes what it computed before.
    """
    layers = [layer for unit in units for layer in unit]
    groups, outputs = find(root, units, run)
    reasons = {id(group): group.reason for group in groups if not group.producers}
    folds = _proven(root, groups, outputs, run, reasons)
    # From the end: what the rows of a layer are divided by is known before its own columns get a scale.
    try:
        for each in reversed(folds):
            each.apply(scale(each.group.layers, each.rows))
        kept = not folds or _given(run, lambda found: _alike(outputs, Outputs.of(found), len(layers)))
    except BaseException:
        _undo(folds)
        raise
    if not kept:
        _undo(folds)
        reasons |= {id(each.group): "the model's outputs would change" for each in folds}
    return [
        f"{', '.join(layer.names[0] for layer in group.layers)}: scale at run time, {reasons[id(group)]}"
        for group in groups
        if id(group) in reasons
    ]


def _proven(root: nn.Module, groups: list[Group], outputs: Outputs, run: Run, reasons: dict[int, str]) -> list[Fold]:
    """The proposals that hold, none of them applied."""
    names = {module: re.sub(r"\d+", "#", name) for name, module in root.named_modules()}
    proposals: dict[tuple[str, str, str], list[Fold]] = {}
    for group in groups:
        for producer in group.producers:
            for form in _forms(producer):
                # What is alike in all blocks of a model holds in all of them or is taken to hold in none.
                relation = names[producer], names[group.layers[0]], form.name
                proposals.setdefault(relation, []).append(Fold(group, producer, form))
    proven: list[Fold] = []
    for alike in proposals.values():
        new: list[Fold] = []
        for each in alike:
            if all(each.group is not other.group and each.producer is not other.producer for other in [*proven, *new]):
                new.append(each)
        if not new:
            continue
        # What is not exact would hide whether others are: it is tried alone.
        basis = [each for each in proven if each.form.exact and new[0].form.exact]
        if new[0].copies and not _found_rows(new, basis, root, run):
            continue
        if _hold([*basis, *new], root, outputs, run):
            proven += new
    done = {id(each.group) for each in proven}
    reasons |= {id(group): "no module before makes each channel of the inputs, and nothing else, larger"
                for group in groups if group.producers and id(group) not in done}  # fmt: skip
    return proven


def _forms(producer: nn.Module) -> tuple[Form, ...]:
    return (ROWS,) if isinstance(producer, nn.Linear) else (MULTIPLIES, ONE_PLUS)


def _powers(fold: Fold, exponents: Tensor) -> Tensor:
    weight = fold.group.layers[0].weight
    return torch.exp2(exponents.to(weight.device, affine.working_dtype(weight)))


def _probe(fold: Fold) -> Tensor:
    """Small and large, in turn over the channels of the producer: no channel is left as it is.

    Far enough apart that a function which is linear in a part of its range only, such as relu6, gives itself away; in
    half precision, and where 1 is added to the weight, as far as it goes.
    """
    rows = torch.arange(fold.group.sample.shape[1]) if fold.rows is None else fold.rows
    far = 1 if not fold.form.exact else 3 if fold.group.sample.dtype == torch.float16 else 10
    return _powers(fold, (rows % 2 * 2 - 1) * far)


def _found_rows(new: list[Fold], proven: list[Fold], root: nn.Module, run: Run) -> bool:
    """Find out which channel of its producer each input is a copy of: heads that share their values have such.

    In the runs, one a digit, every channel of a producer is multiplied by two to the power of a ternary digit of its
    number; the digit is read where the layers get it, and made up for there, so that the rest of the run is as ever.
    """
    most = max(width(each.producer) for each in new)
    of = {each.group.layers[0]: each for each in new}
    found = {each: torch.zeros(each.group.sample.shape[1], dtype=torch.int64, device=each.group.sample.device)
             for each in new}  # fmt: skip
    step = 1

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        each = of.get(module)  # type: ignore[call-overload]
        if each is not None:
            arrived, expected = each.group.arrived(args[0] if args else kwargs["input"]), each.group.sample
            # Nothing can be read off a channel that is silent in these tokens.
            if arrived is None or not bool(expected.any(0).all()):
                raise _Refuted
            ratio = (expected.abs().sum(0) / arrived.abs().sum(0)).nan_to_num(nan=1.0).double()
            exponents = ratio.log2().round().clamp(-1, 1)
            found[each] += step * (exponents.to(torch.int64) + 1)
            for layer in each.group.layers:
                layer.folded = torch.exp2(exponents).to(affine.working_dtype(layer.weight))

    while step < most:
        try:
            for each in proven:
                each.apply(_probe(each))
            for each in new:
                each.divide(_powers(each, torch.arange(width(each.producer)) // step % 3 - 1))
            with hooked(root, before, lambda *_: None):
                read = _given(run, lambda _: True)
        finally:
            _undo([*new, *proven])
        if not read:
            return False
        step *= 3
    for each, rows in found.items():
        if bool((rows >= width(each.producer)).any()):
            return False
        each.rows = rows
    return True


def _hold(folds: list[Fold], root: nn.Module, outputs: Outputs, run: Run) -> bool:
    """Whether with all of ``folds`` every layer gets its inputs divided, and the model gives what it gave."""
    of: dict[nn.Module, Fold] = {layer: each for each in folds for layer in each.group.layers}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module in of and not _divided(of[module], args[0] if args else kwargs["input"]):
            raise _Refuted

    def same(given: Any) -> bool:
        found = Outputs.of(given)
        exact = all(each.form.exact for each in folds)
        return found.bits == outputs.bits if exact else _alike(outputs, found, len(of))

    try:
        for each in folds:
            each.apply(_probe(each))
        with hooked(root, before, lambda *_: None):
            return _given(run, same)
    finally:
        _undo(folds)


def _given(run: Run, holds: Callable[[Any], bool]) -> bool:
    """Whether what the model gives in a ``run`` ``holds``; it does not where a hook or the model itself refuses."""
    try:
        return holds(run())
    except (_Refuted, Exception):
        return False


def _undo(folds: list[Fold]) -> None:
    for each in folds:
        each.undo()


def _divided(each: Fold, x: Tensor) -> bool:
    arrived, expected, scale = each.group.arrived(x), each.group.sample, each.group.layers[0].folded
    assert scale is not None
    if arrived is None:
        return False
    found = (arrived.to(scale.dtype) * scale).to(expected.dtype)
    if each.form.exact:
        return torch.equal(found, expected)
    # 1 + weight is rounded, and so is all before it: but a channel that is not divided is off by a factor of two.
    off, size = (found - expected).float().abs().sum(0), expected.float().abs().sum(0)
    return bool((off <= size / 4).all())


def _alike(before: Outputs, after: Outputs, layers: int) -> bool:
    """Whether outputs differ by no more than independent roundings of every layer would make them."""
    if [each.shape for each in before.numbers] != [each.shape for each in after.numbers]:
        return False
    for old, new in zip(before.numbers, after.numbers, strict=True):
        finite = torch.isfinite(old)
        if not torch.equal(finite, torch.isfinite(new)):
            return False
        if not old.is_floating_point() or not finite.any():
            continue
        a, b = old[finite].double(), new[finite].double()
        allowed = 8 * torch.finfo(old.dtype).eps * layers**0.5 * a.square().mean().sqrt()
        if not bool((a - b).square().mean().sqrt() <= allowed):
            return False
    return True
