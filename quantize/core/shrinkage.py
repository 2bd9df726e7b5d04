"""Shrink the correlations of a Gram matrix that was estimated from few tokens, as far as chance explains them.

Source: Ledoit and Wolf 2004; Schaefer and Strimmer 2005, "A shrinkage approach to large-scale covariance matrix
estimation", with the diagonal as target.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.core.observers import SumState


def intensity(gram: SumState, strength: float) -> Tensor:
    """The fraction ``rho`` ``[]``, from 0 to 1, of the correlations in ``gram.total`` ``[c, c]`` that chance explains.

    1. Let ``r_ij`` be the correlation of two channels, estimated from ``t`` independent tokens. For normal inputs with
       known scales its variance is ``(1 + r_ij^2) / t``.
    2. Of all factors ``1 - rho`` on the correlations, the one with ``rho = sum var(r_ij) / sum r_ij^2`` has the least
       expected squared error. The sums run over ``i != j`` and the channels that were ever active. ``rho`` is at most
       1.
    3. The tokens of a text are neither independent nor normal. So ``strength + c / tokens`` tokens count as one.

    With ``strength`` 0, ``rho`` is 0.

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
    """``gram`` ``[c, c]`` with its off-diagonal elements times ``1 - rho``, where ``rho`` is ``[]``.

    >>> shrink(torch.tensor([[4., 2.], [2., 4.]]), torch.tensor(0.5))
    tensor([[4., 1.],
            [1., 4.]])
    """
    shrunk = gram * (1 - rho)
    shrunk.diagonal().copy_(gram.diagonal())
    return shrunk
