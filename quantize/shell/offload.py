"""Models that accelerate has dispatched: hooks move the inputs of modules, and may offload their parameters.

The attribute ``_hf_hook`` of a module is such a hook, and the forward of the module calls it. Offloaded parameters are
on the meta device between calls; the ``weights_map`` of the hook holds them by name, in host memory or in files. This
file reads them from there and leaves the module as it is. It does not import accelerate.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from quantize.shell.config import refusal

# A function of the name and the value of a parameter; it returns the new value.
Change = Callable[[str, Tensor], Tensor]
_HOOK, _FORWARD = "_hf_hook", "_old_forward"


def dispatched(module: nn.Module) -> bool:
    """Whether a hook of accelerate, and nothing else, has replaced the forward of ``module``."""
    forward, bound = module.__dict__.get("forward"), type(module).forward.__get__(module)
    replaced = isinstance(forward, functools.partial) and forward.args == (module,)
    return replaced and forward.__dict__.get("__wrapped__") == module.__dict__.get(_FORWARD) == bound


def offload_hook(module: nn.Module) -> Any:
    """The hook that offloads the parameters of ``module``, or None."""
    hooks = [module.__dict__.get(_HOOK)]
    for hook in hooks:
        hooks += getattr(hook, "hooks", ())
    return next((hook for hook in hooks if getattr(hook, "offload", False) and hasattr(hook, "weights_map")), None)


def device(module: nn.Module) -> torch.device:
    """The device on which ``module``, which has a weight, computes."""
    hook = offload_hook(module)
    return torch.device(hook.execution_device) if hook is not None else cast("Tensor", module.weight).device


def devices(root: nn.Module) -> frozenset[torch.device]:
    """All devices that ``root`` computes on."""
    found = {p.device for p in root.parameters()} | {*map(device, filter(offload_hook, root.modules()))}
    return frozenset(each for each in found if each.type != "meta")


def buffers(root: nn.Module) -> dict[str, Tensor]:
    """The buffers of ``root`` that are not offloaded, by name."""
    return {name: buffer for name, buffer in root.named_buffers() if not buffer.is_meta}


def weight(layer: nn.Module, name: str) -> Tensor:
    """The weight of ``layer``, on the device where it computes: its parameter, or a copy of the offloaded one.

    Raises:
        QuantizeError: it cannot be read; the error names the layer ``name``.
    """
    return cast("Tensor", _read(layer, name, "weight"))


def bias(layer: nn.Module, name: str) -> Tensor | None:
    """The bias of ``layer``, read as by :func:`weight`; None if it has none."""
    return _read(layer, name, "bias")


def _read(module: nn.Module, name: str, key: str) -> Tensor | None:
    held = {**module._parameters, **module._buffers}.get(key)
    if held is None or not held.is_meta:
        return held
    hook, where = offload_hook(module), f"layer {name!r}"
    if hook is None:
        raise refusal(where, f"its {key} is on the meta device, without data", "a layer with all of its parameters")
    try:
        value: Tensor = hook.weights_map[key]
    except Exception as error:
        told = f"its offloaded {key} cannot be read ({type(error).__name__}: {error})"
        raise refusal(where, told, "the files or tensors that the model was dispatched with") from error
    return value.to(torch.device(hook.execution_device), held.dtype)


class OffloadedStorage(NamedTuple):
    """The storage of offloaded tensors, in ``folder`` or host memory, and the ``device`` that computes with them."""

    device: torch.device
    folder: str | None

    def here(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors, moved to the device where the layer computes."""
        return {name: tensor.to(self.device) for name, tensor in held.items()}

    def put(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors, moved to the storage."""
        return {name: self._stored(tensor) for name, tensor in held.items()}

    def _stored(self, tensor: Tensor) -> Tensor:
        # The folder may be missing where a copy of the model is used.
        if self.folder is None or not Path(self.folder).is_dir() or not tensor.numel():
            return tensor.cpu()
        with tempfile.NamedTemporaryFile(dir=self.folder) as file:
            # The name is deleted at the end of this block; the file itself lasts as long as the tensor.
            mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        # The copy has the strides of the tensor.
        return mapped.as_strided(tensor.shape, torch.empty_like(tensor, device="meta").stride()).copy_(tensor)


def away(layer: nn.Module) -> OffloadedStorage | None:
    """The storage of the weight of ``layer`` if it is offloaded, else None."""
    if (hook := offload_hook(layer)) is None:
        return None
    kept, _, entry = _source(hook.weights_map, "weight")
    return OffloadedStorage(torch.device(hook.execution_device), kept.save_folder if entry else None)


def _source(kept: Any, key: str) -> tuple[Any, str, Any]:
    """For ``key`` in ``kept``, the map of a module: the map of the model behind it, the key there, its file if any."""
    while (whole := getattr(kept, "dataset", None)) is not None:
        kept, key = whole, kept.names.get(key, key) if isinstance(kept, _MapView) else kept.prefix + key
    return kept, key, None if key in getattr(kept, "state_dict", ()) else getattr(kept, "index", {}).get(key)


def ties(root: nn.Module) -> dict[nn.Parameter, nn.Parameter]:
    """By offloaded parameter, the one it is tied to: accelerate copies tied parameters, transformers names them."""
    told: dict[str, str] = getattr(root, "all_tied_weights_keys", None) or {}
    named = dict(root.named_parameters(remove_duplicate=False))
    return {p: named.get(told[key], p) for key, p in named.items() if key in told and p.is_meta}


def state(root: nn.Module, **options: Any) -> dict[str, Any]:
    """The ``state_dict`` of ``root`` with these ``options``, with offloaded tensors read as by :func:`weight`."""
    found: dict[str, Any] = root.state_dict(**options)
    for name, module in root.named_modules(remove_duplicate=False):
        for key in (*module._parameters, *module._buffers) if offload_hook(module) is not None else ():
            full = f"{name}.{key}" if name else key
            if isinstance(held := found.get(full), Tensor) and held.is_meta:
                found[full] = _read(module, name, key)
    return found


def follow(new: nn.Module, old: nn.Module, names: Mapping[str, str], part: Change, *, inside: bool = False) -> None:
    """Give ``new`` the hook of ``old``, if any. ``part`` makes its parameters from those of ``old`` called ``names``.

    With ``inside``, ``new`` runs inside ``old``. Then it gets only a hook that offloads parameters.
    """
    kept = offload_hook(old)
    if (hook := kept if inside else old.__dict__.get(_HOOK)) is None:
        return
    if kept is not None:
        devices = {key: at[name] for key, name in names.items() if name in (at := kept.original_devices)}
        hook = _copied(hook, kept, weights_map=_MapView(kept.weights_map, names, part), original_devices=devices)
    forward = functools.update_wrapper(functools.partial(old.__dict__["forward"].func, new), new.forward)
    new.__dict__.update({_HOOK: hook, _FORWARD: new.forward, "forward": forward})
    settle(new)


def settle(module: nn.Module) -> None:
    """Turn off offloading in the hook of ``module``, unless a parameter is on the meta device."""
    if _HOOK in module.__dict__ and not any(p.is_meta for p in module.parameters(recurse=False)):
        module.__dict__[_HOOK] = _copied(module.__dict__[_HOOK], offload_hook(module), offload=False, weights_map=None)


def hooked(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap the ``forward`` of a class so that it calls accelerate's hook; it reads offloaded parameters itself."""

    @functools.wraps(forward)
    def called(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        # With an old forward, accelerate has replaced that of this instance, and has already called the hook.
        if _HOOK not in module.__dict__ or _FORWARD in module.__dict__:
            return forward(module, *args, **kwargs)
        hook = _copied(module.__dict__[_HOOK], offload_hook(module), offload=False, weights_map=None)
        args, kwargs = hook.pre_forward(module, *args, **kwargs)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not getattr(hook, "no_grad", False)):
            output = forward(module, *args, **kwargs)
        return cast("Tensor", hook.post_forward(module, output))

    return called


class _MapView:
    """The map of a hook in which a function changes the tensors ``names`` whenever they are read."""

    def __init__(self, kept: Any, names: Mapping[str, str], function: Change, *, folded: bool = False) -> None:
        self.dataset, self.names, self._function, self.folded = kept, names, function, folded

    def __getitem__(self, key: str, _default: object = None) -> Any:
        return self._function(key, _mapped(self.dataset, self.names[key])) if key in self.names else self.dataset[key]

    get = __getitem__


def _mapped(kept: Any, key: str) -> Any:
    """The tensor ``key`` of the map of a module. A tensor in a file is mapped, so that only the used part is read."""
    whole, name, entry = _source(kept, key)
    if entry is None or isinstance(kept, _MapView):
        return kept[key]
    if entry.get("safetensors_file"):
        # A map without a device: accelerate's would copy the whole tensor to the device that computes.
        return type(whole)(index={name: entry})[name]
    file, dtype = f"{whole.save_folder}/{name}.dat", getattr(torch, entry["dtype"])
    return torch.from_file(file, size=torch.Size(entry["shape"]).numel(), dtype=dtype).view(entry["shape"])


def change(module: nn.Module, keys: Collection[str], function: Change) -> Callable[[], None]:
    """Replace the parameters ``keys`` that ``module`` has by new ones from ``function``; returns a function to undo it.

    Offloaded tensors stay as they are, and are changed whenever they are read.
    """
    if (hook := offload_hook(module)) is None:
        before = {key: p for key, p in module._parameters.items() if p is not None and key in keys}
        after = {key: nn.Parameter(function(key, p.detach()), p.requires_grad) for key, p in before.items()}
        module._parameters.update(after)
        return functools.partial(module._parameters.update, before)
    old, values = module.__dict__[_HOOK], _MapView(hook.weights_map, {key: key for key in keys}, function, folded=True)
    module.__dict__[_HOOK] = _copied(old, hook, weights_map=values)
    return functools.partial(module.__dict__.__setitem__, _HOOK, old)


def hold(root: nn.Module) -> None:
    """Load the offloaded parameters of all modules with children, until the modules' attributes are restored.

    A pass that pauses inside such a module would lose them when another pass leaves the module.
    """
    for module in root.modules():
        if (hook := offload_hook(module)) is not None and [*module.children()] and not hook.place_submodules:
            hook.pre_forward(module)
            settle(module)


def changed(root: nn.Module) -> bool:
    """Whether :func:`change` applies to any offloaded tensor of ``root``."""
    return any(getattr(getattr(offload_hook(each), "weights_map", None), "folded", False) for each in root.modules())


def _copied(hook: Any, kept: Any, **values: Any) -> Any:
    """``hook``; if it is or contains ``kept``, a copy with new attributes ``values`` and without tied parameters."""
    if hook is kept:
        values |= {"tied_params_map": None, "tied_params_names": set()}
    elif hasattr(hook, "hooks"):
        values = {"hooks": tuple(_copied(each, kept, **values) for each in hook.hooks)}
    else:
        return hook
    new = copy.copy(hook)
    new.__dict__.update(values)
    return new
