"""Group layers that are solved together: units, which read the same tensors, and stacks of units of one shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from quantize.core import Solution, minmax
from quantize.shell import offload
from quantize.shell.calibrate.layer import CalibrationLinear, dynamic
from quantize.shell.report.rows import starred

# On the CPU, solving one after the other is as fast. Larger stacks than this are no faster, and take more memory.
_ONE_BY_ONE, _LARGEST = frozenset({"cpu"}), 16


class Inputs(NamedTuple):
    """The inputs ``[..., c]`` of all calls of a layer in one batch.

    ``arriving`` are those behind the layers quantized so far, and ``originals`` those in the float model. ``mask``
    ``[b, t]`` says which tokens count.
    """

    mask: Tensor | None
    arriving: list[Tensor]
    originals: list[Tensor]


# Layers that read the same tensors, and these inputs by batch.
Reading = tuple[list[CalibrationLinear], list[Inputs]]


@dataclass(eq=False)
class Unit:
    """Layers that read the same tensors at all of their calls, in every pass of the user, and share statistics."""

    layers: list[CalibrationLinear] = field(default_factory=list)

    @property
    def solved(self) -> bool:
        """Whether all of the layers have a solution."""
        return all(layer.solution is not None for layer in self.layers)


def units(layers: list[CalibrationLinear], passes: Sequence[Mapping[str, list[int]]]) -> list[Unit]:
    """All ``layers`` in units, in the order of execution; ``passes`` are the :attr:`Batch.reads` of all batches.

    A layer that was never called, such as an idle expert, is a unit of its own, behind the layer before it in the
    model. A pass through the quantized layers may take another route and call it there.
    """
    # A unit has the number of its first layer in the model.
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
    """Merge sequences into one that keeps the order of each, as far as they agree; ties take the smaller number first.

    >>> merged([[3, 5], [1, 3], [1, 4]])
    [1, 3, 4, 5]
    """
    rest = [list(sequence) for sequence in dict.fromkeys(map(tuple, sequences))]
    left = Counter(item for sequence in rest for item in sequence)
    order: list[int] = []
    while rest := [sequence for sequence in rest if sequence]:
        heads = Counter(sequence[0] for sequence in rest)
        # If the sequences contradict each other, the longest remaining one decides.
        item = min((head for head in heads if heads[head] == left[head]), default=max(rest, key=len)[0])
        order.append(item)
        for sequence in rest:
            if sequence[0] == item or (heads[item] < left[item] and item in sequence):
                sequence.remove(item)
    return order


def solve_stack(units: list[list[CalibrationLinear]]) -> None:
    """Solve a stack of units, each a list of layers that share statistics; in one call if that saves work."""
    first, algorithm = units[0][0], units[0][0].algorithm
    if len(units) > 1:
        statistics = pytree.tree_map(lambda *leaves: torch.stack(leaves), *(unit[0].statistic() for unit in units))
        for layers in zip(*units, strict=True):
            solved = algorithm.solve_stack(torch.stack([layer.float_weight() for layer in layers]), statistics)
            for number, layer in enumerate(layers):
                layer.adopt(pytree.tree_map(lambda leaf, number=number: leaf[number].clone(), solved))
    elif algorithm.together is None or first.fell_back or len({layer.weight.dtype for layer in units[0]}) > 1:
        for layer in units[0]:
            layer.adopt(_solution(layer))
    else:
        solutions = algorithm.together([layer.float_weight() for layer in units[0]], first.statistic())
        for layer, solution in zip(units[0], solutions, strict=True):
            layer.adopt(solution)


def _solution(layer: CalibrationLinear) -> Solution:
    """The solution of one layer from its statistics; with too few tokens, the one of minmax with dynamic inputs."""
    algorithm, spec, weight = layer.algorithm, layer.spec, layer.float_weight()
    if layer.fell_back:
        return minmax.algorithm(replace(spec, inputs=dynamic(spec.inputs))).solve(weight, None)
    if layer.folded is None:
        return algorithm.solve(weight, None if algorithm.data_free else layer.statistic())
    solved = algorithm.solve(weight, layer.statistic(), layer.folded)
    return replace(solved, smoothing=None, notes={**solved.notes, "folded": torch.ones(())})


def stacks(units: list[list[CalibrationLinear]]) -> list[list[list[CalibrationLinear]]]:
    """The units in stacks: experts of one mixture and shape on an accelerator, where many small calls are slow."""
    found: dict[object, list[list[CalibrationLinear]]] = {}
    for unit in units:
        first, device = unit[0], offload.device(unit[0])
        name = starred(first.names[0])
        alone = name == first.names[0] or device.type in _ONE_BY_ONE or first.algorithm.data_free
        alone = alone or first.fell_back or any(layer.folded is not None for layer in unit)
        shapes = tuple((layer.weight.shape, layer.weight.dtype, layer.spec) for layer in unit)
        found.setdefault(id(unit) if alone else (first.session, name, device, shapes), []).append(unit)
    return [stack[start : start + _LARGEST] for stack in found.values() for start in range(0, len(stack), _LARGEST)]


def siblings(layers: list[CalibrationLinear], *, alike: bool = False) -> list[list[CalibrationLinear]]:
    """Group layers that share statistics, in their order; with ``alike``, also by their format."""
    found: dict[object, list[CalibrationLinear]] = {}
    for layer in layers:
        leaves = pytree.tree_leaves(layer.statistics)
        key = id(leaves[0]) if leaves else layer
        found.setdefault((key, layer.spec) if alike else key, []).append(layer)
    return list(found.values())
