"""Arguments of a model: which can be copied and passed again, and which tokens they contain."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

# Types that can be copied, saved and passed again, in lists, tuples and dicts.
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def keepable(value: Any) -> bool:
    """Whether ``value`` can be passed again: it consists of tensors and plain values in lists, tuples and dicts."""
    if type(value) in (list, tuple):
        return all(map(keepable, value))
    if type(value) is dict:
        return all(type(key) in _PLAIN and keepable(item) for key, item in value.items())
    dense = isinstance(value, Tensor) and value.layout == torch.strided and type(value) in (Tensor, nn.Parameter)
    return dense or type(value) in _PLAIN


def copied(value: Any) -> Any:
    """A deep copy: a tensor that occurs twice stays one tensor, and views still share their memory.

    Small views of a large tensor, such as two rows of a data set, are copied separately.
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
    """Mark the rows of ``x`` ``[t, c]`` as the tokens ``places`` ``[t]`` of ``total``; returns ``x`` itself."""
    x._quantize_tokens = places, total  # type: ignore[attr-defined] # an attribute of this library
    return x


def tokens_of(x: Tensor) -> tuple[Tensor | None, int]:
    """``places`` and ``total`` as :func:`with_tokens` set them on ``x``; None and 0 without."""
    known: tuple[Tensor | None, int] = getattr(x, "_quantize_tokens", (None, 0))
    return known


def kept(x: Tensor) -> Tensor:
    """A private copy of ``x``, with the marks of :func:`with_tokens`."""
    return with_tokens(x.detach().clone(), *tokens_of(x))
