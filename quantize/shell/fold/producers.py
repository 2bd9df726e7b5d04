"""Find the module that produces the inputs of layers, and their other readers, in one run of the model, not by name."""

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

# How many preceding linear layers are considered as producers, and how many of those of each width are tried.
_CONSIDERED, _TRIED = 8, 3

# A function that runs the model again on one batch, under the given modes, and returns its outputs.
Run = Callable[..., Any]


class Foldable(nn.Linear):
    """A linear layer whose inputs arrive divided by ``folded`` ``[c]``, unless that is None. Errors use ``names``."""

    names: tuple[str, ...]
    folded: Tensor | None


@dataclass(eq=False)
class _Origin:
    """The innermost ``module`` that returned a tensor, and the names of the ``readers`` of the tensor, by module."""

    module: nn.Module | None = None
    readers: dict[nn.Module | None, str] = field(default_factory=dict)


@dataclass(eq=False)
class Readers:
    """Layers that read one tensor, with its dtype and :func:`magnitudes` ``[c]``, and the modules that may produce it.

    ``producers`` begins with the likeliest. ``reason``: why the scale of the layers is applied at run time.
    """

    layers: Sequence[Foldable]
    dtype: torch.dtype
    sums: Tensor
    producers: list[nn.Module]
    origin: _Origin | None
    reason: str = "no preceding module scales each channel of the inputs, and nothing else"


def magnitudes(x: Tensor) -> Tensor:
    """The sums ``[c]`` of the magnitudes of ``x`` ``[..., c]``; scaling ``x`` by powers of two scales them exactly."""
    return x.detach().reshape(-1, x.shape[-1]).abs().sum(0, dtype=torch.float64)


def width(module: nn.Module | None) -> int:
    """The number of output channels that have their own row in the weight of ``module``; 0 if it has no such weight."""
    weight = None if module is None else module._parameters.get("weight")
    # The hook of a surrounding module may offload the weight, and only that hook can read it.
    if module is None or weight is None or (weight.is_meta and offload.offload_hook(module) is None):
        return 0
    return len(weight) if isinstance(module, nn.Linear) or weight.ndim == 1 else 0


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch leaves it bare
    """A record of one run of ``root``: which module produced each tensor, and which modules read it."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._modules = list(root.modules())
        # How often each module was called, in the order of the first calls.
        self._calls: Counter[nn.Module] = Counter()
        # The inputs of each layer at its first call, in this order; the linear layers before it are the producers.
        self._inputs: dict[Foldable, Readers] = {}
        self._origins: WeakKeyDictionary[torch.UntypedStorage, _Origin] = WeakKeyDictionary()
        self._inside: list[nn.Module] = []

    def watch(self, run: Run) -> Any:
        """Record the ``run``, and return its outputs."""
        with ExitStack() as hooks:
            for module in self._modules:
                hooks.enter_context(module.register_forward_pre_hook(self._before, with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(self._after))
            return run(self)

    def missed(self) -> str:
        """A message about a layer that the run did not reach, whose inputs are unknown; empty if there is none."""
        layers = (each for each in self._modules if isinstance(each, Foldable) and each not in self._inputs)
        return next((f"the first batch did not reach {layer.names[0]}" for layer in layers), "")

    def readers(self, units: Sequence[Sequence[Foldable]]) -> list[Readers]:
        """The readers of each of ``units``, groups of layers that always read one tensor, in the order of execution."""
        owners = Counter(id(p) for module in self._modules for p in module.parameters(recurse=False))
        tied = {module for module in self._modules if any(owners[id(p)] > 1 for p in module.parameters(recurse=False))}
        place = {layer: i for i, layer in enumerate(self._inputs)}
        return [self._read_by(unit, tied) for unit in sorted(units, key=lambda unit: min(place[each] for each in unit))]

    def _read_by(self, layers: Sequence[Foldable], tied: set[nn.Module]) -> Readers:
        """The readers with their possible producers, or with the first reason against folding."""
        found, c = self._inputs[layers[0]], layers[0].in_features
        others, origins = [], {self._inputs[layer].origin for layer in layers}
        found.layers = layers
        if found.origin is not None and found.origin.module is not None and width(found.origin.module) == c:
            found.producers = [found.origin.module]
            others = [name for each, name in found.origin.readers.items() if each not in layers]
        else:
            fits = [m for m in found.producers if self._calls[m] == 1 and m not in tied and m not in layers]
            # Producers with a channel for each input come before those with fewer, whose channels are read repeatedly.
            found.producers = [each for each in fits if width(each) == c][:_TRIED]
            found.producers += [each for each in fits if 1 < width(each) < c and c % width(each) == 0][:_TRIED]
        often = any(self._calls[each] > 1 for each in found.producers)
        kind = "".join(type(each).__name__ for each in found.producers[:1])
        reasons = {
            "no token of the first batch reached it": not found.sums.any(),
            "it is called more than once": any(self._calls[layer] > 1 for layer in layers),
            "the inputs come from the caller, or are changed in between": None in origins or len(origins) > 1,
            "no preceding module has a weight for each channel of the inputs": not found.producers,
            f"a {kind} that is called more than once makes the inputs": often,
            f"{''.join(others[:1])} reads the inputs as well": others,
            f"the {kind} that makes the inputs shares its parameters": tied.intersection(found.producers),
        }
        if reason := next((text for text, holds in reasons.items() if holds), ""):
            found.producers, found.reason = [], reason
        return found

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # This comes first, so that the reads below count as reads by the layer.
        self._inside.append(module)
        if isinstance(module, Foldable) and module not in self._inputs:
            x = args[0] if args else kwargs["input"]
            linears = (each for each in reversed(self._calls) if type(each) is nn.Linear or isinstance(each, Foldable))
            producers: list[nn.Module] = [*islice(linears, _CONSIDERED)]
            origin = self._origins.get(x.untyped_storage())
            self._inputs[module] = Readers([module], x.dtype, magnitudes(x), producers, origin)
        self._calls[module] += 1

    def _after(self, module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        self._inside.pop()
        origin = self._origins.get(output.untyped_storage()) if isinstance(output, Tensor) else None
        # Inner modules end first, so the innermost one is the origin. A module's reads of its own output do not count.
        if origin is not None and origin.module is None:
            origin.module, origin.readers = module, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = _storages((args, kwargs))
        if not func.is_view:
            here = self._inside[-1] if self._inside else None
            name = here.names[0] if isinstance(here, Foldable) else type(here).__name__ if here else "the model"
            for origin in filter(None, map(self._origins.get, known)):
                origin.readers[here] = name
        result = func(*args, **(kwargs or {}))
        self._origins.update((storage, _Origin()) for storage in _storages(result) if storage not in known)
        return result


def _storages(value: Any) -> list[torch.UntypedStorage]:
    leaves = pytree.tree_leaves(value)
    return [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor) and leaf.layout == torch.strided]
