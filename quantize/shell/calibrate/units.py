"""Which layers are solved together, and in which order: what the passes of the user tell."""

from __future__ import annotations

from collections import Counter
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
    place = {key: number for number, key in enumerate(members)}
    order = merged([list(dict.fromkeys(place[keys[name]] for name in reads if name in keys)) for reads in found])
    position = {name: place for reads in found for place, name in enumerate(reads)}
    for each in members.values():
        each.sort(key=lambda layer: position.get(layer.names[0], 0))
    called, idle, before = set(order), dict[int, list[int]](), -1
    for number in (place[keys[layer.names[0]]] for layer in layers):
        if number in called:
            before = number
        else:
            idle.setdefault(before, []).append(number)
    everything = [*idle.get(-1, ()), *(each for number in order for each in (number, *idle.get(number, ())))]
    units_of = list(members.values())
    return [Unit(units_of[number]) for number in everything]


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
