"""Assertions that many properties share."""

import torch
import torch.utils._pytree as pytree


def same_bits(a, b):
    """Two trees of tensors are equal in structure, shape, dtype and every bit that matters (NaN equals NaN)."""
    left, right = pytree.tree_flatten(a), pytree.tree_flatten(b)
    assert left[1] == right[1]
    for x, y in zip(left[0], right[0], strict=True):
        if isinstance(x, torch.Tensor):
            assert x.dtype == y.dtype
            assert x.shape == y.shape
            assert (
                torch.equal(x.nan_to_num(nan=12345.0), y.nan_to_num(nan=12345.0))
                if x.is_floating_point()
                else (torch.equal(x, y))
            )
        else:
            assert x == y


def assert_pure(function, *args):
    """Arguments stay as they were, and a second call gives the same bits; returns the result."""
    kept = pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, args)
    first = function(*args)
    same_bits(args, kept)
    second = function(*args)
    same_bits(first, second)
    same_bits(args, kept)
    return first
