"""Scale up the weights that meet large inputs, so that their rounding errors shrink where it matters.

Source: Lin et al. 2024, "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration",
section 3.2, equations 4 and 5. The loss here is exact and comes from the Gram matrix: no inputs are kept, and the
layer is not run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quantize.core import affine, metrics, observers, ranges, refine, shrinkage
from quantize.core.algorithms.base import FEWEST_FOR_GRAM, Algorithm, BaseOptions, LayerSpec, Solution, option, tied
from quantize.core.scheme import Scheme

QUANTIZES_INPUTS = frozenset({False})


@dataclass(frozen=True)
class Options(BaseOptions):
    """The paper's search, and what improves on it in the same deployed format.

    - ``grids_num``: how many exponents ``i / grids_num`` from 0 are tried.
    - ``clip``: afterwards clip the ranges of the scaled weight by a search, where that helps an output channel.
    - ``shrink``: the strength with which correlations are shrunk as far as chance explains them, see
      :func:`~quantize.core.shrinkage.intensity`; with 0, the errors on the tokens that were seen decide alone.
    """

    grids_num: int = option(20, "an int, at least 1", lambda value: value >= 1)
    clip: bool = option(True, "True or False")
    shrink: float = option(4.0, "a number from 0 to 1e6", lambda value: 0 <= value <= 1e6)


def algorithm(spec: LayerSpec, options: Options = Options()) -> Algorithm:
    """AWQ; remembers the mean magnitude of the input channels and their Gram matrix."""
    observer = observers.product(observers.channel_absmean, observers.gram)
    return Algorithm(
        observer, partial(solve, spec, options), fewest=FEWEST_FOR_GRAM, scale=partial(common_scale, spec, options)
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


def scaled_error(weight: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """The change of the weight ``[n, c]`` by rounding ``weight * scale``: ``Q(W s) / s - W``.

    ``weight`` is ``[n, c]``, ``scale`` ``[c]``. Source: AWQ, equation 4.
    """
    return affine.dequantize(affine.round_to_nearest(weight * scale, scheme)) / scale - weight


def search_scale(
    weight: Tensor | Sequence[Tensor],
    absmean: Tensor,
    gram: Tensor,
    scheme: Scheme,
    *,
    grids_num: int = 20,
    rho: Tensor | float = 0.0,
) -> Tensor:
    """The best of the candidates with ratios ``0, 1/grids_num, ...`` below 1: ``[c]``, and the first of equals.

    A candidate counts by the larger of two errors, each relative to that of plain rounding, which is ratio 0: on
    ``gram`` ``[c, c]`` as it is, so that the result is never worse there, and with the part ``rho`` of the
    correlations taken out, so that it does not live on chance. The errors of several weights ``[n, c]`` add up.
    """
    diagonal, weights = gram.diagonal(), [weight] if isinstance(weight, Tensor) else weight
    scales = torch.stack([candidate_scale(absmean, i / grids_num) for i in range(grids_num)])

    def errors(scale: Tensor) -> Tensor:
        # One below the other; rounded apart, since with strategy tensor each has a scale of its own.
        delta = torch.cat([scaled_error(each, scale, scheme) for each in weights])
        full = metrics.output_error(delta, gram)
        return torch.stack([full, (1 - rho) * full + rho * (delta.square() * diagonal).sum()])

    found = torch.stack([errors(scale) for scale in scales.unbind()])
    return refine.least(scales, (found / torch.where(found[0] > 0, found[0], 1.0)).amax(1))


def common_scale(
    spec: LayerSpec,
    options: Options,
    weights: Sequence[Tensor],
    statistic: tuple[Tensor, observers.SumState],
    tie: Tensor | None = None,
) -> Tensor:
    """The best scale ``[c]`` for all ``weights`` ``[n, c]`` together; ``statistic`` as for :func:`solve`.

    Channels with the same number in ``tie`` ``[c]`` get one scale, by the mean of their magnitudes.
    """
    absmean, sums = tied(statistic[0], tie, mean=True), statistic[1]
    rho = shrinkage.intensity(sums, options.shrink)
    wide = [weight.to(affine.working_dtype(weight)) for weight in weights]
    return search_scale(wide, absmean, sums.total, spec.weight, grids_num=options.grids_num, rho=rho)


def solve(
    spec: LayerSpec,
    options: Options,
    weight: Tensor,
    statistic: tuple[Tensor, observers.SumState],
    smoothing: Tensor | None = None,
) -> Solution:
    """Scale and round ``weight`` ``[n, c]``; ``statistic``: mean magnitudes ``[c]`` and the Gram matrix ``[c, c]``.

    Without ``smoothing`` ``[c]`` the scale is :func:`common_scale`.
    """
    absmean, (gram, _) = statistic
    wide = weight.to(affine.working_dtype(weight))
    rho = shrinkage.intensity(statistic[1], options.shrink)
    scale = common_scale(spec, options, [wide], statistic) if smoothing is None else smoothing
    scaled, gram_scaled = wide * scale, gram / scale / scale[:, None]
    quantized = affine.round_to_nearest(scaled, spec.weight)
    if options.clip:
        params = ranges.search(scaled, spec.weight, gram_scaled.diagonal())
        clipped = affine.quantize(scaled, params, spec.weight)
        for trusted in (shrinkage.shrink(gram_scaled, rho), gram_scaled):
            clipped, _, _ = refine.better_rows(scaled, clipped, quantized, trusted)
        quantized = clipped
    return Solution(
        quantized,
        smoothing=scale,
        error=metrics.output_error(affine.dequantize(quantized) - scaled, gram_scaled),
        baseline_error=metrics.output_error(scaled_error(wide, torch.ones_like(scale), spec.weight), gram),
        notes={"dead_channels": (absmean == 0).sum()},
    )
