"""Fit every layer to the inputs that the quantized layers before it give: in lock step, or else in full passes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from quantize.shell import offload
from quantize.shell.calibrate import passes
from quantize.shell.calibrate.layer import CalibrationLinear
from quantize.shell.calibrate.observing import check_finite, counted, restart
from quantize.shell.calibrate.ranks import Ranks
from quantize.shell.calibrate.session import Session
from quantize.shell.calibrate.units import Unit, units
from quantize.shell.calibrate.walks import Walks
from quantize.shell.modes import same_attributes, undisturbed
from quantize.shell.progress import layers_progress

T = TypeVar("T")
# By batch: which tokens count, and what the calls of a layer read in the model that is being quantized and in the
# float model, [..., c] each.
Read = tuple[Tensor | None, list[Tensor], list[Tensor]]


def solve(root: nn.Module, session: Session, layers: list[CalibrationLinear], ranks: Ranks) -> None:
    """Solve unit after unit of ``layers``, those of ``session``; what has a solution keeps it."""
    before, batches = {layer: layer.solution for layer in layers}, session.batches
    reads = ranks.gather([batch.reads for batch in batches])
    ordered = units(layers, [each for theirs in reads for each in theirs])
    stateful = any(ranks.gather(any(batch.stateful for batch in batches)))
    # Compiled parts run as they were written: the compiler cannot follow a pass that stops half-way.
    with torch.compiler.set_stance("force_eager"), undisturbed(root), same_attributes(root, layers):
        offload.hold(root)
        trouble = "the model writes to its buffers" if stateful else _in_lock_step(root, session, ordered, ranks)
        if trouble is None:
            return
        for layer, solution in before.items():
            layer.solution = solution
        session.remark(f"calibrated in full passes for each layer, which is slow, and not in lock step: {trouble}")
        for unit in layers_progress(ordered):
            _solve_unit(unit, ranks, partial(_full_passes, root, session, unit))


def _in_lock_step(root: nn.Module, session: Session, ordered: list[Unit], ranks: Ranks) -> str | None:
    """Solve the units in lock step; or say why that cannot be."""
    for unit in ordered:
        unit.solved = all(layer.solution is not None for layer in unit.layers)
    batches = session.batches
    # Where the algorithm has no use for float walks, two of them tell whether batches disturb each other.
    floats = len(batches) if session.algorithm.paired else 2 * (len(batches) > 1)
    session.watching = walks = Walks(root, ordered, batches, floats=floats)
    try:
        for _ in layers_progress([unit for unit in ordered if not unit.solved]):
            ranks.together(walks.advance)
            trouble, place = _first(ranks, walks.trouble), _first(ranks, walks.first)
            if trouble is not None or place is None:
                return trouble
            _solve_unit(ordered[place], ranks, partial(_side_by_side, walks, ordered[place]))
            walks.solved(ordered[place])
    finally:
        walks.close()
        session.watching = None
    return None


def _first(ranks: Ranks, value: T | None) -> T | None:
    """The least of what the ranks found, None where none found anything."""
    found: list[Any] = [each for each in ranks.gather(value) if each is not None]
    return min(found, default=None)


def _side_by_side(walks: Walks, unit: Unit) -> dict[CalibrationLinear, list[Read]]:
    return dict.fromkeys(unit.layers, walks.read(unit))


def _full_passes(root: nn.Module, session: Session, unit: Unit) -> dict[CalibrationLinear, list[Read]]:
    paired = session.algorithm.paired is not None
    originals = passes.read(root, session, unit, floating=True) if paired else [{} for _ in session.batches]
    arriving = passes.read(root, session, unit, floating=False)
    return {
        layer: [
            (batch.mask, mine[layer], theirs.get(layer, []))
            for batch, mine, theirs in zip(session.batches, arriving, originals, strict=True)
        ]
        for layer in unit.layers
    }


def _solve_unit(unit: Unit, ranks: Ranks, read: Callable[[], dict[CalibrationLinear, list[Read]]]) -> None:
    """Solve the layers of ``unit`` on what ``read`` gives: by layer and batch; equal lists are gone through once."""
    rest = [layer for layer in unit.layers if layer.solution is None]

    def observe() -> None:
        known: dict[int, tuple[Any, int]] = {}
        found = read()
        for layer in rest:
            key = id(found[layer])
            if key not in known:
                known[key] = _statistics(layer, found[layer])
            layer.statistics, layer.tokens = known[key]

    if rest:
        ranks.together(observe)
        ranks.merge(rest)
        ranks.solve(rest)


def _statistics(layer: CalibrationLinear, read: list[Read]) -> tuple[Any, int]:
    """What the algorithm's observer makes of the inputs of ``layer``, and how many tokens they were."""
    restart([layer])
    state, tokens, update = layer.statistics, 0, layer.session.observer.update
    paired = layer.session.algorithm.paired is not None
    for number, (mask, mine, theirs) in enumerate(read):
        for call, x in enumerate(mine):
            arrived = counted(x, mask)
            original = [counted(y, mask).reshape(-1, layer.in_features) for y in theirs[call : call + 1] if paired]
            state = update(state, arrived, *original)
            tokens += arrived.numel() // layer.in_features
        check_finite(layer, state, number + 1)
    return state, tokens
