"""Outputs that are given again instead of being computed: where that is safe, and when one is not needed any more."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from quantize.shell.batches import copied

_READ_BY_PYTHON = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# What hands the numbers of a tensor to others without an operator of torch.
_ESCAPES = {"numpy", "tolist", "__array__", "__dlpack__"}
# Which call of which stage: its place in the order of execution, and how many calls came before.
Event = tuple[int, int]


class Output:
    """What a stage gave at one call: a copy, or once nobody can read it again, only its shapes."""

    def __init__(self, value: Any) -> None:
        self._value, self.freed = copied(value), False

    def give(self) -> Any:
        """Tensors that the receiver may write to; zeros once :meth:`free` was called."""
        if not self.freed:
            return copied(self._value)
        return pytree.tree_map_only(_Shape, _Shape.zeros, self._value)

    def free(self) -> None:
        """Forget the numbers."""
        self._value, self.freed = pytree.tree_map_only(Tensor, _Shape, self._value), True


class _Shape:
    def __init__(self, tensor: Tensor) -> None:
        self._size, self._stride = tensor.size(), tensor.stride()
        self._dtype, self._device = tensor.dtype, tensor.device

    def zeros(self) -> Tensor:
        return torch.empty_strided(self._size, self._stride, dtype=self._dtype, device=self._device).zero_()


def storages_of(value: Any) -> list[Any] | None:
    """The storages of the tensors in ``value``; None if one has another form."""
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    if any(tensor.layout != torch.strided for tensor in tensors):
        return None
    return [tensor.untyped_storage() for tensor in tensors]


class Tags:
    """A value for each storage, as long as that is alive."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Any], Any]] = {}

    def get(self, storage: Any) -> Any:
        """The value, or None."""
        return self._entries.get(storage._cdata, (None, None))[1]

    def set(self, storage: Any, value: Any) -> None:
        """Remember ``value`` until the storage is gone, and its address may be another's."""
        key = storage._cdata
        self._entries[key] = weakref.ref(storage, lambda _: self._entries.pop(key, None)), value

    def drop(self, storage: Any) -> None:
        """Forget the value."""
        self._entries.pop(storage._cdata, None)

    def values(self) -> list[Any]:
        """Those of all storages that are alive."""
        return [value for _, value in self._entries.values()]


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch leaves it bare
    """Follows what runs between the calls of stages: which outputs of theirs are in the tensors that are still alive.

    Every operator hands the events in its arguments on to its results and to what it writes to. What Python reads of a
    tensor, a number or a length, escapes: then the events in it count as needed for ever.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive = Tags()
        self._read: frozenset[Event] = frozenset()
        self._given: frozenset[Event] = frozenset()

    def mark(self, value: Any, events: frozenset[Event]) -> None:
        """From now on ``events`` are in the tensors of ``value``, besides what was in them."""
        self._given |= events
        storages = storages_of(value)
        if storages is None:
            self.escape()
        for storage in storages or () if events else ():
            self._alive.set(storage, events.union(self._alive.get(storage) or ()))

    def events(self, value: Any) -> frozenset[Event]:
        """What is in the tensors of ``value``."""
        storages = storages_of(value)
        if storages is None:
            return self._given
        return frozenset().union(*(self._alive.get(storage) or () for storage in storages))

    def escape(self) -> None:
        """Something was read that cannot be followed: all that was given so far may be in it."""
        self._read |= self._given

    def needed(self) -> frozenset[Event]:
        """What anything that runs later can depend on."""
        return self._read.union(*self._alive.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        events = self.events((args, kwargs))
        if events:
            if _READ_BY_PYTHON.intersection(func.tags):
                self._read |= events
            self.mark((result, args, kwargs) if func._schema.is_mutable else result, events)
        return result


class Escapes(TorchFunctionMode):
    """Tells a :class:`Watch` of reads that are no operators."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _ESCAPES:
            self._watch.escape()
        return func(*args, **(kwargs or {}))
