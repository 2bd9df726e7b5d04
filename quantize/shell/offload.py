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
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quantize.shell.config import refusal

# Of the name of a parameter and its value, the value to put in its place.
Change = Callable[[str, Tensor], Tensor]
_HOOK, _FORWARD = "_hf_hook", "_old_forward"


def dispatched(module: nn.Module) -> bool:
    """Whether a hook of accelerate, and nothing else, has replaced the forward of ``module``."""
    own = module.__dict__
    hook, forward, original = own.get(_HOOK), own.get("forward"), own.get(_FORWARD)
    return (
        all(callable(getattr(hook, name, None)) for name in ("pre_forward", "post_forward"))
        and isinstance(forward, functools.partial)
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
    if hook is not None:
        return torch.device(hook.execution_device)
    held: Tensor = module._parameters["weight"]  # type: ignore[assignment] # layers have one
    return held.device


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
    found = _read(layer, name, "weight")
    assert found is not None
    return found


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
    folder = None if _entry(kept, key) is None else kept.save_folder
    return Away(torch.device(hook.execution_device), folder)


def _source(kept: Any, key: str) -> tuple[Any, str]:
    """The map of the whole model that ``kept``, the map of a module, reads ``key`` from, and the key there."""
    while isinstance(kept, _Changed) or hasattr(kept, "dataset"):
        if isinstance(kept, _Changed):
            kept, key = kept.kept, kept.names.get(key, key)
        else:
            kept, key = kept.dataset, kept.prefix + key
    return kept, key


def _entry(kept: Any, key: str) -> Any:
    """What the map ``kept`` of a model knows of the file that holds ``key``; None if it is in memory."""
    return None if key in getattr(kept, "state_dict", ()) else getattr(kept, "index", {}).get(key)


def ties(root: nn.Module) -> dict[nn.Parameter, nn.Parameter]:
    """By parameter that is kept elsewhere, the first that is the same tensor: of tied ones accelerate makes several.

    Files do not tell; there it is what transformers says of the model.
    """
    told, found = getattr(root, "all_tied_weights_keys", None) or {}, dict[nn.Parameter, nn.Parameter]()
    first: dict[object, nn.Parameter] = {}
    for module in root.modules():
        hook = keeper(module)
        for key, p in module._parameters.items():
            if hook is not None and p is not None and p.is_meta:
                kept, name = _source(hook.weights_map, key)
                place = told.get(name, name) if _entry(kept, name) is not None else kept[name].data_ptr()
                found[p] = first.setdefault(place, p)
    return found


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
    """Let the hook of ``old``, if it has one, serve ``new`` as well; with ``inside``, only to keep its parameters.

    The parameters ``names`` of ``new`` are each a ``part`` of that parameter of ``old``, and of nothing else.
    """
    hook, kept = keeper(old) if inside else old.__dict__.get(_HOOK), keeper(old)
    if hook is None:
        return
    if kept is not None:
        devices = {key: at[name] for key, name in names.items() if name in (at := kept.original_devices)}
        hook = _changed(hook, _Part(kept.weights_map, names, part), original_devices=devices)
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
        result: Tensor = hook.post_forward(module, output)
        return result

    return called


class _Changed(Mapping[str, Any]):
    """What a hook keeps under other ``names``, changed each time it is read; the rest as it is."""

    def __init__(self, kept: Mapping[str, Any], names: Mapping[str, str], function: Change) -> None:
        self.kept, self.names, self._function = kept, names, function

    def __getitem__(self, key: str) -> Any:
        return self._function(key, self._whole(self.names[key])) if key in self.names else self.kept[key]

    def _whole(self, name: str) -> Any:
        return self.kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)


class _Part(_Changed):
    """Parts of what a hook keeps: of a file, nothing else is read."""

    def _whole(self, name: str) -> Any:
        kept, key = _source(self.kept, name)
        entry = _entry(kept, key)
        if entry is None:
            return kept[key]
        if entry.get("safetensors_file") is None:
            path, shape, dtype = Path(kept.save_folder, f"{key}.dat"), entry["shape"], getattr(torch, entry["dtype"])
            return torch.from_file(str(path), size=math.prod(shape), dtype=dtype).view(shape)
        # On any other device the whole would be read.
        here = copy.copy(kept)
        here.device = None
        return here[key]


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
    old, names = module.__dict__[_HOOK], dict(zip(keys, keys, strict=True))
    module.__dict__[_HOOK] = _changed(old, _Changed(hook.weights_map, names, function))
    return functools.partial(module.__dict__.__setitem__, _HOOK, old)


def _changed(hook: Any, values: _Changed, **more: Any) -> Any:
    # What a hook knows of parameters that are tied to others does not hold for values of its own.
    return _altered(hook, weights_map=values, tied_params_map=None, tied_params_names=set(), **more)


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
    return any(type(getattr(keeper(module), "weights_map", None)) is _Changed for module in root.modules())


def _altered(hook: Any, **values: Any) -> Any:
    """A copy of ``hook`` with other attributes where it offloads; itself where it does not."""
    if not (hasattr(hook, "hooks") or _offloads(hook)):
        return hook
    new = copy.copy(hook)
    if hasattr(hook, "hooks"):
        new.hooks = tuple(_altered(each, **values) for each in hook.hooks)
    else:
        new.__dict__.update(values)
    return new


def _offloads(hook: Any) -> bool:
    return getattr(hook, "offload", None) is True and getattr(hook, "weights_map", None) is not None
