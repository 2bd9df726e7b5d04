"""What one forward pass of the user tells, apart from the layers until the pass has succeeded."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from quantize.core import affine
from quantize.shell.calibrate.batches import Batch
from quantize.shell.config import refusal
from quantize.shell.modes import untracked

if TYPE_CHECKING:
    from quantize.shell.calibrate.layer import CalibrationLinear


class Observing(Protocol):
    """What layers tell of their calls."""

    def observe(self, layer: CalibrationLinear, x: Tensor) -> bool:
        """A call of ``layer`` with the inputs ``x`` ``[..., c]``: whether it is to compute as quantized."""


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


class Recorder:
    """The statistics of one forward pass. Tokens where ``mask`` ``[b, t]`` is 0 do not count."""

    def __init__(self, mask: Tensor | None = None) -> None:
        # The pass itself, where it will be made again.
        self.batch: Batch | None = None
        self._mask = mask
        self._pending: dict[CalibrationLinear, tuple[Any, int]] = {}
        self._known = _Known()

    def observe(self, layer: CalibrationLinear, x: Tensor) -> bool:
        """A call of ``layer`` with the inputs ``x`` ``[..., c]``, which computes in floating point."""
        state, tokens = self._pending.get(layer, (layer.statistics, layer.tokens))
        with untracked(x.device):
            found = counted(x, self._mask)
            # Layers start from one state, so those that always read the same tensor share one to the end.
            leaves = pytree.tree_leaves(state)
            new = self._known.get(x, *leaves)
            if new is None:
                new = layer.config.observer.update(state, found)
                self._known.put(x, new, *leaves)
        self._pending[layer] = new, tokens + found.numel() // layer.in_features
        return False

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


class Calls:
    """Which tensors a forward pass gave to each layer, and their fingerprints: for ``batch``, which will run again."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self._known = _Known()
        self._prints: list[Tensor] = []
        self._layers: list[CalibrationLinear] = []

    def observe(self, layer: CalibrationLinear, x: Tensor) -> bool:
        """A call of ``layer``, which computes in floating point."""
        number = self._known.get(x)
        if number is None:
            number = len(self._prints)
            self._prints.append(fingerprint(x, self.batch.mask))
            self._layers.append(layer)
            self._known.put(x, number)
        self.batch.reads.setdefault(layer.names[0], []).append(number)
        return False

    def close(self, batch: int) -> None:
        """Write the fingerprints down.

        Raises:
            QuantizeError: NaN or inf among the inputs of a layer; it names the layer.
        """
        self.batch.prints = torch.stack(self._prints).tolist() if self._prints else []
        for layer, (size, *_) in zip(self._layers, self.batch.prints, strict=True):
            if not math.isfinite(size):
                raise not_finite(layer, batch)


def restart(layers: Iterable[CalibrationLinear]) -> None:
    """Forget what was learned of the inputs.

    Equal channels start from one state, so that layers which read one tensor go on sharing it: see Recorder.
    """
    initial: dict[tuple[int, torch.dtype, torch.device], Any] = {}
    for layer in layers:
        weight = layer.weight
        key = (layer.in_features, affine.working_dtype(weight), weight.device)
        if key not in initial:
            with untracked(weight.device):
                initial[key] = layer.config.observer.init(key[0], dtype=key[1], device=key[2])
        layer.statistics, layer.tokens = initial[key], 0


def counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens of ``x`` that are no padding, where ``mask`` ``[b, t]`` belongs to it."""
    return x if mask is None or x.ndim != 3 or x.shape[:2] != mask.shape else x[mask.to(x.device)]


def fingerprint(x: Tensor, mask: Tensor | None) -> Tensor:
    """What tells tokens ``[..., c]`` from others, float64 ``[6]``: their magnitude, their precision, four projections.

    The magnitude, the sum of ``|x|`` over the root of their number, is not finite if any of them is not.
    """
    with untracked(x.device):
        tokens = counted(x.detach(), mask).reshape(-1, x.shape[-1])
        # A sum of large numbers leaves the range of float16.
        tokens = tokens.float() if x.dtype == torch.float16 else tokens
        waves = torch.arange(1, 5, dtype=torch.float64, device=x.device)
        rows, columns = (torch.arange(1, n + 1, device=x.device)[:, None].mul(waves).cos_() for n in tokens.shape)
        # Transposed, the product is several times as fast.
        projections = ((columns.T.to(tokens.dtype) @ tokens.T).double() * rows.T).sum(1)
        magnitudes = tokens.abs()
        # A sum may leave the range of float32 where no number does.
        size = magnitudes.sum(1).double().nan_to_num(posinf=1e300).sum() / max(tokens.numel(), 1) ** 0.5
        if magnitudes.numel():
            size = torch.where(torch.isfinite(magnitudes.amax()), size, torch.nan)
        return torch.cat([size[None], size.new_full((1,), torch.finfo(x.dtype).eps), projections])


def near(first: list[float], second: list[float], *, digits: float) -> bool:
    """Whether two fingerprints are of the same tokens up to roundings: this share of the digits agrees."""
    (size, eps, *mine), (other, others_eps, *theirs) = first, second
    apart = max(abs(a - b) for a, b in zip([size, *mine], [other, *theirs], strict=True))
    return bool(apart <= max(eps, others_eps) ** digits * size)


def not_finite(layer: CalibrationLinear, batch: int) -> Exception:
    """The error for NaN or inf in a batch."""
    where = f"layer {layer.names[0]!r}"
    return refusal(where, f"NaN or inf in batch {batch}", "finite inputs; the batch is not counted")
