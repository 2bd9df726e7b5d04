"""From a float model and the ``state_dict`` of a converted one to a converted model; checked first, touched last."""

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
from quantize.shell.deploy.kernels import KERNELS
from quantize.shell.deploy.layer import QuantizedLinear, adopt
from quantize.shell.plan import swap


def check_kernel(kernel: object) -> None:
    """Refuse a name that no kernel has."""
    if kernel is not None and kernel not in KERNELS:
        raise refusal("kernel", shown(kernel), f"None or one of {', '.join(map(repr, KERNELS))}")


def check_served(built: Iterable[QuantizedLinear], kernel: str | None) -> None:
    """Refuse layers that have another kernel than the one that was asked for."""
    for layer in built:
        if kernel is not None and layer.kernel != kernel:
            raise refusal(f"layer {layer.row.name!r}", f"kernel {kernel!r}", f"another kernel ({layer.reason})")


def convert(model: nn.Module, state: object, kernel: str | None) -> None:
    """Make ``model`` the converted model that ``state`` was saved from.

    What ``model`` has under several names, ``state`` may have under one of them.

    Raises:
        QuantizeError: something in ``state`` does not fit ``model``, or is missing, or a kernel cannot serve a layer;
            the model is left as it was.
    """
    check_kernel(kernel)
    if not isinstance(state, Mapping):
        raise refusal("from_state", shown(state), "the state_dict of a converted model")
    for name, module in model.named_modules():
        if offload.keeper(module) is not None:
            raise refusal(f"module {name!r}", "its parameters are offloaded", "a model before it is dispatched")
    layers, tensors = _layers(model, state), _tensors(model)
    # What the model loads by itself: everything but the weights of the layers.
    expected = {key: value for key, value in model.state_dict().items() if key.removesuffix(".weight") not in layers}
    values = {tensors[key]: state[key] for key in expected if key in tensors and key in state}
    rest = {key: values[tensors[key]] for key in expected if tensors.get(key) in values}
    parts: dict[str, dict[str, Any]] = {name: {} for name in layers}
    for key, value in state.items():
        owner, _, last = key.rpartition(".")
        if owner in layers:
            parts[owner][last] = value
        if owner not in layers or last == "bias":
            rest.setdefault(key, value)
    built: dict[nn.Module, QuantizedLinear] = {}
    first: dict[nn.Module, str] = {}
    for name, module in layers.items():
        if first.setdefault(module, name) == name:
            built[module] = _layer(name, parts[name], rest.get(f"{name}.bias"), module, kernel)
        _check_same(first[module], name, parts)
    check_served(built.values(), kernel)
    _check_rest(model, rest, expected)
    _load(model, rest, getattr(state, "_metadata", {}))
    for old, new in built.items():
        new._parameters["bias"] = old._parameters["bias"]
    swap(model, built)


def _layers(model: nn.Module, state: Mapping[str, Any]) -> dict[str, nn.Linear]:
    """The layers that ``state`` describes: the names that it has for them first, then their others in the model."""
    ends = [(key, *key.rpartition(".")) for key in state]
    names = [name for key, name, _, last in ends if last == saved.EXTRA and saved.described(state[key])]
    if not names or "" in names:
        raise refusal("from_state", "no converted layer inside a model", "the state_dict of a converted model")
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name not in modules:
            raise refusal(f"layer {name!r}", "not in the model", "the model that the state was saved from")
        if type(modules[name]) is not nn.Linear:
            raise refusal(f"layer {name!r}", f"a {type(modules[name]).__name__} in the model", "an nn.Linear")
    found = {modules[name] for name in names}
    return {name: modules[name] for name in (*names, *modules) if modules[name] in found}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all of their names."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def _layer(
    name: str, part: Mapping[str, Any], bias: Tensor | None, module: nn.Linear, kernel: str | None
) -> QuantizedLinear:
    layout, row = saved.read(name, part.get(saved.EXTRA))
    weight, own = module.weight, module.bias
    if (layout.n, layout.c, layout.dtype) != (*weight.shape, weight.dtype):
        found = f"{layout.n}x{layout.c} in {layout.dtype} in the state"
        accepted = f"{weight.shape[0]}x{weight.shape[1]} in {weight.dtype}, as in the model"
        raise refusal(f"layer {name!r}", found, accepted)
    solved = saved.solution(name, part, layout)
    for key in part.keys() - {*saved.KEYS, "bias"}:
        raise refusal(f"layer {name!r}", f"{key!r} in the state", f"one of {', '.join((*saved.TENSORS, 'bias'))}")
    _check_tensor(f"{name}.bias", bias, own)

    def placed(tensor: Tensor) -> Tensor:
        return tensor.detach().to(tensor.device if weight.is_meta else weight.device, copy=not weight.is_meta)

    held = None if bias is None else nn.Parameter(placed(bias), requires_grad=own.requires_grad)
    layer = QuantizedLinear(pytree.tree_map_only(Tensor, placed, solved), held, row, weight.dtype, kernel)
    adopt(layer, module)
    return layer


def _check_same(first: str, second: str, parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse two names of one layer with different contents; the second may lack some."""
    for key, value in parts[second].items():
        other = parts[first].get(key)
        same = value is other or (isinstance(value, Tensor) and isinstance(other, Tensor) and torch.equal(value, other))
        if key != saved.EXTRA and not same:
            found = f"another {key!r} than {first!r}"
            raise refusal(f"layer {second!r}", found, "the same: in the model it is one layer")


def _check_rest(model: nn.Module, rest: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key in [*(expected.keys() - rest.keys()), *(rest.keys() - expected.keys())]:
        found, accepted = ("missing in", "present") if key in expected else ("in", "keys of the model only")
        raise refusal("from_state", f"{key!r} is {found} the state", accepted)
    for key, value in expected.items():
        if isinstance(value, Tensor):
            _check_tensor(key, rest[key], value)
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in rest:
            raise refusal(f"buffer {name!r}", "on the meta device, and in no state_dict", "a real tensor")


def _check_tensor(key: str, found: object, expected: Tensor | None) -> None:
    def told(value: object) -> str:
        return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else str(value)

    if told(found) != told(expected):
        raise refusal(f"{key!r} in the state", told(found), f"{told(expected)}, as in the model")


def _load(model: nn.Module, rest: Mapping[str, Any], versions: object) -> None:
    """Fill the real tensors of ``model``, and replace those on the meta device; what was one tensor stays one."""
    tensors, new = _tensors(model), dict[Tensor | None, Tensor]()
    for key, tensor in tensors.items():
        if key in rest and tensor not in new:
            new[tensor] = _filled(tensor, rest[key])
    # A tensor that is there already is assigned to itself.
    state = OrderedDict({key: new.get(tensors.get(key), value) for key, value in rest.items()})
    # Modules read from here how old a state is.
    state._metadata = versions  # type: ignore[attr-defined] # an attribute that torch adds
    model.load_state_dict(state, strict=False, assign=any(tensor.is_meta for tensor in tensors.values()))


def _filled(tensor: Tensor, value: Tensor) -> Tensor:
    if tensor.is_meta:
        value = value.detach()
        return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    with torch.no_grad():
        return tensor.copy_(value)
