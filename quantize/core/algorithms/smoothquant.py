"""Move the range of outlier channels from the inputs into the weights, where rounding it costs less.

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

# Ranges of the channels, and the sums of their squares. The search over strengths and gptq need the Gram matrix or the
# paired statistic instead of the squares.
Statistic = input_loss.Statistic


@dataclass(frozen=True)
class Options(BaseOptions):
    """The paper's strength, and improvements in the same deployed format. In brackets: default; accepted values.

    - ``smooth_strength`` (0.5; a number strictly between 0 and 1): the paper's alpha, which moves the range of the
      inputs into the weight.
    - ``grids_num`` (0; an int, at least 0): 0 uses ``smooth_strength``. Otherwise every layer takes the best of the
      strengths ``i / grids_num`` from 0 to 1 and of no smoothing.
    - ``rounding`` ('nearest'; 'nearest' or 'gptq'): how the smoothed weight is rounded: to the nearest code as in the
      paper, or by gptq with its default options.

    >>> Options(grids_num=10).smooth_strength
    0.5
    """

    smooth_strength: float = option(0.5, "a number strictly between 0 and 1", lambda value: 0 < value < 1)
    grids_num: int = option(0, "an int, at least 0", lambda value: value >= 0)
    rounding: str = option("nearest", "'nearest' or 'gptq'", lambda value: value in ("nearest", "gptq"))


def algorithm(spec: LayerSpec, options: Options = Options()) -> Algorithm:
    """SmoothQuant for the format ``spec``, with ``options``.

    Its statistic is the ranges of the input channels, which also give static inputs their scale, and their squares. The
    search over strengths and gptq need the Gram matrix instead of the squares.

    >>> from quantize.core import Scheme
    >>> algorithm(LayerSpec(Scheme(), Scheme(strategy="token"))).paired is None
    True
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

    ``input_amax`` and ``weight_amax`` ``[c]`` are the largest magnitudes of the input channels in inputs and weight. A
    channel that is zero in either gets 1. With ``strength`` 0.5 both end with the same maximum, the geometric mean.

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
    """The squared error ``[]`` of the outputs in the format ``spec``, when inputs are divided by ``smoothing`` ``[c]``.

    1. The part of the weight is exact: ``tr(delta H delta^T)`` with ``delta = Q(W s) / s - W``.
    2. The errors of the inputs are taken as independent of each other and of the error of the weight. So each channel
       adds its :func:`~quantize.core.input_loss.lost_power` times ``|W s|^2`` of its column.

    ``weight`` is ``[n, c]``, the ranges ``inputs`` are ``[c]``, and ``gram`` is ``[c, c]``.

    >>> from quantize.core import Scheme
    >>> ranges = observers.Range(torch.tensor([-127.0]), torch.tensor([127.0]))
    >>> gram = observers.SumState(torch.tensor([[12.0]]), torch.tensor(12))
    >>> spec = LayerSpec(Scheme(), Scheme(strategy="tensor"))
    >>> expected_error(spec, torch.tensor([[127.0]]), torch.ones(1), ranges, gram) == 127**2
    tensor(True)
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

    ``weight`` is ``[n, c]``, or several of them, whose errors add up. ``spec``, ``inputs`` and ``gram`` are as there,
    and ``tie`` ``[c]`` is as for :func:`common_scale`.

    >>> from quantize.core import Scheme
    >>> ranges, gram = observers.Range(-torch.ones(2), torch.ones(2)), observers.SumState(torch.eye(2), torch.tensor(2))
    >>> search_scale(LayerSpec(Scheme()), torch.ones(1, 2), ranges, gram, grids_num=2)
    tensor([1., 1.])
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
    """The divisor ``[c]`` for all ``weights`` ``[n, c]`` together.

    ``spec`` and ``options`` are those of :func:`algorithm`, and ``statistic`` is as for :func:`solve`. Channels with
    the same number in ``tie`` ``[c]`` get one divisor, from the largest of their magnitudes.

    >>> from quantize.core import Scheme
    >>> ranges = observers.Range(torch.tensor([-16.0]), torch.tensor([0.0]))
    >>> statistic = ranges, observers.SumState(torch.tensor([256.0]), torch.tensor(1))
    >>> common_scale(LayerSpec(Scheme(), Scheme(strategy="token")), Options(), [torch.tensor([[4.0]])], statistic)
    tensor([2.])
    """
    wide = [weight.to(affine.working_dtype(weight)) for weight in weights]
    inputs, gram = statistic
    if not options.grids_num:
        return smoothing_scale(*_maxima(wide, inputs, tie), options.smooth_strength)
    return search_scale(spec, wide, inputs, observers.single(gram), grids_num=options.grids_num, tie=tie)


def solve(
    spec: LayerSpec, options: Options, weight: Tensor, statistic: Statistic, smoothing: Tensor | None = None
) -> Solution:
    """Smooth and round ``weight`` ``[n, c]``.

    ``spec`` and ``options`` are those of :func:`algorithm`. ``statistic`` is the ranges ``[c]`` of the input channels,
    and their squares ``[c]``. For the search over strengths and for gptq, the Gram matrix ``[c, c]`` or the paired
    statistic replaces the squares. The divisor is ``smoothing`` ``[c]`` if given, else :func:`common_scale`.

    Notes: ``dead_channels``, the number of input channels that were zero in all tokens, and those of
    :func:`~quantize.core.input_loss.loss_notes`; with gptq, its notes.

    >>> from quantize.core import Scheme
    >>> ranges = observers.Range(torch.tensor([-16.0]), torch.tensor([0.0]))
    >>> statistic = ranges, observers.SumState(torch.tensor([256.0]), torch.tensor(1))
    >>> spec = LayerSpec(Scheme(), Scheme(strategy="token"))
    >>> solve(spec, Options(), torch.tensor([[4.0]]), statistic).smoothing
    tensor([2.])
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
    """:func:`solve` with gptq for a stack of ``weights`` ``[e, n, c]``, in one call.

    ``spec`` and ``options`` are those of :func:`algorithm`. The tensors of ``statistics`` and of the result have the
    leading axis ``e``, too.

    >>> from quantize.core import Scheme
    >>> ranges = observers.Range(-torch.ones(1, 2), torch.ones(1, 2))
    >>> statistics = ranges, observers.SumState(torch.eye(2)[None], torch.tensor([16]))
    >>> spec = LayerSpec(Scheme(), Scheme(strategy="token"))
    >>> solve_stack(spec, Options(rounding="gptq"), torch.ones(1, 1, 2), statistics).weight.codes.tolist()
    [[[127, 127]]]
    """
    wide = weights.to(affine.working_dtype(weights))
    smoothing = torch.func.vmap(lambda weight, its: common_scale(spec, options, [weight], its))(wide, statistics)
    return gptq.solve_stack(spec, gptq.Options(), wide, statistics, smoothing)


def _maxima(weights: Sequence[Tensor], inputs: observers.Range, tie: Tensor | None) -> tuple[Tensor, Tensor]:
    weight_amax = torch.stack([reduce(weight.abs(), "n c -> c", "max") for weight in weights]).amax(0)
    return tied(torch.maximum(-inputs.low, inputs.high), tie), tied(weight_amax, tie)
