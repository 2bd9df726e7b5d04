"""Steps that reduce the output error ``tr((W - Q) H (W - Q)^T)`` of a quantized weight ``Q``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from quantize.core import affine, metrics
from quantize.core.qtensor import QParams, QTensor, present
from quantize.core.scheme import Scheme

# Columns between two small matmuls inside a block: few enough for the cache, enough to amortize a call.
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
    """Round columns one by one: ``q_j = Q(base_j + sum over i < j of (reference_i - q_i) coupling_ij)``.

    ``base`` and ``reference`` are ``[n, c]``; ``params`` and the result, in ``scheme``, have their layout. Columns are
    rounded in the ``order`` ``[c]``. ``coupling`` ``[c, c]`` is in that order, and only read above its diagonal. All
    tensors may be stacks with a leading axis ``e``.

    GPTQ is this recursion with ``base = reference = W`` and the unit triangular factor of the Gram matrix. Coordinate
    descent has the present values as reference, see :func:`descend`. The sums take one large matmul for each block, a
    small one every 16 columns, and a matrix-vector product. ``block_size`` only changes the order of additions.

    >>> weight, params = torch.tensor([[0.4, 0.4]]), QParams(torch.ones(1, 1))
    >>> sweep(weight, weight, torch.ones(2, 2), params, Scheme(bits=4), torch.arange(2)).codes.tolist()
    [[0, 1]]
    """
    c, stacked = coupling.shape[-1], base.ndim == 3
    add = torch.baddbmm if stacked else torch.addmm
    groups = order // (scheme.group_size or c)
    # A column of the transposed matrix is contiguous.
    base_t, incoming = take_rows(transposed(base), order), transposed(coupling)
    reference_t = base_t if reference is base else take_rows(transposed(reference), order)
    scale_t, zero_t = transposed(params.scale), None if params.zero_point is None else transposed(params.zero_point)
    codes, steps, value = torch.empty_like(base_t), torch.empty_like(base_t), torch.empty_like(base_t[..., 0, :])
    for start in range(0, c, block_size):
        stop = min(start + block_size, c)
        scale = take_rows(scale_t, groups[..., start:stop])
        lows: Sequence[Any] = [scheme.qmin] * c
        highs: Sequence[Any] = [scheme.qmax] * c
        if zero_t is not None:
            zero = take_rows(zero_t, groups[..., start:stop]).to(scale.dtype)
            lows, highs = (scheme.qmin - zero).unbind(-2), (scheme.qmax - zero).unbind(-2)
        # Views are made once: slicing a tensor takes as long as the arithmetic on a column.
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
    return QTensor(transposed(take_rows(codes.to(torch.int8), back)), params.scale, params.zero_point, scheme)


def factor(gram: Tensor, damp: float) -> tuple[Tensor, Tensor, Tensor]:
    """``H + damp * mean(diag H) * I = U diag(d) U^T``: ``U`` ``[c, c]`` unit upper triangular, ``d`` ``[c]``, ``damp``.

    ``H`` is ``gram`` ``[c, c]``, or a stack ``[e, c, c]`` with a damping for each. While the factorization fails,
    ``damp`` grows tenfold, from at least 1e-6, at most until the diagonal dominates. Its final value ``[]`` is
    returned. Channels of zeros have no coupling, and a pivot of 1 plus the damping.

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
    # Divided before the sum, which could overflow.
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


def mapped(function: Callable[..., Any], stacked: bool) -> Callable[..., Any]:
    """``function``, or where ``stacked``, the function that maps it over the leading axis of its arguments.

    >>> mapped(torch.sum, True)(torch.ones(2, 3))
    tensor([3., 3.])
    """
    return torch.func.vmap(function) if stacked else function


def take_rows(rows: Tensor, places: Tensor) -> Tensor:
    """The rows of ``rows`` ``[c, n]`` at ``places`` ``[r]``: ``[r, n]``. In stacks, ``[e, c, n]`` and ``[e, r]``.

    >>> take_rows(torch.tensor([[1, 2], [3, 4]]), torch.tensor([1, 0, 1])).tolist()
    [[3, 4], [1, 2], [3, 4]]
    """
    return rows[places] if rows.ndim == 2 else rows[torch.arange(len(rows), device=rows.device)[:, None], places]


def transposed(x: Tensor) -> Tensor:
    """A contiguous copy ``[c, n]`` of ``x`` ``[n, c]``, or of a stack.

    >>> transposed(torch.tensor([[1, 2]])).tolist()
    [[1], [2]]
    """
    if x.ndim == 2:
        return x.T.contiguous()
    # One after the other: torch copies a transposed stack several times more slowly.
    result = x.new_empty(x.mT.shape)
    for mine, matrix in zip(result, x, strict=True):
        mine.copy_(matrix.T)
    return result


def descend(weight: Tensor, q: QTensor, gram: Tensor, *, block_size: int = 128) -> QTensor:
    """One round of coordinate descent on the codes of ``q``, which increases the error of no output channel.

    ``weight`` is ``[n, c]`` and ``gram`` ``[c, c]``, or all are stacks. ``block_size`` is as for :func:`sweep`.

    1. Let ``E = Q - W``. With all columns but ``j`` fixed, the error is a parabola with its minimum at
       ``q_j - (E H)_j / H_jj``, so the nearest code is the best one.
    2. A column ``i < j`` that has moved by ``q_i' - q_i`` changes ``(E H)_j`` by ``(q_i' - q_i) H_ij``.
    3. So this is :func:`sweep` with ``base_j = q_j - (E H)_j / H_jj``, the values of ``q`` as reference, and
       ``coupling_ij = H_ij / H_jj``. Channels whose ``H_jj`` has no finite reciprocal keep their codes.

    >>> q = QTensor(torch.zeros(1, 2, dtype=torch.int8), torch.ones(1, 1), None, Scheme(bits=4))
    >>> descend(torch.tensor([[0.6, 0.4]]), q, torch.eye(2)).codes.tolist()
    [[1, 0]]
    """
    stacked, diagonal = weight.ndim == 3, gram.diagonal(dim1=-2, dim2=-1)
    values = mapped(affine.dequantize, stacked)(q)
    inverse = torch.where(diagonal >= torch.finfo(gram.dtype).tiny, diagonal.reciprocal(), 0.0)[..., None, :]
    base = values - ((values - weight) @ gram) * inverse
    order = torch.arange(gram.shape[-1], device=gram.device).expand(diagonal.shape)
    moved = sweep(base, values, gram * inverse, q.params, q.scheme, order, block_size=block_size)
    # Rows where rounding errors exceed the gain keep their codes.
    chosen: QTensor = mapped(better_rows, stacked)(weight, moved, q, gram)[0]
    return chosen


def refit(weight: Tensor, q: QTensor, gram: Tensor) -> QTensor:
    """The best scales for the codes of ``q``, one group after the other; increases the error of no output channel.

    ``weight`` is ``[n, c]`` and ``gram`` ``[c, c]``. With strategy ``tensor``, the sum over the channels does not
    increase. Let ``k = codes - zero_point`` on a group, and 0 elsewhere. The error is a parabola in the scale ``s``,
    with its minimum at ``s - (E H k^T) / (k H k^T)``. A scale stays if it would change its sign, or if ``k`` is 0.

    >>> q = QTensor(torch.tensor([[1, 2]], dtype=torch.int8), torch.ones(1, 1), None, Scheme(bits=4))
    >>> refit(torch.tensor([[2.0, 4.0]]), q, torch.eye(2)).scale
    tensor([[2.]])
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
    """The better of two quantizations of ``weight`` ``[n, c]`` for every output channel, by ``gram`` ``[c, c]``.

    The errors of rows add up, so the result is at least as good as both. With strategy ``tensor`` and different scales,
    one of them is taken as a whole. ``first`` wins where both are equal.

    Returns the chosen weight, bool ``[n]`` for the rows of ``second``, and the errors of both, ``[2, n]``.

    >>> first, second = (affine.round_to_nearest(x, Scheme()) for x in (torch.zeros(1, 2), torch.ones(1, 2)))
    >>> better_rows(torch.ones(1, 2), first, second, torch.eye(2))[1]
    tensor([True])
    """
    errors = torch.stack([metrics.row_error(affine.dequantize(q) - weight, gram) for q in (first, second)])
    compared = errors
    if first.scheme.strategy == "tensor":
        alike = [a == b for a, b in zip(present(first.params), present(second.params), strict=True)]
        compared = torch.where(torch.stack(alike).all(), errors, errors.sum(1, keepdim=True))
    # NaN compares as infinite.
    compared = compared.nan_to_num(nan=torch.inf, posinf=torch.inf)
    take = compared[1] < compared[0]
    params = affine.select(take[: len(first.scale), None], second.params, first.params)
    codes = torch.where(take[:, None], second.codes, first.codes)
    return QTensor(codes, *params, first.scheme), take, errors


def least(candidates: Tensor, costs: Tensor) -> Tensor:
    """The first of ``candidates`` ``[r, ...]`` with the least of ``costs`` ``[r]``; NaN counts as infinite.

    >>> least(torch.tensor([[1., 2.], [3., 4.], [5., 6.]]), torch.tensor([2., 1., 1.]))
    tensor([3., 4.])
    """
    costs = costs.nan_to_num(nan=torch.inf, posinf=torch.inf)
    places = torch.arange(len(costs), device=costs.device)
    return candidates[torch.where(costs == costs.amin(), places, len(costs)).amin()]
