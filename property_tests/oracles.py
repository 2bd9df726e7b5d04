"""Independent implementations in exact rationals and float64, with loops, from the definitions. Never the core."""

from fractions import Fraction

import numpy as np
import torch

# Unit roundoffs: the largest relative error of one operation.
U32, U64 = 2.0**-24, 2.0**-53


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


def spread(q):
    """Scale and zero point of every element of ``q``, ``[n, c]`` each; zeros where there is no zero point."""
    where = np.array(members(q.scheme, *q.codes.shape))
    scale = numpy64(q.scale)[where[..., 0], where[..., 1]]
    return scale, np.zeros_like(scale) if q.zero_point is None else numpy64(q.zero_point)[where[..., 0], where[..., 1]]


def values64(q):
    """The numbers that the codes stand for: one rounding of float64 each, so that they are the core's to the bit."""
    scale, zero = spread(q)
    return (numpy64(q.codes) - zero) * scale


def row_losses(delta, gram):
    """``sum over i, j of delta_i H_ij delta_j`` for every row, ``[n]``, of float64 arrays."""
    return (delta @ gram * delta).sum(1)


def loss_noise(sizes, gram):
    """By how much, at most, the larger of two losses may be taken for the smaller, ``[n]``.

    ``sizes`` bounds the magnitudes of both changes. A loss is a product and two sums over ``c`` terms: at most
    ``2 c + 1`` roundings of the sum of the magnitudes. Two losses are compared, in the core and in the test: 4 of them.
    """
    return 4 * (2 * len(gram) + 2) * U64 * row_losses(sizes, np.abs(gram))


def total_noise(sizes, gram):
    """:func:`loss_noise` of sums over the rows: one more rounding for each row, and a few for a mean of two losses."""
    return 4 * (2 * len(gram) + len(sizes) + 6) * U64 * row_losses(sizes, np.abs(gram)).sum()


def lost64(inputs, x, s):
    """What rounding ``x / s`` costs each channel, summed over the tokens: ``[c]``, by the model of the core.

    An error of a twelfth of the squared step for every token, and at most all that there is.
    """
    t, c = x.shape
    square = [sum((row[j] / s[j]) ** 2 for row in x) / max(t, 1) for j in range(c)]
    low = min([0.0, *(row[j] / s[j] for row in x for j in range(c))])
    high = max([0.0, *(row[j] / s[j] for row in x for j in range(c))])
    lowest, highest = -(2 ** (inputs.bits - 1)), 2 ** (inputs.bits - 1) - 1
    if inputs.strategy == "token":
        # The largest channel stands for the longer tail, and the other tail is in proportion.
        tail, longer = max(square) ** 0.5, max(-low, high)
        step = tail / highest if inputs.symmetric else tail * (high - low) / (longer or 1.0) / (highest - lowest)
    elif inputs.symmetric:
        step = low / lowest if -low > high else high / highest
    else:
        step = (high - low) / (highest - lowest)
    return np.array([min(step**2 / 12, square[j]) * t for j in range(c)])
