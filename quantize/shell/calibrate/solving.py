"""Solve the layers of a model under calibration: at once or in the order of execution, on one process or several."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantize.shell import offload
from quantize.shell.calibrate import sequential
from quantize.shell.calibrate.layer import CalibrationLinear, calibrated, unsolved
from quantize.shell.calibrate.ranks import Ranks
from quantize.shell.calibrate.session import KEY, Session
from quantize.shell.calibrate.units import siblings
from quantize.shell.config import QuantizeWarning, refusal
from quantize.shell.fold import folding
from quantize.shell.modes import undisturbed, untracked
from quantize.shell.plan import check_parameters
from quantize.shell.progress import progress
from quantize.shell.report.rows import folded, span


def finish(model: nn.Module, ranks: Ranks) -> None:
    """Solve with the batches seen so far, if any layer is not solved; see :func:`quantize.finish`."""
    layers = unsolved(model)
    everyone = ranks.gather([(layer.names[0], layer.session.seen) for layer in layers])
    solved = ranks.gather(_checksum(model) if not layers and ranks.size > 1 else None)
    if not any(everyone):
        # Ranks that finished together hold equal codes; ranks that finished alone do not.
        if any(each != solved[0] for each in solved):
            raise refusal("model", "every process quantized its layers alone", "a larger batch_num, and finish on all")
        return
    for rank, theirs in enumerate(everyone):
        if not theirs:
            raise refusal(f"rank {rank}", "has quantized its layers alone", "a larger batch_num, and finish on all")
    # Compared by position, because parts of a model that were quantized separately may use the same names.
    for (name, seen), *others in zip(*everyone, strict=False):
        if not (seen or any(number for _, number in others)):
            raise refusal(f"layer {name!r}", "0 batches seen", "a model after at least one forward pass")
    solve_all(model, layers, ranks)


def solve_all(model: nn.Module, layers: list[CalibrationLinear], ranks: Ranks | None = None) -> None:
    """Solve ``layers`` of ``model``, then let all of them compute as quantized. Layers with a solution keep it.

    With ``ranks``, their statistics are merged first.

    Raises:
        QuantizeError: a weight became NaN or inf since ``quantize``; models or configs that differ between ranks.
    """
    ranks = ranks or Ranks()
    roots = {module.__dict__[KEY]: module for module in model.modules() if KEY in module.__dict__}
    parts: dict[Session, list[CalibrationLinear]] = {}
    for layer in layers:
        parts.setdefault(layer.session, []).append(layer)
    if ranks.size > 1 and any(session.config.schedule.fold for session in parts):
        raise refusal("algorithm.fold", "True with a process group", "False, or one process")
    ranks.together(partial(_check, layers, roots))
    # Ranks that were interrupted at different layers keep only the solutions that all ranks have.
    for layer, *solved in zip(layers, *ranks.gather([layer.solution is not None for layer in layers]), strict=False):
        if layer.session.sequential and not all(solved):
            layer.solution = None
    try:
        for session in parts:
            session.solving = True
        with untracked(offload.device(layers[0])):
            mode = f"{sum(each.sequential for each in parts)} of {len(parts)} sessions layer by layer"
            ranks.agree([layer for layer in layers if layer.solution is None], mode)
            for session, own in parts.items():
                if session.sequential:
                    sequential.fit(roots[session], session, own, ranks)
            rest = [layer for layer in layers if layer.solution is None]
            ranks.merge(rest)
            for session, own in parts.items():
                if session.config.schedule.fold and session in roots:
                    _fold(roots[session], session, own)
            ranks.divide(rest, partial(progress, what="solve", unit="layer", size=lambda stack: sum(map(len, stack))))
    finally:
        for session in parts:
            session.solving, session.watching = False, None
    for layer in layers:
        layer.active = True
    # Other sessions keep their batches, because only a part of their model may be solved.
    for session in parts.keys() & roots.keys():
        session.batches = []
    idle = [layer for layer in layers if layer.fell_back]
    if idle:
        few = max(layer.tokens for layer in idle)
        reached = f"fewer than {idle[0].algorithm.fewest} tokens reached" if few else "no token reached"
        told = [(title, span(layer.tokens for layer in group)) for title, group in folded(idle, type)]
        names = ", ".join(f"{title} ({tokens})" if few else title for title, tokens in told)
        message = f"{reached} {len(idle)} of {len(layers)} layers, which fall back to minmax: {names}"
        warnings.warn(message, QuantizeWarning, stacklevel=2)


def _fold(root: nn.Module, session: Session, layers: list[CalibrationLinear]) -> None:
    """Fold the scales of a session, once: after an interruption, folded scales stay folded."""
    if any(layer.folded is not None for layer in layers):
        return
    rest = [layer for layer in layers if layer.solution is None and not layer.fell_back]

    def common(readers: Sequence[Any], rows: Tensor | None) -> Tensor:
        scale = readers[0].algorithm.scale
        assert scale is not None
        found: Tensor = scale([layer.float_weight() for layer in readers], readers[0].statistic(), rows)
        return found

    told = ["all scales at run time: the model's arguments cannot be copied and passed again"]
    if session.batches:
        with undisturbed(root):
            told = folding.fold(root, siblings(rest), partial(session.batches[0].run, root), common)
    session.remark(*told, prefix="not folded, see report(model): ")


def _check(layers: list[CalibrationLinear], roots: Mapping[Session, nn.Module]) -> None:
    for layer in layers:
        check_parameters(layer.names[0], layer)
        # Batches run from the root of the session, so ``model`` must contain it.
        if layer.session.sequential and layer.session not in roots:
            raise refusal("model", "a part of a model that is calibrated layer by layer", "the model given to quantize")


def _checksum(model: nn.Module) -> list[int]:
    """A checksum of the codes of every solved layer."""
    return [int(layer.solution.weight.codes.sum(dtype=torch.int64)) for layer in calibrated(model) if layer.solution]
