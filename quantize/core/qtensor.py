"""A quantized matrix as an immutable value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.utils._pytree as pytree
from torch import Tensor

from quantize.core.scheme import Scheme


class QParams(NamedTuple):
    """The map between numbers and codes: ``x = (code - zero_point) * scale``.

    - ``scale``: ``[1, 1]``, ``[n, 1]`` or ``[n, g]``, in float32, or float64 for float64 data. It is never 0, and
      negative only after :func:`~quantize.core.ranges.search` with ``signed``.
    - ``zero_point``: int8 ``[1, 1]``, ``[n, 1]`` or ``[n, g]``, or None for a symmetric scheme.

    >>> import torch
    >>> QParams(torch.ones(2, 1)).zero_point is None
    True
    """

    scale: Tensor
    zero_point: Tensor | None = None


@dataclass(frozen=True, eq=False)
class QTensor:
    """A quantized matrix: codes, and the parameters that turn them into numbers. A torch pytree with a static scheme.

    ``codes`` is int8 ``[n, c]`` with values in ``[scheme.qmin, scheme.qmax]``. ``scale`` and ``zero_point`` have the
    shape ``[1, 1]``, ``[n, 1]`` or ``[n, g]`` of :class:`QParams`. The scale has the rank of the codes, so one
    :func:`~quantize.core.affine.dequantize` serves every strategy.

    >>> import torch
    >>> q = QTensor(torch.tensor([[7, -8]], dtype=torch.int8), torch.tensor([[0.5]]), None, Scheme(bits=4))
    >>> [leaf.dtype for leaf in pytree.tree_leaves(q)]
    [torch.int8, torch.float32]
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: Scheme

    @property
    def params(self) -> QParams:
        """Scale and zero point."""
        return QParams(self.scale, self.zero_point)

    def rows(self, rows: slice) -> QTensor:
        """A copy of the output channels ``rows``."""
        scale, zero_point = (p if p is None or len(p) == 1 else p[rows].clone() for p in self.params)
        assert scale is not None
        return QTensor(self.codes[rows].clone(), scale, zero_point, self.scheme)


# torch.func.vmap refuses None as a leaf of a result, so the tree leaves absent tensors out.
def _flatten(q: QTensor) -> tuple[list[Any], Scheme]:
    return [q.codes, *present(q.params)], q.scheme


def _unflatten(leaves: Any, scheme: Scheme) -> QTensor:
    codes, *params = leaves
    return QTensor(codes, *QParams(*params), scheme)


def present(params: QParams) -> tuple[Tensor, ...]:
    """The tensors of ``params``, without the None of a symmetric scheme; ``QParams(*present(params))`` is ``params``.

    >>> import torch
    >>> present(QParams(torch.ones(1, 1)))
    (tensor([[1.]]),)
    """
    return (params.scale,) if params.zero_point is None else (params.scale, params.zero_point)


pytree.register_pytree_node(QTensor, _flatten, _unflatten, serialized_type_name="quantize.QTensor")
