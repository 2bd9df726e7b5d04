"""The arguments and conditions of a forward pass, kept so that the pass can run again."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from quantize.shell import offload
from quantize.shell.modes import random_states, set_random_states, write_buffer
from quantize.shell.values import copied


@dataclass
class Batch:
    """One forward pass: its arguments, the global state of torch, and the tensors that the layers read.

    - ``dtype``, ``device``: the model's at that time. Arguments with the same dtype or device follow the model later.
    - ``buffers``: the buffers of the model before the pass; only in the first batch.
    - ``reads``: by layer, the numbers of the tensors that it read at its calls; in the order of the first calls.
    - ``prints``: the fingerprints of these tensors.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor | None
    dtype: torch.dtype
    device: torch.device
    autocast: tuple[str, bool, torch.dtype]
    random: dict[str, Any]
    buffers: dict[str, Tensor] | None
    reads: dict[str, list[int]] = field(default_factory=dict)
    prints: list[list[float]] = field(default_factory=list)

    @classmethod
    def of(cls, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, first: bool) -> Batch:
        """The pass of ``root`` that begins now, with ``args`` and ``kwargs``."""
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        kind = tensors[0].device.type if tensors else "cpu"
        autocast = (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        random, weight = random_states(frozenset(t.device for t in tensors)), next(root.parameters())
        with torch.inference_mode(False):
            mask = attention_mask(root, args, kwargs)
            buffers = copied(offload.buffers(root)) if first else None
            args, kwargs = copied((args, kwargs))
            return cls(args, kwargs, mask, weight.dtype, weight.device, autocast, random, buffers)

    def run(self, root: nn.Module, *modes: Any) -> Any:
        """Run the pass again, without gradients and under ``modes``; returns the outputs of ``root``."""
        kind, enabled, dtype = self.autocast
        now = next(root.parameters())

        def here(tensor: Tensor) -> Tensor:
            device = now.device if tensor.device == self.device else tensor.device
            return tensor.to(device, now.dtype if tensor.dtype == self.dtype else tensor.dtype)

        set_random_states(self.random)
        args, kwargs = pytree.tree_map_only(Tensor, here, copied((self.args, self.kwargs)))
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype))
            for mode in modes:
                stack.enter_context(mode)
            return root(*args, **kwargs)

    def written(self, root: nn.Module) -> dict[str, Tensor | None]:
        """The buffers of ``root`` that changed since this first batch, with their old values, or None for new ones."""
        before = self.buffers or {}
        return {name: before.get(name) for name, now in offload.buffers(root).items()
                if name not in before or not torch.equal(before[name].to(now), now)}  # fmt: skip

    def rewind(self, root: nn.Module) -> None:
        """Restore the buffers of ``root`` to their values before this batch, if it was the first."""
        for name, value in self.written(root).items():
            if value is not None:
                owner, _, last = name.rpartition(".")
                write_buffer(root.get_submodule(owner), last, value)


def attention_mask(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The mask ``[b, t]`` of tokens that are no padding, if the arguments contain an attention mask."""
    try:
        given = inspect.signature(root.forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):
        given = {}
    mask = given.get("attention_mask", kwargs.get("attention_mask"))
    # Float masks are added to scores, where 0 means the opposite.
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.is_floating_point():
        return None
    return mask != 0
