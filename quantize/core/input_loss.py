"""What the rounding of the inputs costs a layer, from the statistics of the inputs before it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantize.core import linear, observers
from quantize.core.scheme import Scheme, Strategy


def lost_power(inputs: Scheme, ranges: observers.Range, gram: observers.SumState, smoothing: Tensor | None) -> Tensor:
    """The squared error, summed over the tokens, that rounding makes in every channel of the smoothed inputs: ``[c]``.

    1. Rounding an input with step ``a`` makes an error of variance ``a^2 / 12``, or loses the whole input where the
       mean square of the channel is below that.
    2. Static inputs have the step of the whole range. For a token's own step, the largest root mean square of a channel
       stands in for the longer tail of its range; without symmetry, the other is as much shorter as over all tokens.

    ``ranges`` ``[c]`` and ``gram`` are those of the inputs before they are divided by ``smoothing`` ``[c]``. The
    diagonal of ``gram`` is read; its ``total`` may be that alone, ``[c]``.
    """
    divisor = torch.ones_like(ranges.low) if smoothing is None else smoothing
    square = _diagonal(gram.total) / gram.tokens.clamp(min=1) / divisor.square()
    if inputs.strategy == "tensor":
        step = linear.static_params(ranges.low, ranges.high, inputs, smoothing=divisor).scale.amax()
    else:
        tail = square.amax().sqrt()
        low, high = (ranges.low / divisor).amin(), (ranges.high / divisor).amax()
        longer = torch.maximum(-low, high)
        both = tail * torch.where(longer > 0, (high - low) / longer, 1.0)
        step = tail / inputs.qmax if inputs.symmetric else both / (inputs.qmax - inputs.qmin)
    return torch.minimum(step.square() / 12, square) * gram.tokens


def loss_notes(
    inputs: Scheme | None,
    weight: Tensor,
    ranges: observers.Range,
    gram: observers.SumState,
    smoothing: Tensor | None = None,
) -> dict[str, Tensor]:
    """How much rounding static inputs costs a layer, and would cost with a scale for each token, ``[]`` each.

    Notes of a solution: ``static_loss`` and ``token_loss``, the parts of the outputs' power that :func:`lost_power` is
    of, where the channels of the inputs are independent. None for inputs that are not static. ``weight`` is ``[n, c]``,
    before smoothing; the rest as for :func:`lost_power`.
    """
    if inputs is None or inputs.strategy != "tensor":
        return {}
    columns = weight.square().sum(0)
    power = (_diagonal(gram.total) * columns).sum()
    columns = columns if smoothing is None else columns * smoothing.square()

    def part(strategy: Strategy) -> Tensor:
        lost = lost_power(replace(inputs, strategy=strategy), ranges, gram, smoothing)
        return torch.where(power > 0, (lost * columns).sum() / power, 0.0)

    return {"static_loss": part("tensor"), "token_loss": part("token")}


def _diagonal(total: Tensor) -> Tensor:
    return total if total.ndim == 1 else total.diagonal()


def met(inputs: Scheme, statistic: Statistic, smoothing: Tensor | None = None) -> observers.PairedState:
    """The paired statistic of the inputs as a layer meets them, smoothed and rounded, from that of the inputs.

    ``statistic``: the ranges ``[c]`` of the channels, and their Gram matrix or the paired one.

    With ``e`` for what rounding adds to an input ``x / s`` and ``P`` for the diagonal matrix of :func:`lost_power`:

    1. ``e`` is taken as independent of the inputs and between channels, so the Gram matrix of ``x / s + e`` is
       ``H / (s s^T) + P``;
    2. the original input lacks ``e``, so the cross statistic changes by ``-sum e (x / s + e)^T = -P``.
    """
    ranges, gram = statistic
    single = observers.single(gram)
    cross = gram.cross if isinstance(gram, observers.PairedState) else torch.zeros_like(single.total)
    lost = torch.diag(lost_power(inputs, ranges, single, smoothing))
    if smoothing is not None:
        outer = smoothing * smoothing[:, None]
        single, cross = observers.SumState(single.total / outer, single.tokens), cross / outer
    return observers.PairedState(observers.SumState(single.total + lost, single.tokens), cross - lost)


Statistic = tuple[observers.Range, observers.SumState | observers.PairedState]
