"""Scale up the weights that meet large inputs, so that their rounding errors shrink where it matters.

Source: Lin et al. 2024, "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration",
section 3.2, equations 4 and 5. The loss here is exact and comes from the Gram matrix: no inputs are kept, and the
layer is not run again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quantize.core import affine, metrics, observers, ranges, refine
from quantize.core.algorithms.base import Algorithm, BaseOptions, LayerSpec, Solution, option
from quantize.core.scheme import Scheme

QUANTIZES_INPUTS = frozenset({False})


@dataclass(frozen=True)
class Options(BaseOptions):
    """The paper's search, and what improves on it in the same deployed format.

    - ``grids_num``: how many exponents ``i / grids_num`` from 0 are tried.
    - ``clip``: afterwards clip the ranges of the scaled weight by a search, where that helps an output channel.
    """

    grids_num: int = option(20, "an int, at least 1", lambda value: value >= 1)
    clip: bool = option(True, "True or False")


def algorithm(spec: LayerSpec, options: Options = Options()) -> Algorithm:
    """AWQ; remembers the mean magnitude of the input channels and their Gram matrix."""
    return Algorithm(observers.product(observers.channel_absmean, observers.gram), partial(solve, spec, options))


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


def scaled_error(weight: Tensor, scale: Tensor, gram: Tensor, scheme: Scheme) -> Tensor:
    """Output error ``[]`` of rounding ``weight * scale``: ``tr(delta H delta^T)``, ``delta = Q(W s) / s - W``.

    ``weight`` ``[n, c]``, ``scale`` ``[c]``, ``gram`` ``[c, c]``. Source: AWQ, equation 4, on the Gram matrix.
    """
    reached = affine.dequantize(affine.round_to_nearest(weight * scale, scheme)) / scale
    return metrics.output_error(reached - weight, gram)


def search_scale(weight: Tensor, absmean: Tensor, gram: Tensor, scheme: Scheme, *, grids_num: int = 20) -> Tensor:
    """The best of the candidates with ratios ``0, 1/grids_num, ...`` below 1: ``[c]``, and the first of equals.

    Ratio 0 is plain rounding, so that the result is never worse on ``gram``.
    """
    best = torch.ones_like(absmean)
    lowest = scaled_error(weight, best, gram, scheme)
    for i in range(1, grids_num):
        scale = candidate_scale(absmean, i / grids_num)
        error = scaled_error(weight, scale, gram, scheme)
        better = error < lowest
        best, lowest = torch.where(better, scale, best), torch.where(better, error, lowest)
    return best


def solve(spec: LayerSpec, options: Options, weight: Tensor, statistic: tuple[Tensor, observers.SumState]) -> Solution:
    """Scale and round ``weight`` ``[n, c]``; ``statistic``: mean magnitudes ``[c]`` and the Gram matrix ``[c, c]``."""
    absmean, gram = statistic
    wide = weight.to(affine.working_dtype(weight))
    scale = search_scale(wide, absmean, gram.total, spec.weight, grids_num=options.grids_num)
    scaled, gram_scaled = wide * scale, gram.total / scale / scale[:, None]
    quantized = affine.round_to_nearest(scaled, spec.weight)
    if options.clip:
        params = ranges.search(scaled, spec.weight, gram_scaled.diagonal())
        clipped = affine.quantize(scaled, params, spec.weight)
        quantized, _, _ = refine.better_rows(scaled, clipped, quantized, gram_scaled)
    return Solution(
        quantized,
        smoothing=scale,
        error=metrics.output_error(affine.dequantize(quantized) - scaled, gram_scaled),
        baseline_error=scaled_error(wide, torch.ones_like(scale), gram.total, spec.weight),
        notes={"dead_channels": (absmean == 0).sum()},
    )
