"""What one forward pass is remembered for, apart from the layers until the pass has succeeded."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from quantize.shell.batches import Batch, untracked
from quantize.shell.config import refusal

if TYPE_CHECKING:
    from quantize.shell.calibration import CalibrationLinear


class Done(BaseException):
    """Ends a run: the layers in question have seen their last call."""


class _Known:
    """Values by tensor, as long as it lives and nobody writes to it.

    Inference tensors do not tell whether they were written to, and are not known.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[int, ...], tuple[weakref.ref[Tensor], Any, Any]] = {}

    def get(self, x: Tensor, *others: Any) -> Any:
        """What was given with the same tensor, and the very same ``others``; or None."""
        if x.is_inference():
            return None
        reference, _, value = self._entries.get(_key(x, others), (None, None, None))
        # An id may come back with another tensor: the weak reference tells.
        return value if reference is not None and reference() is x else None

    def put(self, x: Tensor, value: Any, *others: Any) -> None:
        """Give a value."""
        if not x.is_inference():
            # What nobody can ask for again must not keep its values alive.
            self._entries = {key: entry for key, entry in self._entries.items() if entry[0]() is not None}
            # The others are kept, so that no new object takes their ids.
            self._entries[_key(x, others)] = weakref.ref(x), others, value


def _key(x: Tensor, others: tuple[Any, ...]) -> tuple[int, ...]:
    return id(x), x._version, *map(id, others)


class Watching:
    """Counts the calls of layers in one forward pass, which ends when all have come that ``until`` asks for.

    Tokens where ``mask`` ``[b, t]`` is 0 do not count.
    """

    def __init__(self, mask: Tensor | None = None, until: Mapping[CalibrationLinear, int] | None = None) -> None:
        self.calls: Counter[CalibrationLinear] = Counter()
        # A run that has ended does not count what is called on the way out.
        self.closed = False
        self._mask, self._until = mask, until

    def observe(self, layer: CalibrationLinear, x: Tensor) -> None:
        """A call of ``layer`` with the inputs ``x`` ``[..., c]``."""
        if self.closed:
            return
        with untracked(x.device):
            self._see(layer, x)
        self.calls[layer] += 1
        if self._until is not None and all(self.calls[each] >= number for each, number in self._until.items()):
            raise Done

    def _see(self, layer: CalibrationLinear, x: Tensor) -> None:
        raise NotImplementedError


AnyWatching = TypeVar("AnyWatching", bound=Watching)


class Inputs(Watching):
    """The tokens of every call in one forward pass, copied: a tensor that several layers read is kept once."""

    def __init__(self, mask: Tensor | None = None, until: Mapping[CalibrationLinear, int] | None = None) -> None:
        super().__init__(mask, until)
        self._kept: dict[tuple[CalibrationLinear, int], Tensor] = {}
        self._known = _Known()

    def of(self, layer: CalibrationLinear, call: int) -> Tensor | None:
        """The tokens ``[t, c]`` of a call of ``layer``, the first of which is 0; None if it was not called so often."""
        return self._kept.get((layer, call))

    def _see(self, layer: CalibrationLinear, x: Tensor) -> None:
        kept = self._known.get(x)
        if kept is None:
            kept = counted(x, self._mask).reshape(-1, x.shape[-1]).clone()
            self._known.put(x, kept)
        self._kept[layer, self.calls[layer]] = kept


class Recorder(Watching):
    """The statistics of one forward pass.

    ``original`` are the inputs of the float model in the same batch, for algorithms that look at both.
    """

    def __init__(
        self,
        mask: Tensor | None = None,
        until: Mapping[CalibrationLinear, int] | None = None,
        original: Inputs | None = None,
    ) -> None:
        super().__init__(mask, until)
        self._original = original
        # The pass itself, where it will be made again.
        self.batch: Batch | None = None
        self._pending: dict[CalibrationLinear, tuple[Any, int]] = {}
        self._known = _Known()

    def _see(self, layer: CalibrationLinear, x: Tensor) -> None:
        state, tokens = self._pending.get(layer, (layer.statistics, layer.tokens))
        state, new = self._update(layer, state, x)
        self._pending[layer] = state, tokens + new

    def commit(self, batch: int) -> None:
        """Hand the statistics over to the layers.

        Raises:
            QuantizeError: NaN or inf among the inputs of a layer; nothing is handed over.
        """
        for layer, (state, tokens) in self._pending.items():
            leaves = [leaf for leaf in pytree.tree_leaves(state) if leaf.is_floating_point()]
            if tokens and not all(bool(torch.isfinite(leaf).all()) for leaf in leaves):
                raise not_finite(layer, batch)
        for layer, (state, tokens) in self._pending.items():
            layer.statistics, layer.tokens = state, tokens

    def _update(self, layer: CalibrationLinear, state: Any, x: Tensor) -> tuple[Any, int]:
        """``update(state, x)``, computed once for all layers that share the state and read the same tensor.

        Layers start from one initial state, so those that always read the same tensor share one state to the end;
        the first difference parts them.
        """
        update, leaves = layer.config.algorithm.observer.update, pytree.tree_leaves(state)
        original = None if self._original is None else self._original.of(layer, self.calls[layer])
        tokens = counted(x, self._mask)
        new = self._known.get(x, original, *leaves)
        if new is None:
            new = update(state, tokens) if original is None else update(state, tokens, original)
            self._known.put(x, new, original, *leaves)
        return new, tokens.numel() // layer.in_features


class Calls:
    """How often a forward pass called each layer, in the order of the first calls, and what they read: in ``batch``."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self._finite: dict[CalibrationLinear, Tensor] = {}
        self._known = _Known()

    def observe(self, layer: CalibrationLinear, x: Tensor) -> None:
        """Count a call of ``layer``."""
        name = layer.names[0]
        self.batch.calls[name] = self.batch.calls.get(name, 0) + 1
        if name not in self.batch.inputs:
            number = self._known.get(x)
            self.batch.inputs[name] = len(self.batch.inputs) if number is None else number
            self._known.put(x, self.batch.inputs[name])
        with untracked(x.device):
            finite = torch.isfinite(counted(x, self.batch.mask)).all()
            self._finite[layer] = finite & self._finite[layer] if layer in self._finite else finite

    def check(self, batch: int) -> None:
        """Refuse a pass with NaN or inf among the inputs of a layer.

        Raises:
            QuantizeError: it names the layer.
        """
        for layer, finite in self._finite.items():
            if not bool(finite):
                raise not_finite(layer, batch)


def counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens of ``x`` that are no padding, where ``mask`` ``[b, t]`` belongs to it."""
    return x if mask is None or x.ndim != 3 or x.shape[:2] != mask.shape else x[mask.to(x.device)]


def not_finite(layer: CalibrationLinear, batch: int) -> Exception:
    """The error for NaN or inf in a batch."""
    where = f"layer {layer.names[0]!r}"
    return refusal(where, f"NaN or inf in batch {batch}", "finite inputs; the batch is not counted")
