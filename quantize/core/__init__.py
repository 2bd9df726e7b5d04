"""The pure core: functions on tensors, for any framework that has tensors to quantize.

Shapes are written in the letters ``n`` output channels, ``c`` input channels, ``g`` groups, ``k`` elements of a
group, ``t`` tokens. Nothing here knows modules, devices, files or global state: same inputs, same bits.
"""

from quantize.core import (
    affine,
    budget,
    correction,
    input_loss,
    linear,
    metrics,
    observers,
    packing,
    ranges,
    refine,
    shrinkage,
)
from quantize.core.affine import (
    dequantize,
    fake_quantize,
    from_groups,
    group_ranges,
    qparams,
    quantize,
    round_to_nearest,
    to_groups,
)
from quantize.core.algorithms import ALGORITHMS, Algorithm, LayerSpec, Solution, awq, gptq, minmax, smoothquant
from quantize.core.observers import Observer, channel_absmean, channel_range, channel_square, gram, paired_gram, product
from quantize.core.qtensor import QParams, QTensor
from quantize.core.scheme import Scheme

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "LayerSpec",
    "Observer",
    "QParams",
    "QTensor",
    "Scheme",
    "Solution",
    "affine",
    "awq",
    "budget",
    "channel_absmean",
    "channel_range",
    "channel_square",
    "correction",
    "dequantize",
    "fake_quantize",
    "from_groups",
    "gptq",
    "gram",
    "group_ranges",
    "input_loss",
    "linear",
    "metrics",
    "minmax",
    "observers",
    "packing",
    "paired_gram",
    "product",
    "qparams",
    "quantize",
    "ranges",
    "refine",
    "round_to_nearest",
    "shrinkage",
    "smoothquant",
    "to_groups",
]
