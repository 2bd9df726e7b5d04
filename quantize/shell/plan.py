"""The plan: which layers of a model are quantized, and why the others are not. Nothing else decides this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from quantize.core import LayerSpec
from quantize.shell import offload
from quantize.shell.config import Config, refusal
from quantize.shell.progress import progress
from quantize.shell.report.rows import Skipped, share
from quantize.shell.views import known, modules

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Children whose owner reads their weight without calling them.
_READ_DIRECTLY: dict[type[nn.Module], tuple[str, ...]] = {
    nn.MultiheadAttention: ("out_proj",),
    nn.TransformerEncoderLayer: ("linear1", "linear2"),
}
_NO_FORMAT = "no weights entry of quant_cfg matches it"
_NO_DATA = "its weight is on the meta device, without data"
_REPLACED = "its forward is replaced on the instance"


@dataclass(frozen=True)
class Plan:
    """The result of :func:`plan`: which layers are quantized, and in which format.

    - ``layers``: the layers to quantize, each with all names that it will have in the model.
    - ``specs``: the format of each layer, by its first name.
    - ``views``: replacements for modules that store linear layers in another form, see :mod:`.views`.
    - ``skipped``: the modules with a weight matrix that are not quantized, each with the reason.
    - ``unmatched``: entries of ``skip_layers`` that match no module with a weight matrix, and patterns of ``quant_cfg``
      that match no layer.
    - ``elements``: the number of elements of all weight matrices of the model; each tensor counts once.
    """

    layers: Mapping[nn.Linear, tuple[str, ...]]
    specs: Mapping[str, LayerSpec]
    views: Mapping[nn.Module, nn.Module]
    skipped: tuple[Skipped, ...]
    unmatched: tuple[str, ...]
    elements: int


def plan(model: nn.Module, config: Config, *, outline: bool = False) -> Plan:
    """Decide which modules with a weight matrix are quantized; the model is not changed.

    ``outline``: the model is on the meta device until its weights are read, so the weights are not checked.

    Raises:
        QuantizeError: nothing to quantize, or a layer that :func:`check_parameters` refuses.
    """
    names: dict[nn.Module, list[str]] = {}
    views: dict[nn.Module, nn.Module] = {}
    for name, module in modules(model, views, skip=config.skip_layers):
        names.setdefault(module, []).append(name)
    owners = {module.get_submodule(child): owner.__name__ for module in names
              for owner, children in _READ_DIRECTLY.items() if isinstance(module, owner)
              for child in children}  # fmt: skip
    tied = offload.ties(model)
    total = sum(p.numel() for p in {tied.get(p, p) for p in model.parameters()} if p.ndim >= 2)
    layers, specs = dict[nn.Linear, tuple[str, ...]](), dict[str, LayerSpec]()
    skipped, matched, counted = list[Skipped](), set[str](), set[nn.Parameter]()
    for module, all_names in progress(names.items(), "check the weights", unit="module"):
        matrices = {tied.get(p, p) for p in module.parameters(recurse=False) if p.ndim >= 2}
        if not matrices and not isinstance(module, nn.Linear):
            continue
        asked = [word for word in config.skip_layers if any(word in name for name in all_names)]
        matched.update(asked)
        reason = f"skip_layers: {asked[0]!r}" if asked else _reason(module, all_names, owners.get(module), total)
        reason = None if outline and reason == _NO_DATA else reason
        spec = config.spec(all_names) if reason is None else None
        matched.update(str(each) for each in config.formats if spec is not None and each.matches(all_names))
        reason = reason or _unfit(cast("nn.Linear", module), spec)
        if reason is not None:
            for name in all_names:
                elements = sum(p.numel() for p in matrices - counted)
                skipped.append(Skipped(name, reason, bool(asked) or reason == _NO_FORMAT, elements))
                counted |= matrices
        elif isinstance(module, nn.Linear) and spec is not None:
            layers[module], specs[all_names[0]] = tuple(all_names), spec
            if not outline:
                check_parameters(all_names[0], module)
    if not layers:
        found = "; ".join(f"{s.name or type(model).__name__!r}: {s.reason}" for s in skipped) or "no weight matrix"
        raise refusal("model", f"nothing to quantize ({found})", "a model that contains an nn.Linear")
    # Only modules with a quantized layer are replaced.
    views = {old: new for old, new in views.items() if any(module in layers for module in new.modules())}
    wanted = [*config.skip_layers, *(str(each) for each in config.formats if each.pattern is not None)]
    unmatched = tuple(word for word in wanted if word not in matched)
    return Plan(layers, specs, views, tuple(skipped), unmatched, total)


def swap(model: nn.Module, replacements: Mapping[Any, nn.Module]) -> None:
    """Replace each original by its replacement, under all names that it has in ``model``."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[key] = replacements[child]


def check_parameters(name: str, layer: nn.Module) -> None:
    """Refuse a weight with NaN or inf, parameters on different devices, and parameters that cannot be read."""
    weight, bias = offload.weight(layer, name), offload.bias(layer, name)
    if not bool(torch.isfinite(weight).all()):
        raise refusal(f"layer {name!r}", "a weight with NaN or inf", "finite weights, or the layer in skip_layers")
    if bias is not None and bias.device != weight.device:
        told = f"its weight on {weight.device}, its bias on {bias.device}"
        raise refusal(f"layer {name!r}", told, "one device for both, or the layer in skip_layers")


def _reason(module: nn.Module, names: list[str], owner: str | None, total: int) -> str | None:
    kind = type(module).__name__
    if owner is not None:
        return f"its owner, {owner}, reads the weight without calling the layer"
    if not isinstance(module, nn.Linear):
        wrong = f"{kind} is not an nn.Linear"
        if "forward" in module.__dict__ and known(module):
            wrong = _REPLACED + ", by a hook of accelerate" * offload.dispatched(module)
        # The 3-D parameters of an unknown class may be experts, which are most of a model. Those of torch's
        # convolutions are not.
        stacked = sum(p.numel() for p in module.parameters(recurse=False) if p.ndim == 3)
        told = f": its 3-D parameters, such as those of experts, are {share(stacked, total)}"
        return wrong + told * (stacked > 0 and not module.__module__.startswith("torch."))
    if type(module) is not nn.Linear:
        return f"{kind} is a subclass of nn.Linear: its forward may do something else"
    if "" in names:
        return "the model is the layer itself: it has no parent module"
    if module._parameters.get("weight") is None:
        return "its weight is not a parameter: a hook computes it"
    if "forward" in module.__dict__ and not offload.dispatched(module):
        return _REPLACED
    if 0 in module.weight.shape:
        return "it is empty"
    if module.weight.dtype not in _FLOATS:
        return f"its weight is {module.weight.dtype}"
    if module.weight.is_meta and offload.offload_hook(module) is None:
        return _NO_DATA
    return None


def _unfit(module: nn.Linear, spec: LayerSpec | None) -> str | None:
    if spec is None:
        return _NO_FORMAT
    size = spec.weight.group_size
    if size is not None and size >= module.weight.shape[1]:
        return f"group_size {size} is not below in_features {module.weight.shape[1]}"
    return None
