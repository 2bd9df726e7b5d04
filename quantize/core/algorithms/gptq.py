"""Quantize column by column; each column compensates the rounding errors of the columns before it.

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
    """The paper's algorithm, and improvements in the same deployed format. In brackets: default; accepted values.

    - ``act_order`` (True): quantize channels with large inputs first.
    - ``damp`` (0.01; a number from 0 to 1): this fraction of the Gram matrix's mean diagonal is added to its diagonal.
    - ``block_size`` (128; an int, at least 1): columns between two large matmuls. It affects the speed only.
    - ``search_range`` (True): search clipping ranges, weighted by the pivots of the factorization.
    - ``signed_scale`` (True): allow negative symmetric scales (:func:`~quantize.core.ranges.search`). Ignored with
      quantized inputs, because some of their kernels cannot use such scales.
    - ``shrink`` (4.0; a number from 0 to 1e6): strength of :func:`~quantize.core.shrinkage.intensity`; 4 suits text.
    - ``sweeps`` (0; an int, at least 0): rounds of coordinate descent on the codes and refitted scales, at the end.
    - ``guard`` (True): keep plain rounding for the output channels where it is better.
    - ``asymmetric`` (0.5; a number from 0 to 1): fraction of the upstream error that each layer compensates, with a
      paired statistic (:func:`~quantize.core.correction.corrected`). 0.5 suits text; 0 needs no paired statistic.

    >>> Options(damp=0.1).block_size
    128
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
"""The paper's algorithm 1, with the scales of groups fixed before the pass. Dead channels are rounded, not zeroed."""


def algorithm(spec: LayerSpec, options: Options = Options()) -> Algorithm:
    """GPTQ for the format ``spec``, with ``options``.

    Its statistic is the Gram matrix of the inputs, or the paired one, and for quantized inputs also their ranges.

    >>> from quantize.core import Scheme
    >>> algorithm(LayerSpec(Scheme(bits=4)), PAPER).paired is None
    True
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
Observed = Statistic | input_loss.Statistic  # With quantized inputs, the ranges of the channels come first.


def solve(
    spec: LayerSpec, options: Options, weight: Tensor, statistic: Observed, smoothing: Tensor | None = None
) -> Solution:
    """Quantize ``weight`` ``[n, c]``; ``statistic`` is the Gram matrix ``H`` ``[c, c]`` of the inputs, or a paired one.

    ``spec`` and ``options`` are those of :func:`algorithm`. In the order of processing, column ``j`` becomes
    ``q_j = Q(w_j + sum over i < j of (w_i - q_i) U_ij)`` with ``U`` and ``d`` of :func:`~quantize.core.refine.factor`.
    Then ``(w - q) H (w - q)^T = sum of d_j r_j^2`` with rounding errors ``r``; the range search weighs them by ``d``.

    A paired statistic moves the weight first, see :func:`~quantize.core.correction.corrected`. All errors are then
    measured from the moved weight; plain rounding still rounds ``weight`` itself. For quantized inputs, the weight is
    fitted to the rounded inputs, divided by ``smoothing`` ``[c]`` if given; see
    :func:`~quantize.core.input_loss.rounded_statistic`.

    Notes: ``damp``, the damping that the factorization needed; ``dead_channels``; ``kept_rounding``, the number of
    output channels with plain rounding; ``corrected``, the relative change of the weight.

    Raises:
        ValueError: a statistic that is not finite, or that lacks the ranges of quantized inputs.

    >>> from quantize.core import Scheme
    >>> statistic = observers.SumState(torch.eye(2), torch.tensor(16))
    >>> solve(LayerSpec(Scheme(4)), PAPER, torch.tensor([[7.0, 2.4]]), statistic).weight.codes.tolist()
    [[7, 2]]
    """
    return solve_together(spec, options, [weight], statistic, smoothing)[0]


def solve_together(
    spec: LayerSpec, options: Options, weights: Sequence[Tensor], statistic: Observed, smoothing: Tensor | None = None
) -> list[Solution]:
    """:func:`solve` for several ``weights`` ``[n, c]`` of one dtype that read the same inputs: one factorization.

    Rows are independent, so the weights are concatenated, unless the strategy is ``tensor``. ``spec``, ``options``,
    ``statistic`` and ``smoothing`` are as for :func:`solve`.

    >>> from quantize.core import Scheme
    >>> weight, statistic = torch.ones(1, 2), observers.SumState(torch.eye(2), torch.tensor(16))
    >>> len(solve_together(LayerSpec(Scheme()), Options(), [weight, weight], statistic))
    2
    """
    effective, finished = _after_rounding(spec, statistic, smoothing, stacked=False)
    prepared = _prepare(options, effective)
    if spec.weight.strategy == "tensor":
        solutions = [_solve(spec, options, weight, effective, prepared, smoothing)[0] for weight in weights]
    else:
        heights = [len(weight) for weight in weights]
        solutions = _solve(spec, options, torch.cat(list(weights)), effective, prepared, smoothing, heights)
    return [finished(solution, weight) for solution, weight in zip(solutions, weights, strict=True)]


def solve_stack(
    spec: LayerSpec, options: Options, weights: Tensor, statistics: Observed, smoothing: Tensor | None = None
) -> Solution:
    """:func:`solve` for a stack of ``weights`` ``[e, n, c]``, such as the experts of a mixture, in one call.

    ``spec`` and ``options`` are those of :func:`algorithm`. ``smoothing`` is ``[e, c]``. The tensors of ``statistics``
    and of the result also have the leading axis ``e``. Sums in another order differ from :func:`solve` by rounding.

    >>> from quantize.core import Scheme
    >>> statistics = observers.SumState(torch.eye(2)[None], torch.tensor([16]))
    >>> solve_stack(LayerSpec(Scheme(4)), PAPER, torch.tensor([[[7.0, 2.4]]]), statistics).weight.codes.tolist()
    [[[7, 2]]]
    """
    effective, finished = _after_rounding(spec, statistics, smoothing, stacked=True)
    return finished(_solve(spec, options, weights, effective, _prepare(options, effective), smoothing)[0], weights)


def _after_rounding(
    spec: LayerSpec, statistic: Observed, smoothing: Tensor | None, *, stacked: bool
) -> tuple[Statistic, Callable[[Solution, Tensor], Solution]]:
    """The statistic of the inputs after smoothing and rounding, and a function that adds those to a solution."""
    if isinstance(statistic, observers.SumState | observers.PairedState):
        if spec.inputs is not None:
            raise ValueError("statistic: without the ranges of the inputs; accepted: one of algorithm(spec).observer")
        return statistic, lambda solution, weight: solution
    assert spec.inputs is not None
    inputs, given = spec.inputs, () if smoothing is None else (smoothing,)
    static = None
    if inputs.strategy == "tensor":

        def params(low: Tensor, high: Tensor, smoothing: Tensor | None = None) -> tuple[Tensor, ...]:
            return present(linear.static_params(low, high, inputs, smoothing=smoothing))

        static = QParams(*refine.mapped(params, stacked)(*statistic[0], *given))

    def finished(solution: Solution, weight: Tensor) -> Solution:
        wide = weight.to(affine.working_dtype(weight))
        notes = refine.mapped(partial(input_loss.loss_notes, inputs), stacked)(
            wide, statistic[0], observers.single(statistic[1]), *given
        )
        return replace(solution, inputs=inputs, smoothing=smoothing, static=static, notes={**solution.notes, **notes})

    return refine.mapped(partial(input_loss.rounded_statistic, inputs), stacked)(statistic, *given), finished


class _Prepared(NamedTuple):
    """The results that depend on the inputs only; for a stack, with a leading axis."""

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
        trusted = refine.mapped(lambda s: shrinkage.shrink(s.total, shrinkage.intensity(s, options.shrink)), stacked)(
            sums
        )
    order = torch.arange(gram.shape[-1], device=gram.device).expand(diagonal.shape)
    if options.act_order:
        order = torch.argsort(diagonal, dim=-1, descending=True, stable=True)
    # Rows, and then columns as the rows of the transposed matrix.
    trusted = refine.take_rows(refine.transposed(refine.take_rows(trusted, order)), order).mT
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
    """The solutions of weights with ``heights`` rows, concatenated to ``[n, c]``; without ``heights``, a single one."""
    stacked, gram = weight.ndim == 3, observers.single(statistic).total
    wide = weight.to(affine.working_dtype(weight))
    wide = target = wide if smoothing is None else wide * smoothing[..., None, :]
    if isinstance(statistic, observers.PairedState):
        target = refine.mapped(partial(correction.corrected, strength=options.asymmetric), stacked)(wide, statistic)
    rounded = refine.mapped(partial(affine.round_to_nearest, scheme=spec.weight), stacked)(wide)
    # With no steps, the search returns the full ranges.
    steps, signed = 20 if options.search_range else 0, options.signed_scale and spec.inputs is None
    params = ranges.search(target, spec.weight, prepared.pivots, steps=steps, signed=signed)
    q = refine.sweep(target, target, prepared.upper, params, spec.weight, prepared.order, block_size=options.block_size)
    for _ in range(options.sweeps):
        q = refine.mapped(refine.refit, stacked)(
            target, refine.descend(target, q, gram, block_size=options.block_size), gram
        )
    chosen, give_back, errors = refine.mapped(refine.better_rows, stacked)(target, q, rounded, gram)
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
