"""The global state of torch, Python and NumPy: this is the only file that reads and restores it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from quantize.shell import offload


def snapshot(devices: frozenset[torch.device]) -> Callable[[], None]:
    """Record the global state of a forward pass that pauses; call the result to restore it before the pass continues.

    The state is the gradient mode, the default dtype, autocast, and the random states of ``devices``.
    """
    kinds = {"cpu"} | {device.type for device in devices if torch.amp.is_autocast_available(device.type)}
    restores: list[Callable[[], Any]] = [
        partial(torch.set_grad_enabled, torch.is_grad_enabled()),
        partial(torch.set_default_dtype, torch.get_default_dtype()),
        partial(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled()),
        partial(set_random_states, random_states(devices)),
        *(partial(torch.set_autocast_enabled, kind, torch.is_autocast_enabled(kind)) for kind in kinds),
        *(partial(torch.set_autocast_dtype, kind, torch.get_autocast_dtype(kind)) for kind in kinds),
    ]

    def restore() -> None:
        for each in restores:
            each()

    return restore


def unrestorable() -> tuple[Any, ...]:
    """Global state that :func:`snapshot` cannot restore, to compare: no pass may pause where any of it has changed."""
    excluded, key = torch._C._dispatch_tls_is_dispatch_key_excluded, torch._C.DispatchKey
    cuda: Any = torch.backends.cuda
    return (
        torch.is_inference_mode_enabled(),
        # torch.set_default_device puts a mode on this stack.
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch._C._functorch.peek_interpreter_stack() is None,
        # These are excluded inside an operator, whose C++ frames have to return in order.
        excluded(key.AutogradOther),
        excluded(key.ADInplaceOrView),
        torch.is_anomaly_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
        id(warnings.filters),
    )


def random_states(devices: frozenset[torch.device]) -> dict[str, Any]:
    """The states of the global random generators, as plain values that can be saved."""
    numpys = np.random.get_state(legacy=False)  # noqa: NPY002 - users draw from the legacy generator
    found: dict[str, Any] = {
        "torch": bytes(torch.get_rng_state().numpy()),
        "python": random.getstate(),
        "numpy": pytree.tree_map_only(np.ndarray, np.ndarray.tolist, numpys),
    }
    for device in devices:
        if device.type not in ("cpu", "meta"):
            found[str(device)] = bytes(torch.get_device_module(device).get_rng_state(device).numpy())
    return found


def set_random_states(states: dict[str, Any]) -> None:
    """Restore the ``states`` of :func:`random_states`."""
    for name, state in states.items():
        if name == "python":
            random.setstate(state)
        elif name == "numpy":
            np.random.set_state(state)  # noqa: NPY002 - users draw from the legacy generator
        else:
            tensor = torch.frombuffer(bytearray(state), dtype=torch.uint8)
            if name == "torch":
                torch.set_rng_state(tensor)
            else:
                torch.get_device_module(torch.device(name)).set_rng_state(tensor, torch.device(name))


def untracked(device: torch.device) -> ExitStack:
    """A context without gradients, inference tensors and autocast on ``device``.

    It is not a generator: an interrupt could leave that suspended, and its collection would switch the modes again.
    """
    stack = ExitStack()
    for mode in (torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False)):
        stack.enter_context(mode)
    return stack


def write_buffer(owner: nn.Module, name: str, value: Tensor) -> None:
    """Write ``value`` into a buffer. Inference-mode buffers cannot be written in place, so they are replaced."""
    buffer = owner._buffers[name]
    assert buffer is not None
    if buffer.is_inference():
        owner._buffers[name] = value.clone()
    else:
        buffer.copy_(value)


@contextmanager
def undisturbed(root: nn.Module) -> Iterator[None]:
    """A context that restores the random states and the buffers of ``root`` at its end."""
    states = random_states(offload.devices(root))
    buffers = [(module, name, buffer, buffer.clone()) for module in root.modules()
               for name, buffer in module._buffers.items() if buffer is not None and not buffer.is_meta]  # fmt: skip
    try:
        yield
    finally:
        set_random_states(states)
        for module, name, buffer, kept in buffers:
            module._buffers[name] = buffer
            if not torch.equal(buffer, kept):
                write_buffer(module, name, kept)


@contextmanager
def same_attributes(root: nn.Module, layers: Collection[nn.Module]) -> Iterator[None]:
    """A context that restores all attributes of the modules of ``root``; of ``layers``, only parameters and buffers."""
    modules = list(root.modules())
    held = [module.__dict__ for module in modules if module not in layers]
    held += [each for module in modules for each in (module._parameters, module._buffers)]
    before = [dict(each) for each in held]
    try:
        yield
    finally:
        for each, old in zip(held, before, strict=True):
            # The dict is never cleared, because an interrupt may come at any time.
            each.update(old)
            for key in each.keys() - old.keys():
                del each[key]
