"""Files and directories that are written completely, or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from quantize.shell.config import QuantizeError, refusal, shown

_INDEX = "{}.index.json"


def check_new(directory: str | os.PathLike[str]) -> None:
    """Refuse a directory that has content or cannot be made, and a process that cannot import safetensors."""
    target = Path(directory)
    parent = target.resolve().parent
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        wanted = "a new or an empty directory, whose parent can be written to"
        raise refusal(os.fspath(directory), f"{os.fspath(parent)} is not a directory that can be written to", wanted)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise refusal(os.fspath(directory), "it has content", "a new or an empty directory")
    safetensors()


def safetensors() -> Any:
    """The package of that name; a QuantizeError if it is not installed."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise refusal("safetensors", "not installed", "pip install 'torch-quantize-core[export]' first") from error
    return safetensors


def shard_size(given: object) -> float:
    """The bytes that ``given`` means: an int, a string such as ``'5GB'`` or ``'500MiB'``, or None for no limit."""
    if given is None:
        return math.inf
    text = f"{given}B" if type(given) is int else str(given)
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(I?)B", text.upper())
    size = float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2] or " ") if found else 0
    if size < 1:
        raise refusal("max_shard_size", shown(given), "bytes as an int, or a string such as '5GB' or '500MiB'")
    return size


def as_json(where: str, value: object) -> str:
    """``value`` as the text of a JSON file; a QuantizeError if JSON cannot hold it."""
    try:
        return json.dumps(value, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise QuantizeError(f"{where}: {error}; accepted: what JSON can hold") from error


def write(
    directory: str | os.PathLike[str],
    file: str,
    tensors: Iterable[tuple[str, Tensor]],
    texts: Mapping[str, str],
    header: Mapping[str, str],
    limit: float,
) -> None:
    """Write ``directory`` with ``tensors`` by name in the safetensors ``file``, and with ``texts`` by file name.

    If the tensors of ``a.safetensors`` have more bytes than ``limit``, they are written as shards,
    ``a-00001-of-00002.safetensors`` and so on. ``a.safetensors.index.json`` then says which shard has which tensor, as
    transformers reads it. Only one shard is in memory at a time. ``header`` is added to the metadata of every shard.

    Raises:
        QuantizeError: a tensor on the meta device; nothing is left.
        OSError: the directory cannot be written; nothing is left.
    """
    with replacing(directory) as made:
        made.mkdir()
        shards: list[dict[str, int]] = []
        for shard in _shards(tensors, limit):
            try:
                safetensors().torch.save_file(shard, made / str(len(shards)), metadata={"format": "pt", **header})
            except safetensors().SafetensorError as error:
                # For example, the disk is full.
                raise OSError(str(error)) from error
            shards.append({key: tensor.nbytes for key, tensor in shard.items()})
        stem, many = file.removesuffix(".safetensors"), len(shards)
        names = [f"{stem}-{i + 1:05}-of-{many:05}.safetensors" for i in range(many)] if many > 1 else [file]
        for i, name in enumerate(names):
            # Only the owner can read files of safetensors. They get the permissions of the directory, by the umask.
            (made / str(i)).chmod(made.stat().st_mode & 0o666)
            (made / str(i)).rename(made / name)
        if many > 1:
            where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            told = {"metadata": {"total_size": sum(sum(shard.values()) for shard in shards)}, "weight_map": where}
            texts = {**texts, _INDEX.format(file): as_json("index", told)}
        for name, text in texts.items():
            (made / name).write_text(text, encoding="utf-8")


def read(directory: str | os.PathLike[str], file: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors that :func:`write` wrote as ``file`` or in its shards, and their metadata.

    Each tensor is read from its file when it is used. A missing or unreadable file raises OSError, SafetensorError,
    ValueError or KeyError.
    """
    index, tensors, metadata = Path(directory, _INDEX.format(file)), dict[str, Tensor](), dict[str, str]()
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index.exists() else [file]
    for name in dict.fromkeys(names):
        with safetensors().safe_open(Path(directory, name), framework="pt") as opened:
            tensors |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - no mapping
            metadata |= opened.metadata() or {}
    return tensors, metadata


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path``. At the end of the block, the file or directory made there replaces ``path``.

    After an error, it is deleted, and ``path`` stays as it was.
    """
    # A link is kept, and its target is replaced.
    target = Path(path).resolve()
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as beside:
        made = Path(beside, target.name)
        yield made
        for written in (*made.rglob("*"), made):
            _sync(written)
        made.replace(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    # Some systems cannot open directories.
    if path.is_file() or hasattr(os, "O_DIRECTORY"):
        opened = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _shards(pairs: Iterable[tuple[str, Tensor]], limit: float) -> Iterator[dict[str, Tensor]]:
    """Shards of contiguous tensors on the CPU, each in its own storage. A shard is emptied before the next is made."""
    shard, seen, size = dict[str, Tensor](), set[int](), 0
    for key, tensor in pairs:
        if tensor.is_meta:
            raise refusal(f"{key!r} in the state", "on the meta device", "a tensor with data")
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard.clear()
            seen, size = set(), 0
        here = tensor.detach().cpu().contiguous()
        place = here.untyped_storage().data_ptr()
        shard[key] = here.clone() if place in seen else here
        seen.add(place)
        size += here.nbytes
    yield shard
