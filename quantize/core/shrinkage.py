"""How far a Gram matrix from few tokens can be trusted: correlations that chance explains are shrunk.

Source: Ledoit and Wolf 2004; Schaefer and Strimmer 2005, "A shrinkage approach to large-scale covariance matrix
estimation", with the diagonal as target.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.core.observers import SumState


def intensity(gram: SumState, strength: float) -> Tensor:
    """The part ``rho`` ``[]``, from 0 to 1, of the correlations in ``gram.total`` ``[c, c]`` that chance explains.

    1. In units of the channels' scales, the covariance ``r_ij`` of two channels, estimated from ``t`` independent
       tokens, has variance ``(1 + r_ij^2) / t`` under normal inputs with known scales.
    2. The factor ``1 - rho`` on all of them with the least expected squared error has
       ``rho = sum var(r_ij) / sum r_ij^2`` over ``i != j`` among the channels that were ever active, at most 1.
    3. The tokens of a text are neither independent nor normal: ``strength + c / tokens`` of them count as one.

    Strength 0 trusts everything: ``rho`` is 0.

    >>> intensity(SumState(torch.tensor([[4., 2.], [2., 4.]]), torch.tensor(40)), 3.95)
    tensor(0.5000)
    """
    total, tokens = gram
    if not strength:
        return total.new_zeros(())
    diagonal = total.diagonal()
    unit = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    squares = (total * unit).mul_(unit[:, None])
    squares = squares.mul_(squares)
    found = squares.sum() - squares.diagonal().sum()
    active = (diagonal > 0).sum()
    pairs = active * (active - 1)
    number = tokens.to(total.dtype)
    chance = (pairs + found) * (strength + len(total) / number) / number
    return torch.where(found > chance, chance / found, 1.0)


def shrink(gram: Tensor, rho: Tensor) -> Tensor:
    """``gram`` ``[c, c]`` with all but its diagonal times ``1 - rho``.

    >>> shrink(torch.tensor([[4., 2.], [2., 4.]]), torch.tensor(0.5))
    tensor([[4., 1.],
            [1., 4.]])
    """
    shrunk = gram * (1 - rho)
    shrunk.diagonal().copy_(gram.diagonal())
    return shrunk
