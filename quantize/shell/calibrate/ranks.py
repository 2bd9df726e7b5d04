"""Calibration on several processes: their statistics are merged, and each process solves a part of the layers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor

from quantize.shell.calibrate.layer import CalibrationLinear
from quantize.shell.calibrate.units import siblings, solve_stack, stacks
from quantize.shell.config import QuantizeError, refusal

Stack = list[list[CalibrationLinear]]


class Ranks:
    """The processes of a group, or this process alone. All of them call the same methods in the same order."""

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self._rank = 0 if group is None else dist.get_rank(group)

    def gather(self, value: Any) -> list[Any]:
        """The values, made of plain types, that all ranks passed, in the order of the ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def together(self, work: Callable[[], Any]) -> Any:
        """The result of ``work``. If it fails on one rank, all ranks fail, so that none waits for ever.

        Raises:
            QuantizeError: another rank failed; it names it.
        """
        failure: Exception | None = None
        result = None
        try:
            result = work()
        except Exception as error:
            failure = error
        told = self.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, message in enumerate(told):
            if message is not None:
                raise QuantizeError(f"rank {rank}: {message}; accepted: no failure on any rank")
        return result

    def agree(self, layers: list[CalibrationLinear], mode: str) -> None:
        """Refuse models or configs that differ between ranks, before any statistics are exchanged.

        Raises:
            QuantizeError: on every rank; it names the first difference.
        """
        everyone = self.gather([mode, *map(_fingerprint, layers)]) if self.size > 1 else []
        for rank, theirs in enumerate(everyone):
            for first, found in itertools.zip_longest(everyone[0], theirs, fillvalue="no more layers"):
                if found != first:
                    raise refusal(f"rank {rank}", found, f"as on rank 0: {first}")

    def merge(self, layers: list[CalibrationLinear]) -> None:
        """Merge the statistics and token counts of all ranks; afterwards they are equal on all, to the last bit."""
        if self.size == 1:
            return
        # Layers share a merged state only if they share one on every rank.
        place = {id(()): 0}
        mine = [(place.setdefault(id(layer.statistics), len(place)), layer.tokens) for layer in layers]
        everyone = self.gather(mine)
        merged: dict[tuple[int, ...], Any] = {}
        for i, layer in enumerate(layers):
            key = tuple(theirs[i][0] for theirs in everyone)
            if key not in merged and any(key):
                states = self._states(layer.statistics or layer.initial())
                merged[key] = functools.reduce(layer.observer.merge, states)
            layer.statistics, layer.tokens = merged.get(key, ()), sum(theirs[i][1] for theirs in everyone)

    def divide(
        self,
        layers: list[CalibrationLinear],
        progress: Callable[[list[Stack]], Iterable[Stack]] = iter,
    ) -> None:
        """Solve each layer on one rank, and send the solutions to all. Layers with shared statistics stay together.

        Raises:
            QuantizeError: a rank could not solve a layer; it names rank and layer.
        """
        units = siblings(layers, alike=True)
        owners, failures = self._owners(units), dict[int, str]()
        mine = [unit for unit, owner in zip(units, owners, strict=True) if owner == self._rank]
        for stack in progress(stacks(mine)):
            try:
                solve_stack(stack)
            except Exception as error:
                names = ", ".join(repr(layer.names[0]) for unit in stack for layer in unit)
                if self.size == 1:
                    error.add_note(f"while solving layer {names}; the others are as they were")
                    raise
                # Not raised here: the other ranks wait for an answer.
                failures |= dict.fromkeys(map(id, stack), f"{type(error).__name__}: {error}")
        if self.size > 1:
            for unit, owner in zip(units, owners, strict=True):
                self._share(unit, owner, failures.get(id(unit)))

    def _share(self, unit: list[CalibrationLinear], owner: int, failure: str | None) -> None:
        outcome: list[Any] = [None, None]
        if owner == self._rank:
            solutions = [layer.solution for layer in unit]
            outcome = [failure, pytree.tree_map_only(Tensor, Tensor.cpu, solutions)]
        dist.broadcast_object_list(outcome, src=dist.get_global_rank(self._group, owner), group=self._group)
        failure, solutions = outcome
        if failure:
            where = f"layer {unit[0].names[0]!r}"
            raise QuantizeError(f"{where}: rank {owner} failed with {failure}; accepted: a solution")
        for layer, solution in zip(unit, solutions, strict=True) if owner != self._rank else ():
            layer.adopt(solution)

    def _owners(self, units: list[list[CalibrationLinear]]) -> list[int]:
        """The rank that solves each unit: the longest unit comes first, and goes to the rank with the least work."""
        loads, owners = [0] * self.size, [0] * len(units)
        for place in sorted(range(len(units)), key=lambda place: -(units[place][0].in_features ** 3)):
            c = units[place][0].in_features
            owners[place] = rank = loads.index(min(loads))
            loads[rank] += c**3 + sum(layer.out_features for layer in units[place]) * c**2
        return owners

    def _states(self, state: Any) -> list[Any]:
        leaves, structure = pytree.tree_flatten(state)
        gathered = []
        for leaf in leaves:
            everyone = [torch.empty_like(leaf) for _ in range(self.size)]
            dist.all_gather(everyone, leaf.contiguous(), group=self._group)
            gathered.append(everyone)
        return [pytree.tree_unflatten(list(each), structure) for each in zip(*gathered, strict=True)]


def _fingerprint(layer: CalibrationLinear) -> str:
    weight = layer.float_weight()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    checksum = int(weight.contiguous().view(integer).sum(dtype=torch.int64))
    shape = f"{layer.out_features}x{layer.in_features}"
    return f"layer {layer.names[0]!r}, {shape} in {weight.dtype}, {layer.format()}, weights that sum to {checksum:x}"
