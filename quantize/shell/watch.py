"""Outputs that are given again instead of being computed, and the proof that one of them is not needed any more."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from quantize.shell.recording import copied

_READ_BY_PYTHON = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Which call of which stage: its place in the order of execution, and how many calls came before.
Event = tuple[int, int]


class Output:
    """What a stage gave at one call: a copy, or once nobody can read it again, only its shapes."""

    def __init__(self, value: Any) -> None:
        leaves, self._structure = pytree.tree_flatten(copied(value))
        self._leaves: list[Any] = leaves
        self.freed = False

    def give(self) -> Any:
        """Tensors that the receiver may write to; zeros once :meth:`free` was called."""
        if self.freed:
            made = [torch.zeros(leaf[0], dtype=leaf[1], device=leaf[2]) if isinstance(leaf, tuple) else leaf
                    for leaf in self._leaves]  # fmt: skip
        else:
            made = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return pytree.tree_unflatten(made, self._structure)

    def free(self) -> None:
        """Forget the numbers."""
        self._leaves = [(leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
                        for leaf in self._leaves]  # fmt: skip
        self.freed = True


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch leaves it bare
    """Follows what runs between the calls of stages: which outputs of theirs are in the tensors that are still alive.

    Every operator hands the events in its arguments on to its results and to what it writes to. What Python reads of a
    tensor, a number or a length, escapes: then the events in it count as needed for ever.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: dict[int, tuple[Any, frozenset[Event]]] = {}
        self._read: frozenset[Event] = frozenset()

    def mark(self, value: Any, events: frozenset[Event]) -> None:
        """From now on ``events`` are in the tensors of ``value``, besides what was in them."""
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor) and events:
                # As long as there is a weak reference, no other storage has this address.
                make: Any = StorageWeakRef
                reference = make(leaf.untyped_storage())
                _, before = self._alive.get(reference.cdata, (None, frozenset()))
                self._alive[reference.cdata] = reference, before | events

    def events(self, value: Any) -> frozenset[Event]:
        """What is in the tensors of ``value``."""
        found = [self._alive.get(leaf.untyped_storage()._cdata) for leaf in pytree.tree_leaves(value)
                 if isinstance(leaf, Tensor)]  # fmt: skip
        return frozenset().union(*(entry[1] for entry in found if entry is not None))

    def needed(self) -> frozenset[Event]:
        """What anything that runs later can depend on."""
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        return self._read.union(*(events for _, events in self._alive.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        events = self.events((args, kwargs))
        if events:
            if _READ_BY_PYTHON.intersection(func.tags):
                self._read |= events
            self.mark((result, args, kwargs) if func._schema.is_mutable else result, events)
        return result
