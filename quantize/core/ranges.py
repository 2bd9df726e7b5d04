"""Search of the clipping range: a smaller step for most weights against a larger error for the few that clip."""

from __future__ import annotations

import torch
from einops import reduce
from torch import Tensor

from quantize.core import affine
from quantize.core.qtensor import QParams
from quantize.core.scheme import Scheme

# Elements that are searched at a time: more do not stay in the cache.
_TOGETHER = 2**18


def weighted_error(x: Tensor, params: QParams, scheme: Scheme, importance: Tensor) -> Tensor:
    """Error of rounding ``x`` ``[n, c]``, by group: ``sum of importance * (x - Q(x))^2``, the shape of the scale.

    ``importance`` ``[c]`` says how much an error on each input channel matters; the diagonal of the Gram matrix makes
    this the output error of the layer, apart from the correlation of channels.

    >>> weighted_error(torch.tensor([[0.6, 1.4]]), QParams(torch.ones(1, 1)), Scheme(), torch.tensor([1., 2.]))
    tensor([[0.4800]])
    """
    error = (affine.fake_quantize(x, params, scheme) - x).square() * importance
    return reduce(affine.to_groups(error, scheme), "n g k -> n g", "sum")


def search(x: Tensor, scheme: Scheme, importance: Tensor, *, steps: int = 40, smallest: float = 0.4) -> QParams:
    """Scale and zero point of the range that rounds ``x`` ``[n, c]`` best, group by group, weighted by ``importance``.

    The candidates are the full range times ``steps`` factors, evenly from 1 down to ``smallest``; of equals the widest
    wins. The full range is one of them, so that no group ends above plain rounding in :func:`weighted_error`.

    >>> q = search(torch.tensor([[0.11, 0.32, -0.2, 1.0]]), Scheme(bits=4), torch.tensor([1., 1., 1., 1e-9]))
    >>> bool(q.scale < 1 / 7)
    True
    """
    rows = max(1, _TOGETHER // max(1, x.shape[1]))
    if scheme.strategy != "tensor" and len(x) > rows:
        parts = [search(x[i : i + rows], scheme, importance, steps=steps, smallest=smallest)
                 for i in range(0, len(x), rows)]  # fmt: skip
        zeros = [part.zero_point for part in parts if part.zero_point is not None]
        return QParams(torch.cat([part.scale for part in parts]), torch.cat(zeros) if zeros else None)
    low, high = affine.group_ranges(x, scheme)
    best = affine.qparams(low, high, scheme)
    lowest = weighted_error(x, best, scheme, importance)
    for i in range(1, steps):
        factor = 1 - (1 - smallest) * i / (steps - 1)
        params = affine.qparams(low * factor, high * factor, scheme)
        error = weighted_error(x, params, scheme, importance)
        better = error < lowest
        lowest = torch.where(better, error, lowest)
        best = affine.select(better, params, best)
    return best
