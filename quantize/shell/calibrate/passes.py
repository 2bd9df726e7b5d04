"""The plain way to fit layers to quantized predecessors: for every group, every batch runs from the root, alone.

Slow, and right for every model that gives the same twice; :mod:`.walks` says when it is needed.
"""

from __future__ import annotations

from collections import Counter
from typing import TypeVar

from torch import Tensor, nn

from quantize.shell.calibrate.batches import Batch
from quantize.shell.calibrate.groups import Group
from quantize.shell.calibrate.layer import CalibrationLinear, observed
from quantize.shell.calibrate.observing import Observing, fingerprint
from quantize.shell.modes import put

AnyObserving = TypeVar("AnyObserving", bound=Observing)


class _Pass:
    """One run, in which a group of layers is observed."""

    def __init__(self, group: Group, *, floating: bool) -> None:
        self.read: dict[CalibrationLinear, list[Tensor]] = {layer: [] for layer in group.layers}
        self._floating = floating

    def observe(self, layer: CalibrationLinear, x: Tensor) -> bool:
        """A call of ``layer`` with ``x`` ``[..., c]``: whether it is to compute as quantized."""
        if layer in self.read:
            # What runs on may write to it.
            self.read[layer].append(x.detach().clone())
        return layer.solution is not None and not self._floating


def read(
    root: nn.Module, group: Group, batches: list[Batch], *, floating: bool
) -> list[dict[CalibrationLinear, list[Tensor]]]:
    """By batch and layer, what the calls of ``group`` read: in the float model, or as far as it is quantized.

    Batches run in their order, and the buffers that they write to are at first as they were.
    """
    reset(root, batches)
    return [_run(root, batch, _Pass(group, floating=floating)).read for batch in batches]


class Alone:
    """One run in floating point, and the fingerprints of what every call of a layer reads."""

    def __init__(self, batch: Batch) -> None:
        self.prints: dict[tuple[CalibrationLinear, int], list[float]] = {}
        self._calls: Counter[CalibrationLinear] = Counter()
        self._mask = batch.mask

    def observe(self, layer: CalibrationLinear, x: Tensor) -> bool:
        """A call of ``layer`` with ``x`` ``[..., c]``, in floating point."""
        self.prints[layer, self._calls[layer]] = fingerprint(x, self._mask).tolist()
        self._calls[layer] += 1
        return False


def prints(root: nn.Module, batches: list[Batch]) -> list[dict[tuple[CalibrationLinear, int], list[float]]]:
    """By batch, the fingerprints of the inputs of all calls, when every batch runs alone."""
    return [_run(root, batch, Alone(batch)).prints for batch in batches]


def _run(root: nn.Module, batch: Batch, watching: AnyObserving) -> AnyObserving:
    with observed(root, watching):
        batch.run(root)
    return watching


def reset(root: nn.Module, batches: list[Batch]) -> None:
    """The buffers of ``root`` as they were before the first batch."""
    buffers = dict(root.named_buffers())
    for name, value in (batches[0].buffers if batches else {}).items():
        if name in buffers and not buffers[name].equal(value):
            owner, _, last = name.rpartition(".")
            put(root.get_submodule(owner), last, value)
