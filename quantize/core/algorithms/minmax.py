"""Rounding to the nearest code, with the scales of the full ranges: the baseline of every other algorithm.

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", section 2.1; for the symmetric rule see :func:`~quantize.core.affine.qparams`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from quantize.core import affine, input_loss, linear, observers
from quantize.core.algorithms.contract import Algorithm, BaseOptions, LayerSpec, Solution

QUANTIZES_INPUTS = frozenset({False, True})


@dataclass(frozen=True)
class Options(BaseOptions):
    """minmax has no options.

    >>> Options()
    Options()
    """


def algorithm(spec: LayerSpec, options: Options = Options()) -> Algorithm:
    """Rounding to nearest for the format ``spec``; ``options`` has no fields.

    Weights need no data. Inputs with strategy ``tensor`` take the range of the tokens seen.

    >>> import torch
    >>> from quantize.core import Scheme
    >>> solve = algorithm(LayerSpec(Scheme(bits=4))).solve
    >>> solve(torch.tensor([[0.7, -0.2]]), None).weight.codes.tolist()
    [[7, -2]]
    """
    observer = observers.product(observers.channel_range, observers.channel_square)
    return Algorithm(observer, partial(solve, spec), data_free=spec.inputs is None)


def solve(spec: LayerSpec, weight: Tensor, inputs: tuple[observers.Range, observers.SumState] | None) -> Solution:
    """Quantize ``weight`` ``[n, c]`` to the format ``spec``, by its own ranges.

    Static inputs also need ``inputs``: the ranges and squares ``[c]`` of the input channels. They give the notes of
    :func:`~quantize.core.input_loss.loss_notes`.

    Raises:
        ValueError: static inputs, and ``inputs`` is None.

    >>> import torch
    >>> from quantize.core import Scheme
    >>> solve(LayerSpec(Scheme(bits=4)), torch.tensor([[0.7, -0.2]]), None).weight.codes.tolist()
    [[7, -2]]
    """
    static, notes = None, dict[str, Tensor]()
    if spec.inputs is not None and spec.inputs.strategy == "tensor":
        if inputs is None:
            raise ValueError("inputs: None; accepted: ranges and squares of the channels, with inputs of one scale")
        static = linear.static_params(*inputs[0], spec.inputs)
        notes = input_loss.loss_notes(spec.inputs, weight.to(affine.working_dtype(weight)), *inputs)
    return Solution(affine.round_to_nearest(weight, spec.weight), spec.inputs, static=static, notes=notes)
