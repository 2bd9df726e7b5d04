"""Quantize column by column, and let the columns that follow make up for the error of those before.

Source: Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
equations 2 and 3 and algorithm 1. The recursion here is the equivalent LDL form of Chee et al. 2023, "QuIP: 2-Bit
Quantization of Large Language Models With Guarantees", section 3 and theorem 6: one factorization and no inverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quantize.core import affine, observers, ranges, refine, shrinkage
from quantize.core.algorithms.base import FEWEST_FOR_GRAM, Algorithm, BaseOptions, LayerSpec, Solution, option

QUANTIZES_INPUTS = frozenset({False})


@dataclass(frozen=True)
class Options(BaseOptions):
    """The paper's algorithm, and switches for what improves on it in the same deployed format.

    - ``act_order``: quantize channels with large inputs first.
    - ``damp``: part of the mean diagonal of the Gram matrix that is added to its diagonal.
    - ``block_size``: columns between two large matmuls; a matter of speed alone.
    - ``search_range``: clip ranges by a search, weighted by the diagonal of the Gram matrix.
    - ``shrink``: the strength with which correlations are shrunk as far as chance explains them, see
      :func:`~quantize.core.shrinkage.intensity`; 0 leaves them as they are. Measured on text, 4 is best.
    - ``sweeps``: rounds of coordinate descent on the codes, and of refitted scales, after the pass.
    - ``guard``: for every output channel, keep plain rounding where it is better.
    - ``asymmetric``: the fraction of the upstream error that each layer compensates, with a paired statistic: see
      :func:`corrected`; 0 compensates none. Measured on text, 0.5 is best, and with it fitting layers in the order of
      execution is better than one pass, without it not.
    """

    act_order: bool = option(True, "True or False")
    damp: float = option(0.01, "a number from 0 to 1", lambda value: 0 <= value <= 1)
    block_size: int = option(128, "an int, at least 1", lambda value: value >= 1)
    search_range: bool = option(True, "True or False")
    shrink: float = option(4.0, "a number from 0 to 1e6", lambda value: 0 <= value <= 1e6)
    sweeps: int = option(0, "an int, at least 0", lambda value: value >= 0)
    guard: bool = option(True, "True or False")
    asymmetric: float = option(0.5, "a number from 0 to 1", lambda value: 0 <= value <= 1)


# Ascend.
_WITHOUT_CHOLESKY = frozenset({"npu"})

PAPER = Options(act_order=False, search_range=False, shrink=0.0, sweeps=0, guard=False, asymmetric=0.0)
"""The paper's algorithm 1, to the last code, with the scales of groups fixed before the pass.

Channels that were zero in all tokens are rounded; the authors' code sets them to zero, which the outputs on these
tokens cannot tell apart.
"""


def algorithm(spec: LayerSpec, options: Options = Options()) -> Algorithm:
    """GPTQ; remembers the Gram matrix of the inputs, and to correct, what they lack of the float model's."""
    paired = observers.paired_gram if options.asymmetric > 0 else None
    bound, together = partial(solve, spec, options), partial(solve_together, spec, options)
    return Algorithm(observers.gram, bound, fewest=FEWEST_FOR_GRAM, paired=paired, together=together)


def factor(gram: Tensor, damp: float) -> tuple[Tensor, Tensor, float]:
    """``H + damp * mean(diag H) * I = U diag(d) U^T``: ``U`` ``[c, c]`` unit upper triangular, ``d`` ``[c]``, ``damp``.

    ``H`` is ``gram`` ``[c, c]``. Where the factorization fails, ``damp`` grows to ten times itself, from at least
    1e-6, until it succeeds: at the latest when the diagonal dominates. The one that did is returned. Zero channels
    have no coupling, and a pivot of 1 above the damping.

    Raises:
        ValueError: ``gram`` is not finite.

    1. With ``J`` the reversal of order, ``J (H + ...) J = L L^T`` by Cholesky.
    2. ``J L J`` is upper triangular; its diagonal taken out of the columns leaves ``U``, its square is ``d``.

    >>> upper, pivots, _ = factor(torch.tensor([[5., 2.], [2., 1.]]), 0.0)
    >>> upper, pivots
    (tensor([[1., 2.],
            [0., 1.]]), tensor([1., 1.]))
    """
    diagonal = gram.diagonal()
    # Divided first: the sum of large diagonals would overflow.
    mean = (diagonal / len(gram)).sum()
    dead = (diagonal == 0).to(gram.dtype)
    while True:
        lower, failed = _cholesky((gram + torch.diag(damp * mean + dead)).flip(0, 1))
        if not failed and bool(torch.isfinite(lower).all()):
            break
        if damp > 1e30:
            raise ValueError("gram: NaN or inf; accepted: a finite symmetric matrix")
        damp = max(10 * damp, 1e-6)
    upper = lower.flip(0, 1)
    root = upper.diagonal()
    return upper / root, root.square(), damp


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
    lower, _ = _cholesky(gram * unit * unit[:, None] + torch.diag(ridge))
    pull = (weight @ cross * unit).T
    return weight + strength * (_cholesky_solve(pull, lower) * unit[:, None]).T


def _cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    # On the CPU for devices that have no such operator: the one step of any algorithm that asks for more than matmuls.
    lower, failed = torch.linalg.cholesky_ex(_able(matrix))
    return lower.to(matrix.device), failed


def _cholesky_solve(right: Tensor, lower: Tensor) -> Tensor:
    return torch.cholesky_solve(_able(right), _able(lower)).to(right.device)


def _able(matrix: Tensor) -> Tensor:
    return matrix.cpu() if matrix.device.type in _WITHOUT_CHOLESKY else matrix


def solve(
    spec: LayerSpec, options: Options, weight: Tensor, statistic: observers.SumState | observers.PairedState
) -> Solution:
    """Quantize ``weight`` ``[n, c]`` for inputs with the Gram matrix ``total`` ``[c, c]``.

    With ``U`` and ``d`` of :func:`factor`, in the order of processing, column ``j`` becomes
    ``q_j = Q(w_j + sum over i < j of (w_i - q_i) U_ij)``. Then ``(w - q) H (w - q)^T = sum of d_j r_j^2``, with ``r``
    the rounding errors: each is as small as it can be when its column is reached.

    A paired statistic moves the weight first, see :func:`corrected`; errors are then those against the moved weight,
    also the one of plain rounding, which rounds ``weight`` itself.

    Never fails on finite arguments. Notes: ``damp``, as large as the factorization needed it; ``dead_channels``;
    ``kept_rounding``, output channels that the guard gave back; ``corrected``, by which part of itself it moved.
    """
    return solve_together(spec, options, [weight], statistic)[0]


def solve_together(
    spec: LayerSpec,
    options: Options,
    weights: Sequence[Tensor],
    statistic: observers.SumState | observers.PairedState,
) -> list[Solution]:
    """:func:`solve` for several weights ``[n_i, c]`` of one dtype that read the same inputs: one factorization.

    Rows are independent, so the weights are stacked; with strategy ``tensor`` each has a scale of its own.
    """
    single = statistic.gram if isinstance(statistic, observers.PairedState) else statistic
    gram = single.total
    trusted = shrinkage.shrink(gram, shrinkage.intensity(single, options.shrink)) if options.shrink else gram
    order = torch.arange(len(gram), device=gram.device)
    if options.act_order:
        order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    upper, _, damp = factor(trusted[order][:, order], options.damp)
    shared = {
        "damp": torch.as_tensor(damp, dtype=gram.dtype, device=gram.device),
        "dead_channels": (gram.diagonal() == 0).sum(),
    }
    apart = spec.weight.strategy == "tensor"
    solutions = []
    for stack in [[weight] for weight in weights] if apart else [weights]:
        wide = target = torch.cat([weight.to(affine.working_dtype(weight)) for weight in stack])
        if isinstance(statistic, observers.PairedState):
            target = corrected(wide, statistic, options.asymmetric)
        rounded = affine.round_to_nearest(wide, spec.weight)
        params = ranges.search(target, spec.weight, gram.diagonal(), steps=40 if options.search_range else 1)
        q = refine.sweep(target, target, upper, params, spec.weight, order, block_size=options.block_size)
        for _ in range(options.sweeps):
            q = refine.refit(target, refine.descend(target, q, gram, block_size=options.block_size), gram)
        chosen, give_back, (mine, baseline) = refine.better_rows(target, q, rounded, gram)
        if options.guard:
            q, mine = chosen, torch.where(give_back, baseline, mine)
        first = 0
        for weight in stack:
            rows = slice(first, first + len(weight))
            first = rows.stop
            notes = {**shared, "kept_rounding": (give_back[rows] & options.guard).sum()}
            if isinstance(statistic, observers.PairedState):
                size = wide[rows].norm()
                notes["corrected"] = (target[rows] - wide[rows]).norm() / torch.where(size > 0, size, 1.0)
            errors = mine[rows].sum(), baseline[rows].sum()
            solutions.append(Solution(q.rows(rows), error=errors[0], baseline_error=errors[1], notes=notes))
    return solutions
