"""The plain way to fit layers to quantized predecessors: for every unit, every batch runs from the root, alone.

Slow, and right for every model that gives the same twice; :mod:`.walks` says when it is needed.
"""

from __future__ import annotations

from torch import Tensor, nn

from quantize.shell.calibrate.layer import CalibrationLinear
from quantize.shell.calibrate.session import Session
from quantize.shell.calibrate.units import Unit
from quantize.shell.values import kept


class _Pass:
    """One run, in which a unit is observed."""

    def __init__(self, unit: Unit, *, floating: bool) -> None:
        self.read: dict[CalibrationLinear, list[Tensor]] = {layer: [] for layer in unit.layers}
        self._floating = floating

    def observe(self, layer: CalibrationLinear, x: Tensor) -> bool:
        """A call of ``layer`` with ``x`` ``[..., c]``: whether it is to compute as quantized."""
        if layer in self.read:
            # What runs on may write to it.
            self.read[layer].append(kept(x))
        return layer.solution is not None and not self._floating


def read(
    root: nn.Module, session: Session, unit: Unit, *, floating: bool
) -> list[dict[CalibrationLinear, list[Tensor]]]:
    """By batch and layer, what the calls of ``unit`` read: in the float model, or as far as it is quantized.

    Batches run in their order, and the buffers that they write to are at first as they were.
    """
    found = []
    for number, batch in enumerate(session.batches):
        if number == 0:
            batch.rewind(root)
        session.watching = watching = _Pass(unit, floating=floating)
        batch.run(root)
        found.append(watching.read)
    return found
