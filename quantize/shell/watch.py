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
        self._freed = False

    def give(self) -> Any:
        """Tensors that the receiver may write to; zeros once :meth:`free` was called."""
        if self._freed:
            made = [torch.zeros(leaf[0], dtype=leaf[1], device=leaf[2]) if isinstance(leaf, tuple) else leaf
                    for leaf in self._leaves]  # fmt: skip
        else:
            made = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return pytree.tree_unflatten(made, self._structure)

    def free(self) -> None:
        """Forget the numbers."""
        self._leaves = [(leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
                        for leaf in self._leaves]  # fmt: skip
        self._freed = True


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch leaves it bare
    """Follows what runs between the calls of stages: whether anything of a stage's output can still be read.

    For each call: the storages of its output, and of all that was computed until the next call. Once they are gone,
    what is left of the output is what Python read from it: then the output counts as needed for ever.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: dict[Event, list[StorageWeakRef]] = {}
        self._read: set[Event] = set()
        self._open: Event | None = None

    def begin(self, event: Event, output: Any) -> None:
        """The call ``event`` returns ``output``."""
        self._open, self._storages[event] = event, []
        self._hold(output)

    def end(self) -> None:
        """The next call begins."""
        self._open = None

    def gone(self, event: Event) -> bool:
        """Whether nothing that runs later can depend on the output of ``event``."""
        storages: list[Any] = self._storages[event]
        return event not in self._read and all(storage.expired() for storage in storages)

    def _hold(self, value: Any) -> None:
        if self._open is not None:
            tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
            make: Any = StorageWeakRef
            self._storages[self._open] += [make(tensor.untyped_storage()) for tensor in tensors]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._open is not None and _READ_BY_PYTHON.intersection(func.tags):
            self._read.add(self._open)
        self._hold(result)
        return result
