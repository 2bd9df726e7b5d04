"""Solve the layers of a model under calibration: all at once, or in the order of execution; alone, or with ranks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from quantize.shell.calibrate import sequential
from quantize.shell.calibrate.layer import CalibrationLinear, calibrated, siblings
from quantize.shell.calibrate.ranks import Ranks
from quantize.shell.config import QuantizeWarning, refusal
from quantize.shell.fold import folding
from quantize.shell.fold.producers import Foldable
from quantize.shell.modes import undisturbed, untracked
from quantize.shell.plan import check_weight
from quantize.shell.progress import layers_progress

# Where a model keeps its session.
KEY = "_quantization"


def unsolved(model: nn.Module) -> list[CalibrationLinear]:
    """The layers that still compute in floating point."""
    return [layer for layer in calibrated(model) if not layer.active]


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
    ordered = [root for root in roots if carrier(root).batches is not None]
    if ranks.size > 1 and any(map(_folds, roots)):
        raise refusal("algorithm.fold", "True with a process group", "False, or one process")
    ranks.together(partial(_check, layers, roots))
    with untracked(layers[0].weight.device):
        mode = f"{len(ordered)} of {len(roots)} sessions layer by layer"
        ranks.agree([layer for layer in layers if layer.solution is None], mode)
        for root in ordered:
            _solve_sequentially(root, ranks)
        rest = [layer for layer in layers if layer.solution is None]
        ranks.merge(rest)
        for root in roots:
            _fold(root)
        ranks.solve(rest, layers_progress)
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
    return carrier(root).config.schedule.fold


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
                told = folding.fold(root, siblings(open_), partial(first.run, root), _common_scale)
    finally:
        session.replaying = False
    session.remarks += tuple(told)
    if told:
        warnings.warn(f"not folded, see report(model): {'; '.join(told)}", QuantizeWarning, stacklevel=2)


def _common_scale(layers: Sequence[Foldable], rows: Tensor | None) -> Tensor:
    first = cast("CalibrationLinear", layers[0])
    assert first.config.algorithm.scale is not None
    return first.config.algorithm.scale([layer.weight.detach() for layer in layers], first.statistic(), rows)


def _check(layers: list[CalibrationLinear], roots: list[nn.Module]) -> None:
    known = {layer for root in roots for layer in calibrated(root)}
    for layer in layers:
        check_weight(layer.names[0], layer.weight)
        # What was kept is with the root of the session.
        if layer not in known and layer.seen and not layer.tokens and layer.config.schedule.sequential:
            raise refusal("model", "a part of a model that is calibrated layer by layer", "the model given to quantize")


def _solve_sequentially(root: nn.Module, ranks: Ranks) -> None:
    session = root.__dict__[KEY]

    def told(trouble: str) -> None:
        remark = f"calibrated in full passes for each layer, which is slow, and not in lock step: {trouble}"
        # Once, also where a solve is continued.
        session.remarks = tuple(dict.fromkeys((*session.remarks, remark)))
        warnings.warn(remark, QuantizeWarning, stacklevel=2)

    session.replaying = True
    try:
        sequential.solve(root, carrier(root).batches or [], ranks, told)
    finally:
        session.replaying = False


def checksum(model: nn.Module) -> list[int]:
    """A number for the solution of every layer, equal where the codes are."""
    return [int(layer.solution.weight.codes.sum(dtype=torch.int64)) for layer in calibrated(model) if layer.solution]
