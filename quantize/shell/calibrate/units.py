"""Which layers are solved together, and in which order: what the passes of the user tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from quantize.shell.calibrate.layer import CalibrationLinear

# By layer, in the order of the first calls: which tensor it read at each call. Equal numbers, one tensor.
Reads = Mapping[str, list[int]]


@dataclass(eq=False)
class Unit:
    """Layers that read the same tensors at all of their calls, in every pass of the user. They share statistics."""

    layers: list[CalibrationLinear]
    solved: bool = False


def units(layers: list[CalibrationLinear], passes: Iterable[Reads]) -> list[Unit]:
    """All ``layers`` in units, in the order of execution.

    A layer that was never called, such as an idle expert, stands alone, behind the one before it in the model: there
    it would be called if quantization changed the route.
    """
    found = list(passes)
    keys = {
        layer.names[0]: tuple((number, *reads[layer.names[0]]) for number, reads in enumerate(found)
                              if layer.names[0] in reads) or layer.names[0]
        for layer in layers
    }  # fmt: skip
    members: dict[object, list[CalibrationLinear]] = {}
    for layer in layers:
        members.setdefault(keys[layer.names[0]], []).append(layer)
    order = merged([list(dict.fromkeys(keys[name] for name in reads if name in keys)) for reads in found])
    position = {name: place for reads in found for place, name in enumerate(reads)}
    for each in members.values():
        each.sort(key=lambda layer: position.get(layer.names[0], 0))
    before = None
    for layer in layers:
        key = keys[layer.names[0]]
        if key not in order:
            order.insert(0 if before is None else order.index(before) + 1, key)
        before = key
    return [Unit(members[key]) for key in order]


def merged(sequences: list[list[object]]) -> list[object]:
    """One sequence in which what comes first in any sequence comes first, as far as they agree.

    >>> merged([[3, 5], [1, 3], [1, 2]])
    [1, 3, 5, 2]
    """
    rest = [list(reversed(sequence)) for sequence in {tuple(sequence): sequence for sequence in sequences}.values()]
    left: dict[object, int] = {}
    for sequence in rest:
        for item in sequence:
            left[item] = left.get(item, 0) + 1
    order: list[object] = []
    while rest := [sequence for sequence in rest if sequence]:
        heads = [sequence[-1] for sequence in rest]
        # Where the sequences contradict each other, the one with most before it has its way.
        longest = max(rest, key=len)[-1]
        item = next((head for head in heads if heads.count(head) == left[head]), longest)
        order.append(item)
        for sequence in rest:
            if item in sequence:
                sequence.remove(item)
    return order
