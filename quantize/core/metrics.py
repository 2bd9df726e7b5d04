"""Measures of the difference between a quantized layer and the original."""

from __future__ import annotations

import torch
from einops import reduce
from torch import Tensor


def row_error(delta: Tensor, gram: Tensor) -> Tensor:
    """Output error of every output channel, ``[n]``: the diagonal of ``delta H delta^T``.

    ``delta`` ``[n, c]`` is the change of the weight, and ``gram`` ``[c, c]`` the sum of ``x^T x``. The result is the
    sum over the tokens of ``(x . delta_n)^2``. Rows are independent, so the best choice for each row gives the least
    sum.

    >>> row_error(torch.tensor([[1., 1.], [1., -1.]]), torch.tensor([[2., 1.], [1., 2.]]))
    tensor([6., 2.])
    """
    total = delta.new_zeros(len(delta))
    for start, stop in strips(len(gram)):
        # The matrix is symmetric: only the part above the diagonal is read, and counts twice.
        own, above = delta[:, start:stop], delta[:, :start] @ gram[:start, start:stop]
        product = torch.addmm(above, own, gram[start:stop, start:stop], beta=2)
        total = total + reduce(product.mul_(own), "n c -> n", "sum")
    # A square cannot be negative: a result below 0 is a rounding error.
    return total.clamp(min=0)


# Narrower strips cost more in calls than they save.
_STRIPS, _NARROWEST = 8, 64


def strips(c: int) -> list[tuple[int, int]]:
    """The starts and ends of strips that cover a symmetric matrix ``[c, c]``, to compute one side of its diagonal.

    >>> strips(100)
    [(0, 64), (64, 100)]
    """
    width = max(-(-c // _STRIPS), _NARROWEST)
    return [(start, min(start + width, c)) for start in range(0, c, width)]


def output_error(delta: Tensor, gram: Tensor) -> Tensor:
    """``tr(delta H delta^T)`` ``[]``: the squared error of the outputs after a change ``delta`` of the weight.

    ``delta`` is ``[n, c]``, and ``H`` is ``gram`` ``[c, c]``.

    >>> output_error(torch.tensor([[1., 1.], [1., -1.]]), torch.tensor([[2., 1.], [1., 2.]]))
    tensor(8.)
    """
    return row_error(delta, gram).sum()


def sqnr(reference: Tensor, approximation: Tensor) -> Tensor:
    """Signal to quantization noise ratio in dB, ``[]``: ``10 log10(sum x^2 / sum (x - y)^2)``.

    ``x`` is ``reference`` ``[...]`` and ``y`` is ``approximation`` ``[...]``. Equal tensors give +inf.

    >>> sqnr(torch.tensor([1.0, 0.0]), torch.tensor([0.9, 0.0])).round()
    tensor(20.)
    """
    noise = reference - approximation
    # Scaled by the largest magnitude, so that squares neither overflow nor vanish.
    largest = torch.maximum(reference.abs().amax(), noise.abs().amax())
    unit = torch.where(largest > 0, largest, 1.0)
    noise_power = (noise / unit).square().sum()
    signal = (reference / unit).square().sum()
    return torch.where(noise_power > 0, 10 * torch.log10(signal / noise_power), torch.inf)
