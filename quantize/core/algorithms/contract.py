"""The contract of a quantization algorithm: pure functions that hold a format and options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Protocol

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from quantize.core.affine import dequantize
from quantize.core.observers import Observer
from quantize.core.qtensor import QParams, QTensor, present
from quantize.core.scheme import Scheme


def option(default: Any, accepted: str, check: Callable[[Any], bool] = lambda value: True) -> Any:
    """A field of an ``Options`` class.

    ``default`` also fixes the type. ``accepted`` describes the accepted values for errors, and ``check`` tests them.

    >>> option(2, "an int, at least 1", lambda value: value >= 1).default
    2
    """
    return field(default=default, metadata={"accepted": accepted, "check": check})


@dataclass(frozen=True)
class BaseOptions:
    """Options of an algorithm: :func:`option` makes every field, and the name of a field is its key in a config.

    Raises:
        ValueError: a value that its field does not accept, as ``<key>: <value>; accepted: <what>``.

    >>> from quantize.core import gptq
    >>> gptq.Options(damp=2)
    Traceback (most recent call last):
    ValueError: damp: 2; accepted: a number from 0 to 1
    """

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            kinds = (int, float) if type(f.default) is float else (type(f.default),)
            if type(value) not in kinds or not f.metadata["check"](value):
                raise ValueError(f"{f.name}: {value!r}; accepted: {f.metadata['accepted']}")


@dataclass(frozen=True)
class LayerSpec:
    """The format of a quantized linear layer: that of its ``weight``, and of its ``inputs``, None for floating point.

    >>> str(LayerSpec(Scheme(bits=4)).weight)
    'int4 channel symmetric'
    """

    weight: Scheme
    inputs: Scheme | None = None


@dataclass(frozen=True, eq=False)
class Solution:
    """A quantized layer: everything that a kernel needs, and measures of its quality. A torch pytree.

    - ``weight``: codes ``[n, c]`` and their parameters.
    - ``inputs``: the scheme of the inputs, or None.
    - ``smoothing``: ``[c]`` or None. The inputs are divided by it; ``weight`` already contains the factor.
    - ``static``: parameters ``[1, 1]`` of inputs with strategy ``tensor``, else None.
    - ``error``, ``baseline_error``: ``[]`` or None. ``tr(delta H delta^T)`` of this weight and of plain rounding, on
      the same statistics.
    - ``notes``: scalars ``[]`` by name, such as the damping used. Each algorithm lists its own.

    >>> weight = QTensor(torch.tensor([[7, -8]], dtype=torch.int8), torch.tensor([[0.5]]), None, Scheme(bits=4))
    >>> Solution(weight, smoothing=torch.tensor([1.0, 2.0])).effective_weight()
    tensor([[ 3.5000, -2.0000]])
    """

    weight: QTensor
    inputs: Scheme | None = None
    smoothing: Tensor | None = None
    static: QParams | None = None
    error: Tensor | None = None
    baseline_error: Tensor | None = None
    notes: Mapping[str, Tensor] = field(default_factory=dict)

    def effective_weight(self) -> Tensor:
        """The weight ``[n, c]`` that multiplies the unsmoothed inputs: dequantized, and divided by the smoothing."""
        weight = dequantize(self.weight)
        return weight if self.smoothing is None else weight / self.smoothing


# As in QTensor, the tree leaves absent tensors out.
def _flatten(s: Solution) -> tuple[list[Any], Scheme | None]:
    optional = {"smoothing": s.smoothing, "error": s.error, "baseline_error": s.baseline_error}
    given = {name: value for name, value in optional.items() if value is not None}
    static = () if s.static is None else present(s.static)
    return [s.weight, static, given, dict(s.notes)], s.inputs


def _unflatten(leaves: Any, inputs: Scheme | None) -> Solution:
    weight, static, given, notes = leaves
    return Solution(weight, inputs, static=QParams(*static) if static else None, notes=notes, **given)


pytree.register_pytree_node(Solution, _flatten, _unflatten, serialized_type_name="quantize.Solution")


def tied(values: Tensor, tie: Tensor | None, *, mean: bool = False) -> Tensor:
    """The largest of ``values`` ``[c]``, or their ``mean``, among the channels with one number in ``tie`` ``[c]``.

    Attention heads that share their values read copies of the same channels. The layer that makes these channels can
    be divided by one scale only.

    >>> tied(torch.tensor([1., 5., 2.]), torch.tensor([0, 1, 0]))
    tensor([2., 5., 2.])
    """
    if tie is None:
        return values
    alike = tie == tie[:, None]
    if mean:
        return torch.where(alike, values, 0.0).sum(1) / alike.sum(1)
    return torch.where(alike, values, -torch.inf).amax(1)


# With fewer tokens than this, correlations between channels are noise.
FEWEST_FOR_GRAM = 16


class Algorithm(NamedTuple):
    """An algorithm for one format: the statistic of the inputs that it needs, and functions that quantize a weight.

    - ``observer``: the :class:`~quantize.core.observers.Observer` of the inputs ``[..., c]``.
    - ``solve(weight, statistic) -> Solution``: quantizes ``weight`` ``[n, c]``, finite and of any float dtype.
    - ``data_free``: whether ``solve`` ignores the statistic, which may then be None.
    - ``fewest``: the fewest tokens of a useful statistic. With fewer, plain rounding is the better choice.
    - ``paired``: an observer that replaces ``observer`` where layers are fitted in the order of execution, to the
      outputs of the quantized layers before. Its ``update(state, x, original=None)`` also takes the inputs ``[t, c]``
      of the float model at the same call. None: the algorithm does not use them.
    - ``scale(weights, statistic, tie=None) -> [c]``: one divisor of the inputs for several weights ``[n, c]`` that read
      them; equal where ``tie`` ``[c]`` is, see :func:`tied`. ``solve(weight, statistic, smoothing)`` takes the divisor
      as given. None: the algorithm does not divide its inputs.
    - ``together(weights, statistic) -> [Solution]``: ``solve`` for several weights ``[n, c]`` that read the same
      inputs, with shared work. None: there is none to share.
    - ``stack(weights, statistics) -> Solution``: :meth:`solve_stack` where ``solve`` does not work under
      ``torch.func.vmap``. None: it does.

    >>> from quantize.core import minmax
    >>> minmax.algorithm(LayerSpec(Scheme())).data_free
    True
    """

    observer: Observer
    solve: Callable[..., Solution]
    data_free: bool = False
    fewest: int = 1
    paired: Observer | None = None
    scale: Callable[..., Tensor] | None = None
    together: Callable[..., list[Solution]] | None = None
    stack: Callable[..., Solution] | None = None

    def solve_stack(self, weights: Tensor, statistics: Any) -> Solution:
        """Solve many layers of one shape at once, such as the experts of a mixture: ``weights`` ``[e, n, c]``.

        The tensors of ``statistics`` and of the result have the leading axis ``e``, too. ``statistics`` is None where
        the algorithm is ``data_free``.
        """
        if self.stack is not None:
            return self.stack(weights, statistics)
        solution: Solution = torch.func.vmap(self.solve, in_dims=(0, None if statistics is None else 0))(
            weights, statistics
        )
        return solution


class AlgorithmModule(Protocol):
    """What a file in ``core/algorithms`` defines. The registry, the config and the tests read it.

    >>> from quantize.core import ALGORITHMS
    >>> sorted(ALGORITHMS["smoothquant"].QUANTIZES_INPUTS)
    [True]
    """

    @property
    def Options(self) -> type[Any]:  # noqa: N802 - a class, under the name of a class
        """A subclass of :class:`BaseOptions`: its fields are the keys accepted in a config, with their defaults."""

    @property
    def QUANTIZES_INPUTS(self) -> frozenset[bool]:  # noqa: N802 - a constant
        """The kinds of formats that it supports: ``False`` for weights alone, ``True`` for weights and inputs."""

    @property
    def algorithm(self) -> Callable[[LayerSpec, Any], Algorithm]:
        """A function that makes the :class:`Algorithm` for a format and options."""
