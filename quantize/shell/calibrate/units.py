"""Which layers are solved together, and in which order: what the passes of the user tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from quantize.shell.calibrate.layer import CalibrationLinear


class Inputs(NamedTuple):
    """What the calls of a layer read in one batch, ``[..., c]`` each: as quantized so far, and in the float model.

    ``mask`` ``[b, t]``: which tokens count.
    """

    mask: Tensor | None
    arriving: list[Tensor]
    originals: list[Tensor]


@dataclass(eq=False)
class Unit:
    """Layers that read the same tensors at all of their calls, in every pass of the user. They share statistics."""

    layers: list[CalibrationLinear] = field(default_factory=list)

    @property
    def solved(self) -> bool:
        """Whether all of the layers have a solution."""
        return all(layer.solution is not None for layer in self.layers)


def units(layers: list[CalibrationLinear], passes: Sequence[Mapping[str, list[int]]]) -> list[Unit]:
    """All ``layers`` in units, in the order of execution; ``passes``: what each of them read, as :attr:`Batch.reads`.

    A layer that was never called, such as an idle expert, stands alone, behind the one before it in the model: there
    it would be called if quantization changed the route.
    """
    # By name, the number of the unit: that of its first layer in the model.
    unit_of: dict[str, int] = {}
    first: dict[object, int] = {}
    for number, (name, *_) in enumerate(layer.names for layer in layers):
        read = tuple((i, *reads[name]) for i, reads in enumerate(passes) if name in reads)
        unit_of[name] = first.setdefault(read or name, number)
    sequences = [list(dict.fromkeys(unit_of[name] for name in reads if name in unit_of)) for reads in passes]
    order, before = {unit: (place, -1) for place, unit in enumerate(merged(sequences))}, -1
    for unit in unit_of.values():
        before, _ = order.setdefault(unit, (before, unit))
    found = {unit: Unit() for unit in sorted(order, key=order.__getitem__)}
    position = {name: place for reads in passes for place, name in enumerate(reads)}
    for layer in sorted(layers, key=lambda layer: position.get(layer.names[0], 0)):
        found[unit_of[layer.names[0]]].layers.append(layer)
    return list(found.values())


def merged(sequences: list[list[int]]) -> list[int]:
    """One sequence in which what comes first in any sequence comes first, as far as they agree; else the smaller.

    >>> merged([[3, 5], [1, 3], [1, 4]])
    [1, 3, 4, 5]
    """
    rest = [list(reversed(sequence)) for sequence in {tuple(sequence): sequence for sequence in sequences}.values()]
    left = Counter(item for sequence in rest for item in sequence)
    order: list[int] = []
    while rest := [sequence for sequence in rest if sequence]:
        heads = Counter(sequence[-1] for sequence in rest)
        # Where the sequences contradict each other, the one with most before it has its way.
        item = min((head for head in heads if heads[head] == left[head]), default=max(rest, key=len)[-1])
        order.append(item)
        for sequence in rest:
            if sequence[-1] == item:
                sequence.pop()
            elif heads[item] < left[item] and item in sequence:
                sequence.remove(item)
    return order
