"""Search of the clipping range: a smaller range rounds most weights more finely, and clips a few."""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.core import affine
from quantize.core.qtensor import QParams, present
from quantize.core.scheme import Scheme

# How many elements are searched at once: more would not fit the cache.
_MOST_ELEMENTS = 2**18


def weighted_error(x: Tensor, params: QParams, scheme: Scheme, importance: Tensor) -> Tensor:
    """Error of rounding ``x`` ``[n, c]`` with ``params`` of ``scheme``: ``sum of importance * (x - Q(x))^2`` by group.

    The result has the shape of the scale. ``importance`` ``[c]`` weighs the errors on each input channel. With the
    diagonal of the Gram matrix, this is the output error of the layer if the channels are uncorrelated.

    >>> weighted_error(torch.tensor([[0.6, 1.4]]), QParams(torch.ones(1, 1)), Scheme(), torch.tensor([1., 2.]))
    tensor([[0.4800]])
    """
    return _rounding_error(affine.to_groups(x, scheme), params, scheme, _grouped(importance, x, scheme), keep=True)[0]


def search(
    x: Tensor, scheme: Scheme, importance: Tensor, *, steps: int = 20, smallest: float = 0.4, signed: bool = False
) -> QParams:
    """Scale and zero point in ``scheme`` with the least :func:`weighted_error` of ``x`` ``[n, c]``, for each group.

    ``importance`` ``[c]`` weighs the errors. The candidates are tried in this order, and a later one must be better:

    1. The full range. So no group ends with a larger error than plain rounding.
    2. The full range times ``steps`` factors, spaced evenly from 1 down to ``smallest``. With ``signed``, the scale of
       a symmetric scheme is negative where the upper tail is longer. The longer tail then always reaches the code
       ``-2^(b-1)``, and the step is smaller by ``1 / 2^(b-1)``. Without symmetry, both integers next to the exact zero
       point are tried.
    3. Each candidate of step 2 then takes the best scale for its codes ``k``, from which the zero point is subtracted.
       The error is a parabola in the scale, with its minimum at ``sum(importance x k) / sum(importance k^2)``.

    For a stack ``[e, n, c]``, ``importance`` is ``[e, c]``.

    >>> q = search(torch.tensor([[0.11, 0.32, -0.2, 1.0]]), Scheme(bits=4), torch.tensor([1., 1., 1., 1e-9]))
    >>> bool(q.scale < 1 / 7)
    True
    """
    if x.ndim == 3:
        # One after the other: two would not fit the cache.
        found = [
            search(each, scheme, its, steps=steps, smallest=smallest, signed=signed)
            for each, its in zip(x, importance, strict=True)
        ]
        return QParams(*map(torch.stack, zip(*map(present, found), strict=True)))
    rows = max(1, _MOST_ELEMENTS // max(1, x.shape[1]))
    if scheme.strategy != "tensor" and len(x) > rows:
        parts = [
            search(part, scheme, importance, steps=steps, smallest=smallest, signed=signed)
            for part in torch.split(x, rows)
        ]
        return QParams(*map(torch.cat, zip(*map(present, parts), strict=True)))
    low, high = affine.group_ranges(x, scheme)
    best = affine.qparams(low, high, scheme)
    groups, weights = affine.to_groups(x, scheme), _grouped(importance, x, scheme)
    least = _rounding_error(groups, best, scheme, weights, keep=True)[0].nan_to_num(nan=torch.inf)
    for i in range(steps):
        share = 1 - (1 - smallest) * i / max(steps - 1, 1)
        for candidate in _candidates(low * share, high * share, scheme, signed):
            error, fitted = _rounding_error(groups, candidate, scheme, weights)
            # The error of a candidate that overflows is NaN or inf, so it is never better.
            better = error < least
            best, least = affine.select(better, fitted, best), torch.where(better, error, least)
    return best


def _candidates(low: Tensor, high: Tensor, scheme: Scheme, signed: bool) -> list[QParams]:
    """The parameters to try for the range ``[low, high]``."""
    usual = affine.qparams(low, high, scheme)
    if usual.zero_point is None:
        return [QParams(torch.where(high > -low, high / scheme.qmin, usual.scale))] if signed else [usual]
    exact = scheme.qmin - low / usual.scale
    zeros = [exact.floor().clamp(scheme.qmin, scheme.qmax), exact.ceil().clamp(scheme.qmin, scheme.qmax)]
    return [QParams(usual.scale, zero.to(torch.int8)) for zero in zeros]


def _grouped(importance: Tensor, x: Tensor, scheme: Scheme) -> Tensor:
    rows = x.shape[0] if scheme.strategy == "tensor" else 1
    # The elements of a diagonal are far apart in memory, which is slow.
    return affine.to_groups(importance.contiguous().expand(rows, -1), scheme)


def _rounding_error(
    groups: Tensor, params: QParams, scheme: Scheme, importance: Tensor, *, keep: bool = False
) -> tuple[Tensor, QParams]:
    """The error ``[p, g]`` of rounding ``groups`` ``[p, g, k]`` with ``params``, and the ``params`` used.

    Unless ``keep``, the scale is replaced by the best one for these codes.
    """
    scale = params.scale[..., None]
    codes = (groups / scale).round_()
    # Not in place: vmap has no rule for clamp_, so it loops and warns.
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
    # A scale is not refitted if it would change its sign or vanish: its codes say nothing about the weights.
    shift = torch.where((params.scale + shift) / params.scale > 0.5, shift, 0.0)
    # A square cannot be negative: a result below 0 is a rounding error, and must not beat an exact 0.
    return (least - pull * shift).clamp(min=0), QParams(params.scale + shift, params.zero_point)
