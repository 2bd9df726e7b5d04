"""A quantized matrix as an immutable value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.utils._pytree as pytree
from torch import Tensor

from quantize.core.scheme import Scheme


class QParams(NamedTuple):
    """The map between numbers and codes: ``x = (code - zero_point) * scale``.

    ``scale`` is float32 (float64 for float64 data) and never 0, of shape ``[1, 1]``, ``[n, 1]`` or ``[n, g]``; it is
    positive unless a symmetric scheme was searched with signs, see :func:`~quantize.core.ranges.search`.
    ``zero_point`` is int8 of the same shape, or None for a symmetric scheme.
    """

    scale: Tensor
    zero_point: Tensor | None = None


@dataclass(frozen=True, eq=False)
class QTensor:
    """Codes and the parameters to read them; a torch pytree whose scheme is static.

    ``codes`` is int8 ``[n, c]`` with values in ``[scheme.qmin, scheme.qmax]``; for ``scale`` and ``zero_point`` see
    :class:`QParams`. The scale keeps the rank of the codes, so that one :func:`~quantize.core.affine.dequantize`
    serves every strategy.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: Scheme

    @property
    def params(self) -> QParams:
        """Scale and zero point alone."""
        return QParams(self.scale, self.zero_point)

    def rows(self, rows: slice) -> QTensor:
        """The output channels ``rows``, in memory of their own."""
        scale, zero_point = (p if p is None or len(p) == 1 else p[rows].clone() for p in self.params)
        assert scale is not None
        return QTensor(self.codes[rows].clone(), scale, zero_point, self.scheme)


# None would be a leaf, which torch.func.vmap refuses in a result: absent tensors are absent from the tree.
def _flatten(q: QTensor) -> tuple[list[Any], Scheme]:
    return [q.codes, *present(q.params)], q.scheme


def _unflatten(leaves: Any, scheme: Scheme) -> QTensor:
    codes, *params = leaves
    return QTensor(codes, *QParams(*params), scheme)


def present(params: QParams) -> tuple[Tensor, ...]:
    """The tensors of ``params``, without the None of a symmetric scheme; ``QParams(*present(p))`` is ``p``."""
    return (params.scale,) if params.zero_point is None else (params.scale, params.zero_point)


pytree.register_pytree_node(QTensor, _flatten, _unflatten, serialized_type_name="quantize.QTensor")
