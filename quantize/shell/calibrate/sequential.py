"""Fit every layer to the outputs of the quantized layers before it: in lock step if possible, else in full passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantize.shell import offload
from quantize.shell.calibrate.layer import CalibrationLinear
from quantize.shell.calibrate.lockstep import Walks
from quantize.shell.calibrate.ranks import Ranks
from quantize.shell.calibrate.session import Session
from quantize.shell.calibrate.units import Inputs, Reading, Unit, units
from quantize.shell.calibrate.watching import check_finite, counted
from quantize.shell.modes import same_attributes, undisturbed
from quantize.shell.progress import progress
from quantize.shell.values import kept


def fit(root: nn.Module, session: Session, layers: list[CalibrationLinear], ranks: Ranks) -> None:
    """Solve the units of ``layers``, those of ``session``, in order. Layers with a solution keep it."""
    before, batches = {layer: layer.solution for layer in layers}, session.batches
    reads = ranks.gather([batch.reads for batch in batches])
    ordered = units(layers, [each for theirs in reads for each in theirs])
    stateful = any(ranks.gather(any(batch.written(root) for batch in batches[:1])))
    # Compiled parts run uncompiled, because the compiler cannot trace a pass that pauses.
    with torch.compiler.set_stance("force_eager"), undisturbed(root), same_attributes(root, layers):
        offload.hold(root)
        trouble = "the model writes to its buffers" if stateful else _in_lock_step(root, session, ordered, ranks)
        if trouble is None:
            return
        for layer, solution in before.items():
            layer.solution = solution
        session.remark(f"calibrated in full passes for each layer, which is slow, and not in lock step: {trouble}")
        for unit in _progress(ordered, "solve in full passes"):
            _fit_unit(unit, ranks, partial(_full_passes, root, session, unit))


def _in_lock_step(root: nn.Module, session: Session, ordered: list[Unit], ranks: Ranks) -> str | None:
    """Solve the units in lock step; returns the reason if that is impossible, else None."""
    batches = session.batches
    # If the algorithm does not need float walks, two of them still show whether batches disturb each other.
    floats = len(batches) if session.paired else 2 * (len(batches) > 1)
    session.watching = walks = Walks(root, ordered, batches, floats=floats)
    try:
        for _ in _progress(ordered, "solve in lock step"):
            ranks.together(walks.advance)
            told = ranks.gather((walks.trouble, walks.first))
            trouble: str | None = min((each for each, _ in told if each is not None), default=None)
            place = min((each for _, each in told if each is not None), default=None)
            if trouble is not None or place is None:
                return trouble
            _fit_unit(ordered[place], ranks, partial(walks.read, ordered[place]))
            walks.solved(ordered[place])
    finally:
        walks.close()
        session.watching = None
    return None


def _progress(ordered: list[Unit], what: str) -> Iterable[Unit]:
    rest = [unit for unit in ordered if not unit.solved]
    return progress(rest, what, unit="layer", size=lambda unit: len(unit.layers))


def _full_passes(root: nn.Module, session: Session, unit: Unit) -> list[Reading]:
    """The inputs of each layer of ``unit``, from separate full passes of all batches.

    This is slow, and right for every deterministic model. Batches run in their order, after the buffers of the model
    are restored.
    """
    found = {layer: [Inputs(batch.mask, [], []) for batch in session.batches] for layer in unit.layers}

    def watch(number: int, floating: bool, layer: CalibrationLinear, x: Tensor) -> bool:
        if layer in found:
            _, arriving, originals = found[layer][number]
            # Copied, because the rest of the pass may write to it.
            (originals if floating else arriving).append(kept(x))
        return layer.solution is not None and not floating

    for floating in (True, False) if session.paired else (False,):
        for number, batch in enumerate(session.batches):
            batch.rewind(root)
            session.watching = partial(watch, number, floating)
            batch.run(root)
    return [([layer], inputs) for layer, inputs in found.items()]


def _fit_unit(unit: Unit, ranks: Ranks, read: Callable[[], list[Reading]]) -> None:
    """Solve the layers of ``unit`` from the result of ``read``: layers that share statistics, and their inputs."""
    rest = [layer for layer in unit.layers if layer.solution is None]

    def observe() -> None:
        for layers, inputs in read():
            known: dict[int, tuple[Any, int]] = {}
            for layer in (layer for layer in layers if layer in rest):
                key = id(layer.observer)
                if key not in known:
                    known[key] = _statistics(layer, inputs)
                layer.statistics, layer.tokens = known[key]

    ranks.together(observe)
    ranks.merge(rest)
    ranks.divide(rest)


def _statistics(layer: CalibrationLinear, inputs: list[Inputs]) -> tuple[Any, int]:
    """The statistics of the ``inputs`` of ``layer``, and the number of tokens."""
    state: Any = ()
    tokens, paired = 0, layer.algorithm.paired is not None
    for number, (mask, arriving, originals) in enumerate(inputs):
        for call, x in enumerate(arriving):
            arrived = counted(x, mask)
            pair = [counted(y, mask).reshape(-1, layer.in_features) for y in originals[call : call + 1] if paired]
            state = layer.updated(state, arrived, *pair)
            tokens += arrived.numel() // layer.in_features
        if tokens:
            check_finite(layer, state, number + 1)
    return state, tokens
