"""Models that accelerate has dispatched: hooks move the inputs of modules, and may keep their parameters elsewhere.

A module has such a hook as its attribute ``_hf_hook``, and a forward that calls the hook. Where the hook offloads, the
parameters are on the meta device between calls; its ``weights_map`` holds them by name, in host memory or in files.
Here they are read from there when they are needed, and the module stays as it is. accelerate itself is not imported.
"""

from __future__ import annotations

import copy
import functools
import math
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from quantize.shell.config import refusal

# Of the name of a parameter and its value, the value to put in its place.
Change = Callable[[str, Tensor], Tensor]
_HOOK, _FORWARD = "_hf_hook", "_old_forward"


def dispatched(module: nn.Module) -> bool:
    """Whether a hook of accelerate, and nothing else, has replaced the forward of ``module``."""
    forward, original = module.__dict__.get("forward"), module.__dict__.get(_FORWARD)
    return (
        isinstance(forward, functools.partial)
        and forward.args == (module,)
        and forward.__dict__.get("__wrapped__") == original
        and getattr(original, "__func__", None) is type(module).forward
    )


def keeper(module: nn.Module) -> Any:
    """The hook that keeps the parameters of ``module`` elsewhere, or None."""
    hooks = [module.__dict__.get(_HOOK)]
    for hook in hooks:
        hooks += getattr(hook, "hooks", ())
    return next((hook for hook in hooks if _offloads(hook)), None)


def device(module: nn.Module) -> torch.device:
    """Where ``module``, which has a weight, computes."""
    hook = keeper(module)
    return module.get_parameter("weight").device if hook is None else torch.device(hook.execution_device)


def devices(root: nn.Module) -> frozenset[torch.device]:
    """All devices that ``root`` computes on."""
    hooks = filter(None, map(keeper, root.modules()))
    found = {p.device for p in root.parameters()} | {torch.device(hook.execution_device) for hook in hooks}
    return frozenset(each for each in found if each.type != "meta")


def buffers(root: nn.Module) -> dict[str, Tensor]:
    """The buffers of ``root`` that are not kept elsewhere, by name."""
    return {name: buffer for name, buffer in root.named_buffers() if not buffer.is_meta}


def weight(layer: nn.Module, name: str) -> Tensor:
    """The weight of the layer ``name`` where it computes: its own, or a copy of what is kept elsewhere.

    Raises:
        QuantizeError: it cannot be read.
    """
    return cast("Tensor", _read(layer, name, "weight"))


def bias(layer: nn.Module, name: str) -> Tensor | None:
    """The bias, as :func:`weight`; None where the layer has none."""
    return _read(layer, name, "bias")


def _read(module: nn.Module, name: str, key: str) -> Tensor | None:
    held = {**module._parameters, **module._buffers}.get(key)
    if held is None or not held.is_meta:
        return held
    hook, where = keeper(module), f"layer {name!r}"
    if hook is None:
        raise refusal(where, f"its {key} is on the meta device, without data", "a layer with all of its parameters")
    try:
        value: Tensor = hook.weights_map[key]
    except Exception as error:
        told = f"its offloaded {key} cannot be read ({type(error).__name__}: {error})"
        raise refusal(where, told, "the files or tensors that the model was dispatched with") from error
    return value.to(torch.device(hook.execution_device), held.dtype)


class Away(NamedTuple):
    """Where a layer computes whose tensors are kept elsewhere: in files of ``folder``, or in host memory."""

    device: torch.device
    folder: str | None

    def here(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors where the layer computes."""
        return {name: tensor.to(self.device) for name, tensor in held.items()}

    def put(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors where they are kept."""
        return {name: self._stored(tensor) for name, tensor in held.items()}

    def _stored(self, tensor: Tensor) -> Tensor:
        # A copy of the model may be where the folder is not.
        if self.folder is None or not Path(self.folder).is_dir() or not tensor.numel():
            return tensor.cpu()
        with tempfile.NamedTemporaryFile(dir=self.folder) as file:
            # The file has no name any more when this returns: it lasts as long as the tensor.
            mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        # A dense tensor keeps its strides.
        like = torch.empty_like(tensor, device="meta")
        return mapped.as_strided(like.shape, like.stride()).copy_(tensor)


def away(layer: nn.Module) -> Away | None:
    """Where the weight of ``layer`` is kept and where it computes, None where both are the same."""
    hook = keeper(layer)
    if hook is None:
        return None
    kept, key = _source(hook.weights_map, "weight")
    return Away(torch.device(hook.execution_device), kept.save_folder if _entry(kept, key) else None)


def _source(kept: Any, key: str) -> tuple[Any, str]:
    """The map of the model that ``kept``, the map of a module, reads ``key`` from, and the key there."""
    while (whole := getattr(kept, "dataset", None)) is not None:
        kept, key = whole, kept.names.get(key, key) if isinstance(kept, _Changed) else kept.prefix + key
    return kept, key


def _entry(kept: Any, key: str) -> Any:
    """What the map ``kept`` of a model knows of the file that holds ``key``; None if it is in memory."""
    return None if key in getattr(kept, "state_dict", ()) else getattr(kept, "index", {}).get(key)


def ties(root: nn.Module) -> dict[nn.Parameter, nn.Parameter]:
    """Of tied parameters that are kept elsewhere, which accelerate makes several of, the one: as transformers says."""
    told, named = getattr(root, "all_tied_weights_keys", None), dict(root.named_parameters(remove_duplicate=False))
    pairs = ((named.get(key), named.get(first)) for key, first in (told or {}).items())
    return {p: first for p, first in pairs if p is not None and first is not None and p.is_meta}


def state(root: nn.Module, **options: Any) -> dict[str, Any]:
    """The ``state_dict`` of ``root`` with these ``options``, with what is kept elsewhere.

    Raises:
        QuantizeError: something cannot be read.
    """
    found: dict[str, Any] = root.state_dict(**options)
    for name, module in root.named_modules(remove_duplicate=False):
        for key in (*module._parameters, *module._buffers) if keeper(module) is not None else ():
            full = f"{name}.{key}" if name else key
            if isinstance(held := found.get(full), Tensor) and held.is_meta:
                found[full] = _read(module, name, key)
    return found


def follow(new: nn.Module, old: nn.Module, names: Mapping[str, str], part: Change, *, inside: bool = False) -> None:
    """Let the hook of ``old``, if it has one, run around ``new``, whose parameters are parts of those ``names``.

    With ``inside``, ``new`` runs inside of it: then it only keeps the parameters, if it does.
    """
    kept = keeper(old)
    hook = kept if inside else old.__dict__.get(_HOOK)
    if hook is None:
        return
    if kept is not None:
        devices = {key: at[name] for key, name in names.items() if name in (at := kept.original_devices)}
        hook = _with(hook, _Changed(kept.weights_map, names, part), original_devices=devices)
    original = new.forward
    forward = functools.update_wrapper(functools.partial(old.__dict__["forward"].func, new), original)
    new.__dict__.update({_HOOK: hook, _FORWARD: original, "forward": forward})
    settle(new)


def resident(hook: Any) -> Any:
    """The same as ``hook``, but it leaves the parameters of modules where they are."""
    return _altered(hook, offload=False, weights_map=None)


def settle(module: nn.Module) -> None:
    """Let the hook of ``module`` leave its parameters alone, if they are not on the meta device."""
    if _HOOK in module.__dict__ and not any(p.is_meta for p in module.parameters(recurse=False)):
        module.__dict__[_HOOK] = resident(module.__dict__[_HOOK])


def hooked(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let ``forward`` of a class call the hooks of its instances; it reads offloaded parameters itself."""

    @functools.wraps(forward)
    def called(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        # accelerate has replaced the forward of this instance if there is an old one: then the hook was called.
        if _HOOK not in module.__dict__ or _FORWARD in module.__dict__:
            return forward(module, *args, **kwargs)
        hook = resident(module.__dict__[_HOOK])
        args, kwargs = hook.pre_forward(module, *args, **kwargs)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not getattr(hook, "no_grad", False)):
            output = forward(module, *args, **kwargs)
        return cast("Tensor", hook.post_forward(module, output))

    return called


class _Changed:
    """What a hook keeps under the ``names``, by a function each time it is read; the rest as it is."""

    def __init__(self, kept: Any, names: Mapping[str, str], function: Change, *, folded: bool = False) -> None:
        self.dataset, self.names, self._function, self.folded = kept, names, function, folded

    def __getitem__(self, key: str) -> Any:
        if key not in self.names:
            return self.dataset[key]
        return self._function(key, _mapped(self.dataset, self.names[key]))

    def get(self, key: str, _default: object = None) -> Any:
        """As of any mapping; what is asked for is there."""
        return self[key]


def _mapped(kept: Any, key: str) -> Tensor:
    """The tensor ``key`` of the map of a module; of one in a file, no more is read than is used."""
    whole, name = (kept, key) if isinstance(kept, _Changed) else _source(kept, key)
    if (entry := _entry(whole, name)) is None:
        return cast("Tensor", kept[key])
    if "safetensors_file" not in entry:
        file, dtype = f"{whole.save_folder}/{name}.dat", getattr(torch, entry["dtype"])
        return torch.from_file(file, size=math.prod(entry["shape"]), dtype=dtype).view(entry["shape"])
    # To another device than this one, it would be copied.
    here = copy.copy(whole)
    here.device = None
    return cast("Tensor", here[name])


def change(module: nn.Module, keys: Collection[str], function: Change) -> Callable[[], None]:
    """Make new parameters ``keys`` of ``module``, those that it has, by ``function``. Returns what undoes this.

    What is kept elsewhere stays as it is, and is changed whenever it is read.
    """
    hook = keeper(module)
    if hook is None:
        before = {key: p for key, p in module._parameters.items() if p is not None and key in keys}
        after = {key: nn.Parameter(function(key, p.detach()), p.requires_grad) for key, p in before.items()}
        module._parameters.update(after)
        return functools.partial(module._parameters.update, before)
    old, values = module.__dict__[_HOOK], _Changed(hook.weights_map, {key: key for key in keys}, function, folded=True)
    module.__dict__[_HOOK] = _with(old, values)
    return functools.partial(module.__dict__.__setitem__, _HOOK, old)


def hold(root: nn.Module) -> None:
    """Give modules that contain others all of their own parameters to keep, until their attributes are put back.

    A pass that stops inside of such a module would lose them when another one ends.
    """
    for module in root.modules():
        hook = keeper(module)
        if hook is not None and next(module.children(), None) is not None and not hook.place_submodules:
            for key, p in module._parameters.items():
                if (value := _read(module, type(module).__name__, key)) is not None and p is not None:
                    module._parameters[key] = nn.Parameter(value, p.requires_grad)
            module.__dict__[_HOOK] = resident(module.__dict__[_HOOK])


def changed(root: nn.Module) -> bool:
    """Whether :func:`change` is in force for something that is kept elsewhere."""
    return any(getattr(getattr(keeper(each), "weights_map", None), "folded", False) for each in root.modules())


def _with(hook: Any, values: _Changed, **more: Any) -> Any:
    # What a hook knows of parameters that are tied to others does not hold for values of its own.
    return _altered(hook, weights_map=values, tied_params_map=None, tied_params_names=set(), **more)


def _altered(hook: Any, **values: Any) -> Any:
    """A copy of ``hook`` with other attributes where it offloads; itself where it does not."""
    if hasattr(hook, "hooks"):
        values = {"hooks": tuple(_altered(each, **values) for each in hook.hooks)}
    elif not _offloads(hook):
        return hook
    new = copy.copy(hook)
    new.__dict__.update(values)
    return new


def _offloads(hook: Any) -> bool:
    return getattr(hook, "offload", None) is True and getattr(hook, "weights_map", None) is not None
