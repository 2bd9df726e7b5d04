"""Compensate the errors of the layers before a layer, which make its inputs differ from those of the float model."""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.core import observers

# The least ridge, relative to the mean of the diagonal; the largest one, which keeps that of a tiny channel finite.
_FLOOR, _MOST = 1e-4, 1e12


def corrected(weight: Tensor, statistic: observers.PairedState, strength: float) -> Tensor:
    """A weight ``[n, c]`` whose outputs on the arriving inputs are closer to those of ``weight`` on the float inputs.

    ``weight`` ``W`` is ``[n, c]``, and ``statistic`` is that of :data:`~quantize.core.observers.paired_gram`.

    1. Let ``x`` be an arriving input, and ``x + e`` the same input in the float model. The mean square of
       ``V x - W (x + e)`` is least for ``V = W + W D H^-1``, where ``D = sum e x^T`` and ``H = sum x x^T``.
    2. ``D H^-1`` is a regression with ``c^2`` unknowns, and mostly noise where correlations are weak. So a ridge is
       added to the diagonal of ``H``. For each channel it is the largest of its diagonal elements in ``H`` and ``D``
       and 1e-4 of the mean of the diagonal of ``H``. The second limits channels that nearly vanished on the way, the
       third those that were always nearly zero, which could explain any error with a huge factor.
    3. No weight moves by more than the root mean square of its row: larger changes of a row are scaled down.
    4. The change is multiplied by ``strength``, because later layers compensate a part of the same error.

    Steps 2 to 4 take a part of the way to the minimum of a convex function, so the error never increases.

    Source: Li et al. 2025, "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration". The objective is
    the same; there it is minimized column by column. Steps 2 and 3 are new here.

    >>> state = observers.paired_gram.update(observers.paired_gram.init(1), torch.ones(4, 1), 1.5 * torch.ones(4, 1))
    >>> corrected(torch.tensor([[8.0]]), state, 1.0)
    tensor([[10.]])
    """
    (gram, _), cross = statistic
    diagonal = gram.diagonal()
    unit = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    # Divided first, and multiplied twice: neither sums nor squares leave the range.
    least = (_FLOOR * (diagonal / len(diagonal))).sum()
    ridge = (torch.maximum(cross.diagonal().abs(), least) * unit * unit).clamp(min=1, max=_MOST)
    lower = (gram * unit).mul_(unit[:, None])
    lower.diagonal().add_(ridge)
    lower, _ = torch.linalg.cholesky_ex(lower)
    # W D H^-1 from the left or from the right: whichever has the smaller matrix to solve for.
    few = len(weight) <= len(gram)
    pull = weight @ cross if few else cross
    change = (torch.cholesky_solve((pull * unit).T, lower) * unit[:, None]).T
    change = change if few else weight @ change
    size, most = change.abs().amax(1, keepdim=True), weight.square().mean(1, keepdim=True).sqrt()
    return weight + strength * torch.where(size > most, change * (most / size), change)
