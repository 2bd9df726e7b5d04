"""From a float model and the ``state_dict`` of a converted one to a converted model; checked first, touched last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from quantize.shell.config import QuantizeError, refusal, shown
from quantize.shell.deploy import state as saved
from quantize.shell.deploy.kernels import KERNELS
from quantize.shell.deploy.layer import QuantizedLinear, adopt
from quantize.shell.plan import swap


def convert(model: nn.Module, state: object, kernel: str | None) -> None:
    """Make ``model`` the converted model that ``state`` was saved from.

    Raises:
        QuantizeError: as :func:`layers`, and a kernel that cannot serve a layer; the model is left as it was.
    """
    check_kernel(kernel)
    built = layers(model, state, kernel)
    check_served(built.values(), kernel)
    load(model, cast("Mapping[str, Any]", state), built)


def check_kernel(kernel: object) -> None:
    """Refuse a name that no kernel has."""
    if kernel is not None and kernel not in KERNELS:
        raise refusal("kernel", shown(kernel), f"None or one of {', '.join(map(repr, KERNELS))}")


def check_served(built: Iterable[QuantizedLinear], kernel: str | None) -> None:
    """Refuse layers that have another kernel than the one that was asked for."""
    for layer in built:
        if kernel is not None and layer.kernel != kernel:
            raise refusal(f"layer {layer.row.name!r}", f"kernel {kernel!r}", f"another kernel ({layer.reason})")


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
    first: dict[nn.Module, str] = {}
    for name, part in parts.items():
        module = _linear(model, name)
        if module in built:
            # A layer under two names is one layer.
            _check_same(first[module], parts[first[module]], name, part)
        else:
            built[module], first[module] = _layer(name, part, module, kernel), name
    _check_rest(model, rest, parts)
    return built


def load(model: nn.Module, state: Mapping[str, Any], built: Mapping[nn.Module, QuantizedLinear]) -> None:
    """Put ``built`` into the model, and all else that ``state`` holds: both as :func:`layers` accepted them."""
    names = {name for name, module in model.named_modules(remove_duplicate=False) if module in built}
    rest = {key: value for key, value in state.items() if key.rpartition(".")[0] not in names}
    before = _tensors(model)
    swap(model, built)
    try:
        for on_meta in (False, True):
            part = {k: v for k, v in rest.items() if (k in before and before[k].is_meta) is on_meta}
            if part:
                model.load_state_dict(_with_versions(part, state), strict=False, assign=on_meta)
    except BaseException:
        swap(model, {new: old for old, new in built.items()})
        raise
    after = _tensors(model)
    for old, new in built.items():
        kept, loaded = old._parameters["bias"], new._parameters["bias"]
        if kept is not None and loaded is not None and not kept.is_meta:
            with torch.no_grad():
                kept.copy_(loaded)
            new._parameters["bias"] = kept
    # Made one by one, what was one tensor under two names has become two.
    made: dict[int, Tensor] = {}
    for name in before.keys() & after.keys():
        if before[name].is_meta:
            owner, _, key = name.rpartition(".")
            module = model.get_submodule(owner)
            tensors = module._parameters if key in module._parameters else module._buffers
            tensors[key] = made.setdefault(id(before[name]), after[name])  # type: ignore[assignment]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all of their names."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def _with_versions(part: dict[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    # Modules read from here how old a state is.
    ordered = OrderedDict(part)
    if hasattr(state, "_metadata"):
        ordered._metadata = state._metadata  # type: ignore[attr-defined] # an attribute that torch adds
    return ordered


def _check_same(first: str, part: Mapping[str, Any], second: str, other: Mapping[str, Any]) -> None:
    for key in (*saved.TENSORS, "bias"):
        a, b = part.get(key), other.get(key)
        same = torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b
        if not same:
            raise refusal(
                f"layer {second!r}", f"another {key!r} than {first!r}", "the same: in the model it is one layer"
            )


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
