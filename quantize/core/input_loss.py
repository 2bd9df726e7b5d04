"""The error that rounding the inputs adds to a layer, estimated from the statistics of the unrounded inputs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantize.core import linear, observers
from quantize.core.scheme import Scheme, Strategy


def lost_power(inputs: Scheme, ranges: observers.Range, gram: observers.SumState, smoothing: Tensor | None) -> Tensor:
    """The squared rounding error of every channel of the smoothed inputs, summed over the tokens: ``[c]``.

    1. Rounding with step ``a`` makes an error of variance ``a^2 / 12``. A channel whose mean square is below that loses
       its whole signal instead.
    2. Static ``inputs`` have one step, that of the whole range. Dynamic ones have a step for each token: its estimate
       takes the largest root mean square of a channel as the longer tail of the token's range. Without symmetry, the
       ratio of the shorter tail to the longer one is that of the ranges of all tokens.

    ``ranges`` ``[c]`` and ``gram`` belong to the inputs before the division by ``smoothing`` ``[c]``. Only the diagonal
    of ``gram`` is read, so its ``total`` may be ``[c]`` instead of ``[c, c]``.

    >>> ranges = observers.Range(torch.tensor([-127.0]), torch.tensor([127.0]))
    >>> gram = observers.SumState(torch.tensor([1200.0]), torch.tensor(12))
    >>> lost_power(Scheme(strategy="tensor", symmetric=True), ranges, gram, None)
    tensor([1.])
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
    """The cost of rounding static inputs, and of rounding with a scale for each token: notes for a solution.

    ``static_loss`` and ``token_loss``, ``[]`` each, are :func:`lost_power` at the outputs of ``weight`` ``[n, c]``,
    relative to the power of the outputs. Both treat the input channels as independent. ``weight`` is the one before
    smoothing. ``inputs``, ``ranges``, ``gram`` and ``smoothing`` are as for :func:`lost_power`; there are no notes
    unless the inputs are static.

    >>> ranges = observers.Range(torch.tensor([-127.0]), torch.tensor([127.0]))
    >>> gram = observers.SumState(torch.tensor([12.0]), torch.tensor(12))
    >>> loss_notes(Scheme(strategy="tensor"), torch.ones(1, 1), ranges, gram)["static_loss"]
    tensor(0.0833)
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


def rounded_statistic(inputs: Scheme, statistic: Statistic, smoothing: Tensor | None = None) -> observers.PairedState:
    """The paired statistic of the smoothed and rounded inputs, which are those that the weight multiplies.

    ``statistic`` belongs to the inputs ``x`` before that: the ranges ``[c]`` of the channels, and their Gram matrix or
    paired statistic. ``inputs`` and ``smoothing`` are as for :func:`lost_power`. Let ``s`` be the smoothing, ``e`` the
    rounding error of ``x / s``, and ``P`` the diagonal matrix of :func:`lost_power`.

    1. ``e`` is taken as independent of the inputs and between channels. So the Gram matrix of ``x / s + e`` is
       ``H / (s s^T) + P``.
    2. The original input has no ``e``. So the cross statistic changes by ``-sum e (x / s + e)^T = -P``.

    >>> ranges = observers.Range(torch.tensor([-127.0]), torch.tensor([127.0]))
    >>> gram = observers.SumState(torch.tensor([[12.0]]), torch.tensor(12))
    >>> rounded_statistic(Scheme(strategy="tensor"), (ranges, gram)).gram.total
    tensor([[13.]])
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
