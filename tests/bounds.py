"""How far results may be apart that differ in roundings alone. ``u``: the unit roundoff of a dtype."""

import torch

from quantize.core import affine, linear


def unit(dtype):
    """Half the distance from 1 to the next number: a rounded result is off by at most this share of itself."""
    return torch.finfo(dtype).eps / 2


V = unit(torch.float32)


def reach(weight):
    """``(|code| + |zero_point|) * |scale|`` ``[n, c]``, float64: no less than ``|W|``.

    Scale and zero point may be rounded apart, so that nothing of one can be set off against the other.
    """
    zero = torch.zeros_like(weight.scale) if weight.zero_point is None else weight.zero_point
    codes = affine.to_groups(weight.codes.double().abs(), weight.scheme)
    found = (codes + zero.double().abs()[..., None]) * weight.scale.double().abs()[..., None]
    return affine.from_groups(found, weight.scheme, weight.codes.shape)


def matmul_bound(layer, x):
    """How far two float matmuls of ``x`` ``[..., c]`` with the weight of a converted layer may be apart.

    With ``m = |x| |W|^T + |bias|``, a matmul that rounds weights to the dtype is off by: scale or zero point and weight
    (``2 u``), ``c`` products and as many sums in float32 (``(c + 4) v`` with scales and tokens that are rounded there),
    the product and its sum with the bias (``2 u``). Two of them: twice that.
    """
    u, tokens = unit(x.dtype), linear.smooth(x.flatten(0, -2), layer.solution.smoothing).to(x.dtype).double()
    m = tokens.abs() @ reach(layer.solution.weight).T
    m += 0 if layer.bias is None else layer.bias.double().abs()
    return (8 * u + (2 * x.shape[-1] + 16) * V) * m


def fixed_point_bound(x, weight):
    """The bound that :func:`quantize.shell.deploy.kernels.integers.fixed_point_linear` states, without a bias."""
    step = x.abs().amax(1, keepdim=True).double() / (127 * 2**16)
    size = ((weight.codes.double() - (0 if weight.zero_point is None else weight.zero_point)) * weight.scale).abs()
    return step * size.sum(1) + 8 * V * (x.double().abs() @ size.T)
