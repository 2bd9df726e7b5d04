"""A converted model in a directory of its own: files of tensors, whose header says the rest."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from quantize.shell import offload
from quantize.shell.config import QuantizeError, refusal, shown
from quantize.shell.deploy import loading
from quantize.shell.deploy import state as saved
from quantize.shell.deploy.layer import QuantizedLinear
from quantize.shell.disk import files
from quantize.shell.disk.parts import pairs, quantized

_TENSORS, _HEADER, _VERSION = "model.safetensors", "quantize", 2


def save(model: nn.Module, directory: str | os.PathLike[str], *, max_shard_size: int | str | None = None) -> None:
    """Write a converted model: its ``state_dict`` and all other buffers, a tensor under several names once.

    Args:
        model: a model after ``convert``.
        directory: a new or an empty one, in a directory that exists. It is there whole, or as it was.
        max_shard_size: bytes of tensors in a file, or a string such as ``'5GB'``; a larger model is written as several
            files and an index, as transformers does. No more than one of them is made at a time.

    Raises:
        QuantizeError: a model that is not converted, a state that JSON cannot hold, a directory with content, or no
            safetensors; nothing is left.
        OSError: it cannot be written; nothing is left.
    """
    layers, limit, buffers = quantized(model), files.shard_size(max_shard_size), loading.hidden(model)
    files.check_new(directory)
    # With the tensors themselves, which are the same objects under several names.
    state = offload.state(model, destination=saved.Outline(), keep_vars=True)
    first: dict[Tensor, str] = {}
    aliases: dict[str, str] = {}
    extra: dict[str, Any] = {}
    for key, value in {**state, **buffers}.items():
        if isinstance(value, Tensor):
            if first.setdefault(value, key) != key:
                aliases[key] = first[value]
        # Tuples, and keys that are no strings, would come back as others.
        elif json.loads(files.as_json(f"{key!r} in the state", value)) != value:
            raise refusal(f"{key!r} in the state", shown(value), "what JSON gives back as it was")
        else:
            extra[key] = value
    told = getattr(state, "_metadata", {})
    modules = {at: {key: value for key, value in told[at].items() if key != loading.HIDDEN} for at in told}
    rest = {"version": _VERSION, "extra": extra, "aliases": aliases, "modules": modules, "buffers": [*buffers]}
    header = {_HEADER: files.as_json("the versions of the modules", rest)}
    once = {name: layer for layer, name in {layer: name for name, layer in reversed(layers.items())}.items()}
    tensors = pairs({key: tensor for tensor, key in first.items()}, once, _tensors)
    files.write(directory, _TENSORS, tensors, {}, header, limit)


def _tensors(layer: QuantizedLinear) -> dict[str, Tensor]:
    return {**saved.tensors(layer.solution), saved.EXTRA: layer.get_extra_state()}


def load(model: nn.Module, directory: str | os.PathLike[str], *, kernel: str | None = None) -> None:
    """Make ``model`` the converted model that :func:`save` wrote, in place; no float weight is needed.

    Args:
        model: the same architecture in floating point, also on the meta device.
        directory: of :func:`save`.
        kernel: as for ``convert``.

    Raises:
        QuantizeError: a directory of something else, a state that does not fit the model, or no safetensors; the model
            is left as it was.
        OSError: a file cannot be read.
    """
    where, reader = os.fspath(directory), files.safetensors()
    try:
        tensors, header = files.read(directory, _TENSORS)
        rest = json.loads(header.get(_HEADER, "{}"))
        if rest.get("version") != _VERSION:
            found = 1 if Path(directory, "quantize.json").exists() else rest.get("version")
            raise refusal(where, f"version {found}", f"version {_VERSION} of save, which writes no quantize.json")
        tensors |= {alias: tensors[key] for alias, key in rest["aliases"].items()}
        buffers = {key: tensors.pop(key) for key in rest["buffers"]}
        state = OrderedDict({**tensors, **rest["extra"]})
        told = {**rest["modules"], "": {**rest["modules"].get("", {}), loading.HIDDEN: buffers}}
    except QuantizeError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, reader.SafetensorError) as error:
        raise refusal(where, f"cannot be read ({type(error).__name__}: {error})", "a directory of save") from error
    state._metadata = told  # type: ignore[attr-defined] # an attribute that torch adds
    loading.convert(model, state, kernel)
