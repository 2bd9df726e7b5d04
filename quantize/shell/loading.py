"""From a float model and the ``state_dict`` of a converted one to a converted model; checked first, touched last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from quantize.shell import saved
from quantize.shell.config import QuantizeError, refusal, shown
from quantize.shell.deployment import QuantizedLinear, adopt


def layers(model: nn.Module, state: object, kernel: str | None) -> dict[nn.Module, QuantizedLinear]:
    """The layers that ``state`` holds, by the modules of ``model`` that they replace.

    Raises:
        QuantizeError: something in ``state`` does not fit ``model``, or is missing.
    """
    if not isinstance(state, Mapping):
        raise refusal("from_state", shown(state), "the state_dict of a converted model")
    parts: dict[str, dict[str, Any]] = {
        key.removesuffix(saved.EXTRA).removesuffix("."): {}
        for key, value in state.items()
        if key.endswith(saved.EXTRA) and saved.described(value)
    }
    if not parts or "" in parts:
        raise refusal("from_state", "no converted layer inside a model", "the state_dict of a converted model")
    for key, value in state.items():
        name, _, last = key.rpartition(".")
        if name in parts:
            parts[name][last] = value
    rest = {key: value for key, value in state.items() if key.rpartition(".")[0] not in parts}
    built: dict[nn.Module, QuantizedLinear] = {}
    for name, part in parts.items():
        module = _linear(model, name)
        # A layer under two names is one layer.
        if module not in built:
            built[module] = _layer(name, part, module, kernel)
    _check_rest(model, rest, parts)
    return built


def load(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Everything of ``state`` outside of the converted layers, into a model that :func:`layers` accepted."""
    floats = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    rest = {key: value for key, value in state.items() if key.rpartition(".")[0] not in floats}
    parameters = list(model.named_parameters(remove_duplicate=False))
    meta = any(p.is_meta for _, p in parameters) or any(b.is_meta for b in model.buffers())
    model.load_state_dict(rest, strict=False, assign=meta)
    if not meta:
        return
    # Assigned one by one, what was one parameter under two names has become two.
    first: dict[nn.Parameter, nn.Parameter] = {}
    for name, old in parameters:
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        module._parameters[key] = first.setdefault(old, module.get_parameter(key))


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise refusal(f"layer {name!r}", "not in the model", "the model that the state was saved from") from None
    if type(module) is not nn.Linear:
        raise refusal(f"layer {name!r}", f"a {type(module).__name__} in the model", "an nn.Linear")
    return module


def _layer(name: str, part: Mapping[str, Any], module: nn.Linear, kernel: str | None) -> QuantizedLinear:
    where, found = f"layer {name!r}", saved.layout(name, part.get(saved.EXTRA))
    weight, bias = module.weight, module.bias
    if (found.n, found.c, found.dtype) != (*weight.shape, weight.dtype):
        shape, expected = f"{found.n}x{found.c} in {found.dtype}", f"{weight.shape[0]}x{weight.shape[1]}"
        raise refusal(where, f"{shape} in the state", f"{expected} in {weight.dtype}, as in the model")
    solved = saved.solution(name, part, found)
    for key in part.keys() - {*saved.TENSORS, saved.EXTRA, "bias"}:
        raise refusal(where, f"{key!r} in the state", f"one of {', '.join((*saved.TENSORS, 'bias'))}")
    _check_tensor(f"{name}.bias", part.get("bias"), bias)

    def placed(tensor: Tensor) -> Tensor:
        return tensor.detach().to(tensor.device if weight.is_meta else weight.device, copy=not weight.is_meta)

    held = None if bias is None else nn.Parameter(placed(part["bias"]), requires_grad=bias.requires_grad)
    solved = pytree.tree_map_only(Tensor, placed, solved)
    layer = QuantizedLinear(solved, held, saved.row(part[saved.EXTRA]), weight.dtype, kernel)
    adopt(layer, module)
    return layer


def _check_rest(model: nn.Module, rest: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
    expected = {key: value for key, value in model.state_dict().items() if key.rpartition(".")[0] not in parts}
    for key in [*(expected.keys() - rest.keys()), *(rest.keys() - expected.keys())]:
        found, accepted = ("missing in", "present") if key in expected else ("in", "keys of the model only")
        raise refusal("from_state", f"{key!r} is {found} the state", accepted)
    for key, value in expected.items():
        if isinstance(value, Tensor):
            _check_tensor(key, rest[key], value)
    lost = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in rest]
    if lost:
        raise QuantizeError(f"buffer {lost[0]!r}: on the meta device, and in no state_dict; accepted: a real tensor")


def _check_tensor(key: str, found: object, expected: Tensor | None) -> None:
    def told(value: object) -> str:
        return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else str(value)

    if told(found) != told(expected):
        raise refusal(f"{key!r} in the state", told(found), f"{told(expected)}, as in the model")
