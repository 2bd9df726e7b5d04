"""The contract of a quantization algorithm: pure functions, closed over a format and options."""

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
    """A field of an ``Options``: its default, which also fixes its type, and what is accepted, as text and test."""
    return field(default=default, metadata={"accepted": accepted, "check": check})


@dataclass(frozen=True)
class BaseOptions:
    """Options of an algorithm: every field is made by :func:`option`, and its name is the key in a config.

    Raises:
        ValueError: a value outside of what its field accepts, as ``<key>: <value>; accepted: <what>``.
    """

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            kinds = (int, float) if type(f.default) is float else (type(f.default),)
            if type(value) not in kinds or not f.metadata["check"](value):
                raise ValueError(f"{f.name}: {value!r}; accepted: {f.metadata['accepted']}")


@dataclass(frozen=True)
class LayerSpec:
    """The format that a linear layer shall take: ``inputs`` None leaves the inputs in floating point."""

    weight: Scheme
    inputs: Scheme | None = None


@dataclass(frozen=True, eq=False)
class Solution:
    """A quantized layer: everything that a kernel needs, and what is known about its quality. A torch pytree.

    - ``weight``: codes ``[n, c]`` and their parameters.
    - ``inputs``: the scheme of the inputs, or None.
    - ``smoothing`` ``[c]`` or None: the inputs are divided by it, and the weight holds the factor.
    - ``static``: parameters ``[1, 1]`` of inputs with strategy ``tensor``, else None.
    - ``error``, ``baseline_error`` ``[]`` or None: ``tr(delta H delta^T)`` of this weight and of plain rounding, on
      the same statistics.
    - ``notes``: scalars ``[]`` that say what happened on the way, by name.
    """

    weight: QTensor
    inputs: Scheme | None = None
    smoothing: Tensor | None = None
    static: QParams | None = None
    error: Tensor | None = None
    baseline_error: Tensor | None = None
    notes: Mapping[str, Tensor] = field(default_factory=dict)

    def effective_weight(self) -> Tensor:
        """The weight ``[n, c]`` as unsmoothed inputs meet it: dequantized, without the factor of the smoothing."""
        weight = dequantize(self.weight)
        return weight if self.smoothing is None else weight / self.smoothing


# As in QTensor, what is None is absent from the tree.
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
    """The largest, or the mean, of ``values`` ``[c]`` among the channels with one number in ``tie`` ``[c]``.

    Heads that share their values read copies of the same channels: what makes those can be divided by one scale only.

    >>> tied(torch.tensor([1., 5., 2.]), torch.tensor([0, 1, 0]))
    tensor([2., 5., 2.])
    """
    if tie is None:
        return values
    alike = tie == tie[:, None]
    if mean:
        return torch.where(alike, values, 0.0).sum(1) / alike.sum(1)
    return torch.where(alike, values, -torch.inf).amax(1)


# Fewer tokens than this span so few directions that correlations between channels are noise.
FEWEST_FOR_GRAM = 16


class Algorithm(NamedTuple):
    """An :class:`~quantize.core.observers.Observer` and what to do with its statistic.

    - ``observer``: what to remember of the inputs ``[..., c]``.
    - ``solve(weight, statistic) -> Solution``: ``weight`` is ``[n, c]``, any float dtype and finite.
    - ``data_free``: ``solve`` does not look at the statistic.
    - ``paired``: the observer to use instead where layers are fitted in the order of execution, each to what the
      quantized ones before it give. Its ``update(state, x, original=None)`` also takes the inputs ``[t, c]`` of the
      float model at the same call. None: the algorithm has no use for them.
    - ``scale(weights, statistic, tie=None) -> [c]``: for an algorithm that divides its inputs, the divisor for several
      weights ``[n, c]`` that read the same inputs, equal where ``tie`` ``[c]`` is, see :func:`tied`;
      ``solve(weight, statistic, smoothing)`` then takes it as given.
    - ``together(weights, statistic) -> [Solution]``: what ``solve`` gives for each of several weights ``[n, c]`` that
      read the same inputs, for an algorithm that saves work by that.
    - ``stack(weights, statistics) -> Solution``: what ``solve`` gives for every member of a stack, for an algorithm of
      which no map can be made; see :meth:`solve_stack`.
    - ``fewest``: with fewer tokens than this the statistic says nothing, and plain rounding is the better choice.
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
        """Solve many layers of one shape at once, as the experts of a mixture are: ``weights`` ``[e, n, c]``.

        The tensors of ``statistics``, None where ``solve`` looks at none, and of the result have the axis ``e``, too.
        """
        if self.stack is not None:
            return self.stack(weights, statistics)
        solution: Solution = torch.func.vmap(self.solve, in_dims=(0, None if statistics is None else 0))(
            weights, statistics
        )
        return solution


class AlgorithmModule(Protocol):
    """What a file in ``core/algorithms`` offers; the registry, the config and the tests read it from there."""

    @property
    def Options(self) -> type[Any]:  # noqa: N802 - a class, under the name of a class
        """A :class:`BaseOptions`: its fields are the keys accepted in a config, with their defaults."""

    @property
    def QUANTIZES_INPUTS(self) -> frozenset[bool]:  # noqa: N802 - a constant
        """Which formats are meant: ``False`` for weights alone, ``True`` for weights and inputs."""

    @property
    def algorithm(self) -> Callable[[LayerSpec, Any], Algorithm]:
        """Close the algorithm over a format and options."""
