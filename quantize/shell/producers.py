"""Which module makes the inputs of layers, and who else reads them: found in one run of a model, never by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quantize.shell.batches import Batch
from quantize.shell.calibration import CalibrationLinear
from quantize.shell.watch import Tags, storages_of

# How many tokens, and how many numbers of an output, are compared.
_TOKENS, _NUMBERS = 16, 4096
# How many linear layers before a layer may make its inputs, through something that keeps the channels apart.
_NEAR, _TRIED = 8, 3


@dataclass(eq=False)
class Group:
    """Layers that read one tensor, some of its tokens ``[s, c]``, and the modules that may make it, likeliest first.

    Without any, ``reason`` says why.
    """

    layers: list[CalibrationLinear]
    sample: Tensor
    producers: list[nn.Module] = field(default_factory=list)
    reason: str = ""


def sample(x: Tensor) -> Tensor:
    """A few tokens ``[s, c]`` of ``x`` ``[..., c]``, evenly spaced."""
    tokens = x.detach().reshape(-1, x.shape[-1])
    return tokens[:: max(1, len(tokens) // _TOKENS)].clone()


def sampled(output: Any) -> list[Tensor]:
    """Numbers of every tensor in ``output``, evenly spaced."""
    flat = [leaf.detach().flatten() for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    return [leaf[:: max(1, len(leaf) // _NUMBERS)].clone() for leaf in flat]


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


def find(root: nn.Module, layers: list[CalibrationLinear], batch: Batch) -> tuple[list[Group], list[Tensor]]:
    """The groups of ``layers`` in the order of execution, and numbers of what ``root`` gives for ``batch``.

    Layers are one group if they share their statistics: then they read the same tensor in every batch.
    """
    trace = _Trace(set(layers))
    with hooked(root, trace.before, trace.after):
        output = batch.run(root, trace)
    trace.gave(output)
    together: dict[int, list[CalibrationLinear]] = {}
    for layer in sorted((layer for layer in layers if layer in trace.inputs), key=trace.order.index):
        together.setdefault(id(pytree.tree_leaves(layer.statistics)[0]), []).append(layer)
    return [trace.group(members) for members in together.values()], sampled(output)


class _Made:
    """A tensor: the innermost module that gave it, the layers that read it afterwards, and who else does."""

    def __init__(self) -> None:
        self.module: nn.Module | None = None
        self.layers: dict[CalibrationLinear, None] = {}
        self.others: dict[str, None] = {}


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch leaves it bare
    def __init__(self, layers: set[CalibrationLinear]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._layers = layers
        self._made = Tags()
        self._inside: list[nn.Module] = []
        # Linear layers in the order of their calls, and how often each module was called.
        self._linears: list[nn.Module] = []
        self._calls: Counter[nn.Module] = Counter()
        self.order: list[CalibrationLinear] = []
        self.inputs: dict[CalibrationLinear, tuple[_Made | None, Tensor, int]] = {}

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls[module] += 1
        self._inside.append(module)
        if isinstance(module, CalibrationLinear) and module in self._layers and module not in self.inputs:
            x = args[0] if args else kwargs["input"]
            self.order.append(module)
            self.inputs[module] = self._made.get(x.untyped_storage()), sample(x), len(self._linears)

    def after(self, module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        self._inside.pop()
        if type(module) in (nn.Linear, CalibrationLinear):
            self._linears.append(module)
        made = self._made.get(output.untyped_storage()) if isinstance(output, Tensor) else None
        # What a module calls comes first: the innermost stays. What it read of it itself does not count.
        if made is not None and made.module is None:
            made.module, made.layers, made.others = module, {}, {}

    def gave(self, output: Any) -> None:
        for storage in storages_of(output) or ():
            if (made := self._made.get(storage)) is not None:
                made.others["the caller of the model"] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        here = self._inside[-1] if self._inside else None
        read = storages_of((args, kwargs)) or []
        for made in filter(None, map(self._made.get, () if func.is_view else read)):
            if isinstance(here, CalibrationLinear) and here in self._layers:
                made.layers[here] = None
            else:
                made.others[type(here).__name__ if here is not None else "the model"] = None
        result = func(*args, **(kwargs or {}))
        known = {storage._cdata for storage in read}
        for storage in storages_of(result) or ():
            if storage._cdata not in known:
                self._made.set(storage, _Made())
        return result

    def group(self, layers: list[CalibrationLinear]) -> Group:
        made, tokens, before = self.inputs[layers[0]]
        found = Group(layers, tokens)
        again = [layer.names[0] for layer in layers if self._calls[layer] > 1]
        if not len(tokens):
            found.reason = "no token of the first batch reached it"
        elif again:
            found.reason = f"{again[0]} is called more than once"
        elif made is None or any(self.inputs[layer][0] is not made for layer in layers):
            found.reason = "the inputs are those of the model, or are changed in between"
        elif isinstance(made.module, nn.Module) and width(made.module) == layers[0].in_features:
            others = [*made.others, *(layer.names[0] for layer in made.layers if layer not in layers)]
            if self._calls[made.module] > 1:
                found.reason = f"a {type(made.module).__name__} that is called more than once makes the inputs"
            elif others:
                found.reason = f"{others[0]} reads the inputs as well"
            else:
                found.producers = [made.module]
        else:
            near = dict.fromkeys(reversed(self._linears[max(0, before - _NEAR) : before]))
            fits = [each for each in near if self._calls[each] == 1 and width(each) in _divisors(layers[0])]
            found.producers = [each for each in fits if each not in layers][:_TRIED]
            found.reason = "" if found.producers else "no module before has a weight for each channel of the inputs"
        return found


def width(module: nn.Module) -> int:
    """For how many output channels ``module`` has a weight each; 0 if for none."""
    weight = module._parameters.get("weight")
    linear = isinstance(module, (nn.Linear, CalibrationLinear))
    return len(weight) if weight is not None and (linear or weight.ndim == 1) else 0


def _divisors(layer: CalibrationLinear) -> set[int]:
    return {n for n in range(1, layer.in_features + 1) if layer.in_features % n == 0}
