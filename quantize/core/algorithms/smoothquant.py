"""Move the range of outlier channels from the inputs into the weights, where it costs less.

Source: Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
equations 3 and 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from einops import reduce
from torch import Tensor

from quantize.core import affine, linear, observers
from quantize.core.algorithms.base import Algorithm, BaseOptions, LayerSpec, Solution, option

QUANTIZES_INPUTS = frozenset({True})


@dataclass(frozen=True)
class Options(BaseOptions):
    """``smooth_strength``: how much of the inputs' range moves into the weight; alpha in the paper."""

    smooth_strength: float = option(0.5, "a number strictly between 0 and 1", lambda value: 0 < value < 1)


def algorithm(spec: LayerSpec, options: Options = Options()) -> Algorithm:
    """SmoothQuant; remembers the ranges of the input channels, which give static inputs their scale as well."""
    return Algorithm(observers.channel_range, partial(solve, spec, options))


def smoothing_scale(input_amax: Tensor, weight_amax: Tensor, strength: float) -> Tensor:
    """The divisor of the inputs, ``[c]``: ``input_amax^strength / weight_amax^(1 - strength)``.

    Both maxima are ``[c]`` magnitudes of the input channels. A channel that is dead on either side gets 1. With
    strength 0.5 both sides end with equal maxima, the geometric mean of the two.

    Source: SmoothQuant, equation 4.

    >>> smoothing_scale(torch.tensor([16., 0.]), torch.tensor([4., 1.]), 0.5)
    tensor([2., 1.])
    """
    tiny = torch.finfo(input_amax.dtype).tiny
    alive = (input_amax > 0) & (weight_amax > 0)
    scale = input_amax.clamp(min=tiny) ** strength / weight_amax.clamp(min=tiny) ** (1 - strength)
    return torch.where(alive, scale, 1.0)


def solve(spec: LayerSpec, options: Options, weight: Tensor, inputs: observers.Range) -> Solution:
    """Smooth and round ``weight`` ``[n, c]``; ``inputs``: the ranges ``[c]`` of the input channels.

    Notes: ``dead_channels``, input channels that were zero in all of the tokens.
    """
    wide = weight.to(affine.working_dtype(weight))
    input_amax = torch.maximum(-inputs.low, inputs.high)
    smoothing = smoothing_scale(input_amax, reduce(wide.abs(), "n c -> c", "max"), options.smooth_strength)
    static = None
    if spec.inputs is not None and spec.inputs.strategy == "tensor":
        static = linear.static_params(inputs.low, inputs.high, spec.inputs, smoothing=smoothing)
    return Solution(
        affine.round_to_nearest(wide * smoothing, spec.weight),
        spec.inputs,
        smoothing,
        static,
        notes={"dead_channels": (input_amax == 0).sum()},
    )
