"""Assertions that many properties share."""

import numpy as np
import torch
import torch.utils._pytree as pytree

from property_tests.oracles import numpy64, spread


def same_bits(a, b):
    """Two trees of tensors are equal in structure, shape, dtype and every value (NaN equals NaN, and -0 equals 0)."""
    left, right = pytree.tree_flatten(a), pytree.tree_flatten(b)
    assert left[1] == right[1]
    for x, y in zip(left[0], right[0], strict=True):
        if isinstance(x, torch.Tensor):
            assert x.dtype == y.dtype
            assert x.shape == y.shape
            assert bool(((x == y) | ((x != x) & (y != y))).all())
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


def assert_nearest(q, targets, margin):
    """Every code of ``q`` is a nearest one to its target; ``margin``: how far off float64 may be, in the target's unit.

    Codes that float64 decides near a tie differ between processors. What holds on all of them is this: a code is
    within half a step of its target, give or take the margin.
    """
    scale, zero = spread(q)
    lowest, highest = q.scheme.qmin - zero, q.scheme.qmax - zero
    codes = numpy64(q.codes) - zero
    assert ((lowest <= codes) & (codes <= highest)).all()
    assert (np.abs(codes - np.clip(targets / scale, lowest, highest)) <= 0.5 + margin / scale).all()
