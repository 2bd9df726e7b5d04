"""Which module makes the inputs of layers, and who else reads them: found in one run of a model, never by name."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quantize.shell.fold.outputs import Outputs, visible
from quantize.shell.values import keepable

# How many tokens of an input are compared.
_TOKENS = 16
# How many preceding linear layers are considered as producers, and how many of them, of each width, are tried.
_NEAR, _TRIED = 8, 3

# Runs the model once more on the batch that folds are proven on, under modes, and returns what it gives.
Run = Callable[..., Any]


class Foldable(nn.Linear):
    """A linear layer whose inputs arrive divided by ``folded`` ``[c]``, where that is not None; ``names`` in errors."""

    names: tuple[str, ...]
    folded: Tensor | None


@dataclass(eq=False)
class Readers:
    """Layers that read one tensor, its largest tokens ``[s, c]``, and the modules that may make it, likeliest first.

    ``places`` ``[s]`` are those of the tokens. ``reason``: why the scale stays at run time, unless a fold is proven.
    """

    layers: list[Foldable]
    sample: Tensor
    places: Tensor
    producers: list[nn.Module] = field(default_factory=list)
    reason: str = "no module before makes each channel of the inputs, and nothing else, larger"

    def arrived(self, x: Tensor) -> Tensor | None:
        """The same tokens of other inputs ``[..., c]``; None if there are fewer."""
        tokens = x.detach().reshape(-1, x.shape[-1])
        within = len(tokens) > int(self.places.max()) and tokens.shape[1] == self.sample.shape[1]
        return tokens[self.places] if within else None


def width(module: nn.Module) -> int:
    """For how many output channels ``module`` has a weight each; 0 if for none."""
    weight = module._parameters.get("weight")
    return len(weight) if weight is not None and (isinstance(module, nn.Linear) or weight.ndim == 1) else 0


def find(root: nn.Module, units: Sequence[Sequence[Foldable]], run: Run) -> tuple[list[Readers], Outputs]:
    """The readers in each of ``units``, layers that always read one tensor, in the order of execution; the outputs."""
    trace = _Trace(root)
    with ExitStack() as hooks:
        for module in root.modules():
            hooks.enter_context(module.register_forward_pre_hook(trace.before, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(trace.after))
        leaves = list(visible(run(trace)))
    trace.read(leaves, "the caller of the model")
    opaque = [type(leaf).__name__ for leaf in leaves if not keepable(leaf)]
    # What runs in other batches alone may read anything.
    missed = [layer.names[0] for layer in root.modules() if isinstance(layer, Foldable) and layer not in trace.inputs]
    reason = ""
    if opaque:
        reason = f"a {opaque[0]} in the model's outputs cannot be compared"
    elif not any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves):
        reason = "the model's outputs are no tensors in floating point"
    elif missed:
        reason = f"the first batch did not reach {missed[0]}"
    unit_of = {layer: place for place, unit in enumerate(units) for layer in unit}
    reached: dict[int, list[Foldable]] = {}
    for layer in trace.inputs:
        if layer in unit_of:
            reached.setdefault(unit_of[layer], []).append(layer)
    return [trace.readers(layers, reason) for layers in reached.values()], Outputs.of([] if opaque else leaves)


@dataclass(eq=False)
class _Origin:
    """Of a tensor: the innermost module that gave it, and the modules, or who else, that read it afterwards."""

    module: nn.Module | None = None
    readers: dict[nn.Module | str, None] = field(default_factory=dict)


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch leaves it bare
    """One run of a model: which memory every operator wrote and read, and in which module."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owners = Counter(id(p) for module in root.modules() for p in module._parameters.values() if p is not None)
        self._origins: WeakKeyDictionary[torch.UntypedStorage, _Origin] = WeakKeyDictionary()
        self._inside = [root]
        self._calls: Counter[nn.Module] = Counter()
        # The last linear layers that were called, the last one first.
        self._linears: deque[nn.Module] = deque(maxlen=_NEAR)
        # What each layer read at its first call: origin, tokens and their places; and the linear layers before it.
        self.inputs: dict[Foldable, tuple[_Origin | None, Tensor, Tensor, list[nn.Module]]] = {}

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls[module] += 1
        self._inside.append(module)
        if isinstance(module, Foldable) and module not in self.inputs:
            x = args[0] if args else kwargs["input"]
            tokens = x.detach().reshape(-1, x.shape[-1])
            places = tokens.float().abs().sum(1).topk(min(_TOKENS, len(tokens))).indices
            origin = self._origins.get(x.untyped_storage())
            self.inputs[module] = origin, tokens[places].clone(), places, list(dict.fromkeys(self._linears))

    def after(self, module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        self._inside.pop()
        if type(module) is nn.Linear or isinstance(module, Foldable):
            self._linears.appendleft(module)
        origin = self._origins.get(output.untyped_storage()) if isinstance(output, Tensor) else None
        # What a module calls comes first: the innermost stays. What it read of it itself does not count.
        if origin is not None and origin.module is None:
            origin.module, origin.readers = module, {}

    def read(self, value: Any, reader: nn.Module | str) -> None:
        for origin in filter(None, map(self._origins.get, _storages(value))):
            origin.readers[reader] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.read((args, kwargs), self._inside[-1])
        result = func(*args, **(kwargs or {}))
        known = _storages((args, kwargs))
        for storage in _storages(result):
            if storage not in known:
                self._origins[storage] = _Origin()
        return result

    def readers(self, layers: list[Foldable], reason: str) -> Readers:
        """What ``layers`` read, and what may make it; with a ``reason``, nothing."""
        origin, sample, places, near = self.inputs[layers[0]]
        found, c = Readers(layers, sample, places), layers[0].in_features
        again = [layer.names[0] for layer in layers if self._calls[layer] > 1]
        if reason:
            found.reason = reason
        elif not sample.any():
            found.reason = "no token of the first batch reached it"
        elif again:
            found.reason = f"{again[0]} is called more than once"
        elif origin is None or any(self.inputs[layer][0] is not origin for layer in layers):
            found.reason = "the inputs are those of the model, or are changed in between"
        elif origin.module is not None and width(origin.module) == c:
            maker, others = type(origin.module).__name__, [each for each in origin.readers if each not in layers]
            if self._calls[origin.module] > 1:
                found.reason = f"a {maker} that is called more than once makes the inputs"
            elif others:
                found.reason = f"{_name(others[0])} reads the inputs as well"
            elif self._tied(origin.module):
                found.reason = f"the {maker} that makes the inputs shares its parameters"
            else:
                found.producers = [origin.module]
        else:
            fits = [each for each in near if width(each) > 1 and c % width(each) == 0 and each not in layers]
            fits = [each for each in fits if self._calls[each] == 1 and not self._tied(each)]
            # Those with a channel for each input come before those whose channels would be read several times.
            whole, shared = ([each for each in fits if (width(each) == c) is full] for full in (True, False))
            found.producers = [*whole[:_TRIED], *shared[:_TRIED]]
            if not fits:
                found.reason = "no module before has a weight for each channel of the inputs"
        return found

    def _tied(self, module: nn.Module) -> bool:
        return any(self._owners[id(p)] > 1 for p in module._parameters.values() if p is not None)


def _storages(value: Any) -> list[torch.UntypedStorage]:
    leaves = pytree.tree_leaves(value)
    return [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor) and leaf.layout == torch.strided]


def _name(reader: nn.Module | str) -> str:
    if isinstance(reader, Foldable):
        return reader.names[0]
    return reader if isinstance(reader, str) else type(reader).__name__
