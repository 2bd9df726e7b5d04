"""What a model was called with, kept so that the call can be made again."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from quantize.shell.modes import random_states, set_random_states
from quantize.shell.values import copied


@dataclass
class Batch:
    """One forward pass: its arguments, and what it gave to the layers."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor | None
    autocast: tuple[str, bool, torch.dtype]
    random: dict[str, Any]
    # Of the first batch: the buffers of the model before it, and whether it wrote to them.
    buffers: dict[str, Tensor]
    stateful: bool = False
    # Which tensors each layer read at its calls, in the order of the first calls; and the fingerprints of those.
    reads: dict[str, list[int]] = field(default_factory=dict)
    prints: list[list[float]] = field(default_factory=list)

    @classmethod
    def of(
        cls, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor | None, buffers: Mapping[str, Tensor]
    ) -> Batch:
        """The pass that begins now."""
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = tensors[0].device.type if tensors else "cpu"
        autocast = (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        with torch.inference_mode(False):
            args, kwargs = copied((args, kwargs))
            return cls(
                args, kwargs, mask, autocast, random_states(frozenset(t.device for t in tensors)), copied(dict(buffers))
            )

    def run(self, root: nn.Module, *modes: Any) -> Any:
        """The same pass once more, without gradients and under ``modes``; returns what ``root`` gives."""
        device, enabled, dtype = self.autocast
        set_random_states(self.random)
        args, kwargs = copied((self.args, self.kwargs))
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.autocast(device, enabled=enabled, dtype=dtype))
            for mode in modes:
                stack.enter_context(mode)
            return root(*args, **kwargs)

    def changed(self, root: nn.Module) -> bool:
        """Whether the buffers of ``root`` are others than before this first batch."""
        now = dict(root.named_buffers())
        return now.keys() != self.buffers.keys() or any(
            not torch.equal(now[name], buffer) for name, buffer in self.buffers.items()
        )

    def move(self, device: torch.device) -> None:
        """Bring the arguments to a device, where the model has gone."""
        self.args, self.kwargs, self.mask, self.buffers = pytree.tree_map_only(
            Tensor, lambda tensor: tensor.to(device), (self.args, self.kwargs, self.mask, self.buffers)
        )

    def cast(self, before: torch.dtype, after: torch.dtype) -> None:
        """Give arguments of dtype ``before`` another one, as the model got it."""
        self.args, self.kwargs = pytree.tree_map_only(
            Tensor, lambda tensor: tensor.to(after) if tensor.dtype == before else tensor, (self.args, self.kwargs)
        )


def attention_mask(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Which tokens ``[b, t]`` are no padding, where the model is called with such an argument."""
    try:
        given = inspect.signature(root.forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):
        given = {}
    mask = given.get("attention_mask", kwargs.get("attention_mask", given.get("kwargs", {}).get("attention_mask")))
    # Masks of floats are added to scores: 0 means the opposite there.
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.is_floating_point():
        return None
    return mask != 0
