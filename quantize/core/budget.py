"""Choose a format for every layer: a small sum of errors, with the sum of sizes within a limit."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Assignment(NamedTuple):
    """The result of :func:`assign`.

    - ``choice``: int64 ``[l]``, the format of each layer.
    - ``error``: float64 ``[]``, the sum of errors of this choice.
    - ``bound``: float64 ``[]``; no assignment within the limit has a smaller sum of errors.

    >>> Assignment(torch.tensor([1, 0]), torch.tensor(4.0), torch.tensor(3.5)).choice.tolist()
    [1, 0]
    """

    choice: Tensor
    error: Tensor
    bound: Tensor


def assign(errors: Tensor, sizes: Tensor, limit: int) -> Assignment:
    """The formats ``[l]`` with a small sum of ``errors`` ``[l, f]`` and a sum of ``sizes`` ``[l, f]`` up to ``limit``.

    ``errors`` are at least 0, and inf where a layer cannot take a format. ``sizes`` are int64, in the unit of
    ``limit``. The result exceeds the lower ``bound`` by at most one step of one layer to its next format.

    This is a multiple-choice knapsack problem. Source: Sinha and Zoltners 1979, "The Multiple-Choice Knapsack Problem":

    1. Each layer keeps only the formats on the lower convex hull of ``(size, error)``. A step from one to the next
       costs size and reduces the error. The reduction per size falls along the hull.
    2. All layers start with their smallest format. Steps are taken in the order of reduction per size. Before the first
       step that does not fit, no assignment of the same size has a smaller error. The fraction of that step that fits
       gives ``bound``.
    3. Later steps that still fit are taken as well, in the order of each layer.

    Raises:
        ValueError: a layer has no finite error, or the smallest formats exceed ``limit``.

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
    """The formats ``(size, error, place)`` on the lower convex hull, in the order of size; errors fall along it."""
    hull: list[tuple[int, float, int]] = []
    for point in sorted((size, error, place) for place, (error, size) in enumerate(zip(errors, sizes, strict=True))):
        if point[1] >= (hull[-1][1] if hull else float("inf")):
            continue
        # These quotients also order the steps, so rounding cannot put a step before its predecessor.
        while len(hull) > 1 and _rate(hull[-1], point) >= _rate(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def _rate(before: tuple[int, float, int], after: tuple[int, float, int]) -> float:
    return (before[1] - after[1]) / (after[0] - before[0])
