"""The directory of ``--out``: early checks of its format, and writing it with all files that programs need."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.shell import api
from quantize.shell.cli.subjects import described, dtype_in
from quantize.shell.config import QuantizeError, QuantizeWarning, parse
from quantize.shell.disk import export, files, storage
from quantize.shell.disk.parts import Parts
from quantize.shell.plan import Plan

# Suffixes of weights and of files of training, which are not copied. Indexes would name missing files.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".gguf", ".onnx", ".index.json")


def check(directory: Path | None, format: str | None, config: Any, source: Path | None) -> None:  # noqa: A002 - as in export
    """Refuse a directory that cannot be written, and a config that the format cannot hold: one layer is tried.

    ``source``: the directory of the model; the layer gets the dtype of this model.
    """
    if directory is not None:
        files.check_new(directory)
    parsed = parse(config)
    spec = parsed.spec(("",))
    # With patterns, the format of a layer is only known when the model is read.
    if format not in export.FORMATS or spec is None or any(each.pattern for each in parsed.formats):
        return
    size, dtype = 2 * (spec.weight.group_size or 32), dtype_in(source)
    # A model in float32 may be refused although it would not be in bfloat16.
    dtype = dtype if dtype in (torch.float16, torch.float32) else torch.bfloat16
    model = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 8)).to(dtype)
    _try(model, size, format, {**config, "skip_layers": None})


def check_layers(planned: Plan, format: str, config: Any) -> None:  # noqa: A002
    """Refuse layers that the format cannot hold, before calibration. Small layers are tried in their place.

    These have the names of the ``planned`` layers. Smoothing is not tried.
    """
    tree = _Tree()
    size = 2 * max(spec.weight.group_size or 32 for spec in planned.specs.values())
    for layer, names in planned.layers.items():
        small = nn.Linear(size, 8, dtype=layer.weight.dtype)
        for name in names:
            tree.put(name, small)
    for skipped in planned.skipped:
        tree.put(skipped.name, _Tree())
    _try(tree, size, format, {**config, "algorithm": "minmax"})


class _Tree(nn.Module):
    """Layers under any names, which all read the same inputs. An empty tree stands for a layer in floating point."""

    def put(self, name: str, layer: nn.Module) -> None:
        head, _, rest = name.partition(".")
        if not rest:
            self._modules.setdefault(head, layer)
        elif isinstance(below := self._modules.setdefault(head, _Tree()), _Tree):
            below.put(rest, layer)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            child(x if isinstance(child, _Tree) else x.to(child.get_parameter("weight").dtype))
        return x


def _try(model: nn.Module, size: int, format: str, config: Any) -> None:  # noqa: A002
    x = torch.randn(32, size, generator=torch.Generator().manual_seed(0)).to(next(model.parameters()).dtype)
    with torch.no_grad(), warnings.catch_warnings(action="ignore", category=QuantizeWarning):
        api.quantize(model, {**config, "batch_num": 1})
        model(x)
        api.convert(model)
    try:
        export.FORMATS[format].texts(Parts(model))
    except QuantizeError as error:
        told = str(error).replace("layer '1': its", "the").removeprefix("layer '1': ")
        raise QuantizeError(f"--format {format}: {told}") from None


def write(model: nn.Module, directory: Path, format: str | None, source: Path) -> None:  # noqa: A002
    """Write a converted model, and copy the other files of ``source``: tokenizer, chat template, code, ...

    ``directory`` is written completely, or left as it was.
    """
    with files.replacing(directory) as made:
        if format in export.FORMATS:
            export.export(model, made, format=format)
        else:
            storage.save(model, made)
            # Without a quant_method, transformers refuses the directory. Else it would make random weights.
            told = {"dtype": str(model.dtype).removeprefix("torch."), **described(source)}
            told["quantization_config"] = {"read_by": "quantize.load"}
            (made / "config.json").write_text(files.as_json("config.json", told), encoding="utf-8")
        for file in _beside(source):
            target = made / file.relative_to(source)
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                # The mode is not copied; it follows the umask.
                shutil.copyfile(file, target)


def _beside(source: Path) -> Iterator[Path]:
    """All files except weights and hidden ones, also in folders of chat templates and of sentence-transformers."""
    modules = source / "modules.json"
    told = modules.read_text(encoding="utf-8") if modules.is_file() else ""
    folders = {"additional_chat_templates", *re.findall(r'"path":\s*"([^"]+)"', told)}
    for entry in sorted(source.iterdir()):
        if entry.is_file() and not entry.name.startswith(".") and not entry.name.endswith(_WEIGHTS):
            yield entry
        elif entry.is_dir() and entry.name in folders:
            yield from (file for file in sorted(entry.rglob("*")) if file.is_file())
