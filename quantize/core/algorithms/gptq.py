"""Quantize column by column, and let the columns that follow make up for the error of those before.

Source: Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
equations 2 and 3 and algorithm 1. The recursion here is the equivalent LDL form of Chee et al. 2023, "QuIP: 2-Bit
Quantization of Large Language Models With Guarantees", section 3 and theorem 6: one factorization and no inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from quantize.core import affine, correction, input_loss, linear, observers, ranges, refine, shrinkage
from quantize.core.algorithms.contract import FEWEST_FOR_GRAM, Algorithm, BaseOptions, LayerSpec, Solution, option
from quantize.core.qtensor import QParams, present

QUANTIZES_INPUTS = frozenset({False, True})


@dataclass(frozen=True)
class Options(BaseOptions):
    """The paper's algorithm, and switches for what improves on it in the same deployed format.

    - ``act_order``: quantize channels with large inputs first.
    - ``damp``: part of the mean diagonal of the Gram matrix that is added to its diagonal.
    - ``block_size``: columns between two large matmuls; a matter of speed alone.
    - ``search_range``: clip ranges by a search, weighted by the pivots of the factorization.
    - ``signed_scale``: symmetric scales may be negative, see :func:`~quantize.core.ranges.search`. Without effect on
      layers with quantized inputs: not every kernel for those takes such a scale.
    - ``shrink``: the strength with which correlations are shrunk as far as chance explains them, see
      :func:`~quantize.core.shrinkage.intensity`; 0 leaves them as they are. Measured on text, 4 is best.
    - ``sweeps``: rounds of coordinate descent on the codes, and of refitted scales, after the pass.
    - ``guard``: for every output channel, keep plain rounding where it is better.
    - ``asymmetric``: the fraction of the upstream error that each layer compensates, with a paired statistic, see
      :func:`~quantize.core.correction.corrected`; 0 compensates none. Measured on text, 0.5 is best, and with it
      fitting layers in the order of execution is better than one pass, without it not.
    """

    act_order: bool = option(True, "True or False")
    damp: float = option(0.01, "a number from 0 to 1", lambda value: 0 <= value <= 1)
    block_size: int = option(128, "an int, at least 1", lambda value: value >= 1)
    search_range: bool = option(True, "True or False")
    shrink: float = option(4.0, "a number from 0 to 1e6", lambda value: 0 <= value <= 1e6)
    signed_scale: bool = option(True, "True or False")
    sweeps: int = option(0, "an int, at least 0", lambda value: value >= 0)
    guard: bool = option(True, "True or False")
    asymmetric: float = option(0.5, "a number from 0 to 1", lambda value: 0 <= value <= 1)


PAPER = Options(act_order=False, search_range=False, shrink=0.0, sweeps=0, guard=False, asymmetric=0.0)
"""The paper's algorithm 1, to the last code, with the scales of groups fixed before the pass.

Channels that were zero in all tokens are rounded; the authors' code sets them to zero, which the outputs on these
tokens cannot tell apart.
"""


def algorithm(spec: LayerSpec, options: Options = Options()) -> Algorithm:
    """GPTQ; remembers the Gram matrix of the inputs, and to correct, what they lack of the float model's.

    With quantized inputs it remembers their ranges, too.
    """
    observer, paired = observers.gram, observers.paired_gram
    if spec.inputs is not None:
        observer, paired = (observers.product(observers.channel_range, each) for each in (observer, paired))
    return Algorithm(
        observer,
        partial(solve, spec, options),
        fewest=FEWEST_FOR_GRAM,
        paired=paired if options.asymmetric > 0 else None,
        together=partial(solve_together, spec, options),
        stack=partial(solve_stack, spec, options),
    )


Statistic = observers.SumState | observers.PairedState


def solve(
    spec: LayerSpec,
    options: Options,
    weight: Tensor,
    statistic: Statistic | input_loss.Statistic,
    smoothing: Tensor | None = None,
) -> Solution:
    """Quantize ``weight`` ``[n, c]`` for inputs with the Gram matrix ``total`` ``[c, c]``.

    With ``U`` and ``d`` of :func:`~quantize.core.refine.factor`, in the order of processing, column ``j`` becomes
    ``q_j = Q(w_j + sum over i < j of (w_i - q_i) U_ij)``. Then ``(w - q) H (w - q)^T = sum of d_j r_j^2``, with ``r``
    the rounding errors: each is as small as it can be when its column is reached. So the pivots ``d`` are also what
    the search of the ranges weighs errors with.

    A paired statistic moves the weight first, see :func:`~quantize.core.correction.corrected`; errors are then those
    against the moved weight, also the one of plain rounding, which rounds ``weight`` itself. With quantized inputs, the
    weight is fitted to the rounded inputs, divided by ``smoothing`` ``[c]`` if given, see
    :func:`~quantize.core.input_loss.met`.

    Never fails on finite arguments. Notes: ``damp``, as large as the factorization needed it; ``dead_channels``;
    ``kept_rounding``, output channels that the guard gave back; ``corrected``, the relative change of the weight.
    """
    return solve_together(spec, options, [weight], statistic, smoothing)[0]


def solve_together(
    spec: LayerSpec,
    options: Options,
    weights: Sequence[Tensor],
    statistic: Statistic | input_loss.Statistic,
    smoothing: Tensor | None = None,
) -> list[Solution]:
    """:func:`solve` for several weights ``[n_i, c]`` of one dtype that read the same inputs: one factorization.

    Rows are independent, so the weights are put one below the other; with strategy ``tensor`` each has its own scale.
    """
    met, finished = _met(spec, statistic, smoothing, stacked=False)
    prepared = _prepare(options, met)
    if spec.weight.strategy == "tensor":
        solutions = [_solve(spec, options, weight, met, prepared, smoothing)[0] for weight in weights]
    else:
        heights = [len(weight) for weight in weights]
        solutions = _solve(spec, options, torch.cat(list(weights)), met, prepared, smoothing, heights)
    return [finished(solution, weight) for solution, weight in zip(solutions, weights, strict=True)]


def solve_stack(
    spec: LayerSpec,
    options: Options,
    weights: Tensor,
    statistics: Statistic | input_loss.Statistic,
    smoothing: Tensor | None = None,
) -> Solution:
    """:func:`solve` for every weight of a stack ``[e, n, c]`` at once, as the experts of a mixture are.

    The tensors of ``statistics``, ``smoothing`` and the solution have the leading axis as well. What is added in
    another order than by :func:`solve` differs by roundings.
    """
    met, finished = _met(spec, statistics, smoothing, stacked=True)
    return finished(_solve(spec, options, weights, met, _prepare(options, met), smoothing)[0], weights)


def _met(
    spec: LayerSpec, statistic: Statistic | input_loss.Statistic, smoothing: Tensor | None, *, stacked: bool
) -> tuple[Statistic, Callable[[Solution, Tensor], Solution]]:
    """The statistic of what a layer meets, and how to say in the solution of a weight what happens to the inputs."""
    if isinstance(statistic, observers.SumState | observers.PairedState):
        if spec.inputs is not None:
            raise ValueError("statistic: without ranges; accepted: that of algorithm(spec), with quantized inputs")
        return statistic, lambda solution, weight: solution
    assert spec.inputs is not None
    inputs, given = spec.inputs, () if smoothing is None else (smoothing,)
    static = None
    if inputs.strategy == "tensor":

        def params(low: Tensor, high: Tensor, smoothing: Tensor | None = None) -> tuple[Tensor, ...]:
            return present(linear.static_params(low, high, inputs, smoothing=smoothing))

        static = QParams(*refine.each(params, stacked)(*statistic[0], *given))

    def finished(solution: Solution, weight: Tensor) -> Solution:
        wide = weight.to(affine.working_dtype(weight))
        notes = refine.each(partial(input_loss.loss_notes, inputs), stacked)(
            wide, statistic[0], observers.single(statistic[1]), *given
        )
        return replace(solution, inputs=inputs, smoothing=smoothing, static=static, notes={**solution.notes, **notes})

    return refine.each(partial(input_loss.met, inputs), stacked)(statistic, *given), finished


class _Prepared(NamedTuple):
    """What depends on the inputs alone; of a stack, with a leading axis."""

    order: Tensor
    upper: Tensor
    pivots: Tensor
    notes: dict[str, Tensor]


def _prepare(options: Options, statistic: Statistic) -> _Prepared:
    sums = observers.single(statistic)
    gram, stacked = sums.total, sums.total.ndim == 3
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    trusted = gram
    if options.shrink:
        trusted = refine.each(lambda s: shrinkage.shrink(s.total, shrinkage.intensity(s, options.shrink)), stacked)(
            sums
        )
    order = torch.arange(gram.shape[-1], device=gram.device).expand(diagonal.shape)
    if options.act_order:
        order = torch.argsort(diagonal, dim=-1, descending=True, stable=True)
    # Rows, and then columns as the rows of the transposed matrix.
    trusted = refine.picked(refine.transposed(refine.picked(trusted, order)), order).mT
    upper, pivots, damp = refine.factor(trusted, options.damp)
    pivots = pivots.gather(-1, torch.argsort(order, dim=-1)).masked_fill(diagonal == 0, 0.0)
    return _Prepared(order, upper, pivots, {"damp": damp, "dead_channels": (diagonal == 0).sum(-1)})


def _solve(
    spec: LayerSpec,
    options: Options,
    weight: Tensor,
    statistic: Statistic,
    prepared: _Prepared,
    smoothing: Tensor | None,
    heights: Sequence[int] | None = None,
) -> list[Solution]:
    """The solutions of a weight ``[n, c]`` that is put together of some with ``heights`` rows; or one, of a stack."""
    stacked, gram = weight.ndim == 3, observers.single(statistic).total
    wide = weight.to(affine.working_dtype(weight))
    wide = target = wide if smoothing is None else wide * smoothing[..., None, :]
    if isinstance(statistic, observers.PairedState):
        target = refine.each(partial(correction.corrected, strength=options.asymmetric), stacked)(wide, statistic)
    rounded = refine.each(partial(affine.round_to_nearest, scheme=spec.weight), stacked)(wide)
    # Without a step, the search gives the full ranges.
    steps, signed = 20 if options.search_range else 0, options.signed_scale and spec.inputs is None
    params = ranges.search(target, spec.weight, prepared.pivots, steps=steps, signed=signed)
    q = refine.sweep(target, target, prepared.upper, params, spec.weight, prepared.order, block_size=options.block_size)
    for _ in range(options.sweeps):
        q = refine.each(refine.refit, stacked)(
            target, refine.descend(target, q, gram, block_size=options.block_size), gram
        )
    chosen, give_back, errors = refine.each(refine.better_rows, stacked)(target, q, rounded, gram)
    mine, baseline = errors.unbind(-2)
    if options.guard:
        q, mine = chosen, torch.where(give_back, baseline, mine)
    solutions, first = [], 0
    for height in heights or [weight.shape[-2]]:
        rows = slice(first, first + height)
        first = rows.stop
        notes = {**prepared.notes, "kept_rounding": (give_back[..., rows] & options.guard).sum(-1)}
        if isinstance(statistic, observers.PairedState):
            size, change = (t[..., rows, :].norm(dim=(-2, -1)) for t in (wide, target - wide))
            notes["corrected"] = change / torch.where(size > 0, size, 1.0)
        part = q if heights is None else q.rows(rows)
        solutions.append(
            Solution(part, error=mine[..., rows].sum(-1), baseline_error=baseline[..., rows].sum(-1), notes=notes)
        )
    return solutions
