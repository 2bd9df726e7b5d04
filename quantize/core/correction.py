"""Let a layer make up for what its inputs lack of those of the float model."""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.core import observers


def corrected(weight: Tensor, statistic: observers.PairedState, strength: float) -> Tensor:
    """The weight ``[n, c]`` that gives on the inputs that arrive what ``weight`` gives on those of the float model.

    1. With ``x`` what arrives and ``e`` what is missing of it, ``V x`` is nearest to ``W (x + e)`` in the mean of the
       squares for ``V = W + W D H^-1``, where ``D = sum e x^T`` and ``H = sum x x^T``.
    2. ``D H^-1`` is a regression with as many unknowns as ``c^2``, and mostly noise where correlations are weak: as
       much as the diagonal of ``H`` is added to it (a ridge in units of the channels), and that of ``D`` where it is
       larger, so that a channel which nearly vanished on the way moves no weight by more than itself.
    3. ``strength`` of the change is taken: what is corrected here is seen again by the layers behind.

    Source: Li et al. 2025, "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration": the same
    objective, there minimized column by column. Step 2 is ours.

    >>> state = observers.paired_gram.update(observers.paired_gram.init(1), torch.ones(4, 1), 1.5 * torch.ones(4, 1))
    >>> corrected(torch.tensor([[8.0]]), state, 1.0)
    tensor([[10.]])
    """
    (gram, _), cross = statistic
    unit = torch.where(gram.diagonal() > 0, gram.diagonal(), 1.0).rsqrt()
    ridge = (cross.diagonal().abs() * unit.square()).clamp(min=1)
    scaled = (gram * unit).mul_(unit[:, None])
    scaled.diagonal().add_(ridge)
    lower, _ = torch.linalg.cholesky_ex(scaled)
    # W D H^-1 from the left or from the right: whichever has the smaller matrix to solve for.
    few = len(weight) <= len(gram)
    pull = weight @ cross if few else cross
    change = (torch.cholesky_solve((pull * unit).T, lower) * unit[:, None]).T
    return weight + strength * (change if few else weight @ change)
