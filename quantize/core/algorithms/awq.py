"""Scale up the weights of channels with large inputs, which reduces their rounding errors.

Source: Lin et al. 2024, "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration",
section 3.2, equations 4 and 5. The loss here is exact and comes from the Gram matrix, so no inputs are stored and the
layer does not run again.
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

# Mean magnitudes of the input channels, their Gram matrix, and for quantized inputs their ranges.
Statistic = tuple[Any, ...]


@dataclass(frozen=True)
class Options(BaseOptions):
    """The paper's search, and improvements in the same deployed format. In brackets: default; accepted values.

    - ``grids_num`` (20; an int, at least 1): number of exponents ``i / grids_num``, from 0, that are tried.
    - ``clip`` (True): also search the clipping ranges of the scaled weight for each exponent. An output channel keeps
      the full range unless the search reduces its error.
    - ``signed_scale`` (True): allow negative symmetric scales, see :func:`~quantize.core.ranges.search`. It has no
      effect on layers with quantized inputs.
    - ``shrink`` (4.0; a number from 0 to 1e6): strength of the shrinkage of correlations, see
      :func:`~quantize.core.shrinkage.intensity`. With 0, only the errors on the tokens seen decide.

    >>> Options(clip=False).grids_num
    20
    """

    grids_num: int = option(20, "an int, at least 1", lambda value: value >= 1)
    clip: bool = option(True, "True or False")
    signed_scale: bool = option(True, "True or False")
    shrink: float = option(4.0, "a number from 0 to 1e6", lambda value: 0 <= value <= 1e6)


# How many clipping ranges are tried for each exponent.
_CLIPPING_RANGES = 8


def algorithm(spec: LayerSpec, options: Options = Options()) -> Algorithm:
    """AWQ for the format ``spec``, with ``options``.

    Its statistic is the mean magnitude of the input channels, their Gram matrix, and for quantized inputs their ranges.

    >>> from quantize.core import Scheme
    >>> algorithm(LayerSpec(Scheme(bits=4))).fewest
    16
    """
    observed = [observers.channel_absmean, observers.gram, *[observers.channel_range] * (spec.inputs is not None)]
    return Algorithm(
        observers.product(*observed),
        partial(solve, spec, options),
        fewest=FEWEST_FOR_GRAM,
        scale=partial(common_scale, spec, options),
    )


def candidate_scale(absmean: Tensor, ratio: float) -> Tensor:
    """``absmean^ratio`` for ``absmean`` ``[c]``, divided by ``sqrt(max * min)`` of the powers: ``[c]``.

    Dead channels get 1. The normalization is in the log domain, so a tiny channel neither underflows nor makes the
    other channels infinite.

    Source: AWQ, equation 5. The authors' code has the same normalization.

    >>> candidate_scale(torch.tensor([1., 4., 0.]), 0.5)
    tensor([0.7071, 1.4142, 1.0000])
    """
    alive = absmean > 0
    log = torch.where(alive, absmean, 1.0).log()
    low = torch.where(alive, log, torch.inf).amin()
    high = torch.where(alive, log, -torch.inf).amax()
    middle = torch.where(alive.any(), (low + high) / 2, 0.0)
    return torch.where(alive, torch.exp(ratio * (log - middle)), 1.0)


def round_scaled(
    weight: Tensor, scale: Tensor, gram: Tensor, spec: LayerSpec, options: Options, rho: Tensor | float = 0.0
) -> tuple[QTensor, Tensor]:
    """``Q(W s)`` ``[n, c]``, and its errors ``[2]``: ``tr(delta H delta^T)`` with ``delta = Q(W s) / s - W``.

    ``weight`` is ``[n, c]`` and ``scale`` ``[c]``. The first error uses ``gram`` ``[c, c]`` as it is, and the second
    one removes the fraction ``rho`` ``[]`` of its correlations. With ``options.clip``, the range of every output
    channel is searched; the full range is kept unless both errors fall. ``spec`` is the format.

    Source: AWQ, equation 4.

    >>> from quantize.core import Scheme
    >>> weight, spec = torch.tensor([[7.0, 2.4]]), LayerSpec(Scheme(bits=4))
    >>> q, errors = round_scaled(weight, torch.ones(2), torch.eye(2), spec, Options(clip=False))
    >>> q.codes.tolist(), errors
    ([[7, 2]], tensor([0.1600, 0.1600]))
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
    params = ranges.search(scaled, spec.weight, diagonal / scale.square(), steps=_CLIPPING_RANGES, signed=signed)
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
    """The best scale ``[c]`` for all ``weights`` ``[n, c]`` together.

    ``spec`` and ``options`` are those of :func:`algorithm`, and ``statistic`` is as for :func:`solve`. The candidates
    have the exponents ``0, 1/grids_num, ...`` below 1. A candidate has the two errors of :func:`round_scaled`, summed
    over the weights; quantized inputs add their :func:`~quantize.core.input_loss.lost_power`. Each error is divided by
    that of exponent 0, which is plain rounding or better, and the larger quotient counts. The first candidate with the
    smallest quotient wins. So the result is never worse than plain rounding on the tokens seen, and does not rely on
    correlations that chance explains.

    Channels with the same number in ``tie`` ``[c]`` get one scale, from the mean of their magnitudes.

    >>> from quantize.core import Scheme
    >>> statistic = torch.ones(2), observers.SumState(16 * torch.eye(2), torch.tensor(16))
    >>> common_scale(LayerSpec(Scheme(bits=4)), Options(), [torch.ones(1, 2)], statistic)
    tensor([1., 1.])
    """
    absmean, sums = tied(statistic[0], tie, mean=True), statistic[1]
    rho = shrinkage.intensity(sums, options.shrink)
    wide = [weight.to(affine.working_dtype(weight)) for weight in weights]

    def errors(scale: Tensor) -> Tensor:
        total = torch.stack([round_scaled(each, scale, sums.total, spec, options, rho)[1] for each in wide]).sum(0)
        if spec.inputs is None or len(statistic) < 3:
            return total
        lost = input_loss.lost_power(spec.inputs, statistic[2], sums, scale)
        return total + sum((lost * (each * scale).square()).sum() for each in wide)

    scales = torch.stack([candidate_scale(absmean, i / options.grids_num) for i in range(options.grids_num)])
    found = torch.stack([errors(scale) for scale in scales.unbind()])
    # An error of 0 is as good as the 0 of exponent 0; any other error is infinitely worse than that 0.
    return refine.least(scales, torch.where(found == 0, 0.0, found / found[0]).amax(1))


def solve(
    spec: LayerSpec, options: Options, weight: Tensor, statistic: Statistic, smoothing: Tensor | None = None
) -> Solution:
    """Scale and round ``weight`` ``[n, c]``.

    ``spec`` and ``options`` are those of :func:`algorithm`. ``statistic`` is the mean magnitudes ``[c]`` of the input
    channels, their Gram matrix ``[c, c]``, and for quantized inputs their ranges ``[c]``. The scale is ``smoothing``
    ``[c]`` if given, else :func:`common_scale`.

    Notes: ``dead_channels``, the number of input channels that were zero in all tokens.

    >>> from quantize.core import Scheme
    >>> statistic = torch.ones(2), observers.SumState(16 * torch.eye(2), torch.tensor(16))
    >>> spec = LayerSpec(Scheme(bits=4))
    >>> solve(spec, Options(clip=False), torch.tensor([[7., 2.4]]), statistic).weight.codes.tolist()
    [[7, 2]]
    """
    absmean, sums = statistic[:2]
    wide = weight.to(affine.working_dtype(weight))
    rho = shrinkage.intensity(sums, options.shrink)
    scale = common_scale(spec, options, [wide], statistic) if smoothing is None else smoothing
    quantized, errors = round_scaled(wide, scale, sums.total, spec, options, rho)
    plain = affine.dequantize(affine.round_to_nearest(wide, spec.weight)) - wide
    error, baseline = errors[0], metrics.output_error(plain, sums.total)
    static, notes = None, dict[str, Tensor]()
    if spec.inputs is not None:
        # Both errors include the rounding of the inputs.
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
