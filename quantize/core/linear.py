"""The linear layer on quantized operands. This is the reference that every kernel must reproduce."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from einops import rearrange, reduce
from torch import Tensor

from quantize.core import affine
from quantize.core.qtensor import QParams, QTensor
from quantize.core.scheme import Scheme

# A difference of int8 codes is at most 255. The sum of fewer products of two than this fits int32.
_INT32_LENGTH = 2**15
# The sum of 1024 products of two int8 is at most 1024 * 2^14 = 2^24, so float32 holds every partial sum exactly.
_EXACT_LENGTH = 1024


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` of int8 matrices ``a`` ``[t, c]`` and ``b`` ``[n, c]``, exact in int32: ``[t, n]``.

    It uses the float32 matmul of any device, in slices of ``c`` short enough that no sum is rounded. TF32 and HF32
    hold int8 values exactly, too. The result fits int32 for ``c < 2^17``.

    >>> int_matmul(torch.tensor([[1, -2]], dtype=torch.int8), torch.tensor([[3, 4]], dtype=torch.int8))
    tensor([[-5]], dtype=torch.int32)
    """
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for left, right in zip(*(torch.split(m, _EXACT_LENGTH, 1) for m in (a, b)), strict=True):
        total = total + (left.float() @ right.float().T).to(torch.int32)
    return total


def smooth(x: Tensor, smoothing: Tensor | None) -> Tensor:
    """``x`` ``[..., c]`` divided by ``smoothing`` ``[c]``, in the wider dtype of the two; None leaves ``x`` unchanged.

    >>> smooth(torch.tensor([[2.0, 3.0]]), torch.tensor([2.0, 1.0]))
    tensor([[1., 3.]])
    """
    return x if smoothing is None else x / smoothing


def static_params(low: Tensor, high: Tensor, scheme: Scheme, *, smoothing: Tensor | None = None) -> QParams:
    """One scale ``[1, 1]`` in ``scheme`` for all inputs, whose channels range from ``low`` ``[c]`` to ``high`` ``[c]``.

    The ranges are divided by ``smoothing`` ``[c]`` first.

    >>> static_params(torch.tensor([-4., 0.]), torch.tensor([0., 1.]), Scheme(strategy="tensor")).scale
    tensor([[0.0312]])
    """
    if smoothing is not None:
        low, high = low / smoothing, high / smoothing
    return affine.qparams(reduce(low, "c -> 1 1", "min"), reduce(high, "c -> 1 1", "max"), scheme)


def input_params(x: Tensor, scheme: Scheme, static: QParams | None = None) -> QParams:
    """Scale and zero point in ``scheme`` for tokens ``x`` ``[t, c]``: ``static`` if given, else from their ranges.

    >>> input_params(torch.tensor([[127.0], [-64.0]]), Scheme(strategy="token")).scale.tolist()
    [[1.0], [0.5]]
    """
    return affine.qparams(*affine.group_ranges(x, scheme), scheme) if static is None else static


def integer_linear(
    x: QTensor, weight: QTensor, bias: Tensor | None = None, *, matmul: Callable[[Tensor, Tensor], Tensor] = int_matmul
) -> Tensor:
    """``x W^T + bias`` of quantized inputs and weights: ``[t, n]`` in float32.

    ``x`` has codes ``[t, c]``, and one scale for the tensor or for each token. ``weight`` has codes ``[n, c]``, and one
    scale for the tensor or for each channel. Both may have zero points. ``bias`` is ``[n]``. The integer sum is exact;
    the scales and the bias are applied in float32. ``matmul`` computes what :func:`int_matmul` does, exactly.

    Derivation, with ``q`` for the codes and ``z`` for the zero point:

    1. ``y = sum_c (q_x - z_x) s_x (q_w - z_w) s_w + b``;
    2. neither scale depends on ``c``, so ``y = s_x s_w S + b`` with
       ``S = sum_c q_x q_w - z_x sum_c q_w - z_w sum_c q_x + c z_x z_w``: one matmul and two row sums;
    3. each term of ``S`` is below ``c 2^14``, and ``S`` itself below ``c 2^16``, which int32 holds for ``c < 2^15``.
       Longer sums with a zero point are int64.

    Raises:
        ValueError: a weight with strategy ``group``: step 2 needs one scale for the whole row.

    >>> x = QTensor(torch.tensor([[1, 2]], dtype=torch.int8), torch.tensor([[0.5]]), None, Scheme(strategy="token"))
    >>> weight = QTensor(torch.tensor([[3, 4]], dtype=torch.int8), torch.tensor([[2.0]]), None, Scheme())
    >>> integer_linear(x, weight, torch.tensor([1.0]))
    tensor([[12.]])
    """
    if weight.scheme.strategy == "group":
        raise ValueError(f"weight: {weight.scheme}; accepted with quantized inputs: strategy tensor or channel")
    total, c = matmul(x.codes, weight.codes), weight.codes.shape[1]
    if x.zero_point is not None or weight.zero_point is not None:
        wide = torch.int32 if c < _INT32_LENGTH else torch.int64
        total = total.to(wide)
        if x.zero_point is not None:
            # torch returns the sum of int32 as int64.
            sums = reduce(weight.codes.to(wide), "n c -> 1 n", "sum").to(wide)
            if weight.zero_point is not None:
                sums = sums - c * rearrange(weight.zero_point.to(wide), "n 1 -> 1 n")
            total = total - x.zero_point.to(wide) * sums
        if weight.zero_point is not None:
            sums = reduce(x.codes.to(wide), "t c -> t 1", "sum").to(wide)
            total = total - sums * rearrange(weight.zero_point.to(wide), "n 1 -> 1 n")
    y = total * x.scale * rearrange(weight.scale, "n 1 -> 1 n")
    return y if bias is None else y + bias


def centered(weight: QTensor) -> QTensor | None:
    """The same numbers as ``weight``, without a zero point; None where a ``codes - zero_point`` does not fit int8.

    Codes of at most 7 bits always fit. The scheme of the result has 8 bits.

    >>> q = QTensor(torch.tensor([[-8, 7]], dtype=torch.int8), torch.ones(1, 1), torch.tensor([[7]]), Scheme(4, False))
    >>> centered(q).codes.tolist()
    [[-15, 0]]
    """
    scheme = replace(weight.scheme, bits=8, symmetric=True)
    if weight.zero_point is None:
        return QTensor(weight.codes, weight.scale, None, scheme)
    codes = affine.dequantize(QTensor(weight.codes, torch.ones_like(weight.scale), weight.zero_point, weight.scheme))
    narrow = codes.to(torch.int8)
    return QTensor(narrow, weight.scale, None, scheme) if bool((narrow == codes).all()) else None


def integer_bias(weight: QTensor, static: QParams, bias: Tensor | None = None) -> Tensor:
    """The bias as an integer that is added to the sum of codes, before the scales are applied: ``[n]`` in int64.

    ``weight`` is as for :func:`integer_linear`, without a zero point (see :func:`centered`). ``static`` ``[1, 1]``
    belongs to the inputs, and ``bias`` is ``[n]``. With ``b`` for the result::

        y = s_x s_w (sum_c q_x q_w + b),  b = round(bias / (s_x s_w)) - z_x sum_c q_w

    This is step 2 of :func:`integer_linear`. The bias is off by at most half a unit ``s_x s_w``. Quotients are float64.

    >>> weight = QTensor(torch.tensor([[3, 4]], dtype=torch.int8), torch.tensor([[0.5]]), None, Scheme())
    >>> static = QParams(torch.tensor([[0.5]]), torch.tensor([[2]], dtype=torch.int8))
    >>> integer_bias(weight, static, torch.tensor([1.0])).tolist()
    [-10]
    """
    sums = reduce(weight.codes.to(torch.int64), "n c -> n", "sum")
    total = torch.zeros_like(sums) if static.zero_point is None else -static.zero_point.to(torch.int64)[0] * sums
    if bias is None:
        return total
    unit = (static.scale * weight.scale)[:, 0].double()
    return total + torch.round(bias.double() / unit).to(torch.int64)


def quantized_linear(
    x: Tensor,
    weight: QTensor,
    bias: Tensor | None = None,
    *,
    inputs: Scheme | None = None,
    smoothing: Tensor | None = None,
    static: QParams | None = None,
    matmul: Callable[[Tensor, Tensor], Tensor] = int_matmul,
) -> Tensor:
    """A deployed linear layer: ``x`` ``[..., c]`` to ``[..., n]``, in the dtype of ``x``.

    ``x`` is divided by ``smoothing`` ``[c]`` first. With ``inputs`` None it is then multiplied by the dequantized
    ``weight``, which is rounded to the dtype of ``x``. Otherwise it is quantized, with the ``static`` parameters or
    with those of its own range, and :func:`integer_linear` follows. ``bias`` ``[n]`` and ``matmul`` are as there.

    >>> weight = affine.round_to_nearest(torch.tensor([[127., 1.]]), Scheme())
    >>> quantized_linear(torch.tensor([1., 2.]), weight, inputs=Scheme(strategy="token"))
    tensor([130.])
    """
    tokens = smooth(rearrange(x, "... c -> (...) c"), smoothing)
    if inputs is None:
        y = _float_linear(tokens.to(x.dtype), weight, bias)
    else:
        quantized = affine.quantize(tokens, input_params(tokens, inputs, static), inputs)
        y = integer_linear(quantized, weight, bias, matmul=matmul).to(x.dtype)
    return y.reshape(*x.shape[:-1], weight.codes.shape[0])


def fake_quantized_linear(
    x: Tensor,
    weight: QTensor,
    bias: Tensor | None = None,
    *,
    inputs: Scheme | None = None,
    smoothing: Tensor | None = None,
    static: QParams | None = None,
) -> Tensor:
    """:func:`quantized_linear` in floating point: the inputs are fake-quantized and all products are floats.

    ``x`` ``[..., c]``, ``weight``, ``bias`` ``[n]``, ``inputs``, ``smoothing`` ``[c]`` and ``static`` are the same. The
    results differ by rounding only. With ``u`` the unit roundoff of the dtype of ``x``, ``v`` that of the accumulation,
    and ``m = |x'| |W'|^T + |bias|`` on the dequantized operands::

        |difference| <= (5 u + (c + 8) v) m

    1. the float form rounds each operand to the dtype of ``x`` (``2 u``), sums ``c`` products and the bias in ``v``
       (``(c + 1) v``), and rounds the product and the sum with the bias (``2 u``);
    2. the integer form sums exactly, multiplies by two scales and adds the bias in float32 (``3 v``), and rounds
       once to the dtype of ``x`` (``u``);
    3. the dequantized operands are themselves rounded products of a code and a scale (``2 v``); the rest of the
       ``8 v`` covers the products of these terms.

    Weight-only layers compute the same expression in both forms.

    >>> weight = affine.round_to_nearest(torch.tensor([[127., 1.]]), Scheme())
    >>> fake_quantized_linear(torch.tensor([1., 127.]), weight, inputs=Scheme(strategy="token"))
    tensor([254.])
    """
    tokens = smooth(rearrange(x, "... c -> (...) c"), smoothing)
    if inputs is not None:
        tokens = affine.fake_quantize(tokens, input_params(tokens, inputs, static), inputs)
    return _float_linear(tokens.to(x.dtype), weight, bias).reshape(*x.shape[:-1], weight.codes.shape[0])


def _float_linear(tokens: Tensor, weight: QTensor, bias: Tensor | None) -> Tensor:
    y = tokens @ affine.dequantize(weight).to(tokens.dtype).T
    return y if bias is None else y + bias.to(tokens.dtype)
