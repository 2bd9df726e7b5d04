"""Scale up the weights that meet large inputs, so that their rounding errors shrink where it matters.

Source: Lin et al. 2024, "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration",
section 3.2, equations 4 and 5. The loss here is exact and comes from the Gram matrix: no inputs are kept, and the
layer is not run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantize.core import affine, input_loss, linear, metrics, observers, ranges, refine, shrinkage
from quantize.core.algorithms.contract import FEWEST_FOR_GRAM, Algorithm, BaseOptions, LayerSpec, Solution, option, tied
from quantize.core.qtensor import QTensor

QUANTIZES_INPUTS = frozenset({False, True})

# The mean magnitudes of the input channels, their Gram matrix, and with quantized inputs their ranges.
Statistic = tuple[Any, ...]


@dataclass(frozen=True)
class Options(BaseOptions):
    """The paper's search, and what improves on it in the same deployed format.

    - ``grids_num``: how many exponents ``i / grids_num`` from 0 are tried.
    - ``clip``: with each of them, search the clipping ranges of the scaled weight as well, and keep those of the output
      channels that gain.
    - ``signed_scale``: symmetric scales may be negative, see :func:`~quantize.core.ranges.search`; without effect on
      layers with quantized inputs.
    - ``shrink``: the strength with which correlations are shrunk as far as chance explains them, see
      :func:`~quantize.core.shrinkage.intensity`; with 0, the errors on the tokens that were seen decide alone.
    """

    grids_num: int = option(20, "an int, at least 1", lambda value: value >= 1)
    clip: bool = option(True, "True or False")
    signed_scale: bool = option(True, "True or False")
    shrink: float = option(4.0, "a number from 0 to 1e6", lambda value: 0 <= value <= 1e6)


# Candidates of the clipping range for each exponent.
_STEPS = 8


def algorithm(spec: LayerSpec, options: Options = Options()) -> Algorithm:
    """AWQ; remembers the mean magnitude of the input channels and their Gram matrix.

    With quantized inputs it remembers their ranges, too.
    """
    observed = [observers.channel_absmean, observers.gram, *[observers.channel_range] * (spec.inputs is not None)]
    return Algorithm(
        observers.product(*observed),
        partial(solve, spec, options),
        fewest=FEWEST_FOR_GRAM,
        scale=partial(common_scale, spec, options),
    )


def candidate_scale(absmean: Tensor, ratio: float) -> Tensor:
    """``absmean^ratio`` over ``sqrt(max * min)`` of itself, ``[c]``; dead channels get 1, ratio 0 gives 1.

    Normalized in the log domain, so that a tiny channel neither underflows nor makes the rest infinite.

    Source: AWQ, equation 5; the normalization is that of the authors' code.

    >>> candidate_scale(torch.tensor([1., 4., 0.]), 0.5)
    tensor([0.7071, 1.4142, 1.0000])
    """
    alive = absmean > 0
    log = torch.where(alive, absmean, 1.0).log()
    low = torch.where(alive, log, torch.inf).amin()
    high = torch.where(alive, log, -torch.inf).amax()
    middle = torch.where(alive.any(), (low + high) / 2, 0.0)
    return torch.where(alive, torch.exp(ratio * (log - middle)), 1.0)


def rounded(
    weight: Tensor, scale: Tensor, gram: Tensor, spec: LayerSpec, options: Options, rho: Tensor | float = 0.0
) -> tuple[QTensor, Tensor]:
    """``Q(W s)`` ``[n, c]``, and its errors ``[2]``: ``tr(delta H delta^T)`` with ``delta = Q(W s) / s - W``.

    The first error is that on ``gram`` ``[c, c]`` as it is, the second that with the part ``rho`` of the correlations
    taken out. With ``options.clip``, every output channel has its range searched, and keeps the full range unless both
    errors fall. ``weight`` is ``[n, c]``, ``scale`` ``[c]``. Source: AWQ, equation 4.
    """
    scaled, diagonal = weight * scale, gram.diagonal()

    def errors(q: QTensor) -> Tensor:
        delta = affine.dequantize(q) / scale - weight
        full = metrics.row_error(delta, gram)
        return torch.stack([full, (1 - rho) * full + rho * (delta.square() @ diagonal)])

    plain = affine.round_to_nearest(scaled, spec.weight)
    found = errors(plain)
    if not options.clip:
        return plain, found.sum(1)
    signed = options.signed_scale and spec.inputs is None
    params = ranges.search(scaled, spec.weight, diagonal / scale.square(), steps=_STEPS, signed=signed)
    searched = affine.quantize(scaled, params, spec.weight)
    others = errors(searched)
    if spec.weight.strategy == "tensor":
        keep = (others.sum(1) <= found.sum(1)).all().expand(len(weight))
    else:
        keep = (others <= found).all(0)
    params = affine.select(keep[: len(params.scale), None], searched.params, plain.params)
    codes = torch.where(keep[:, None], searched.codes, plain.codes)
    return QTensor(codes, *params, spec.weight), torch.where(keep, others, found).sum(1)


def common_scale(
    spec: LayerSpec, options: Options, weights: Sequence[Tensor], statistic: Statistic, tie: Tensor | None = None
) -> Tensor:
    """The best scale ``[c]`` for all ``weights`` ``[n, c]`` together; ``statistic`` as for :func:`solve`.

    The candidates have the exponents ``0, 1/grids_num, ...`` below 1, of which the first of equals wins. A candidate
    counts by the larger of the two errors of :func:`rounded`, each relative to that of exponent 0, which is plain
    rounding or better: so the result is never worse on the tokens that were seen, and does not live on chance. The
    errors of the weights add up, and with quantized inputs that of :func:`~quantize.core.input_loss.lost_power`.

    Channels with the same number in ``tie`` ``[c]`` get one scale, by the mean of their magnitudes.
    """
    absmean, sums = tied(statistic[0], tie, mean=True), statistic[1]
    rho = shrinkage.intensity(sums, options.shrink)
    wide = [weight.to(affine.working_dtype(weight)) for weight in weights]

    def errors(scale: Tensor) -> Tensor:
        total = torch.stack([rounded(each, scale, sums.total, spec, options, rho)[1] for each in wide]).sum(0)
        if spec.inputs is None or len(statistic) < 3:
            return total
        lost = input_loss.lost_power(spec.inputs, statistic[2], sums, scale)
        return total + sum((lost * (each * scale).square()).sum() for each in wide)

    scales = torch.stack([candidate_scale(absmean, i / options.grids_num) for i in range(options.grids_num)])
    found = torch.stack([errors(scale) for scale in scales.unbind()])
    # Nothing to 0 is as good; anything else to 0 is infinitely worse.
    return refine.least(scales, torch.where(found == 0, 0.0, found / found[0]).amax(1))


def solve(
    spec: LayerSpec, options: Options, weight: Tensor, statistic: Statistic, smoothing: Tensor | None = None
) -> Solution:
    """Scale and round ``weight`` ``[n, c]``; ``statistic``: mean magnitudes ``[c]`` and the Gram matrix ``[c, c]``.

    With quantized inputs, also the ranges ``[c]`` of the channels. Without ``smoothing`` ``[c]`` the scale is
    :func:`common_scale`. Notes: ``dead_channels``, input channels that were zero in all of the tokens.
    """
    absmean, sums = statistic[:2]
    wide = weight.to(affine.working_dtype(weight))
    rho = shrinkage.intensity(sums, options.shrink)
    scale = common_scale(spec, options, [wide], statistic) if smoothing is None else smoothing
    quantized, errors = rounded(wide, scale, sums.total, spec, options, rho)
    plain = affine.dequantize(affine.round_to_nearest(wide, spec.weight)) - wide
    error, baseline = errors[0], metrics.output_error(plain, sums.total)
    static, notes = None, dict[str, Tensor]()
    if spec.inputs is not None:
        # What the inputs lose counts on both sides.
        error, baseline = (
            each + (input_loss.lost_power(spec.inputs, statistic[2], sums, s) * (wide * s).square()).sum()
            for each, s in ((error, scale), (baseline, torch.ones_like(scale)))
        )
        if spec.inputs.strategy == "tensor":
            notes = input_loss.loss_notes(spec.inputs, wide, statistic[2], sums, scale)
            static = linear.static_params(statistic[2].low, statistic[2].high, spec.inputs, smoothing=scale)
    return Solution(
        quantized,
        spec.inputs,
        smoothing=scale,
        static=static,
        error=error,
        baseline_error=baseline,
        notes={"dead_channels": (absmean == 0).sum(), **notes},
    )
