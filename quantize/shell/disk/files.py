"""Directories on disk: there whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from quantize.shell.config import refusal


def check_new(directory: str | os.PathLike[str]) -> None:
    """Refuse a directory that holds something, and a process that could not write tensors into it.

    Raises:
        QuantizeError: a file, a directory with content, or no safetensors.
    """
    target = Path(directory)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise refusal(os.fspath(directory), "exists, and holds something", "a new or an empty directory")
    safetensors()


def safetensors() -> Any:
    """The module ``safetensors.torch``.

    Raises:
        QuantizeError: it is not installed.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        wanted = "an environment after pip install 'torch-quantize-core[export]'"
        raise refusal("safetensors", "not installed", wanted) from error
    return safetensors.torch


def write(
    directory: str | os.PathLike[str], tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str]
) -> None:
    """Make ``directory`` of files: the safetensors ``tensors``, by file and by name, and ``texts``, by file.

    All is written into a directory beside it, which then takes its name.

    Raises:
        QuantizeError: as :func:`check_new`.
        OSError: it cannot be written; nothing is left.
    """
    check_new(directory)
    # A link stays one: its target is replaced.
    target = Path(directory).resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.mkdir()
    try:
        for name, held in tensors.items():
            safetensors().save_file(_apart(held), temporary / name, metadata={"format": "pt"})
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        for path in temporary.iterdir():
            with path.open("r+b") as file:
                os.fsync(file.fileno())
        sync(temporary)
        temporary.replace(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(target.parent)


def sync(directory: Path) -> None:
    """Put the names in ``directory`` on disk, where the system opens directories."""
    if hasattr(os, "O_DIRECTORY"):
        opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and no two in one storage: as the format wants them."""
    seen: set[int] = set()
    held: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        here = tensor.detach().cpu().contiguous()
        place = here.untyped_storage().data_ptr()
        held[name] = here.clone() if place in seen else here
        seen.add(place)
    return held
