"""A converted model in a directory of its own: one file of tensors, whose header says the rest."""

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
from quantize.shell.disk import files
from quantize.shell.disk.parts import as_json, quantized

_TENSORS, _HEADER, _VERSION = "model.safetensors", "quantize", 2


def save(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write a converted model: its whole ``state_dict``, a tensor under several names once.

    Args:
        model: a model after ``convert``.
        directory: a new or an empty one, in a directory that exists. It is there whole, or as it was.

    Raises:
        QuantizeError: a model that is not converted, a state that JSON cannot hold, a directory with content, or no
            safetensors; nothing was written.
        OSError: it cannot be written; nothing is left.
    """
    quantized(model)
    files.check_new(directory)
    state = offload.state(model)
    first: dict[tuple[object, ...], str] = {}
    aliases: dict[str, str] = {}
    extra: dict[str, Any] = {}
    for key, value in state.items():
        where = f"{key!r} in the state"
        if not isinstance(value, Tensor):
            # Tuples, and keys that are no strings, would come back as others.
            if json.loads(as_json(where, value)) != value:
                raise refusal(where, shown(value), "what JSON gives back as it was")
            extra[key] = value
        elif value.is_meta:
            raise refusal(where, "on the meta device", "a tensor with data")
        else:
            # An empty tensor has no place in memory of its own.
            place = (value.data_ptr() or key, value.dtype, value.shape, value.stride(), value.device)
            if first.setdefault(place, key) != key:
                aliases[key] = first[place]
    rest = {"version": _VERSION, "extra": extra, "aliases": aliases, "modules": getattr(state, "_metadata", {})}
    header = {_HEADER: as_json("the versions of the modules", rest)}
    files.write(directory, {_TENSORS: {key: state[key] for key in first.values()}}, {}, header)


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
    from safetensors import SafetensorError

    try:
        with reader.safe_open(Path(directory, _TENSORS), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
            rest = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
        if rest.get("version") != _VERSION:
            found = 1 if Path(directory, "quantize.json").exists() else rest.get("version")
            raise refusal(where, f"version {found}", f"version {_VERSION} of save, which writes no quantize.json")
        state = OrderedDict({**tensors, **rest["extra"], **{k: tensors[v] for k, v in rest["aliases"].items()}})
        state._metadata = rest["modules"]  # type: ignore[attr-defined] # an attribute that torch adds
    except QuantizeError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
        raise refusal(where, f"cannot be read ({type(error).__name__}: {error})", "a directory of save") from error
    loading.convert(model, state, kernel)
