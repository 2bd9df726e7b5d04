"""Rounding to the nearest code, with the scales of the full ranges: the baseline of every other algorithm."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from quantize.core import affine, input_loss, linear, observers
from quantize.core.algorithms.contract import Algorithm, BaseOptions, LayerSpec, Solution

QUANTIZES_INPUTS = frozenset({False, True})


@dataclass(frozen=True)
class Options(BaseOptions):
    """minmax has no options."""


def algorithm(spec: LayerSpec, options: Options = Options()) -> Algorithm:
    """Round to nearest. Weights need no data; inputs with strategy ``tensor`` take the range of the tokens seen.

    >>> import torch
    >>> from quantize.core import Scheme
    >>> solve = algorithm(LayerSpec(Scheme(bits=4))).solve
    >>> solve(torch.tensor([[0.7, -0.2]]), None).weight.codes.tolist()
    [[7, -2]]
    """
    observer = observers.product(observers.channel_range, observers.channel_square)
    return Algorithm(observer, partial(solve, spec), data_free=spec.inputs is None)


def solve(spec: LayerSpec, weight: Tensor, inputs: tuple[observers.Range, observers.SumState] | None) -> Solution:
    """Quantize ``weight`` ``[n, c]`` by its own ranges; ``inputs``: ranges and squares ``[c]`` of the input channels.

    ``inputs`` is read with static inputs only. Notes for those: :func:`~quantize.core.input_loss.loss_notes`.
    """
    static, notes = None, dict[str, Tensor]()
    if spec.inputs is not None and spec.inputs.strategy == "tensor":
        if inputs is None:
            raise ValueError("inputs: None; accepted: ranges and squares of the channels, with inputs of one scale")
        static = linear.static_params(*inputs[0], spec.inputs)
        notes = input_loss.loss_notes(spec.inputs, weight.to(affine.working_dtype(weight)), *inputs)
    return Solution(affine.round_to_nearest(weight, spec.weight), spec.inputs, static=static, notes=notes)
