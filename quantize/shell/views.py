"""Linear layers that a model stores in another form, as ``nn.Linear`` on views of the same memory.

- The experts of transformers: 3-D parameters in a module whose class has the decorator ``use_experts_implementation``.
  The attributes that the decorator sets identify it, not its name.
- ``Conv1D`` of transformers (GPT-2): a linear layer with its weight transposed.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from quantize.shell import offload
from quantize.shell.config import refusal
from quantize.shell.values import tokens_of, with_tokens

_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm", "num_experts")


def modules(
    model: nn.Module, views: dict[nn.Module, nn.Module], *, skip: Collection[str] = ()
) -> Iterator[tuple[str, nn.Module]]:
    """All modules of ``model`` under all names, with views in place of their originals; it adds these to ``views``.

    A module with one of the words ``skip`` in its name gets no view.

    Raises:
        QuantizeError: as :func:`view`.
    """
    inside = ""
    for name, module in model.named_modules(remove_duplicate=False):
        if inside and name.startswith(inside):
            continue
        seen = views.get(module)
        if seen is None and name and not any(word in name for word in skip):
            seen = view(name, module)
        if seen is None:
            yield name, module
        else:
            views[module], inside = seen, f"{name}."
            yield from seen.named_modules(prefix=name, remove_duplicate=False)


def view(name: str, module: nn.Module) -> nn.Module | None:
    """The replacement for ``module`` whose weights are linear layers; None if it needs none.

    Raises:
        QuantizeError: experts whose attributes do not fit their parameters; it names the module.
    """
    replaced = "forward" in module.__dict__ and not offload.dispatched(module)
    if replaced or getattr(offload.offload_hook(module), "place_submodules", False) or not known(module):
        return None
    if "down_proj" in module._parameters:
        return Experts(name, module)
    layer = _linear(module, {"weight": "weight", "bias": "bias"}, functools.partial(_part, (), True), inside=False)
    adopt(layer, module)
    return layer


def adopt(new: nn.Module, old: nn.Module) -> None:
    """Give ``new`` the attributes, buffers, flags and hooks that users attached to ``old``; the dicts are shared."""
    own = *getattr(old, "own", ()), "_old_forward"
    for key, value in vars(old).items():
        # ``new`` may already have an accelerate hook of its own.
        if ("_hook" in key and key != "_hf_hook") or not (key in own or hasattr(new, key)):
            vars(new)[key] = value
    new._buffers = {**old._buffers, **new._buffers}
    new._non_persistent_buffers_set |= old._non_persistent_buffers_set
    new.training = old.training
    offload.settle(new)


def known(module: nn.Module) -> bool:
    """Whether the class of ``module`` has a view. Its forward must be that of the class."""
    kind = type(module)
    if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."):
        return module._parameters.get("weight") is not None
    # A subclass with its own forward does not run that of the decorator.
    decorated = getattr(kind.forward, "__globals__", {}).get("__name__") == "transformers.integrations.moe"
    decorated = decorated and all(hasattr(module, mark) for mark in _MARKS)
    return decorated and module._parameters.get("down_proj") is not None


def release(model: nn.Module) -> None:
    """Copy the weights of experts that stay in floating point, so that the memory they shared is freed."""
    for module in model.modules():
        for p in module.parameters() if isinstance(module, Experts) else ():
            if p.nbytes < p.untyped_storage().nbytes():
                p.data = p.data.clone()


class Experts(nn.Module):
    """A mixture's experts: modules ``0``, ``1``, ... with ``gate_proj`` (if any), ``up_proj`` and ``down_proj``.

    The gate function, the norm after an expert, hooks and attributes are those of the original. The router is outside.
    """

    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool
    has_post_expert_norm: bool
    act_fn: nn.Module
    post_expert_norm: nn.Module

    def __init__(self, name: str, original: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(original.__dict__)
        self.__dict__.pop("forward", None)
        self._modules, self._parameters = dict(original._modules), dict(original._parameters)
        self.name, self.original = name, cast("Any", type(original))
        up, e = "gate_up_proj" if self.has_gate else "up_proj", self.num_experts
        down = cast("Tensor", original._parameters["down_proj"])
        if down.ndim != 3:
            raise refusal(f"module {name!r}", f"'down_proj' as {list(down.shape)}", "[experts, hidden, inner]")
        h, i = (down.mT if self.is_transposed else down).shape[1:]
        wide = 2 * i if self.has_gate else i
        shapes = {up: (e, wide, h), "down_proj": (e, h, i), f"{up}_bias": (e, wide), "down_proj_bias": (e, h)}
        for key, (_, *shape) in shapes.items():
            p = self._parameters.pop(key, None)
            wanted = None if "bias" in key and not self.has_bias else [e, *shape[:: -1 if self.is_transposed else 1]]
            if (found := None if p is None else list(p.shape)) != wanted:
                raise refusal(f"module {name!r}", f"{key!r} as {found}", f"{wanted}, as its attributes say")
        # Concatenated: [gate; up]. Interleaved: gate, up, gate, up, ...
        halves = (slice(i), slice(i, None)) if self.is_concatenated else (slice(0, None, 2), slice(1, None, 2))
        rows = dict(zip(("gate_proj", "up_proj"), halves, strict=True)) if self.has_gate else {"up_proj": slice(None)}
        sources = {**dict.fromkeys(rows, up), "down_proj": "down_proj"}
        for number in range(e):
            expert = nn.ModuleDict().train(original.training)
            for key, source in sources.items():
                part = functools.partial(_part, (number, rows.get(key, slice(None))), self.is_transposed)
                expert[key] = _linear(original, {"weight": source, "bias": f"{source}_bias"}, part, inside=True)
            self.add_module(str(number), expert)
        offload.follow(self, original, {key: key for key in self._parameters}, lambda _, tensor: tensor)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run each token of ``[t, h]`` through its experts ``[t, k]``, and sum the outputs weighted by ``[t, k]``.

        The index ``num_experts`` means no expert, as in transformers.

        Raises:
            QuantizeError: another index outside the experts.
        """
        chosen, k = top_k_index.flatten(), top_k_index.shape[1]
        outside = chosen[(chosen < 0) | (chosen > self.num_experts)]
        if len(outside):
            raise refusal(f"module {self.name!r}", f"expert {int(outside[0])}", f"0 to {self.num_experts}")
        counts = torch.bincount(chosen, minlength=self.num_experts + 1).tolist()
        total = torch.zeros_like(hidden_states)
        for number, place in enumerate(torch.split(torch.argsort(chosen, stable=True), counts)[: self.num_experts]):
            if len(place):
                token = place // k
                x = with_tokens(hidden_states[token], token, len(hidden_states))
                y = self._expert(self._modules[str(number)], x)
                total.index_add_(0, token, (y * top_k_weights[token, place % k, None]).to(total.dtype))
        return total

    def _expert(self, expert: Any, x: Tensor) -> Tensor:
        if self.has_gate:
            pair = expert["gate_proj"](x), expert["up_proj"](x)
            both = torch.cat(pair, -1) if self.is_concatenated else torch.stack(pair, -1).flatten(-2)
            inner = self.original._apply_gate(self, both)
        else:
            inner = self.act_fn(expert["up_proj"](x))
        y: Tensor = expert["down_proj"](with_tokens(inner, *tokens_of(x)))
        return self.post_expert_norm(y) if self.has_post_expert_norm else y


def _part(place: tuple[Any, ...], transposed: bool, key: str, tensor: Tensor) -> Tensor:
    return (tensor.mT if transposed and key == "weight" else tensor)[place]


def _linear(original: nn.Module, names: dict[str, str], part: offload.Change, *, inside: bool) -> nn.Linear:
    """A linear layer: each parameter is the ``part`` of the parameter of ``original`` that ``names`` maps it to."""
    held = {key: p for key, name in names.items() if (p := original._parameters.get(name)) is not None}
    n, c = part("weight", held["weight"]).shape
    layer = nn.Linear(c, n, bias="bias" in held, device="meta").train(original.training)
    for key, p in held.items():
        layer._parameters[key] = nn.Parameter(part(key, p.detach()), p.requires_grad)
    # The hook of a mixture runs once, around all of its experts.
    offload.follow(layer, original, names, part, inside=inside)
    return layer
