"""Choose a format for every layer, so that the sum of the errors is small and the sum of the sizes within a limit."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Assignment(NamedTuple):
    """``choice`` int64 ``[l]``: the format of each layer; ``error`` and ``bound`` float64 ``[]`` (:func:`assign`)."""

    choice: Tensor
    error: Tensor
    bound: Tensor


def assign(errors: Tensor, sizes: Tensor, limit: int) -> Assignment:
    """The formats ``[l]`` with a small sum of ``errors`` ``[l, f]`` and a sum of ``sizes`` ``[l, f]`` up to ``limit``.

    ``errors`` are at least 0, inf where a layer cannot take a format; ``sizes`` are int64, in any unit. ``bound`` is a
    sum of errors below which no assignment within the limit comes. The sum that was reached, ``error``, is above it by
    at most one step: what one layer gains from one format to the next one on its hull.

    This is a multiple-choice knapsack problem. Source: Sinha and Zoltners 1979, "The Multiple-Choice Knapsack Problem":

    1. Of every layer only the formats on the lower convex hull of ``(size, error)`` are considered. Between neighbours
       a step costs size and gains error, and the gain per size falls along the hull.
    2. From the smallest formats on, the steps of all layers are taken in the order of gain per size. Up to the first
       step that does not fit, no assignment of the same size has a smaller error; a fraction of that step, which fills
       the limit, gives ``bound``.
    3. What fits of the steps behind it is taken as well, in the order of each layer.

    Raises:
        ValueError: a layer without a format, or not even the smallest formats are within ``limit``.

    >>> errors, sizes = torch.tensor([[8.0, 0.0], [4.0, 0.0]]), torch.tensor([[4, 8], [4, 8]])
    >>> assign(errors, sizes, 12)
    Assignment(choice=tensor([1, 0]), error=tensor(4., dtype=torch.float64), bound=tensor(4., dtype=torch.float64))
    """
    hulls = [_hull(*pair) for pair in zip(errors.tolist(), sizes.tolist(), strict=True)]
    if not all(hulls):
        raise ValueError(f"errors: layer {hulls.index([])} has none below inf; accepted: a format for every layer")
    steps = [
        (_rate(before, after), layer, after[0] - before[0], before[1] - after[1], place)
        for layer, hull in enumerate(hulls)
        for place, (before, after) in enumerate(pairwise(hull), 1)
    ]
    taken, left = [0] * len(hulls), limit - sum(hull[0][0] for hull in hulls)
    if left < 0:
        raise ValueError(f"limit: {limit}; accepted: at least {limit - left}, the size of the smallest formats")
    error = sum(hull[0][1] for hull in hulls)
    bound: float | None = None
    for rate, layer, size, gain, place in sorted(steps, key=lambda step: (-step[0], step[1], step[4])):
        if size > left and bound is None:
            bound = error - rate * left
        if size <= left and taken[layer] == place - 1:
            taken[layer], left, error = place, left - size, error - gain
    chosen = [hull[place] for hull, place in zip(hulls, taken, strict=True)]
    error = sum(point[1] for point in chosen)
    found = torch.tensor([error, error if bound is None else min(bound, error)], dtype=torch.float64)
    choice = torch.tensor([point[2] for point in chosen], dtype=torch.int64, device=errors.device)
    return Assignment(choice, *found.to(errors.device))


def _hull(errors: list[float], sizes: list[int]) -> list[tuple[int, float, int]]:
    """The formats ``(size, error, place)`` on the lower convex hull, by size; errors fall along it."""
    hull: list[tuple[int, float, int]] = []
    for point in sorted((size, error, place) for place, (error, size) in enumerate(zip(errors, sizes, strict=True))):
        if point[1] >= (hull[-1][1] if hull else float("inf")):
            continue
        # The quotients by which the steps are ordered, so that rounding cannot put a step before the one below it.
        while len(hull) > 1 and _rate(hull[-1], point) >= _rate(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def _rate(before: tuple[int, float, int], after: tuple[int, float, int]) -> float:
    return (before[1] - after[1]) / (after[0] - before[0])
