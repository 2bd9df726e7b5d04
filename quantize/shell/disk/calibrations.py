"""Calibration on disk: a process that is killed goes on from where it was saved."""

from __future__ import annotations

import os
import pickle

import torch
from torch import nn

from quantize.shell import offload
from quantize.shell.calibrate.layer import calibrated, check_states
from quantize.shell.config import refusal
from quantize.shell.deploy import state as saved
from quantize.shell.disk.files import replacing

_STARTED = "a model after quantize(model, config)"


def save_calibration(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the ``state_dict`` of a model under calibration to ``path``: the old file or the new one, never a part.

    Call it between forward passes. It holds the parameters, the statistics, and what was solved already; with
    ``sequential``, the arguments of the batches.

    Raises:
        QuantizeError: a model that is not under calibration.
        OSError: the file cannot be written; what was there stays.
    """
    if not calibrated(model):
        raise refusal("model", "not under calibration", _STARTED)
    if offload.changed(model):
        told = "scales are folded into weights that are offloaded"
        raise refusal("model", told, "a model before its last batch, without fold, or in memory")
    with replacing(path) as made, made.open("wb") as file:
        torch.save(model.state_dict(), file)


def load_calibration(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Go on from a file of :func:`save_calibration`, in a model that was given the same config.

    Raises:
        QuantizeError: a model that is not under calibration, or of another config.
        OSError: the file cannot be read.
    """
    layers, where = calibrated(model), os.fspath(path)
    if not layers:
        raise refusal("model", "not under calibration", f"{_STARTED}, with the same config")
    try:
        state = torch.load(path, map_location=offload.device(layers[0]), weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError) as error:
        told = " ".join(str(error).split())
        raise refusal(where, f"cannot be read ({told[:200]})", "a file of save_calibration") from error
    if not isinstance(state, dict):
        raise refusal(where, f"a {type(state).__name__}", "a file of save_calibration")
    own = model.state_dict()
    saved.check(where, state, own, "a calibration of this model")
    for key, value in own.items():
        if isinstance(value, torch.Tensor) and state[key].is_meta != value.is_meta:
            told = f"{key!r} is {'with' if value.is_meta else 'without'} its data"
            raise refusal(where, told, "a calibration of a model that was dispatched as this one is")
    check_states(model, state)
    model.load_state_dict(state)
