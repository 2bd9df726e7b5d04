"""What a model is called with: what of it can be kept and given a second time."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

# What can be kept, saved and given again, in lists, tuples and dicts.
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def keepable(value: Any) -> bool:
    """Whether ``value`` is tensors and plain values in lists, tuples and dicts: it can be given a second time."""
    if type(value) in (list, tuple):
        return all(map(keepable, value))
    if type(value) is dict:
        return all(type(key) in _PLAIN and keepable(item) for key, item in value.items())
    dense = isinstance(value, Tensor) and value.layout == torch.strided and type(value) in (Tensor, nn.Parameter)
    return dense or type(value) in _PLAIN


def copied(value: Any) -> Any:
    """The same with tensors of their own: what was one tensor stays one, and views share memory as they did.

    Small views of something large, such as two rows of a data set, are copied apart.
    """
    tensors = {id(leaf): leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)}
    covered = Counter[int]()
    for tensor in tensors.values():
        covered[tensor.untyped_storage()._cdata] += tensor.nbytes
    made: dict[int, Any] = {}
    for key, tensor in tensors.items():
        storage = tensor.untyped_storage()
        apart = covered[storage._cdata] == tensor.nbytes or covered[storage._cdata] < storage.nbytes() // 2
        made[key] = tensor.detach().clone() if apart else copy.deepcopy(tensor.detach(), made)
    return copy.deepcopy(value, made)


def with_tokens(x: Tensor, places: Tensor | None, total: int) -> Tensor:
    """``x`` ``[t, c]`` itself, which knows from now on that its rows are the tokens ``places`` ``[t]`` of ``total``."""
    x._quantize_tokens = places, total  # type: ignore[attr-defined] # an attribute of our own
    return x


def tokens_of(x: Tensor) -> tuple[Tensor | None, int]:
    """What :func:`with_tokens` told of ``x``."""
    known: tuple[Tensor | None, int] = getattr(x, "_quantize_tokens", (None, 0))
    return known


def kept(x: Tensor) -> Tensor:
    """A copy of ``x`` that nobody writes to, and that knows as much of its tokens."""
    return with_tokens(x.detach().clone(), *tokens_of(x))
