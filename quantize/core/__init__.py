"""The pure core: functions on tensors, for any framework that has tensors to quantize.

Nothing here knows modules, files or global state: the same inputs give the same bits. Shapes use these letters:

- ``n`` output channels, ``c`` input channels, ``t`` tokens.
- ``g`` groups of a row, ``k`` elements of a group, ``p`` rows that have scales of their own.
- ``e`` members of a stack, such as experts; ``r`` candidates or other rows; ``l`` layers, ``f`` formats.

Values that are neither functions nor classes:

- ``ALGORITHMS``: the modules of the algorithms, by the name that a config gives them.
- ``channel_range``: the :class:`Observer` of the lowest and highest value of every input channel.
- ``channel_absmean``: the one of their mean magnitudes.
- ``channel_square``: the one of the sums of their squares.
- ``gram``: the one of their Gram matrix, the sum of ``x^T x`` over the tokens.
- ``paired_gram``: the one of the Gram matrix, and of cross products with the inputs of the float model.

>>> import torch
>>> q = round_to_nearest(torch.tensor([[0.5, -1.0, 0.25]]), Scheme(bits=8))
>>> dequantize(q)
tensor([[ 0.5000, -1.0000,  0.2500]])
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
    qtensor,
    ranges,
    refine,
    scheme,
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
from quantize.core.algorithms import (
    ALGORITHMS,
    Algorithm,
    LayerSpec,
    Solution,
    awq,
    contract,
    gptq,
    minmax,
    smoothquant,
)
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
    "contract",
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
    "qtensor",
    "quantize",
    "ranges",
    "refine",
    "round_to_nearest",
    "scheme",
    "shrinkage",
    "smoothquant",
    "to_groups",
]
