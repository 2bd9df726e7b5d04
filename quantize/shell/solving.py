"""Solve the layers of a model under calibration: all at once, or stage by stage; alone, or with other ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from quantize.core import affine
from quantize.shell import folding, order, stages
from quantize.shell.batches import Batch, undisturbed, untracked
from quantize.shell.calibration import CalibrationLinear, calibrated
from quantize.shell.config import QuantizeWarning, refusal
from quantize.shell.plan import check_weight
from quantize.shell.progress import progress
from quantize.shell.ranks import Ranks
from quantize.shell.recording import AnyWatching, Inputs, Recorder

# Where a model keeps its session.
KEY = "_quantization"


def unsolved(model: nn.Module) -> list[CalibrationLinear]:
    """The layers that still compute in floating point."""
    return [layer for layer in calibrated(model) if not layer.active]


def restart(layers: Iterable[CalibrationLinear]) -> None:
    """Forget what was learned of the inputs.

    Equal channels start from one state, so that layers which read one tensor go on sharing it: see Recorder.
    """
    initial: dict[tuple[int, torch.dtype, torch.device], Any] = {}
    for layer in layers:
        weight = layer.weight
        key = (layer.in_features, affine.working_dtype(weight), weight.device)
        if key not in initial:
            with untracked(weight.device):
                initial[key] = layer.config.algorithm.observer.init(key[0], dtype=key[1], device=key[2])
        layer.statistics, layer.tokens = initial[key], 0


def carrier(root: nn.Module) -> CalibrationLinear:
    """The layer that holds what belongs to all layers of a session: so it enters a ``state_dict``."""
    return calibrated(root)[0]


def solve(model: nn.Module, ranks: Ranks | None = None) -> None:
    """Solve every layer, then let all compute as quantized; layers solved before an interruption are kept.

    With ``ranks``, on what all of them have seen.

    Raises:
        QuantizeError: a weight became NaN or inf since ``quantize``; models or configs that differ between ranks.
    """
    layers, ranks = unsolved(model), ranks or Ranks()
    # A part that was converted before has a session, and nothing to solve.
    roots = [module for module in model.modules() if KEY in module.__dict__ and unsolved(module)]
    staged = [root for root in roots if carrier(root).batches is not None]
    if ranks.size > 1 and any(map(_folds, roots)):
        raise refusal("algorithm.fold", "True with a process group", "False, or one process")
    ranks.together(partial(_check, layers, roots))
    with untracked(layers[0].weight.device):
        mode = f"{len(staged)} of {len(roots)} sessions in stages"
        ranks.agree([layer for layer in layers if layer.solution is None], mode)
        for root in staged:
            _solve_in_stages(root, ranks)
        rest = [layer for layer in layers if layer.solution is None]
        ranks.merge(rest)
        for root in roots:
            _fold(root)
        ranks.solve(rest, _solve_layer, _progress)
    for layer in layers:
        layer.active, layer.batches, layer.first = True, None, None
    idle = [layer for layer in layers if layer.fell_back]
    if idle:
        few = max(layer.tokens for layer in idle)
        reached = f"fewer than {layers[0].config.algorithm.fewest} tokens reached" if few else "no token reached"
        names = ", ".join(f"{layer.names[0]} ({layer.tokens})" if few else layer.names[0] for layer in idle)
        message = f"{reached} {len(idle)} of {len(layers)} layers, which fall back to minmax: {names}"
        warnings.warn(message, QuantizeWarning, stacklevel=2)


def _folds(root: nn.Module) -> bool:
    return bool(getattr(carrier(root).config.options, "fold", False))


def _fold(root: nn.Module) -> None:
    """Fold the scales of a session that asks for it, once."""
    session, layers = root.__dict__[KEY], calibrated(root)
    # After an interrupted solve what is folded stays so.
    if not _folds(root) or any(layer.folded is not None for layer in layers):
        return
    first = carrier(root).first
    open_ = [layer for layer in layers if layer.solution is None and not layer.fell_back]
    session.replaying = True
    try:
        with undisturbed(root):
            told = ["all scales at run time: the model was called with what may not be given twice"]
            if first is not None:
                told = folding.fold(root, open_, first)
    finally:
        session.replaying = False
    session.remarks += tuple(told)
    if told:
        warnings.warn(f"not folded, see report(model): {'; '.join(told)}", QuantizeWarning, stacklevel=2)


def _check(layers: list[CalibrationLinear], roots: list[nn.Module]) -> None:
    known = {layer for root in roots for layer in calibrated(root)}
    for layer in layers:
        check_weight(layer.names[0], layer.weight)
        # What was kept is with the root of the session.
        if (
            layer not in known
            and layer.seen
            and not layer.tokens
            and getattr(layer.config.options, "sequential", False)
        ):
            raise refusal("model", "a part of a model that is calibrated stage by stage", "the model given to quantize")


def _solve_in_stages(root: nn.Module, ranks: Ranks) -> None:
    """Solve the stages of ``root`` one after the other, each on what the quantized ones before give it."""
    session = root.__dict__[KEY]
    layers, batches = calibrated(root), carrier(root).batches or []
    # The order of the first rank that called a layer.
    seen = ranks.gather([(list(batch.calls), batch.inputs) for batch in batches])
    calls = [name for theirs in seen for names, _ in theirs for name in names]
    inputs: dict[str, tuple[int, int, int]] = {}
    for rank, theirs in enumerate(seen):
        for number, (_, read) in enumerate(theirs):
            for name, tensor in read.items():
                inputs.setdefault(name, (rank, number, tensor))
    sequence = order.ordered(order.stages(root, layers), calls)
    replay = stages.Replay(root, sequence, batches)
    session.replaying = True
    try:
        with undisturbed(root), replay.installed():
            ranks.together(replay.survey)
            for place, (_, members) in enumerate(_progress(sequence)):
                steps = order.groups(members, inputs) if members[0].config.algorithm.paired else [members]
                for step in steps:
                    rest = [layer for layer in step if layer.solution is None]
                    if rest:
                        ranks.together(partial(_observe, replay, place, rest, batches, last=step is steps[-1]))
                        ranks.merge(rest)
                        ranks.solve(rest, _solve_layer)
                    for layer in step:
                        layer.active = True
    except BaseException:
        # As before: all in floating point, and to be continued.
        for layer in layers:
            layer.active = False
        raise
    finally:
        session.replaying = False


def _observe(
    replay: stages.Replay, place: int, members: list[CalibrationLinear], batches: list[Batch], *, last: bool
) -> None:
    # Of an interrupted solve nothing may be counted twice.
    restart(members)
    replay.reset()
    for number, batch in enumerate(batches):
        expected = {layer: batch.calls[layer.names[0]] for layer in members if layer.names[0] in batch.calls}
        if not expected and not replay.stateful:
            continue
        # Before the last layers of a stage there is no need to see its output.
        until = None if last or replay.stateful else expected

        original = None
        try:
            # A model that writes to its buffers cannot run every batch twice.
            if members[0].config.algorithm.paired and not replay.stateful:
                watched = partial(_watched, members, partial(Inputs, batch.mask, until))
                original = replay.run(number, place, expected, watched, floating=True)
            recorder = partial(Recorder, batch.mask, until, original)
            replay.run(number, place, expected, partial(_watched, members, recorder)).commit(number + 1)
        finally:
            for layer in members:
                layer.recorder = None


def _watched(members: list[CalibrationLinear], make: Callable[[], AnyWatching]) -> AnyWatching:
    new = make()
    for layer in members:
        layer.recorder = new
    return new


def _solve_layer(layer: CalibrationLinear) -> None:
    try:
        layer.solve()
    except Exception as error:
        error.add_note(f"while solving layer {layer.names[0]!r}; the others are as they were")
        raise


def _progress(items: list[Any]) -> Any:
    # Quick work shows nothing.
    return progress(items, "quantize", unit="layer", delay=1)


def checksum(model: nn.Module) -> list[int]:
    """A number for the solution of every layer, equal where the codes are."""
    return [int(layer.solution.weight.codes.sum(dtype=torch.int64)) for layer in calibrated(model) if layer.solution]
