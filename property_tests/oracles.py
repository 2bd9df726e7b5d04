"""Independent implementations in exact rationals and float64, with loops, from the definitions. Never the core."""

from fractions import Fraction

import numpy as np
import torch


def members(scheme, n, c):
    """Index of the scale of every element, ``[n, c]`` of pairs, spelled out per strategy."""
    size = {"tensor": None, "channel": c, "token": c, "group": scheme.group_size}[scheme.strategy]
    return [[(0, 0) if size is None else (i, j // size) for j in range(c)] for i in range(n)]


def half_even(x):
    """Round a Fraction to the nearest integer, ties to even: Python's own rule for Fractions."""
    return round(x)


def exact_ranges(x, scheme):
    """``{scale index: (low, high)}`` as Fractions, widened to contain 0."""
    found = {}
    for i, row in enumerate(members(scheme, *x.shape)):
        for j, group in enumerate(row):
            value = Fraction(x[i, j].item())
            low, high = found.get(group, (Fraction(0), Fraction(0)))
            found[group] = min(low, value), max(high, value)
    return found


def exact_scale(low, high, bits, symmetric):
    """The rule of the format as a Fraction, before any rounding and clamping."""
    if low == high == 0:
        return Fraction(1)
    if not symmetric:
        return (high - low) / (2**bits - 1)
    return -low / 2 ** (bits - 1) if -low > high else high / (2 ** (bits - 1) - 1)


def numpy64(x):
    return x.detach().to(torch.float64).numpy()


def gram64(x):
    total = np.zeros((x.shape[1], x.shape[1]))
    for token in numpy64(x):
        total += np.outer(token, token)
    return total
