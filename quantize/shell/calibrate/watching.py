"""The observations of one forward pass, kept apart from the layers until the pass has succeeded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from quantize.shell.calibrate.layer import CalibrationLinear
from quantize.shell.calibrate.replay import Batch
from quantize.shell.config import refusal
from quantize.shell.modes import untracked
from quantize.shell.values import tokens_of


class TensorCache:
    """A cache of values by tensor, valid while the tensor lives and is not written to.

    Nothing is cached for inference tensors, because they do not count writes.
    """

    def __init__(self) -> None:
        self._values = WeakTensorKeyDictionary()

    def get(self, x: Tensor, make: Callable[[], Any], *key: Any) -> Any:
        """The cached result of ``make()`` for ``x`` and the objects in ``key``, which are compared by identity."""
        if x.is_inference():
            return make()
        values = self._values.setdefault(x, {})  # type: ignore[no-untyped-call] # torch leaves it bare
        place = x._version, *map(id, key)
        if place not in values:
            # The key is stored, so that no new object can reuse its ids.
            values[place] = key, make()
        return values[place][1]


class Statistics:
    """The observer of a pass whose layers are all solved at the end: it collects their statistics.

    ``mask`` ``[b, t]``: which tokens count. ``batch``: the pass itself, if it will run again.
    """

    def __init__(self, mask: Tensor | None, batch: Batch | None = None) -> None:
        self.batch, self._mask, self._known = batch, mask, TensorCache()
        self._pending: dict[CalibrationLinear, tuple[Any, int]] = {}

    def __call__(self, layer: CalibrationLinear, x: Tensor) -> bool:
        """A call of ``layer`` with the inputs ``x`` ``[..., c]``, which computes in floating point."""
        state, tokens = self._pending.get(layer, (layer.statistics, layer.tokens))
        with untracked(x.device):
            found = counted(x, self._mask)
            # Layers that always read the same tensors start with empty states, and share their statistics throughout.
            leaves = pytree.tree_leaves(state)
            state = self._known.get(x, lambda: layer.updated(state, found), layer.observer, *leaves)
        self._pending[layer] = state, tokens + found.numel() // layer.in_features
        return False

    def close(self, number: int) -> None:
        """Store the statistics in the layers.

        Raises:
            QuantizeError: NaN or inf among the inputs of a layer in batch ``number``; nothing is stored.
        """
        for layer, (state, tokens) in self._pending.items():
            if tokens:
                check_finite(layer, state, number)
        for layer, (state, tokens) in self._pending.items():
            layer.statistics, layer.tokens = state, tokens


class Fingerprints:
    """The observer of a pass that will run again: it records which tensors each layer read, and their fingerprints."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self._known = batch, TensorCache()
        self._read: list[tuple[CalibrationLinear, Tensor]] = []

    def __call__(self, layer: CalibrationLinear, x: Tensor) -> bool:
        """A call of ``layer`` with the inputs ``x`` ``[..., c]``, which computes in floating point."""

        def number() -> int:
            self._read.append((layer, fingerprint(x, self.batch.mask)))
            return len(self._read) - 1

        self.batch.reads.setdefault(layer.names[0], []).append(self._known.get(x, number))
        return False

    def close(self, number: int) -> None:
        """Store the fingerprints in the batch.

        Raises:
            QuantizeError: NaN or inf among the inputs of a layer in batch ``number``; it names the layer.
        """
        self.batch.prints = torch.stack([found for _, found in self._read]).tolist() if self._read else []
        for (layer, _), (size, *_) in zip(self._read, self.batch.prints, strict=True):
            check_finite(layer, torch.tensor(size, dtype=torch.float64), number)


def counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens of ``x`` that are no padding, if ``mask`` ``[b, t]`` applies to ``x``; else ``x``."""
    if mask is None:
        return x
    mask = mask.to(x.device)
    places, total = tokens_of(x)
    if x.ndim == 2 and places is not None and total == mask.numel():
        return x[mask.flatten()[places]]
    return x[mask] if x.ndim == 3 and x.shape[:2] == mask.shape else x


def fingerprint(x: Tensor, mask: Tensor | None) -> Tensor:
    """The fingerprint of tokens ``x`` ``[..., c]``, float64 ``[6]``: magnitude, precision, and four projections.

    The magnitude is the sum of ``|x|`` over the root of the number of elements. It is not finite if any element is not.
    """
    with untracked(x.device):
        tokens = counted(x.detach(), mask).reshape(-1, x.shape[-1])
        # Sums can overflow float16.
        tokens = tokens.float() if x.dtype == torch.float16 else tokens
        waves = torch.arange(1, 5, dtype=torch.float64, device=x.device)
        rows, columns = (torch.arange(1, n + 1, device=x.device)[:, None].mul(waves).cos_() for n in tokens.shape)
        # The transposed product is several times faster.
        projections = ((columns.T.to(tokens.dtype) @ tokens.T).double() * rows.T).sum(1)
        magnitudes = tokens.abs()
        # A sum of finite numbers can overflow float32, which must not look like an infinite input.
        size = magnitudes.sum(1).double().nan_to_num(posinf=1e300).sum() / max(tokens.numel(), 1) ** 0.5
        if magnitudes.numel():
            size = torch.where(torch.isfinite(magnitudes.amax()), size, torch.nan)
        return torch.cat([size[None], size.new_full((1,), torch.finfo(x.dtype).eps), projections])


def same_tokens(first: list[float], second: list[float]) -> bool:
    """Whether two fingerprints belong to the same tokens up to rounding: three quarters of their digits agree."""
    (size, eps, *mine), (other, others_eps, *theirs) = first, second
    apart = max(abs(a - b) for a, b in zip([size, *mine], [other, *theirs], strict=True))
    return bool(apart <= max(eps, others_eps) ** 0.75 * size)


def check_finite(layer: CalibrationLinear, found: Any, number: int) -> None:
    """Refuse NaN or inf in ``found``, a tree of tensors that is made of what ``layer`` read in batch ``number``."""
    leaves = [leaf for leaf in pytree.tree_leaves(found) if leaf.is_floating_point() and leaf.numel()]
    # Extremes carry NaN along, and make no copy of the tensor.
    if not all(bool(torch.isfinite(extreme)) for leaf in leaves for extreme in torch.aminmax(leaf)):
        told = f"NaN or inf in batch {number}"
        raise refusal(f"layer {layer.names[0]!r}", told, "finite inputs; the batch is not counted")
