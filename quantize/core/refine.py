"""Lower the output error ``tr((W - Q) H (W - Q)^T)`` of a quantized weight: factors, sweeps, scales, rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from quantize.core import affine, metrics
from quantize.core.qtensor import QParams, QTensor, present
from quantize.core.scheme import Scheme

# Columns between two small matmuls inside a block: short enough for the cache, long enough to amortize a call.
_INNER = 16


def sweep(
    base: Tensor,
    reference: Tensor,
    coupling: Tensor,
    params: QParams,
    scheme: Scheme,
    order: Tensor,
    *,
    block_size: int = 128,
) -> QTensor:
    """Round the columns of a matrix one after the other, each moved by the steps of those before it.

    ``q_j = Q(base_j + sum over i < j of (reference_i - q_i) coupling_ij)``; ``base`` and ``reference`` are ``[n, c]``,
    ``order`` ``[c]`` is the order of the columns, and ``coupling`` ``[c, c]``, of which only the part above the
    diagonal is read, is in that order. ``params`` and the result are in the layout of ``base``.

    GPTQ is this recursion with ``base = reference = W`` and the unit triangular factor of the Gram matrix; coordinate
    descent is the same with the present values as reference: see :func:`descend`. Only decided columns are read, so
    the sums are gathered by one large matmul a block, a small one every 16 columns, and a product of matrix and vector.
    ``block_size`` changes the order of additions and nothing else.

    Every tensor may be one of a stack, with a leading axis ``e``: the matrices are then swept side by side.
    """
    c, stacked = coupling.shape[-1], base.ndim == 3
    add = torch.baddbmm if stacked else torch.addmm
    groups = order // (scheme.group_size or c)
    # Transposed, a column is contiguous.
    base_t, incoming = picked(transposed(base), order), transposed(coupling)
    reference_t = base_t if reference is base else picked(transposed(reference), order)
    scale_t, zero_t = transposed(params.scale), None if params.zero_point is None else transposed(params.zero_point)
    codes, steps, value = torch.empty_like(base_t), torch.empty_like(base_t), torch.empty_like(base_t[..., 0, :])
    for start in range(0, c, block_size):
        stop = min(start + block_size, c)
        scale = picked(scale_t, groups[..., start:stop])
        lows: Sequence[Any] = [scheme.qmin] * c
        highs: Sequence[Any] = [scheme.qmax] * c
        if zero_t is not None:
            zero = picked(zero_t, groups[..., start:stop]).to(scale.dtype)
            lows, highs = (scheme.qmin - zero).unbind(-2), (scheme.qmax - zero).unbind(-2)
        # Views made once: slicing tensors costs as much as the arithmetic on a column.
        code_of, step_of, from_ = (tensor[..., start:stop, :].unbind(-2) for tensor in (codes, steps, reference_t))
        scales = scale.unbind(-2)
        target = add(base_t[..., start:stop, :], incoming[..., start:stop, :start], steps[..., :start, :])
        for inner in range(start, stop, _INNER):
            end = min(inner + _INNER, stop)
            rows = slice(inner - start, end - start)
            near = add(target[..., rows, :], incoming[..., inner:end, start:inner], steps[..., start:inner, :])
            decided, weights = steps[..., inner:end, :].mT, incoming[..., inner:end, inner:end].unbind(-2)
            for j, row in enumerate(near.unbind(-2)):
                column = inner - start + j
                code, size = code_of[column], scales[column]
                if stacked:
                    before = weights[j][:, None, :j], decided[:, :, :j].mT
                    torch.baddbmm(row[:, None], *before, out=value[:, None])
                else:
                    torch.addmv(row, decided[:, :j], weights[j][:j], out=value)
                torch.div(value, size, out=code).round_()
                torch.clamp(code, lows[column], highs[column], out=code)
                torch.addcmul(from_[column], code, size, value=-1, out=step_of[column])
        if zero_t is not None:
            codes[..., start:stop, :] += zero
    back = torch.argsort(order)
    return QTensor(transposed(picked(codes.to(torch.int8), back)), params.scale, params.zero_point, scheme)


def factor(gram: Tensor, damp: float) -> tuple[Tensor, Tensor, Tensor]:
    """``H + damp * mean(diag H) * I = U diag(d) U^T``: ``U`` ``[c, c]`` unit upper triangular, ``d`` ``[c]``, ``damp``.

    ``H`` is ``gram`` ``[c, c]``. Where the factorization fails, ``damp`` ``[]`` grows to ten times itself, from at
    least 1e-6, until it succeeds: at the latest when the diagonal dominates. The one that did is returned. Zero
    channels have no coupling, and a pivot of 1 above the damping. A stack ``[e, c, c]`` has one damping for each.

    Raises:
        ValueError: ``gram`` is not finite.

    1. With ``J`` the reversal of order, ``J (H + ...) J = L L^T`` by Cholesky.
    2. ``J L J`` is upper triangular; its diagonal taken out of the columns leaves ``U``, its square is ``d``.

    >>> upper, pivots, _ = factor(torch.tensor([[5., 2.], [2., 1.]]), 0.0)
    >>> upper, pivots
    (tensor([[1., 2.],
            [0., 1.]]), tensor([1., 1.]))
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    # Divided first: the sum of large diagonals would overflow.
    mean = (diagonal / diagonal.shape[-1]).sum(-1)
    dead = (diagonal == 0).to(gram.dtype)
    used = torch.full_like(mean, damp)
    while True:
        lower = gram.flip(-2, -1)
        lower.diagonal(dim1=-2, dim2=-1).add_(((used * mean)[..., None] + dead).flip(-1))
        lower, failed = torch.linalg.cholesky_ex(lower)
        # A pivot is made of all numbers in its row.
        failed = (failed != 0) | ~torch.isfinite(lower.diagonal(dim1=-2, dim2=-1)).all(-1)
        if not failed.any():
            break
        if damp > 1e30:
            raise ValueError("gram: NaN or inf; accepted: a finite symmetric matrix")
        damp = max(10 * damp, 1e-6)
        used = torch.where(failed, damp, used)
    upper = lower.flip(-2, -1)
    # In place: every [c, c] counts in the peak.
    root = upper.diagonal(dim1=-2, dim2=-1).clone()
    return upper.div_(root[..., None, :]), root.square(), used


def each(function: Callable[..., Any], stacked: bool) -> Callable[..., Any]:
    """``function``, or the same for every member of stacks."""
    return torch.func.vmap(function) if stacked else function


def picked(rows: Tensor, places: Tensor) -> Tensor:
    """The rows ``places`` ``[w]`` of a matrix ``[c, n]``: ``[w, n]``. In a stack each has its own: ``[e, w]``.

    >>> picked(torch.tensor([[1, 2], [3, 4]]), torch.tensor([1, 0, 1]))
    tensor([[3, 4],
            [1, 2],
            [3, 4]])
    """
    return rows[places] if rows.ndim == 2 else rows[torch.arange(len(rows), device=rows.device)[:, None], places]


def transposed(x: Tensor) -> Tensor:
    """A contiguous copy ``[..., c, n]`` of ``x`` ``[..., n, c]``."""
    if x.ndim == 2:
        return x.T.contiguous()
    # One after the other: torch copies a transposed stack several times as slowly.
    result = x.new_empty(x.mT.shape)
    for mine, matrix in zip(result, x, strict=True):
        mine.copy_(matrix.T)
    return result


def descend(weight: Tensor, q: QTensor, gram: Tensor, *, block_size: int = 128) -> QTensor:
    """One round of coordinate descent on the codes of ``q``: the error of no output channel rises.

    1. With ``E = Q - W`` and all columns but ``j`` fixed, the error is least where ``q_j - (E H)_j / H_jj`` is; it is a
       parabola, so the nearest code is the best code.
    2. Columns ``i < j`` that moved by ``q_i' - q_i`` before change ``(E H)_j`` by ``(q_i' - q_i) H_ij``.
    3. So this is :func:`sweep` with ``base_j = q_j - (E H)_j / H_jj``, the values of ``q`` as reference, and
       ``coupling_ij = H_ij / H_jj``.

    A channel that was never active, or whose power has no finite reciprocal, keeps its codes. ``weight`` is ``[n, c]``,
    ``gram`` ``[c, c]``, or all are stacks.
    """
    stacked, diagonal = weight.ndim == 3, gram.diagonal(dim1=-2, dim2=-1)
    values = each(affine.dequantize, stacked)(q)
    inverse = torch.where(diagonal >= torch.finfo(gram.dtype).tiny, diagonal.reciprocal(), 0.0)[..., None, :]
    base = values - ((values - weight) @ gram) * inverse
    order = torch.arange(gram.shape[-1], device=gram.device).expand(diagonal.shape)
    moved = sweep(base, values, gram * inverse, q.params, q.scheme, order, block_size=block_size)
    # Rows where rounding errors of the sums ate the gain keep their codes.
    chosen: QTensor = each(better_rows, stacked)(weight, moved, q, gram)[0]
    return chosen


def refit(weight: Tensor, q: QTensor, gram: Tensor) -> QTensor:
    """The best scales for the codes of ``q``, group after group: the error of no output channel rises.

    With strategy ``tensor`` all channels share the scale, and it is their sum that does not rise.

    With ``k = codes - zero_point`` on the group, zero elsewhere, the error is a parabola in the scale ``s``, least at
    ``s - (E H k^T) / (k H k^T)``. A scale that would change its sign, or belongs to zeros, is kept.
    ``weight`` is ``[n, c]``, ``gram`` ``[c, c]``.
    """
    c = weight.shape[1]
    width = q.scheme.group_size or c
    codes = affine.dequantize(QTensor(q.codes, torch.ones_like(q.scale), q.zero_point, q.scheme))
    pull = (affine.dequantize(q) - weight) @ gram
    scales = []
    for g, start in enumerate(range(0, c, width)):
        part = slice(start, start + width)
        k = codes[:, part]
        slope, curve = (pull[:, part] * k).sum(1, keepdim=True), metrics.row_error(k, gram[part, part])[:, None]
        if q.scheme.strategy == "tensor":
            slope, curve = slope.sum(0, keepdim=True), curve.sum(0, keepdim=True)
        old = q.scale[:, g : g + 1]
        new = old - slope / torch.where(curve > 0, curve, 1.0)
        new = torch.where((curve > 0) & (new * old.sign() > 0), new, old)
        scales.append(new)
        pull = pull + ((new - old) * k) @ gram[part]
    fitted = QTensor(q.codes, torch.cat(scales, 1), q.zero_point, q.scheme)
    return better_rows(weight, fitted, q, gram)[0]


def better_rows(weight: Tensor, first: QTensor, second: QTensor, gram: Tensor) -> tuple[QTensor, Tensor, Tensor]:
    """For every output channel the better of two quantized weights.

    Rows add up independently, so the result is at least as good as both. With strategy ``tensor`` the rows share a
    scale: unless both have the same, it is the better of the two as a whole. ``first`` wins where both are equal.

    Returns the chosen weight, which rows came from ``second``, bool ``[n]``, and the errors of both, ``[2, n]``.
    """
    errors = torch.stack([metrics.row_error(affine.dequantize(q) - weight, gram) for q in (first, second)])
    compared = errors
    if first.scheme.strategy == "tensor":
        alike = [a == b for a, b in zip(present(first.params), present(second.params), strict=True)]
        compared = torch.where(torch.stack(alike).all(), errors, errors.sum(1, keepdim=True))
    # What is no number is worse than any.
    compared = compared.nan_to_num(nan=torch.inf, posinf=torch.inf)
    take = compared[1] < compared[0]
    params = affine.select(take[: len(first.scale), None], second.params, first.params)
    codes = torch.where(take[:, None], second.codes, first.codes)
    return QTensor(codes, *params, first.scheme), take, errors


def least(candidates: Tensor, costs: Tensor) -> Tensor:
    """The candidate with the least cost, and the first of equals: ``candidates`` ``[r, ...]``, ``costs`` ``[r]``.

    A cost that is NaN counts as infinite.

    >>> least(torch.tensor([[1., 2.], [3., 4.], [5., 6.]]), torch.tensor([2., 1., 1.]))
    tensor([3., 4.])
    """
    costs = costs.nan_to_num(nan=torch.inf, posinf=torch.inf)
    places = torch.arange(len(costs), device=costs.device)
    return candidates[torch.where(costs == costs.amin(), places, len(costs)).amin()]
