"""Calibration on disk: a process that is killed goes on from where it was saved."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import nn

from quantize.shell.config import QuantizeError, refusal
from quantize.shell.session import calibrated


def save_calibration(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the ``state_dict`` of a model under calibration to ``path``: the old file or the new one, never a part.

    Call it between forward passes. It holds the parameters, the statistics, and what was solved already; stage by stage, the arguments of the batches.

    Raises:
        QuantizeError: a model that is not under calibration.
        OSError: the file cannot be written; what was there stays.
    """
    if not calibrated(model):
        raise refusal("model", "not under calibration", "a model after quantize(model, config)")
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(model.state_dict(), file)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    # The name is on disk when its directory is; not every system opens directories.
    if hasattr(os, "O_DIRECTORY"):
        directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def load_calibration(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Go on from a file of :func:`save_calibration`, in a model that was given the same config.

    Raises:
        QuantizeError: a model that is not under calibration, or of another config.
        OSError: the file cannot be read.
    """
    if not calibrated(model):
        raise refusal("model", "not under calibration", "a model after quantize(model, config), with the same config")
    device = next(model.parameters()).device
    try:
        model.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise QuantizeError(f"{os.fspath(path)}: {told}; accepted: a calibration of this model") from error
