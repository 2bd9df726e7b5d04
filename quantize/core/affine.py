"""The affine map between numbers and integer codes, for every granularity.

:func:`to_groups` reduces all strategies to one: elements that share a scale lie along the last axis, so a scale
``[p, g]`` broadcasts over its elements ``[p, g, k]``.
"""

from __future__ import annotations

import torch
from einops import rearrange, reduce
from torch import Tensor

from quantize.core.qtensor import QParams, QTensor
from quantize.core.scheme import Scheme


def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which ranges and scales of ``x`` ``[...]`` are computed: float64 for float64, else float32.

    >>> working_dtype(torch.ones(1, dtype=torch.bfloat16))
    torch.float32
    """
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def to_groups(x: Tensor, scheme: Scheme) -> Tensor:
    """Bring the elements of ``x`` ``[n, c]`` that share a scale onto the last axis of ``[p, g, k]``.

    The strategy of ``scheme`` decides: tensor gives ``[1, 1, n*c]``, channel and token ``[n, 1, c]``, and group
    ``[n, g, group_size]``. A shorter last group is padded with zeros. Every range contains 0, so padding changes no
    scale.

    >>> to_groups(torch.ones(2, 5), Scheme(strategy="group", group_size=3)).shape
    torch.Size([2, 2, 3])
    """
    if scheme.strategy == "tensor":
        return rearrange(x, "n c -> 1 1 (n c)")
    if scheme.group_size is None:
        return rearrange(x, "n c -> n 1 c")
    missing = -x.shape[1] % scheme.group_size
    padded = torch.constant_pad_nd(x, (0, missing)) if missing else x
    return rearrange(padded, "n (g k) -> n g k", k=scheme.group_size)


def from_groups(groups: Tensor, scheme: Scheme, shape: tuple[int, int]) -> Tensor:
    """Undo :func:`to_groups` with the same ``scheme``: ``groups`` ``[p, g, k]`` to ``[n, c]``; ``shape`` is ``(n, c)``.

    >>> x = torch.arange(10.).view(2, 5)
    >>> scheme = Scheme(strategy="group", group_size=3)
    >>> torch.equal(from_groups(to_groups(x, scheme), scheme, (2, 5)), x)
    True
    """
    n, c = shape
    if scheme.strategy == "tensor":
        return rearrange(groups, "1 1 (n c) -> n c", n=n, c=c)
    return rearrange(groups, "n g k -> n (g k)")[:, :c]


def group_ranges(x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value of every group of ``x`` ``[n, c]``, widened to contain 0.

    Returns two tensors of shape ``scheme.grid_shape(n, c)`` in the dtype of ``x``. A group that holds NaN gets NaN.

    >>> low, high = group_ranges(torch.tensor([[1., 3.], [-2., 1.]]), Scheme())
    >>> low.flatten().tolist(), high.flatten().tolist()
    ([0.0, -2.0], [3.0, 1.0])
    """
    if x.numel() == 0:
        zero = x.new_zeros(scheme.grid_shape(*x.shape))
        return zero, zero.clone()
    groups = to_groups(x, scheme)
    # Two reductions: aminmax along a dimension was 3 to 6 times slower on CPUs.
    low, high = reduce(groups, "n g k -> n g", "min"), reduce(groups, "n g k -> n g", "max")
    return low.clamp(max=0), high.clamp(min=0)


def qparams(low: Tensor, high: Tensor, scheme: Scheme) -> QParams:
    """Scale and zero point, of one shape ``[...]``, for ranges from ``low`` to ``high`` ``[...]``, which contain 0.

    With ``b`` the bits of ``scheme``:

    - Symmetric: the longer tail reaches its end of the codes. ``scale = -low / 2^(b-1)`` where ``-low > high``, else
      ``high / (2^(b-1) - 1)``. There is no zero point.
    - Asymmetric: ``scale = (high - low) / (2^b - 1)``, ``zero_point = round(-2^(b-1) - low / scale)``.

    A range of zero width gets scale 1. A scale is at least the smallest normal number, so no division is by 0. The
    result is float32, or float64 for float64 ranges.

    Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", section 2.1 (asymmetric). The symmetric rule also uses the code ``-2^(b-1)``.

    >>> qparams(torch.tensor([-1.0, -1.0]), torch.tensor([0.5, 2.0]), Scheme(bits=4)).scale
    tensor([0.1250, 0.2857])
    """
    dtype = working_dtype(low)
    low, high = low.to(dtype), high.to(dtype)
    tiny = torch.finfo(dtype).tiny
    if scheme.symmetric:
        scale = torch.where(-low > high, low / scheme.qmin, high / scheme.qmax)
    else:
        # Halving is exact and keeps high - low from overflowing.
        scale = (high / 2 - low / 2) / ((scheme.qmax - scheme.qmin) / 2)
    scale = torch.where((low == 0) & (high == 0), 1.0, scale.clamp(min=tiny))
    if scheme.symmetric:
        return QParams(scale)
    zero_point = torch.round(scheme.qmin - low / scale).clamp(scheme.qmin, scheme.qmax)
    return QParams(scale, zero_point.to(torch.int8))


def quantize(x: Tensor, params: QParams, scheme: Scheme) -> QTensor:
    """Round ``x`` ``[n, c]`` to codes of ``scheme``: ``clip(round(x / scale) + zero_point)``, round half to even.

    ``x`` has any float dtype; the division is in the dtype of the scale. Infinite values clip. NaN has no defined
    code. Where nothing clips, the error is at most ``scale / 2``.

    Raises:
        RuntimeError: the shapes of ``x`` and ``params`` do not fit (from torch).

    >>> q = quantize(torch.tensor([[0.4, -1.0, 9.0]]), QParams(torch.tensor([[0.25]])), Scheme(bits=4))
    >>> q.codes.tolist()
    [[2, -4, 7]]
    """
    codes = _codes(to_groups(x, scheme), params, scheme).to(torch.int8)
    n, c = x.shape
    return QTensor(from_groups(codes, scheme, (n, c)), params.scale, params.zero_point, scheme)


def dequantize(q: QTensor) -> Tensor:
    """The numbers that the codes of ``q`` stand for: ``(codes - zero_point) * scale``, ``[n, c]``, dtype of the scale.

    >>> dequantize(QTensor(torch.tensor([[2, -4]], dtype=torch.int8), torch.tensor([[0.25]]), None, Scheme(bits=4)))
    tensor([[ 0.5000, -1.0000]])
    """
    n, c = q.codes.shape
    # The subtraction would wrap in int8; every difference of codes is exact in float32.
    groups = to_groups(q.codes, q.scheme).to(q.scale.dtype)
    return from_groups(_values(groups, q.params), q.scheme, (n, c))


def fake_quantize(x: Tensor, params: QParams, scheme: Scheme) -> Tensor:
    """``dequantize(quantize(x, params, scheme))`` of ``x`` ``[n, c]`` without int8, in its dtype; NaN stays NaN.

    >>> fake_quantize(torch.tensor([[0.4, -1.0, 9.0]]), QParams(torch.tensor([[0.25]])), Scheme(bits=4))
    tensor([[ 0.5000, -1.0000,  1.7500]])
    """
    n, c = x.shape
    values = from_groups(_values(_codes(to_groups(x, scheme), params, scheme), params), scheme, (n, c))
    if x.dtype == torch.float16:
        # The last step of a range may exceed the largest number of the dtype.
        values = values.clamp(torch.finfo(x.dtype).min, torch.finfo(x.dtype).max)
    return values.to(x.dtype)


def round_to_nearest(x: Tensor, scheme: Scheme) -> QTensor:
    """Quantize ``x`` ``[n, c]`` to ``scheme`` with the scales of its own ranges.

    >>> round_to_nearest(torch.tensor([[0.5, -1.0, 0.25]]), Scheme()).codes.tolist()
    [[64, -128, 32]]
    """
    return quantize(x, qparams(*group_ranges(x, scheme), scheme), scheme)


def select(condition: Tensor, yes: QParams, no: QParams) -> QParams:
    """``torch.where(condition, yes, no)`` for parameters of one scheme; ``condition`` ``[...]`` broadcasts.

    >>> select(torch.tensor([[True], [False]]), QParams(torch.ones(2, 1)), QParams(torch.zeros(2, 1))).scale.tolist()
    [[1.0], [0.0]]
    """
    scale = torch.where(condition, yes.scale, no.scale)
    if yes.zero_point is None or no.zero_point is None:
        return QParams(scale)
    return QParams(scale, torch.where(condition, yes.zero_point, no.zero_point))


def _codes(groups: Tensor, params: QParams, scheme: Scheme) -> Tensor:
    codes = torch.round(groups / params.scale[..., None])
    if params.zero_point is not None:
        codes = codes + params.zero_point[..., None]
    return codes.clamp(scheme.qmin, scheme.qmax)


def _values(codes: Tensor, params: QParams) -> Tensor:
    if params.zero_point is not None:
        codes = codes - params.zero_point[..., None]
    return codes * params.scale[..., None]
