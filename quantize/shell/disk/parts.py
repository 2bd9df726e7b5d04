"""The parts of a converted model for files: its quantized layers, all other tensors, their names, and its config."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from quantize.shell import offload
from quantize.shell.calibrate.layer import CalibrationLinear, check_model
from quantize.shell.config import refusal
from quantize.shell.deploy.layer import QuantizedLinear
from quantize.shell.deploy.state import Outline
from quantize.shell.disk.files import as_json
from quantize.shell.progress import progress
from quantize.shell.views import Experts

_T = TypeVar("_T")
# Layers of one module that loaders compute as one matrix.
MERGED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
)
_FLOAT = "floating point"


def quantized(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized layers of a converted model, under all of their names; a QuantizeError for any other model."""
    check_model(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if isinstance(module, CalibrationLinear):
            raise refusal(f"layer {name!r}", "under calibration", "a model after convert(model)")
    found = {name: module for name, module in modules.items() if isinstance(module, QuantizedLinear)}
    if not found or "" in found:
        raise refusal("model", "no converted layer inside a model", "a model after convert(model)")
    return found


def pairs(
    others: Mapping[str, Tensor], layers: Mapping[str, _T], tensors: Callable[[_T], Mapping[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a file with their names: ``others``, then those that ``tensors`` makes, layer by layer."""
    yield from others.items()
    for name, layer in progress(layers.items(), "write", unit="layer"):
        yield from ((f"{name}.{key}", tensor) for key, tensor in tensors(layer).items())


class Parts:
    """The parts of a converted model; nothing is copied.

    - ``layers``: the quantized layers, under all their names.
    - ``names``: the name of each layer in a checkpoint, by its name in the model. ``biases``: by the same names.
    - ``others``: every other tensor of the ``state_dict``, by its name in a checkpoint; tied tensors are there once.
    - ``tied``: the names that ``others`` leaves out, because loaders tie them by the config.

    Raises:
        QuantizeError: a model that is not converted, or one that no checkpoint can hold.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.layers = model, quantized(model)
        for name, layer in self.layers.items():
            if hasattr(layer, "smoothing"):
                how = f"algorithm {{{layer.row.algorithm!r}: {{'fold': True}}}}, which smooths in the module before"
                how += " (with it, the report says why a scale stayed), or the layer in skip_layers"
                raise refusal(f"layer {name!r}", "its inputs are smoothed at run time, which no format can hold", how)
        tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        # A quantized weight is no longer tied to an embedding.
        self.untied = any(key.rpartition(".")[0] in self.layers for pair in tied.items() for key in pair)
        named = {} if self.untied else dict(model.named_parameters(remove_duplicate=False))
        self.tied = {key for key, source in tied.items() if key in named and named[key] is named.get(source)}
        state = offload.state(model, destination=Outline())
        others = {key: value for key, value in state.items() if key not in self.tied}
        for key, value in others.items():
            if not isinstance(value, Tensor):
                raise refusal(f"{key!r} in the state", f"a {type(value).__name__}", "tensors only")
        self.check_merged(dict.fromkeys(self.layers, "codes"))
        self.biases = {name: others.pop(f"{name}.bias") for name in self.layers if f"{name}.bias" in others}
        self.names, self.others = _of_checkpoint(model, self.layers, others)

    def check_merged(self, kinds: Mapping[str, str]) -> None:
        """Refuse layers that loaders compute as one matrix or one mixture, if their ``kinds`` differ.

        ``kinds`` are given by name. A layer without a kind stays in floating point.
        """
        for parent, module in self.model.named_modules(remove_duplicate=False):
            for names in _merged(parent, module):
                first = kinds.get(names[0], _FLOAT)
                for name in names[1:]:
                    if (kind := kinds.get(name, _FLOAT)) != first:
                        found = f"{first} and {kind}, but loaders compute these layers as one"
                        wanted = f"one format for {', '.join(each.rpartition('.')[2] for each in names[:3])}"
                        raise refusal(f"layers {names[0]!r}, {name!r}", found, f"{wanted}, or all in skip_layers")

    def configs(self, **extra: Any) -> dict[str, str]:
        """``config.json`` with ``extra`` added, and ``generation_config.json``, if the model has such configs."""
        config: Any = getattr(self.model, "config", None)
        told: dict[str, Any] = {}
        if callable(getattr(config, "to_dict", None)):
            # As transformers does on saving: the class, and the present dtype of the model.
            told = {**config.to_dict(), "architectures": [type(self.model).__name__]}
            dtype = next(iter(self.layers.values())).layout.dtype
            told["torch_dtype" if "torch_dtype" in told else "dtype"] = str(dtype).removeprefix("torch.")
            told = _public(told, untied=self.untied)
        texts = {"config.json": as_json("model.config", {**told, **extra})} if told or extra else {}
        generation: Any = getattr(self.model, "generation_config", None)
        if callable(getattr(generation, "to_json_string", None)):
            texts["generation_config.json"] = generation.to_json_string()
        return texts


def check_scale(name: str, layer: QuantizedLinear) -> None:
    """Refuse a layer with a scale that becomes 0 in the dtype of the model, because loaders convert it to that."""
    dtype = layer.layout.dtype
    if not bool(layer.get_buffer("scale").to(dtype).all()):
        found = f"a scale too small for {dtype}, in which loaders hold it"
        raise refusal(f"layer {name!r}", found, "a model in bfloat16 or float32, or the layer in skip_layers")


def _merged(parent: str, module: nn.Module) -> Iterator[list[str]]:
    """Groups of layers in ``module`` that loaders compute as one: their names."""
    if isinstance(module, Experts):
        kinds = (nn.Linear, QuantizedLinear)
        yield [name for name, each in module.named_modules(prefix=parent) if isinstance(each, kinds)]
    for row in MERGED:
        if present := [key for key in row if module._modules.get(key) is not None]:
            yield [f"{parent}.{key}" if parent else key for key in present]


def _public(config: dict[str, Any], *, untied: bool) -> dict[str, Any]:
    """``config``, and configs inside it, without the paths of their files; ``untied``: without tied weights."""
    told = {key: _public(value, untied=untied) if isinstance(value, dict) else value
            for key, value in config.items() if key != "_name_or_path"}  # fmt: skip
    return {**told, "tie_word_embeddings": False} if untied and "tie_word_embeddings" in told else told


def _of_checkpoint(
    model: nn.Module, layers: Iterable[str], others: Mapping[str, Tensor]
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The names of ``layers`` in a checkpoint, by their names in the model; and ``others`` by checkpoint names.

    transformers renames the tensors itself. In place of each weight it gets a number, which identifies the layer. In
    place of a 3-D parameter of experts it gets a tensor of such numbers.
    """
    loading: Any = sys.modules.get("transformers.core_model_loading")
    revert = getattr(loading, "revert_weight_conversion", None)
    if revert is None or not hasattr(model, "save_pretrained"):
        return {name: name for name in layers}, dict(others)
    given = [*layers]
    left = {name: torch.tensor([number]) for number, name in enumerate(given)}
    marks: dict[str, Tensor] = {}
    for name, m in model.named_modules(remove_duplicate=False):
        if isinstance(m, Experts):
            ups = ("gate_proj", "up_proj") if m.has_gate else ("up_proj",)
            for fused, parts in (("gate_up_proj" if m.has_gate else "up_proj", ups), ("down_proj", ("down_proj",))):
                numbers = [left.pop(f"{name}.{e}.{part}") for e in range(m.num_experts) for part in parts]
                marks[f"{name}.{fused}"] = torch.stack(numbers).view(m.num_experts, len(parts), 1)
    marks |= {f"{name}.weight": number for name, number in left.items()}
    names, kept = {name: name for name in given}, dict[str, Tensor]()
    for key, tensor in revert(model, {**others, **marks}).items():
        if tensor.dtype != torch.int64 or key in others:
            kept[key] = tensor
        elif tensor.numel() > 1:
            told = f"{key!r} is one tensor in its checkpoints, and no format has codes for that"
            raise refusal("model", told, "the experts in skip_layers")
        else:
            names[given[int(tensor)]] = key.removesuffix(".weight")
    return names, kept
