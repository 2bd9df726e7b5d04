"""Statistics of the inputs of a layer, accumulated over batches as commutative monoids.

An :class:`Observer` is four pure functions. ``init`` makes the identity, ``update`` adds one batch, ``merge`` joins
two states, and ``finalize`` turns a state into a statistic; only ``finalize`` divides. States are NamedTuples of
tensors, so they move, save and all-reduce as trees. They hold sums and counts, never averages of averages, in float32
(float64 for float64 models): sums in bfloat16 stop growing after a few hundred steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor

from quantize.core.metrics import strips


class Observer(NamedTuple):
    """A statistic of the input channels, as a commutative monoid.

    - ``init(c, dtype=torch.float32, device=None) -> state``: the identity, for ``c`` input channels.
    - ``update(state, x) -> state``: adds ``x`` ``[..., c]``, of any float dtype; leading axes, if any, are tokens.
    - ``merge(state, state) -> state``: associative and commutative; bit for bit, unless it sums.
    - ``finalize(state) -> statistic``.
    - ``paired``: whether ``update`` also takes ``original=None``, the inputs ``[t, c]`` of the float model.

    >>> channel_range.finalize(channel_range.update(channel_range.init(2), torch.tensor([[1., -2.]]))).low
    tensor([ 0., -2.])
    """

    init: Callable[..., Any]
    update: Callable[..., Any]
    merge: Callable[[Any, Any], Any]
    finalize: Callable[[Any], Any]
    paired: bool = False


class Range(NamedTuple):
    """The lowest and highest value of every channel, ``low`` and ``high`` ``[c]``. A statistic contains 0.

    >>> Range(torch.tensor([-1.0]), torch.tensor([2.0])).high
    tensor([2.])
    """

    low: Tensor
    high: Tensor


class SumState(NamedTuple):
    """A sum over tokens, ``total`` ``[c]`` or ``[c, c]``, and the number of ``tokens``, int64 ``[]``.

    >>> SumState(torch.eye(2), torch.tensor(2)).total.shape
    torch.Size([2, 2])
    """

    total: Tensor
    tokens: Tensor


def _tokens(x: Tensor, state_dtype: torch.dtype) -> Tensor:
    return rearrange(x, "... c -> (...) c").to(state_dtype)


def _no_tokens(device: torch.device | str | None) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=device)


def _range_init(c: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Range:
    low = torch.full((c,), torch.inf, dtype=dtype, device=device)
    return Range(low, -low)


def _range_update(state: Range, x: Tensor) -> Range:
    tokens = rearrange(x, "... c -> (...) c")
    if tokens.shape[0] == 0:
        return state
    # Reduced in the dtype of x, which is exact; only the [c] results are widened.
    low, high = reduce(tokens, "t c -> c", "min"), reduce(tokens, "t c -> c", "max")
    dtype = state.low.dtype
    return Range(torch.minimum(state.low, low.to(dtype)), torch.maximum(state.high, high.to(dtype)))


def _range_merge(a: Range, b: Range) -> Range:
    return Range(torch.minimum(a.low, b.low), torch.maximum(a.high, b.high))


def _range_finalize(state: Range) -> Range:
    return Range(state.low.clamp(max=0), state.high.clamp(min=0))


channel_range = Observer(_range_init, _range_update, _range_merge, _range_finalize)
"""Lowest and highest value of every input channel, widened to contain 0; the range ``[0, 0]`` without tokens.

It gives the static range of all inputs after any positive scaling of the channels: ``min(x / s)`` is the minimum over
the channels of ``low / s``. So no algorithm needs a second pass.
"""


def _absmean_init(c: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> SumState:
    return SumState(torch.zeros(c, dtype=dtype, device=device), _no_tokens(device))


def _absmean_update(state: SumState, x: Tensor) -> SumState:
    tokens = _tokens(x, state.total.dtype)
    return SumState(state.total + reduce(tokens.abs(), "t c -> c", "sum"), state.tokens + tokens.shape[0])


def _sum_merge(a: SumState, b: SumState) -> SumState:
    return SumState(a.total + b.total, a.tokens + b.tokens)


def _absmean_finalize(state: SumState) -> Tensor:
    return state.total / state.tokens.clamp(min=1)


channel_absmean = Observer(_absmean_init, _absmean_update, _sum_merge, _absmean_finalize)
"""Mean magnitude ``[c]`` of every input channel; zeros without tokens."""


def _square_update(state: SumState, x: Tensor) -> SumState:
    tokens = _tokens(x, state.total.dtype)
    return SumState(state.total + reduce(tokens.square(), "t c -> c", "sum"), state.tokens + tokens.shape[0])


def _sum_finalize(state: SumState) -> SumState:
    return state


channel_square = Observer(_absmean_init, _square_update, _sum_merge, _sum_finalize)
"""The sum of the squares of every input channel, ``total`` ``[c]``, which is the diagonal of :data:`gram`."""


def _gram_init(c: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> SumState:
    return SumState(torch.zeros(c, c, dtype=dtype, device=device), _no_tokens(device))


def _gram_update(state: SumState, x: Tensor) -> SumState:
    tokens = _tokens(x, state.total.dtype)
    # Computed from both, so that under vmap it is a batch if either is one.
    total = state.total + tokens.new_zeros(())
    for start, stop in strips(len(total)):
        # The matrix is symmetric: the part right of the diagonal is computed, and copied below it.
        right = torch.addmm(state.total[start:stop, start:], tokens[:, start:stop].T, tokens[:, start:])
        square, beside = right[:, : stop - start], right[:, stop - start :]
        total[start:stop, start:stop] = square.triu() + square.triu(1).T
        total[start:stop, stop:], total[stop:, start:stop] = beside, beside.T
    return SumState(total, state.tokens + tokens.shape[0])


gram = Observer(_gram_init, _gram_update, _sum_merge, _sum_finalize)
"""The Gram matrix ``total = sum of x^T x`` ``[c, c]``, symmetric to the last bit, and the number of tokens.

It gives the exact output error of any change ``delta`` ``[n, c]`` of the weight:

1. ``sum over tokens |x delta^T|^2 = tr(delta (sum x^T x) delta^T)``.
2. So the error depends on the tokens only through ``H = sum x^T x``.
3. The Hessian of the GPTQ paper is ``2 H``. The constant cancels in every quotient and is dropped here.
"""


class PairedState(NamedTuple):
    """The Gram matrix of the arriving inputs, ``gram``, and ``cross`` ``[c, c]``, the sum of ``(original - x)^T x``.

    >>> PairedState(SumState(torch.eye(2), torch.tensor(2)), torch.zeros(2, 2)).gram.tokens
    tensor(2)
    """

    gram: SumState
    cross: Tensor


def single(statistic: SumState | PairedState) -> SumState:
    """The Gram matrix of the arriving inputs, from a ``statistic`` that is paired or not.

    >>> single(SumState(torch.eye(2), torch.tensor(2))).tokens
    tensor(2)
    """
    return statistic.gram if isinstance(statistic, PairedState) else statistic


def _paired_init(c: int, **kwargs: Any) -> PairedState:
    return PairedState(_gram_init(c, **kwargs), _gram_init(c, **kwargs).total)


def _paired_update(state: PairedState, x: Tensor, original: Tensor | None = None) -> PairedState:
    tokens, cross = _tokens(x, state.cross.dtype), state.cross
    if original is not None and original.shape == tokens.shape:
        missing = original.to(cross.dtype) - tokens
        alike = torch.linalg.vecdot(missing, missing) <= torch.linalg.vecdot(tokens, tokens)
        cross = torch.addmm(cross, missing.masked_fill_(~alike[:, None], 0.0).T, tokens)
    return PairedState(_gram_update(state.gram, x), cross)


def _paired_merge(a: PairedState, b: PairedState) -> PairedState:
    return PairedState(_sum_merge(a.gram, b.gram), a.cross + b.cross)


def _paired_finalize(state: PairedState) -> PairedState:
    return state


paired_gram = Observer(_paired_init, _paired_update, _paired_merge, _paired_finalize, paired=True)
"""The Gram matrix of the arriving inputs ``x``, and their cross products with ``original - x``.

``update(state, x, original=None)``: ``original`` ``[t, c]`` are the inputs of the float model at the same call. Source:
Li et al. 2025, "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", equations 5 to 7.

``cross`` ignores originals of another shape, and tokens with ``|original - x| > |x|``: a router may have swapped them.
"""


def _product_init(observers: tuple[Observer, ...], c: int, **kwargs: Any) -> tuple[Any, ...]:
    return tuple(o.init(c, **kwargs) for o in observers)


def _product_update(
    observers: tuple[Observer, ...], state: tuple[Any, ...], x: Tensor, original: Tensor | None = None
) -> tuple[Any, ...]:
    return tuple(
        o.update(s, x, original) if o.paired else o.update(s, x) for o, s in zip(observers, state, strict=True)
    )


def _product_merge(observers: tuple[Observer, ...], a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(o.merge(s, t) for o, s, t in zip(observers, a, b, strict=True))


def _product_finalize(observers: tuple[Observer, ...], state: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(o.finalize(s) for o, s in zip(observers, state, strict=True))


@cache
def product(*observers: Observer) -> Observer:
    """Several ``observers`` as one, whose states and statistics are tuples. Equal arguments return the same object.

    >>> both = product(channel_range, channel_absmean)
    >>> ranges, absmean = both.finalize(both.update(both.init(2), torch.tensor([[1., -2.], [3., 0.]])))
    >>> absmean
    tensor([2., 1.])
    >>> ranges.high
    tensor([3., 0.])
    """
    init, update, merge, finalize = (
        partial(f, observers) for f in (_product_init, _product_update, _product_merge, _product_finalize)
    )
    return Observer(init, update, merge, finalize, paired=any(o.paired for o in observers))
