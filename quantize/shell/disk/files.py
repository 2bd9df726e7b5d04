"""Files and directories on disk: there whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
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
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Mapping[str, Tensor]],
    texts: Mapping[str, str],
    header: Mapping[str, str] | None = None,
) -> None:
    """Make ``directory`` of files: the safetensors ``tensors``, by file and by name, and ``texts``, by file.

    ``header`` is added to the metadata of every file of tensors.

    Raises:
        QuantizeError: as :func:`check_new`.
        OSError: it cannot be written; nothing is left.
    """
    check_new(directory)
    with replacing(directory) as temporary:
        temporary.mkdir()
        for name, held in tensors.items():
            safetensors().save_file(_apart(held), temporary / name, metadata={"format": "pt", **(header or {})})
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside ``path``. The file or directory that the block makes there takes the place of ``path`` at its end.

    Raises:
        OSError: it cannot be written; nothing is left of it, and what was at ``path`` stays.
    """
    # A link stays one: its target is replaced.
    target = Path(path).resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield temporary
        for written in (*temporary.glob("*"), temporary):
            _sync(written)
        temporary.replace(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync(target.parent)


def _sync(path: Path) -> None:
    # Some systems open no directories.
    if path.is_file() or hasattr(os, "O_DIRECTORY"):
        opened = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
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
