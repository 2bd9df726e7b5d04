"""Let a layer make up for what its inputs lack of those of the float model."""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.core import observers

# Of the mean of the diagonal; and what keeps the ridge of a channel that is nearly nothing finite.
_FLOOR, _MOST = 1e-4, 1e12


def corrected(weight: Tensor, statistic: observers.PairedState, strength: float) -> Tensor:
    """The weight ``[n, c]`` that gives on the inputs that arrive what ``weight`` gives on those of the float model.

    1. With ``x`` what arrives and ``e`` what is missing of it, ``V x`` is nearest to ``W (x + e)`` in the mean of the
       squares for ``V = W + W D H^-1``, where ``D = sum e x^T`` and ``H = sum x x^T``.
    2. ``D H^-1`` is a regression with as many unknowns as ``c^2``, and mostly noise where correlations are weak. So a
       ridge is added to the diagonal of ``H``, for each channel the largest of three: as much as the channel has there;
       as much as ``D`` has, for a channel that nearly vanished on the way; 1e-4 of the mean, for one that was always
       nearly zero, on which any error can be regressed with a huge factor.
    3. No weight moves by more than the root mean square of its row: the change of the row is scaled down to that.
    4. ``strength`` of the change is taken: what is corrected here is seen again by the layers behind.

    Steps 2 to 4 lead a part of the way to a minimum of a convex function: the outputs come nearer, or stay.

    Source: Li et al. 2025, "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration": the same
    objective, there minimized column by column. Steps 2 and 3 are ours.

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
