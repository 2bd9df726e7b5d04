"""Solve layers: those that share their statistics at once, and the experts of a mixture in stacks."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.utils._pytree as pytree

from quantize.core import Solution, minmax
from quantize.shell import offload
from quantize.shell.calibrate.layer import CalibrationLinear, dynamic
from quantize.shell.report.rows import starred

# Measured: on the CPU, one after the other is as fast. More at once than this do not gain, and take memory.
_ALONE, _MOST = frozenset({"cpu"}), 16


def solve_stack(units: list[list[CalibrationLinear]]) -> None:
    """Solve a stack of units, each of layers that share their statistics; at once, where that saves work."""
    first, algorithm = units[0][0], units[0][0].session.algorithm
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
    """That of one layer from its statistics; with too few tokens that of minmax, without a range of the inputs."""
    algorithm, spec, weight = layer.session.algorithm, layer.session.config.spec, layer.float_weight()
    if layer.fell_back:
        return minmax.algorithm(replace(spec, inputs=dynamic(spec.inputs))).solve(weight, None)
    if layer.folded is None:
        return algorithm.solve(weight, None if algorithm.data_free else layer.statistic())
    solved = algorithm.solve(weight, layer.statistic(), layer.folded)
    return replace(solved, smoothing=None, notes={**solved.notes, "folded": torch.ones(())})


def stacks(units: list[list[CalibrationLinear]]) -> list[list[list[CalibrationLinear]]]:
    """The units in stacks: experts of one mixture and one shape, some at a time, where many small calls cost most."""
    found: dict[object, list[list[CalibrationLinear]]] = {}
    for unit in units:
        first, device = unit[0], offload.device(unit[0])
        name = starred(first.names[0])
        alone = name == first.names[0] or device.type in _ALONE or first.session.algorithm.data_free
        alone = alone or first.fell_back or any(layer.folded is not None for layer in unit)
        shapes = tuple((layer.weight.shape, layer.weight.dtype) for layer in unit)
        found.setdefault(id(unit) if alone else (first.session, name, device, shapes), []).append(unit)
    return [stack[start : start + _MOST] for stack in found.values() for start in range(0, len(stack), _MOST)]


def siblings(layers: list[CalibrationLinear]) -> list[list[CalibrationLinear]]:
    """The layers by the statistics that they share, in their order."""
    found: dict[object, list[CalibrationLinear]] = {}
    for layer in layers:
        leaves = pytree.tree_leaves(layer.statistics)
        found.setdefault(id(leaves[0]) if leaves else layer, []).append(layer)
    return list(found.values())
