"""Move the range of outlier channels from the inputs into the weights, where it costs less.

Source: Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
equations 3 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from einops import reduce
from torch import Tensor

from quantize.core import affine, input_loss, linear, metrics, observers, refine
from quantize.core.algorithms import gptq
from quantize.core.algorithms.contract import Algorithm, BaseOptions, LayerSpec, Solution, option, tied

QUANTIZES_INPUTS = frozenset({True})

# The ranges of the channels and the sums of their squares; for a search over strengths and for gptq, the Gram matrix or
# the paired one in place of the squares.
Statistic = input_loss.Statistic


@dataclass(frozen=True)
class Options(BaseOptions):
    """The paper's strength, and what improves on it in the same deployed format.

    - ``smooth_strength``: how much of the inputs' range moves into the weight; alpha in the paper.
    - ``grids_num``: 0 takes ``smooth_strength``; else every layer takes the best of the strengths ``i / grids_num``
      from 0 to 1, and of no smoothing at all.
    - ``rounding``: how the smoothed weight is rounded: ``nearest`` as in the paper, or by ``gptq`` with its defaults.
    """

    smooth_strength: float = option(0.5, "a number strictly between 0 and 1", lambda value: 0 < value < 1)
    grids_num: int = option(0, "an int, at least 0", lambda value: value >= 0)
    rounding: str = option("nearest", "'nearest' or 'gptq'", lambda value: value in ("nearest", "gptq"))


def algorithm(spec: LayerSpec, options: Options = Options()) -> Algorithm:
    """SmoothQuant; remembers ranges and squares of the input channels, which give static inputs their scale as well.

    The search and gptq remember the Gram matrix in place of the squares.
    """
    bound, scale = partial(solve, spec, options), partial(common_scale, spec, options)
    if options.rounding == "gptq":
        inner = gptq.algorithm(spec)
        stack = partial(solve_stack, spec, options)
        return Algorithm(inner.observer, bound, fewest=inner.fewest, paired=inner.paired, scale=scale, stack=stack)
    second = observers.gram if options.grids_num else observers.channel_square
    return Algorithm(observers.product(observers.channel_range, second), bound, scale=scale)


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


def expected_error(
    spec: LayerSpec, weight: Tensor, smoothing: Tensor, inputs: observers.Range, gram: observers.SumState
) -> Tensor:
    """What the outputs lose when inputs are divided by ``smoothing`` ``[c]`` and both sides are rounded, ``[]``.

    1. The weight's part is exact: ``tr(delta H delta^T)`` with ``delta = Q(W s) / s - W``.
    2. The errors of the inputs are taken as independent of each other and of the weight's, so that of each channel, see
       :func:`~quantize.core.input_loss.lost_power`, counts ``|W s|^2`` of its column.

    ``weight`` is ``[n, c]``, ``inputs`` ``[c]``, ``gram`` ``[c, c]``.
    """
    scaled = weight * smoothing
    reached = affine.dequantize(affine.round_to_nearest(scaled, spec.weight)) / smoothing
    exact = metrics.output_error(reached - weight, gram.total)
    if spec.inputs is None:
        return exact
    lost = input_loss.lost_power(spec.inputs, inputs, gram, smoothing)
    return exact + (lost * reduce(scaled.square(), "n c -> c", "sum")).sum()


def search_scale(
    spec: LayerSpec,
    weight: Tensor | Sequence[Tensor],
    inputs: observers.Range,
    gram: observers.SumState,
    *,
    grids_num: int,
    tie: Tensor | None = None,
) -> Tensor:
    """The divisor ``[c]`` with the least :func:`expected_error`, among ``grids_num + 1`` strengths and the identity.

    The errors of several weights ``[n, c]`` add up; ``tie`` as in :func:`common_scale`.
    """
    weights = [weight] if isinstance(weight, Tensor) else weight
    input_amax, weight_amax = _maxima(weights, inputs, tie)
    scales = [torch.ones_like(input_amax)]
    scales += [smoothing_scale(input_amax, weight_amax, i / grids_num) for i in range(grids_num + 1)]
    errors = [
        torch.stack([expected_error(spec, each, scale, inputs, gram) for each in weights]).sum() for scale in scales
    ]
    return refine.least(torch.stack(scales), torch.stack(errors))


def common_scale(
    spec: LayerSpec, options: Options, weights: Sequence[Tensor], statistic: Statistic, tie: Tensor | None = None
) -> Tensor:
    """The divisor ``[c]`` for all ``weights`` ``[n, c]`` together; ``statistic`` as for :func:`solve`.

    Channels with the same number in ``tie`` ``[c]`` get one divisor, by the largest of their magnitudes.
    """
    wide = [weight.to(affine.working_dtype(weight)) for weight in weights]
    inputs, gram = statistic
    if not options.grids_num:
        return smoothing_scale(*_maxima(wide, inputs, tie), options.smooth_strength)
    return search_scale(spec, wide, inputs, observers.single(gram), grids_num=options.grids_num, tie=tie)


def solve(
    spec: LayerSpec, options: Options, weight: Tensor, statistic: Statistic, smoothing: Tensor | None = None
) -> Solution:
    """Smooth and round ``weight`` ``[n, c]``; ``statistic``: the ranges ``[c]`` of the channels, and their squares.

    For the search over strengths and for gptq, the Gram matrix ``[c, c]`` or the paired one takes the place of the
    squares. Without ``smoothing`` ``[c]`` the divisor is :func:`common_scale`. Notes: ``dead_channels``, input channels
    that were zero in all of the tokens; :func:`~quantize.core.input_loss.loss_notes`; and those of gptq.
    """
    wide = weight.to(affine.working_dtype(weight))
    if smoothing is None:
        smoothing = common_scale(spec, options, [wide], statistic)
    if options.rounding == "gptq":
        return gptq.solve(spec, gptq.Options(), wide, statistic, smoothing)
    inputs, static = statistic[0], None
    if spec.inputs is not None and spec.inputs.strategy == "tensor":
        static = linear.static_params(inputs.low, inputs.high, spec.inputs, smoothing=smoothing)
    dead = (inputs.low == 0) & (inputs.high == 0)
    quantized = affine.round_to_nearest(wide * smoothing, spec.weight)
    notes = input_loss.loss_notes(spec.inputs, wide, inputs, observers.single(statistic[1]), smoothing)
    return Solution(quantized, spec.inputs, smoothing, static, notes={"dead_channels": dead.sum(), **notes})


def solve_stack(spec: LayerSpec, options: Options, weights: Tensor, statistics: input_loss.Statistic) -> Solution:
    """:func:`solve` with gptq for every weight of a stack ``[e, n, c]`` at once; all else has the leading axis, too."""
    wide = weights.to(affine.working_dtype(weights))
    smoothing = torch.func.vmap(lambda weight, its: common_scale(spec, options, [weight], its))(wide, statistics)
    return gptq.solve_stack(spec, gptq.Options(), wide, statistics, smoothing)


def _maxima(weights: Sequence[Tensor], inputs: observers.Range, tie: Tensor | None) -> tuple[Tensor, Tensor]:
    weight_amax = torch.stack([reduce(weight.abs(), "n c -> c", "max") for weight in weights]).amax(0)
    return tied(torch.maximum(-inputs.low, inputs.high), tie), tied(weight_amax, tie)
