"""Convert a float model by the ``state_dict`` of a converted one. A refused call changes nothing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from quantize.shell import offload
from quantize.shell.config import refusal, shown
from quantize.shell.deploy import state as saved
from quantize.shell.deploy.kernels import KERNELS, PARTIAL
from quantize.shell.deploy.layer import QuantizedLinear
from quantize.shell.plan import swap
from quantize.shell.views import adopt, modules, release

# The key of hidden buffers in the metadata of a state_dict, where torch keeps the versions of modules.
HIDDEN = "hidden_buffers"


def check_kernel(kernel: object) -> None:
    """Refuse an unknown kernel."""
    if kernel is not None and kernel not in KERNELS:
        raise refusal("kernel", shown(kernel), f"None or one of {', '.join(map(repr, KERNELS))}")


def check_served(built: Iterable[QuantizedLinear], kernel: str | None) -> None:
    """Refuse layers that the requested ``kernel`` cannot serve. One of ``PARTIAL`` has to serve at least one layer."""
    layers = [*built]
    if kernel in PARTIAL and any(layer.kernel == kernel for layer in layers):
        return
    for layer in layers:
        if kernel is not None and layer.kernel != kernel:
            raise refusal(f"layer {layer.row.name!r}", f"kernel {kernel!r}", f"another kernel ({layer.reason})")


def hidden(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that no ``state_dict`` holds, under all their names, without the buffers of kernels."""
    return {
        f"{name}.{key}".lstrip("."): buffer
        for name, module in model.named_modules(remove_duplicate=False)
        for key, buffer in module._buffers.items()
        if key in module._non_persistent_buffers_set and buffer is not None and key not in getattr(module, "_kept", ())
    }


def carry_hidden(model: nn.Module) -> None:
    """Add the :func:`hidden` buffers to the metadata of every ``state_dict`` of ``model``, for :func:`convert`."""
    if hidden(model):
        model.register_state_dict_post_hook(_bring)  # type: ignore[no-untyped-call] # torch leaves it bare


def _bring(model: nn.Module, _state: object, _prefix: str, told: dict[str, Any]) -> None:
    told[HIDDEN] = hidden(model)


def convert(model: nn.Module, state: object, kernel: str | None) -> None:
    """Turn the float ``model`` into the converted model that ``state`` was saved from.

    A tensor that ``model`` has under several names may have only one of them in ``state``.

    Raises:
        QuantizeError: ``state`` does not fit ``model``, or something is missing in it, or a kernel cannot serve a
            layer; the model is left as it was.
    """
    check_kernel(kernel)
    if not isinstance(state, Mapping):
        raise refusal("from_state", shown(state), "the state_dict of a converted model")
    for name, module in model.named_modules():
        if offload.offload_hook(module) is not None:
            raise refusal(f"module {name!r}", "its parameters are offloaded", "a model before it is dispatched")
    views: dict[nn.Module, nn.Module] = {}
    held = {module for name, module in modules(model, views) if f"{name}.{saved.EXTRA}" in state}
    used = {old: new for old, new in views.items() if held & {*new.modules()}}
    swap(model, used)
    try:
        _convert(model, state, kernel)
    except BaseException:
        swap(model, {new: old for old, new in used.items()})
        raise
    release(model)


def _convert(model: nn.Module, state: Mapping[str, Any], kernel: str | None) -> None:
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= model.named_buffers(remove_duplicate=False)
    names: dict[object, str] = {}
    for name, thing in (*modules.items(), *tensors.items()):
        names.setdefault(thing, name)

    def first(key: str) -> str:
        # The first name that the model has for the same tensor or module.
        owner, _, last = key.rpartition(".")
        if key in tensors:
            return names[tensors[key]]
        return f"{names[modules[owner]]}.{last}" if owner and owner in modules else key

    end = f".{saved.EXTRA}"
    described = [key.removesuffix(end) for key in state if key.endswith(end) and saved.described(state[key])]
    found = [_linear(name, modules) for name in described]
    layers = {names[module]: module for module in found}
    if not layers:
        raise refusal("from_state", "no converted layer inside a model", "the state_dict of a converted model")
    empty = [name for name, buffer in hidden(model).items() if buffer.is_meta]
    told = {at: {**versions} for at, versions in getattr(state, "_metadata", {}).items()}
    brought = {f"{at}.{key}".lstrip("."): t for at in told for key, t in told[at].pop(HIDDEN, {}).items()}
    given = {**state, **{name: brought[name] for name in empty if name in brought}}
    whole: dict[str, Any] = {}
    for key, value in given.items():
        whole.setdefault(first(key), value)
    # The model itself loads ``rest``: everything except the weights of the layers.
    rest: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {name: {} for name in layers}
    for key, value in whole.items():
        owner, _, last = key.rpartition(".")
        part, at = (parts[owner], last) if owner in parts and key not in tensors else (rest, key)
        part[at] = value
    weights = {f"{name}.weight" for name, module in modules.items() if names[module] in layers}
    own = {key: value for key, value in model.state_dict().items() if key not in weights}
    for name in empty:
        if first(name) not in rest:
            accepted = "a buffer with data, a state_dict with its metadata (torch.save keeps it), or quantize.load"
            raise refusal(f"buffer {name!r}", "on the meta device, and not in the state", accepted)
    # A hidden buffer may have grown or been cast since the model was built: any shape and dtype is accepted.
    like = dict.fromkeys(map(first, empty)) | {first(key): value for key, value in own.items()}
    saved.check("from_state", rest, like, "keys of the model only")
    built: dict[nn.Module, QuantizedLinear] = {
        module: _layer(name, parts[name], module, rest.get(first(f"{name}.bias")), kernel)
        for name, module in layers.items()
    }
    check_served(built.values(), kernel)
    for key, value in given.items():
        other = whole[first(key)]
        # At equal addresses are tied tensors, and tensors without data.
        tied = isinstance(value, Tensor) and (value.data_ptr(), value.shape) == (other.data_ptr(), other.shape)
        if isinstance(value, Tensor) and not tied and not torch.equal(value, other):
            (second, _, last), (name, _, _) = key.rpartition("."), first(key).rpartition(".")
            differs = f"its {last!r} differs from that of {name!r}"
            raise refusal(f"layer {second!r}", differs, "equal tensors, as the model has one under both names")
    new = {key: _filled(tensors[key], value) if key in tensors else value for key, value in rest.items()}
    ready = OrderedDict({key: new[first(key)] for key in own})
    # Modules read the version of their state from here.
    ready._metadata = told  # type: ignore[attr-defined] # an attribute that torch adds
    model.load_state_dict(ready, strict=False, assign=any(tensor.is_meta for tensor in tensors.values()))
    for name in empty:
        owner, _, last = name.rpartition(".")
        modules[owner]._buffers[last] = new[first(name)]
    for old, layer in built.items():
        layer._parameters["bias"] = old._parameters["bias"]
        adopt(layer, old)
    swap(model, built)
    carry_hidden(model)


def _linear(name: str, modules: Mapping[str, nn.Module]) -> nn.Linear:
    module = modules.get(name)
    if type(module) is not nn.Linear:
        found = "not in the model" if module is None else f"a {type(module).__name__} in the model"
        raise refusal(f"layer {name!r}", found, "an nn.Linear, as in the model that the state was saved from")
    return module


def _layer(
    name: str, part: Mapping[str, Any], module: nn.Linear, bias: Tensor | None, kernel: str | None
) -> QuantizedLinear:
    layout, row = saved.read(name, part.get(saved.EXTRA))
    weight = module.weight
    if (layout.n, layout.c, layout.dtype) != (*weight.shape, weight.dtype):
        found = f"{layout.n}x{layout.c} in {layout.dtype} in the state"
        accepted = f"{weight.shape[0]}x{weight.shape[1]} in {weight.dtype}, as in the model"
        raise refusal(f"layer {name!r}", found, accepted)
    solved = saved.solution(name, part, layout)

    def placed(tensor: Tensor) -> Tensor:
        return tensor.detach().to(tensor.device if weight.is_meta else weight.device, copy=not weight.is_meta)

    held = None if bias is None else nn.Parameter(placed(bias))
    return QuantizedLinear(pytree.tree_map_only(Tensor, placed, solved), held, row, weight.dtype, kernel)


def _filled(tensor: Tensor, value: Tensor) -> Tensor:
    """``tensor`` with ``value`` written into it; if ``tensor`` is on the meta device, ``value`` itself."""
    if tensor.is_meta:
        value = value.detach()
        return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    with torch.no_grad():
        return tensor.copy_(value)
