"""The library's own files: a converted model in a directory, and a calibration that another process continues."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.shell import offload
from quantize.shell.calibrate.layer import calibrated, check_states
from quantize.shell.config import QuantizeError, refusal, shown
from quantize.shell.deploy import loading
from quantize.shell.deploy import state as saved
from quantize.shell.deploy.layer import QuantizedLinear
from quantize.shell.disk import files
from quantize.shell.disk.parts import pairs, quantized

_FILE, _HEADER, _VERSION = "model.safetensors", "quantize", 2
_STARTED = "a model after quantize(model, config)"


def save(model: nn.Module, directory: str | os.PathLike[str], *, max_shard_size: int | str | None = None) -> None:
    """Write a converted model: its ``state_dict`` and all other buffers. A tensor with several names is written once.

    Args:
        model: a model after ``convert``.
        directory: a new or an empty one, whose parent exists. It is written completely, or left as it was.
        max_shard_size: as for ``export``.

    Raises:
        QuantizeError: a model that is not converted, a state that JSON cannot hold, a directory that has content or
            no parent, or no safetensors; nothing is left.
        OSError: the directory cannot be written; nothing is left of it.

    >>> import tempfile, quantize as qz
    >>> model = nn.Sequential(nn.Linear(8, 4))
    >>> weights = {"type": "int8", "symmetric": True, "strategy": "channel"}
    >>> qz.quantize(model, {"quant_cfg": {"weights": weights}, "algorithm": "minmax"})
    >>> qz.convert(model)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     qz.save(model, f"{folder}/int8")
    ...     os.listdir(f"{folder}/int8")
    ['model.safetensors']
    """
    files.check_new(directory)
    layers, limit, buffers = quantized(model), files.shard_size(max_shard_size), loading.hidden(model)
    # keep_vars gives the tensors themselves, so that one tensor is one object under all its names.
    state = offload.state(model, destination=saved.Outline(), keep_vars=True)
    first: dict[Tensor, str] = {}
    aliases: dict[str, str] = {}
    extra: dict[str, Any] = {}
    for key, value in {**state, **buffers}.items():
        if isinstance(value, Tensor):
            if first.setdefault(value, key) != key:
                aliases[key] = first[value]
        # JSON would change tuples, and keys that are not strings.
        elif json.loads(files.as_json(f"{key!r} in the state", value)) != value:
            raise refusal(f"{key!r} in the state", shown(value), "what JSON does not change")
        else:
            extra[key] = value
    told = getattr(state, "_metadata", {})
    modules = {at: {key: value for key, value in told[at].items() if key != loading.HIDDEN} for at in told}
    rest = {"version": _VERSION, "extra": extra, "aliases": aliases, "modules": modules, "buffers": [*buffers]}
    header = {_HEADER: files.as_json("the versions of the modules", rest)}
    once = {name: layers[name] for name, _ in model.named_modules() if name in layers}
    tensors = pairs({key: tensor for tensor, key in first.items()}, once, _tensors)
    files.write(directory, _FILE, tensors, {}, header, limit)


def _tensors(layer: QuantizedLinear) -> dict[str, Tensor]:
    return {**saved.tensors(layer.solution), saved.EXTRA: saved.describe(layer.row, layer.layout.dtype)}


def load(model: nn.Module, directory: str | os.PathLike[str], *, kernel: str | None = None) -> None:
    """Turn ``model`` into the converted model that :func:`save` wrote, in place; no float weight is needed.

    Args:
        model: the same architecture in floating point; it may be on the meta device.
        directory: a directory that :func:`save` wrote.
        kernel: as for ``convert``.

    Raises:
        QuantizeError: a directory that :func:`save` did not write, a state that does not fit the model, or no
            safetensors; the model is left as it was.
        OSError: a file cannot be read.

    >>> import tempfile, quantize as qz
    >>> model = nn.Sequential(nn.Linear(8, 4))
    >>> weights = {"type": "int8", "symmetric": True, "strategy": "channel"}
    >>> qz.quantize(model, {"quant_cfg": {"weights": weights}, "algorithm": "minmax"})
    >>> qz.convert(model)
    >>> again = nn.Sequential(nn.Linear(8, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     qz.save(model, f"{folder}/int8")
    ...     qz.load(again, f"{folder}/int8")
    >>> torch.equal(again[0].codes, model[0].codes)
    True
    """
    where, reader = os.fspath(directory), files.safetensors()
    try:
        tensors, header = files.read(directory, _FILE)
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


def save_calibration(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the ``state_dict`` of a model under calibration to ``path``, completely or not at all.

    Call it between forward passes. The file holds the parameters, the statistics, and the layers that are quantized
    already; with ``sequential``, also the arguments of the batches.

    Args:
        model: a model under calibration.
        path: a file, in a directory that exists.

    Raises:
        QuantizeError: a model that is not under calibration.
        OSError: the file cannot be written; an old file is kept.

    >>> import tempfile, quantize as qz
    >>> model = nn.Sequential(nn.Linear(8, 4))
    >>> weights = {"type": "int4", "symmetric": True, "strategy": "channel"}
    >>> qz.quantize(model, {"quant_cfg": {"weights": weights}, "algorithm": "gptq", "batch_num": 2})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     qz.save_calibration(model, f"{folder}/calibration.pt")
    ...     os.listdir(folder)
    ['calibration.pt']
    """
    if not calibrated(model):
        raise refusal("model", "not under calibration", _STARTED)
    if offload.changed(model):
        told = "scales are folded into weights that are offloaded"
        raise refusal("model", told, "a model before its last batch, without fold, or in memory")
    with files.replacing(path) as made, made.open("wb") as file:
        torch.save(model.state_dict(), file)


def load_calibration(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Continue a calibration from a file of :func:`save_calibration`.

    Args:
        model: the same model, after ``quantize`` with the same config.
        path: a file that :func:`save_calibration` wrote.

    Raises:
        QuantizeError: a model that is not under calibration, or has another config.
        OSError: the file cannot be read.

    >>> import tempfile, quantize as qz
    >>> weights = {"type": "int4", "symmetric": True, "strategy": "channel"}
    >>> config = {"quant_cfg": {"weights": weights}, "algorithm": "gptq", "batch_num": 2}
    >>> first, second = nn.Sequential(nn.Linear(8, 4)), nn.Sequential(nn.Linear(8, 4))
    >>> qz.quantize(first, config)
    >>> output = first(torch.ones(16, 8))
    >>> qz.quantize(second, config)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     qz.save_calibration(first, f"{folder}/calibration.pt")
    ...     qz.load_calibration(second, f"{folder}/calibration.pt")
    >>> output = second(torch.ones(16, 8))
    >>> qz.report(second).rows[0].tokens
    32
    """
    layers, where = calibrated(model), os.fspath(path)
    if not layers:
        raise refusal("model", "not under calibration", f"{_STARTED}, with the same config")
    try:
        state = torch.load(path, map_location=offload.device(layers[0]), weights_only=True)
        found = None if isinstance(state, dict) else f"a {type(state).__name__}"
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError) as error:
        found = f"cannot be read ({' '.join(str(error).split())[:200]})"
    if found is not None:
        raise refusal(where, found, "a file of save_calibration")
    own = model.state_dict()
    saved.check(where, state, own, "a calibration of this model")
    for key, value in own.items():
        if isinstance(value, Tensor) and state[key].is_meta != value.is_meta:
            told = f"{key!r} is {'with' if value.is_meta else 'without'} its data"
            raise refusal(where, told, "a calibration of a model that was dispatched as this one is")
    check_states(model, state)
    model.load_state_dict(state)
