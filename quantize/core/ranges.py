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
    return _fitted(affine.to_groups(x, scheme), params, scheme, _by_group(importance, x, scheme), keep=True)[0]


def search(
    x: Tensor, scheme: Scheme, importance: Tensor, *, steps: int = 20, smallest: float = 0.4, signed: bool = False
) -> QParams:
    """Scale and zero point that round ``x`` ``[n, c]`` best, group by group, weighted by ``importance`` ``[c]``.

    The candidates, of which the first of equals wins:

    1. the full range, so that no group ends above plain rounding in :func:`weighted_error`;
    2. the full range times ``steps`` factors, evenly from 1 down to ``smallest``; none with 0. With ``signed``, the
       scale of a symmetric scheme is negative where the upper tail is the longer one: the longer tail then always
       reaches the code ``-2^(b-1)``, and the step is smaller by ``1 / 2^(b-1)``. Without symmetry, both integers next
       to the exact zero point are tried.
    3. Each candidate of step 2 takes the scale that is best for its own codes ``k`` (with the zero point subtracted):
       the error is a parabola in the scale, least at ``sum(importance x k) / sum(importance k^2)``.

    In stacks ``[e, n, c]`` every matrix has an importance of its own, ``[e, c]``.

    >>> q = search(torch.tensor([[0.11, 0.32, -0.2, 1.0]]), Scheme(bits=4), torch.tensor([1., 1., 1., 1e-9]))
    >>> bool(q.scale < 1 / 7)
    True
    """
    if x.ndim == 3:
        # One after the other: more than one does not stay in the cache.
        found = [
            search(each, scheme, its, steps=steps, smallest=smallest, signed=signed)
            for each, its in zip(x, importance, strict=True)
        ]
        return QParams(*map(torch.stack, zip(*map(present, found), strict=True)))
    rows = max(1, _TOGETHER // max(1, x.shape[1]))
    if scheme.strategy != "tensor" and len(x) > rows:
        parts = [
            search(part, scheme, importance, steps=steps, smallest=smallest, signed=signed)
            for part in torch.split(x, rows)
        ]
        return QParams(*map(torch.cat, zip(*map(present, parts), strict=True)))
    low, high = affine.group_ranges(x, scheme)
    best = affine.qparams(low, high, scheme)
    groups, weights = affine.to_groups(x, scheme), _by_group(importance, x, scheme)
    least = _fitted(groups, best, scheme, weights, keep=True)[0].nan_to_num(nan=torch.inf)
    for i in range(steps):
        share = 1 - (1 - smallest) * i / max(steps - 1, 1)
        for candidate in _neighbours(low * share, high * share, scheme, signed):
            error, fitted = _fitted(groups, candidate, scheme, weights)
            # What overflows is no candidate.
            better = error < least
            best, least = affine.select(better, fitted, best), torch.where(better, error, least)
    return best


def _neighbours(low: Tensor, high: Tensor, scheme: Scheme, signed: bool) -> list[QParams]:
    """The parameters of the range ``[low, high]`` as the search tries them."""
    usual = affine.qparams(low, high, scheme)
    if usual.zero_point is None:
        return [QParams(torch.where(high > -low, high / scheme.qmin, usual.scale))] if signed else [usual]
    exact = scheme.qmin - low / usual.scale
    zeros = [exact.floor().clamp(scheme.qmin, scheme.qmax), exact.ceil().clamp(scheme.qmin, scheme.qmax)]
    return [QParams(usual.scale, zero.to(torch.int8)) for zero in zeros]


def _by_group(importance: Tensor, x: Tensor, scheme: Scheme) -> Tensor:
    rows = x.shape[0] if scheme.strategy == "tensor" else 1
    # A diagonal is far apart in memory.
    return affine.to_groups(importance.contiguous().expand(rows, -1), scheme)


def _fitted(
    groups: Tensor, params: QParams, scheme: Scheme, importance: Tensor, *, keep: bool = False
) -> tuple[Tensor, QParams]:
    """The error of rounding ``groups`` ``[p, g, k]`` with ``params``, ``[p, g]``, and ``params``.

    Unless ``keep``, the scale is first moved to the best one for these codes.
    """
    scale = params.scale[..., None]
    codes = (groups / scale).round_()
    # Not in place: torch maps clamp_ over a stack one by one, and warns.
    if params.zero_point is None:
        codes = codes.clamp(scheme.qmin, scheme.qmax)
    else:
        zero = params.zero_point[..., None].to(codes.dtype)
        codes = codes.clamp(scheme.qmin - zero, scheme.qmax - zero)
    error = torch.addcmul(groups, codes, scale, value=-1)
    weighted = error * importance
    least = torch.linalg.vecdot(weighted, error)
    if keep:
        return least, params
    pull, curve = torch.linalg.vecdot(weighted, codes), torch.linalg.vecdot(codes * importance, codes)
    shift = torch.where(curve > 0, pull / curve, 0.0)
    # A scale that would change its sign, or vanish, belongs to codes that say nothing.
    shift = torch.where((params.scale + shift) / params.scale > 0.5, shift, 0.0)
    # A square by definition: what falls below 0 is rounding, and must not beat an exact 0.
    return (least - pull * shift).clamp(min=0), QParams(params.scale + shift, params.zero_point)
