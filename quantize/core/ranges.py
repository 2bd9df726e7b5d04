"""Search of the clipping range: a smaller step for most weights against a larger error for the few that clip."""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.core import affine
from quantize.core.qtensor import QParams, present
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
    return _group_error(affine.to_groups(x, scheme), params, scheme, _by_group(importance, x, scheme))


def search(x: Tensor, scheme: Scheme, importance: Tensor, *, steps: int = 40, smallest: float = 0.4) -> QParams:
    """Scale and zero point of the range that rounds ``x`` ``[n, c]`` best, group by group, weighted by ``importance``.

    The candidates are the full range times ``steps`` factors, evenly from 1 down to ``smallest``; the widest of equals
    wins. The full range is one of them, so that no group ends above plain rounding in :func:`weighted_error`. In stacks
    ``[e, n, c]`` every matrix has an importance of its own, ``[e, c]``.

    >>> q = search(torch.tensor([[0.11, 0.32, -0.2, 1.0]]), Scheme(bits=4), torch.tensor([1., 1., 1., 1e-9]))
    >>> bool(q.scale < 1 / 7)
    True
    """
    if x.ndim == 3:
        # One after the other: more than one does not stay in the cache.
        pairs = zip(x, importance, strict=True)
        found = [search(each, scheme, its, steps=steps, smallest=smallest) for each, its in pairs]
        return QParams(*map(torch.stack, zip(*map(present, found), strict=True)))
    rows = max(1, _TOGETHER // max(1, x.shape[1]))
    if scheme.strategy != "tensor" and len(x) > rows:
        parts = [search(part, scheme, importance, steps=steps, smallest=smallest) for part in torch.split(x, rows)]
        return QParams(*map(torch.cat, zip(*map(present, parts), strict=True)))
    low, high = affine.group_ranges(x, scheme)
    shares = [1 - (1 - smallest) * i / max(steps - 1, 1) for i in range(steps)]
    factors = torch.tensor(shares, dtype=affine.working_dtype(x), device=x.device)[:, None, None]
    candidates = affine.qparams(low * factors, high * factors, scheme)
    groups, importance = affine.to_groups(x, scheme), _by_group(importance, x, scheme)
    errors = [
        _group_error(groups, QParams(*params), scheme, importance)
        for params in zip(*(each.unbind() for each in present(candidates)), strict=True)
    ]
    # What overflows is no candidate; the first of equals is taken.
    best = torch.stack(errors).nan_to_num(nan=torch.inf, posinf=torch.inf).argmin(0, keepdim=True)
    return QParams(*(each.gather(0, best)[0] for each in present(candidates)))


def _by_group(importance: Tensor, x: Tensor, scheme: Scheme) -> Tensor:
    rows = x.shape[0] if scheme.strategy == "tensor" else 1
    # A diagonal is far apart in memory.
    return affine.to_groups(importance.contiguous().expand(rows, -1), scheme)


def _group_error(groups: Tensor, params: QParams, scheme: Scheme, importance: Tensor) -> Tensor:
    """``sum over k of importance * (x - Q(x))^2`` of ``groups`` ``[p, g, k]``: ``[p, g]``."""
    scale, low, high = params.scale[..., None], scheme.qmin, scheme.qmax
    codes = (groups / scale).round_()
    if params.zero_point is None:
        codes = codes.clamp(low, high)
    else:
        zero = params.zero_point[..., None].to(codes.dtype)
        codes = codes.clamp(low - zero, high - zero)
    error = codes.mul_(scale).sub_(groups)
    return error.mul_(error).mul_(importance).sum(-1)
