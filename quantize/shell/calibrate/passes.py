"""The plain way to fit layers to quantized predecessors: for every unit, every batch runs from the root, alone.

Slow, and right for every model that gives the same twice; :mod:`.walks` says when it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from quantize.shell.calibrate.layer import CalibrationLinear
from quantize.shell.calibrate.session import Session
from quantize.shell.calibrate.units import Inputs, Unit
from quantize.shell.values import kept


@dataclass
class _Pass:
    """One run of the float model, or of the model as far as it is quantized, for the ``inputs`` of some layers."""

    inputs: dict[CalibrationLinear, Inputs]
    floating: bool

    def observe(self, layer: CalibrationLinear, x: Tensor) -> bool:
        """A call of ``layer`` with ``x`` ``[..., c]``: whether it is to compute as quantized."""
        if layer in self.inputs:
            _, arriving, originals = self.inputs[layer]
            # What runs on may write to it.
            (originals if self.floating else arriving).append(kept(x))
        return layer.solution is not None and not self.floating


def read(root: nn.Module, session: Session, unit: Unit) -> dict[CalibrationLinear, list[Inputs]]:
    """What the layers of ``unit`` read.

    Batches run in their order, and the buffers that they write to are at first as they were.
    """
    found = {layer: [Inputs(batch.mask, [], []) for batch in session.batches] for layer in unit.layers}
    for floating in (True, False) if session.algorithm.paired is not None else (False,):
        for number, batch in enumerate(session.batches):
            if number == 0:
                batch.rewind(root)
            inputs = {layer: found[layer][number] for layer in unit.layers}
            session.watching = _Pass(inputs, floating)
            batch.run(root)
    return found
