"""Values for the memory that tensors share."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor


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
