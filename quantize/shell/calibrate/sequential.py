"""Fit every layer to the inputs that the quantized layers before it give: in lock step, or else in full passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from quantize.shell.calibrate import passes
from quantize.shell.calibrate.batches import Batch
from quantize.shell.calibrate.groups import Group, groups
from quantize.shell.calibrate.layer import CalibrationLinear, calibrated, observed
from quantize.shell.calibrate.observing import counted, not_finite, restart
from quantize.shell.calibrate.ranks import Ranks
from quantize.shell.calibrate.walks import Walks
from quantize.shell.modes import eager, same_attributes, undisturbed
from quantize.shell.progress import layers_progress

# By batch: which tokens count, and what the calls of a layer read in the model that is being quantized and in the
# float model, [..., c] each.
Read = tuple[Tensor | None, list[Tensor], list[Tensor]]


def solve(root: nn.Module, batches: list[Batch], ranks: Ranks, told: Callable[[str], None]) -> None:
    """Solve group after group of layers that read one tensor; those that have a solution keep it.

    ``told`` gets the reason where lock step is impossible.
    """
    layers = calibrated(root)
    paired = layers[0].config.algorithm.paired is not None
    before = {layer: layer.solution for layer in layers}
    ordered = groups(layers, [reads for theirs in ranks.gather([batch.reads for batch in batches]) for reads in theirs])
    stateful = any(ranks.gather(any(batch.stateful for batch in batches)))
    with undisturbed(root), same_attributes(root, layers), eager():
        trouble = "the model writes to its buffers" if stateful else None
        if trouble is None:
            trouble = _in_lock_step(root, ordered, batches, ranks, paired=paired)
        if trouble is None:
            return
        for layer, solution in before.items():
            layer.solution = solution
        told(trouble)
        for group in layers_progress(ordered):
            _solve_group(group, ranks, partial(_full_passes, root, group, batches, paired=paired))


def _in_lock_step(
    root: nn.Module, ordered: list[Group], batches: list[Batch], ranks: Ranks, *, paired: bool
) -> str | None:
    """Solve the groups in lock step; or say why that cannot be."""
    trouble: str | None = None
    for group in ordered:
        group.solved = all(layer.solution is not None for layer in group.layers)
    # Where no float walks are compared with the passes of the user, two batches tell whether they disturb each other.
    two = batches[:2] if len(batches) > 1 and not paired else []
    alone = ranks.together(partial(passes.prints, root, two))
    with _watching(root, Walks(root, ordered, two, ways=(True,))) as walks:
        ranks.together(partial(walks.rehearse, alone))
        trouble = _first(ranks, walks.trouble)
    if trouble is not None:
        return trouble
    with _watching(root, Walks(root, ordered, batches, ways=(True, False) if paired else (False,))) as walks:
        for _ in layers_progress([group for group in ordered if not group.solved]):
            ranks.together(walks.advance)
            trouble, place = _first(ranks, walks.trouble), _first(ranks, walks.first)
            if trouble is not None or place is None:
                break
            group = ordered[place]
            _solve_group(group, ranks, partial(_side_by_side, walks, group))
            walks.solved(group)
    return trouble


def _first(ranks: Ranks, value: Any) -> Any:
    """The least of what the ranks found, None where none found anything."""
    return min((each for each in ranks.gather(value) if each is not None), default=None)


@contextmanager
def _watching(root: nn.Module, walks: Walks) -> Iterator[Walks]:
    """While the walks run, all layers ask them; afterwards all have ended."""
    with observed(root, walks):
        try:
            yield walks
        finally:
            walks.close()


def _side_by_side(walks: Walks, group: Group) -> dict[CalibrationLinear, list[Read]]:
    return dict.fromkeys(group.layers, walks.read(group))


def _full_passes(
    root: nn.Module, group: Group, batches: list[Batch], *, paired: bool
) -> dict[CalibrationLinear, list[Read]]:
    originals = passes.read(root, group, batches, floating=True) if paired else [{} for _ in batches]
    arriving = passes.read(root, group, batches, floating=False)
    return {
        layer: [
            (batch.mask, mine[layer], theirs.get(layer, []))
            for batch, mine, theirs in zip(batches, arriving, originals, strict=True)
        ]
        for layer in group.layers
    }


def _solve_group(group: Group, ranks: Ranks, read: Callable[[], dict[CalibrationLinear, list[Read]]]) -> None:
    """Solve the layers of ``group`` on what ``read`` gives: by layer and batch; equal lists are gone through once."""
    rest = [layer for layer in group.layers if layer.solution is None]

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
    state, tokens, update = layer.statistics, 0, layer.config.observer.update
    for number, (mask, mine, theirs) in enumerate(read):
        for call, x in enumerate(mine):
            arrived = counted(x, mask)
            original = counted(theirs[call], mask) if call < len(theirs) else None
            state = update(state, arrived, *([] if original is None else [original.reshape(-1, layer.in_features)]))
            tokens += arrived.numel() // layer.in_features
        if not all(bool(torch.isfinite(leaf).all()) for leaf in pytree.tree_leaves(state) if leaf.is_floating_point()):
            raise not_finite(layer, number + 1)
    return state, tokens
