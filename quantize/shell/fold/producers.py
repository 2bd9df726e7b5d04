"""Which module makes the inputs of layers, and who else reads them: found in one run of a model, never by name."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quantize.shell.fold.storages import Tags, storages_of
from quantize.shell.values import keepable

# How many tokens, and how many numbers of an output where bits may change, are compared.
_TOKENS, _NUMBERS = 16, 4096
# How many linear layers before a layer may make its inputs, through something that keeps the channels apart.
_NEAR, _TRIED = 8, 3


class Foldable(nn.Linear):
    """A linear layer whose inputs arrive divided by ``folded`` ``[c]``, where that is not None; ``names`` in errors."""

    names: tuple[str, ...]
    folded: Tensor | None


@dataclass(eq=False)
class Group:
    """Layers that read one tensor, its largest tokens ``[s, c]``, and the modules that may make it, likeliest first.

    ``places`` ``[s]`` are those of the tokens. Without any module, ``reason`` says why.
    """

    layers: list[Foldable]
    sample: Tensor
    places: Tensor
    producers: list[nn.Module] = field(default_factory=list)
    reason: str = ""

    def arrived(self, x: Tensor) -> Tensor | None:
        """The same tokens of other inputs ``[..., c]``; None if there are fewer."""
        tokens = x.detach().reshape(-1, x.shape[-1])
        within = len(tokens) > int(self.places.max()) and tokens.shape[1] == self.sample.shape[1]
        return tokens[self.places] if within else None


# Runs the model once more on the batch that folds are proven on, under modes, and returns what it gives.
Run = Callable[..., Any]


@dataclass(frozen=True)
class Outputs:
    """What a model gave: a checksum of all its bits, and some of the numbers of every tensor."""

    bits: tuple[Any, ...]
    numbers: list[Tensor]

    @classmethod
    def of(cls, value: Any) -> Outputs:
        """Of what :func:`visible` finds."""
        leaves = visible(value)
        tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        plain = tuple(repr(leaf) for leaf in leaves if not isinstance(leaf, Tensor))
        return cls((*plain, *map(_checksum, tensors)), [_some(tensor) for tensor in tensors])


def visible(value: Any) -> list[Any]:
    """Tensors, plain values, and what cannot be looked into, in containers and in the attributes of objects."""
    found: list[Any] = []
    seen: dict[int, Any] = {}
    waiting = pytree.tree_leaves(value)
    while waiting:
        leaf = waiting.pop()
        if keepable(leaf) or not hasattr(leaf, "__dict__"):
            found.append(leaf)
        elif id(leaf) not in seen:
            # Kept, so that no new object takes its id.
            seen[id(leaf)] = leaf
            inside = [*vars(leaf).values(), *(leaf.values() if isinstance(leaf, dict) else ())]
            waiting += pytree.tree_leaves(inside)
    return found[::-1]


def _checksum(tensor: Tensor) -> tuple[Any, ...]:
    """Two sums over all bits, of which one also depends on the places; both may wrap."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bits = flat.contiguous().flatten().view(integer[flat.element_size()])
    sums = [tensor.shape, tensor.dtype]
    for start in range(0, len(bits), 2**20):
        part = bits[start : start + 2**20].to(torch.int64)
        places = torch.arange(start, start + len(part), device=part.device) * 2654435761 + 1
        sums += [int(part.sum()), int((part * places).sum())]
    return tuple(sums)


def _some(tensor: Tensor) -> Tensor:
    # A step without a divisor in common with the shape: no channel is left out.
    step = max(1, tensor.numel() // _NUMBERS)
    while any(math.gcd(step, size) > 1 for size in tensor.shape):
        step += 1
    return tensor.flatten()[::step].clone()


@contextmanager
def hooked(root: nn.Module, before: Any, after: Any) -> Iterator[None]:
    """``before(module, args, kwargs)`` and ``after(module, args, output)`` around every call of a module."""
    handles = []
    for module in root.modules():
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def find(root: nn.Module, units: Sequence[Sequence[Foldable]], run: Run) -> tuple[list[Group], Outputs]:
    """A group for each of ``units``, layers that always read one tensor, in the order of execution; and the outputs."""
    trace = _Trace(root)
    with hooked(root, trace.before, trace.after):
        output = run(trace)
    leaves = visible(output)
    trace.gave(leaves)
    opaque = [leaf for leaf in leaves if not keepable(leaf)]
    # What runs in other batches alone may read anything.
    missed = [layer.names[0] for layer in root.modules() if isinstance(layer, Foldable) and layer not in trace.inputs]
    if opaque:
        trace.reason = f"a {type(opaque[0]).__name__} in the model's outputs cannot be compared"
    elif not any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves):
        trace.reason = "the model's outputs are no tensors in floating point"
    elif missed:
        trace.reason = f"the first batch did not reach {missed[0]}"
    reached = [sorted((layer for layer in unit if layer in trace.inputs), key=[*trace.inputs].index) for unit in units]
    reached = sorted(filter(None, reached), key=lambda unit: [*trace.inputs].index(unit[0]))
    return [trace.group(members) for members in reached], Outputs.of(None if opaque else output)


class _Made:
    """A tensor: the innermost module that gave it, the layers that read it afterwards, and who else does."""

    def __init__(self) -> None:
        self.module: nn.Module | None = None
        self.layers: dict[Foldable, None] = {}
        self.others: dict[str, None] = {}


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch leaves it bare
    def __init__(self, root: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Of all groups, why none can be folded.
        self.reason = ""
        self._owners = Counter(id(p) for module in root.modules() for p in module._parameters.values() if p is not None)
        self._made = Tags()
        self._inside: list[nn.Module] = []
        # Linear layers in the order of their calls, and how often each module was called.
        self._linears: list[nn.Module] = []
        self._calls: Counter[nn.Module] = Counter()
        # What each layer read at its first call, in the order of those.
        self.inputs: dict[Foldable, tuple[_Made | None, tuple[Tensor, Tensor], int]] = {}

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls[module] += 1
        self._inside.append(module)
        if isinstance(module, Foldable) and module not in self.inputs:
            x = args[0] if args else kwargs["input"]
            tokens = x.detach().reshape(-1, x.shape[-1])
            norms = tokens.float().abs().sum(1)
            places = norms.topk(min(_TOKENS, len(tokens))).indices
            made = self._made.get(x.untyped_storage())
            self.inputs[module] = made, (tokens[places].clone(), places), len(self._linears)

    def after(self, module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        self._inside.pop()
        if type(module) is nn.Linear or isinstance(module, Foldable):
            self._linears.append(module)
        made = self._made.get(output.untyped_storage()) if isinstance(output, Tensor) else None
        # What a module calls comes first: the innermost stays. What it read of it itself does not count.
        if made is not None and made.module is None:
            made.module, made.layers, made.others = module, {}, {}

    def gave(self, leaves: list[Any]) -> None:
        for storage in storages_of(leaves) or ():
            if (made := self._made.get(storage)) is not None:
                made.others["the caller of the model"] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        here = self._inside[-1] if self._inside else None
        read = storages_of((args, kwargs)) or []
        for made in filter(None, map(self._made.get, () if func.is_view else read)):
            if isinstance(here, Foldable):
                made.layers[here] = None
            else:
                made.others[type(here).__name__ if here is not None else "the model"] = None
        result = func(*args, **(kwargs or {}))
        known = {storage._cdata for storage in read}
        for storage in storages_of(result) or ():
            if storage._cdata not in known:
                self._made.set(storage, _Made())
        return result

    def group(self, layers: list[Foldable]) -> Group:
        made, (tokens, places), before = self.inputs[layers[0]]
        found = Group(layers, tokens, places)
        again = [layer.names[0] for layer in layers if self._calls[layer] > 1]
        if self.reason:
            found.reason = self.reason
        elif not tokens.any():
            found.reason = "no token of the first batch reached it"
        elif again:
            found.reason = f"{again[0]} is called more than once"
        elif made is None or any(self.inputs[layer][0] is not made for layer in layers):
            found.reason = "the inputs are those of the model, or are changed in between"
        elif made.module is not None and width(made.module) == layers[0].in_features:
            others = [*made.others, *(layer.names[0] for layer in made.layers if layer not in layers)]
            if self._calls[made.module] > 1:
                found.reason = f"a {type(made.module).__name__} that is called more than once makes the inputs"
            elif others:
                found.reason = f"{others[0]} reads the inputs as well"
            elif self._tied(made.module):
                found.reason = f"the {type(made.module).__name__} that makes the inputs shares its parameters"
            else:
                found.producers = [made.module]
        else:
            near = dict.fromkeys(reversed(self._linears[max(0, before - _NEAR) : before]))
            c = layers[0].in_features
            fits = [each for each in near if width(each) > 1 and c % width(each) == 0 and each not in layers]
            fits = [each for each in fits if self._calls[each] == 1 and not self._tied(each)]
            # The nearest first, and those with a channel for each input before those that would be read several times.
            whole, shared = ([each for each in fits if (width(each) == c) is full] for full in (True, False))
            found.producers = [*whole[:_TRIED], *shared[:_TRIED]]
            found.reason = "" if found.producers else "no module before has a weight for each channel of the inputs"
        return found

    def _tied(self, module: nn.Module) -> bool:
        return any(self._owners[id(p)] > 1 for p in module._parameters.values() if p is not None)


def width(module: nn.Module) -> int:
    """For how many output channels ``module`` has a weight each; 0 if for none."""
    weight = module._parameters.get("weight")
    linear = isinstance(module, nn.Linear)
    return len(weight) if weight is not None and (linear or weight.ndim == 1) else 0
