"""What a model was called with, kept so that the call can be made again."""

from __future__ import annotations

import inspect
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

# What can be kept, saved and given again, in lists, tuples and dicts.
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


@dataclass
class Batch:
    """One forward pass: its arguments, and how often it called each layer, in the order of the first calls."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor | None
    autocast: tuple[str, bool, torch.dtype]
    random: tuple[bytes, Any]
    calls: dict[str, int]
    # Of the first batch: the buffers of the model before it, and whether it wrote to them.
    buffers: dict[str, Tensor]
    stateful: bool = False
    # Which tensor each layer read at its first call: equal numbers, one tensor.
    inputs: dict[str, int] = field(default_factory=dict)

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
            return cls(args, kwargs, mask, autocast, random_state(), {}, copied(dict(buffers)))

    def run(self, root: nn.Module, *modes: Any) -> Any:
        """The same pass once more, without gradients and under ``modes``; returns what ``root`` gives."""
        device, enabled, dtype = self.autocast
        set_random_state(self.random)
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


def keepable(value: Any) -> bool:
    """Whether ``value`` is tensors and plain values in lists, tuples and dicts: it can be given a second time."""
    if type(value) in (list, tuple):
        return all(map(keepable, value))
    if type(value) is dict:
        return all(type(key) in _PLAIN and keepable(item) for key, item in value.items())
    dense = isinstance(value, Tensor) and value.layout == torch.strided and type(value) in (Tensor, nn.Parameter)
    return dense or type(value) in _PLAIN


def copied(value: Any) -> Any:
    """The same with tensors of their own: what was one tensor stays one, and views share memory as they did.

    Small views of something large, such as two rows of a data set, are copied apart.
    """
    tensors = {id(leaf): leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)}
    covered: Counter[int] = Counter()
    views: Counter[int] = Counter()
    for tensor in tensors.values():
        covered[tensor.untyped_storage()._cdata] += tensor.nbytes
        views[tensor.untyped_storage()._cdata] += 1
    storages: dict[int, Any] = {}
    made: dict[int, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if views[key] == 1 or covered[key] < storage.nbytes() // 2:
                made[id(tensor)] = tensor.detach().clone()
            else:
                if key not in storages:
                    storages[key] = storage.clone()  # type: ignore[no-untyped-call]
                new = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
                made[id(tensor)] = new.set_(storages[key], tensor.storage_offset(), tensor.size(), tensor.stride())
        return made[id(tensor)]

    return pytree.tree_map_only(Tensor, copy, value)


def random_state() -> tuple[bytes, Any]:
    """The state of the random numbers of torch on the CPU, and of Python."""
    return bytes(torch.get_rng_state().numpy()), random.getstate()


def set_random_state(state: tuple[bytes, Any]) -> None:
    """Undo :func:`random_state`."""
    torch.set_rng_state(torch.frombuffer(bytearray(state[0]), dtype=torch.uint8))
    version, internal, gauss = state[1]
    random.setstate((version, tuple(internal), gauss))


def put(owner: nn.Module, name: str, value: Tensor) -> None:
    """Write ``value`` into a buffer; one that was made in inference mode lets nobody, and is replaced."""
    buffer = owner._buffers[name]
    assert buffer is not None
    if buffer.is_inference():
        owner._buffers[name] = value.clone()
    else:
        buffer.copy_(value)


@contextmanager
def undisturbed(root: nn.Module) -> Iterator[None]:
    """Random numbers and the buffers of ``root`` are afterwards as before."""
    random = random_state()
    buffers = [(module, name, buffer, buffer.clone()) for module in root.modules()
               for name, buffer in module._buffers.items() if buffer is not None]  # fmt: skip
    try:
        yield
    finally:
        set_random_state(random)
        for module, name, buffer, kept in buffers:
            module._buffers[name] = buffer
            if not torch.equal(buffer, kept):
                put(module, name, kept)


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


@contextmanager
def untracked(device: torch.device) -> Iterator[None]:
    """No gradients, no inference tensors and no autocast, whatever the caller has switched on."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
