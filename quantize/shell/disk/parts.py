"""What a file needs of a converted model: its quantized layers, all other tensors, their names, and its config."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantize.shell import offload
from quantize.shell.calibrate.layer import CalibrationLinear
from quantize.shell.config import refusal, shown
from quantize.shell.deploy.layer import QuantizedLinear
from quantize.shell.deploy.state import Outline
from quantize.shell.disk.files import as_json
from quantize.shell.views import Experts


def quantized(model: object) -> dict[str, QuantizedLinear]:
    """The quantized layers of a converted model, under all of their names; a QuantizeError for any other model."""
    if not isinstance(model, nn.Module):
        raise refusal("model", shown(model), "a torch.nn.Module")
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if isinstance(module, CalibrationLinear):
            raise refusal(f"layer {name!r}", "under calibration", "a model after convert(model)")
    found = {name: module for name, module in modules.items() if isinstance(module, QuantizedLinear)}
    if not found or "" in found:
        raise refusal("model", "no converted layer inside a model", "a model after convert(model)")
    return found


def pairs(
    others: Mapping[str, Tensor],
    layers: Mapping[str, QuantizedLinear],
    tensors: Callable[[QuantizedLinear], Mapping[str, Tensor]],
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a file with their names: ``others``, and those that ``tensors`` makes of a layer at a time."""
    yield from others.items()
    for name, layer in layers.items():
        yield from ((f"{name}.{key}", tensor) for key, tensor in tensors(layer).items())


class Parts:
    """A converted model taken apart; nothing is copied.

    - ``layers``: the quantized layers, by all names. ``names``: by these, those in a checkpoint.
    - ``others``: every other tensor of the ``state_dict``, the layers' biases among them; tied ones once. Under the
      names of checkpoints.
    - ``tied``: the names that ``others`` leaves out, since the config makes loaders tie them.

    Raises:
        QuantizeError: a model that is not converted, or one that no checkpoint can hold.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.layers = model, quantized(model)
        for name, layer in self.layers.items():
            if hasattr(layer, "smoothing"):
                how = f"algorithm {{{layer.row.algorithm!r}: {{'fold': True}}}}, which smooths in the module before"
                how += " (report says why it did not), or the layer in skip_layers"
                raise refusal(f"layer {name!r}", "its inputs are smoothed at run time, which no format can hold", how)
        tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        # A weight that was quantized is no longer the embedding's.
        self.untied = any(key.rpartition(".")[0] in self.layers for pair in tied.items() for key in pair)
        named = {} if self.untied else dict(model.named_parameters(remove_duplicate=False))
        self.tied = {key for key, source in tied.items() if key in named and named[key] is named.get(source)}
        state = offload.state(model, destination=Outline())
        others = {key: value for key, value in state.items() if key not in self.tied}
        for key, value in others.items():
            if not isinstance(value, Tensor):
                raise refusal(f"{key!r} in the state", f"a {type(value).__name__}", "tensors only")
        self.names, self.others = _of_checkpoint(model, self.layers, others)

    def configs(self, **extra: Any) -> dict[str, str]:
        """``config.json`` with ``extra`` in it, and ``generation_config.json``, where the model has such configs."""
        config: Any = getattr(self.model, "config", None)
        told: dict[str, Any] = {}
        if callable(getattr(config, "to_dict", None)):
            # As transformers does on saving: the class, and the dtype that the model has by now.
            told = {**config.to_dict(), "architectures": [type(self.model).__name__]}
            dtype = next(iter(self.layers.values())).layout.dtype
            told["torch_dtype" if "torch_dtype" in told else "dtype"] = str(dtype).removeprefix("torch.")
            told = _without_ties(told) if self.untied else told
        texts = {"config.json": as_json("model.config", {**told, **extra})} if told or extra else {}
        generation: Any = getattr(self.model, "generation_config", None)
        if callable(getattr(generation, "to_json_string", None)):
            texts["generation_config.json"] = generation.to_json_string()
        return texts


def _without_ties(config: dict[str, Any]) -> dict[str, Any]:
    nested = {key: _without_ties(value) if isinstance(value, dict) else value for key, value in config.items()}
    return {**nested, "tie_word_embeddings": False} if "tie_word_embeddings" in nested else nested


def _of_checkpoint(
    model: nn.Module, layers: Iterable[str], others: Mapping[str, Tensor]
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The names of ``layers`` and of float experts by those in memory; and ``others`` as checkpoints have them.

    transformers finds the names itself: for every layer it is given a number in place of the weight. An expert's are
    those of its part of the 3-D parameter that the model was made with.
    """
    loading: Any = sys.modules.get("transformers.core_model_loading")
    revert = getattr(loading, "revert_weight_conversion", None)
    if revert is None or not hasattr(model, "save_pretrained"):
        return {name: name for name in layers}, dict(others)
    mixtures = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, Experts)}
    # Experts that stay in floating point have such names, too.
    floats = [f"{name}.{inner}" for name, mixture in mixtures.items() for inner, module in mixture.named_modules()
              if isinstance(module, nn.Linear)]  # fmt: skip
    given = [*layers, *floats]
    left = {name: torch.tensor([number]) for number, name in enumerate(given)}
    marks: dict[str, Tensor] = {}
    for name, m in mixtures.items():
        ups = ("gate_proj", "up_proj") if m.has_gate else ("up_proj",)
        for fused, parts in (("gate_up_proj" if m.has_gate else "up_proj", ups), ("down_proj", ("down_proj",))):
            numbers = [torch.stack([left.pop(f"{name}.{e}.{part}") for part in parts]) for e in range(m.num_experts)]
            marks[f"{name}.{fused}"] = torch.stack(numbers)
    marks |= {f"{name}.weight": number for name, number in left.items()}
    names, kept = {name: name for name in given}, dict[str, Tensor]()
    own = {key: key.rpartition(".") for key in others if key.rpartition(".")[0] in floats}
    rest = {key: tensor for key, tensor in others.items() if key not in own}
    for key, tensor in revert(model, {**rest, **marks}).items():
        if tensor.dtype != torch.int64 or key in rest:
            kept[key] = tensor
        elif tensor.numel() > 1:
            told = f"{key!r} is one tensor in its checkpoints, which no format has in codes"
            raise refusal("model", told, "the experts in skip_layers")
        else:
            names[given[int(tensor)]] = key.removesuffix(".weight")
    return names, kept | {f"{names[owner]}.{last}": others[key] for key, (owner, _, last) in own.items()}
