"""Which module makes the inputs of layers, and who else reads them: found in one run of a model, never by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quantize.shell import offload
from quantize.shell.fold.outputs import Outputs, visible
from quantize.shell.values import keepable

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
    """Layers that read one tensor: its dtype and :func:`magnitudes` ``[c]``, and the modules that may make it.

    The likeliest module is the first. ``reason``: why the scale of the layers stays at run time.
    """

    layers: Sequence[Foldable]
    dtype: torch.dtype
    sums: Tensor
    producers: list[nn.Module]
    reason: str = "no module before makes each channel of the inputs, and nothing else, larger"


def magnitudes(x: Tensor) -> Tensor:
    """The sums ``[c]`` of the magnitudes of ``x`` ``[..., c]``: powers of two times ``x`` are the same times these."""
    return x.detach().reshape(-1, x.shape[-1]).abs().sum(0, dtype=torch.float64)


def width(module: nn.Module | None) -> int:
    """For how many output channels ``module`` has a weight each; 0 if for none."""
    weight = None if module is None else module._parameters.get("weight")
    # The hook of a module around it may keep it: nobody else can read it.
    if module is not None and weight is not None and weight.is_meta and offload.keeper(module) is None:
        return 0
    return len(weight) if weight is not None and (isinstance(module, nn.Linear) or weight.ndim == 1) else 0


def find(root: nn.Module, units: Sequence[Sequence[Foldable]], run: Run) -> tuple[list[Readers], Outputs]:
    """The readers in each of ``units``, layers that always read one tensor, in the order of execution; the outputs."""
    trace, modules = _Trace(), list(root.modules())
    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(trace.before, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(trace.after))
        leaves = list(visible(run(trace)))
    trace.read(leaves, "the caller of the model")
    opaque = next((type(leaf).__name__ for leaf in leaves if not keepable(leaf)), "")
    floats = any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves)
    # What runs in other batches alone may read anything.
    missed = next((each.names[0] for each in modules if isinstance(each, Foldable) and each not in trace.inputs), "")
    general = [
        (opaque, f"a {opaque} in the model's outputs cannot be compared"),
        (not floats, "the model's outputs are no tensors in floating point"),
        (missed, f"the first batch did not reach {missed}"),
    ]
    owners = Counter(id(p) for module in modules for p in module.parameters(recurse=False))
    tied = {module for module in modules if any(owners[id(p)] > 1 for p in module.parameters(recurse=False))}
    unit_of = {layer: tuple(each for each in unit if each in trace.inputs) for unit in units for layer in unit}
    reached = dict.fromkeys(unit_of[layer] for layer in trace.inputs if layer in unit_of)
    return [_proposed(unit, trace, tied, general) for unit in reached], Outputs.of([] if opaque else leaves)


def _proposed(layers: Sequence[Foldable], trace: _Trace, tied: set[nn.Module], general: list[Any]) -> Readers:
    """The readers with what may make their inputs, or with the first reason against it, ``general`` ones before."""
    (found, origin), c, other = trace.inputs[layers[0]], layers[0].in_features, ""
    found.layers = layers
    if origin is not None and width(origin.module) == c:
        found.producers = [origin.module]
        other = next((name for each, name in origin.readers.items() if each not in layers), "")
    else:
        fits = [each for each in found.producers if trace.calls[each] == 1 and each not in tied and each not in layers]
        # Those with a channel for each input come before those whose channels would be read several times.
        found.producers = [each for each in fits if width(each) == c][:_TRIED]
        found.producers += [each for each in fits if 1 < width(each) < c and c % width(each) == 0][:_TRIED]
    again = next((layer.names[0] for layer in layers if trace.calls[layer] > 1), "")
    often = any(trace.calls[each] > 1 for each in found.producers)
    kind = "".join(type(each).__name__ for each in found.producers[:1])
    apart = origin is None or any(trace.inputs[layer][1] is not origin for layer in layers)
    reasons = [
        *general,
        (not found.sums.any(), "no token of the first batch reached it"),
        (again, f"{again} is called more than once"),
        (apart, "the inputs are those of the model, or are changed in between"),
        (not found.producers, "no module before has a weight for each channel of the inputs"),
        (often, f"a {kind} that is called more than once makes the inputs"),
        (other, f"{other} reads the inputs as well"),
        (tied.intersection(found.producers), f"the {kind} that makes the inputs shares its parameters"),
    ]
    if reason := next((text for holds, text in reasons if holds), ""):
        found.producers, found.reason = [], reason
    return found


@dataclass(eq=False)
class _Origin:
    """Of a tensor: the innermost module that gave it, and by module the names of those that read it afterwards."""

    module: Any = None
    readers: dict[nn.Module | None, str] = field(default_factory=dict)


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch leaves it bare
    """One run of a model: which module made the memory that its operators read, and which modules read it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # How often each module was called, in the order of the first calls.
        self.calls: Counter[nn.Module] = Counter()
        # What each layer read at its first call, in the order of these calls; the linear layers before it as producers.
        self.inputs: dict[Foldable, tuple[Readers, _Origin | None]] = {}
        self._origins: WeakKeyDictionary[torch.UntypedStorage, _Origin] = WeakKeyDictionary()
        self._inside: list[nn.Module] = []

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # First, so that what is read here is read by the layer.
        self._inside.append(module)
        if isinstance(module, Foldable) and module not in self.inputs:
            x = args[0] if args else kwargs["input"]
            linears = (each for each in reversed(self.calls) if type(each) is nn.Linear or isinstance(each, Foldable))
            found = Readers([module], x.dtype, magnitudes(x), [*islice(linears, _NEAR)])
            self.inputs[module] = found, self._origins.get(x.untyped_storage())
        self.calls[module] += 1

    def after(self, module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        self._inside.pop()
        origin = self._origins.get(output.untyped_storage()) if isinstance(output, Tensor) else None
        # Inner modules end first, so that the innermost stays. What a module reads of its own output does not count.
        if origin is not None and origin.module is None:
            origin.module, origin.readers = module, {}

    def read(self, value: Any, name: str) -> None:
        """Note that ``value`` is read: by the module that runs, else by the one called ``name``."""
        here = self._inside[-1] if self._inside else None
        name = name if here is None else here.names[0] if isinstance(here, Foldable) else type(here).__name__
        for origin in filter(None, map(self._origins.get, _storages(value))):
            origin.readers[here] = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.read((args, kwargs), "the model")
        result, known = func(*args, **(kwargs or {})), _storages((args, kwargs))
        self._origins.update((storage, _Origin()) for storage in _storages(result) if storage not in known)
        return result


def _storages(value: Any) -> list[torch.UntypedStorage]:
    leaves = pytree.tree_leaves(value)
    return [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor) and leaf.layout == torch.strided]
