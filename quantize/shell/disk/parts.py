"""What every format needs of a converted model: its quantized layers, all other tensors, and its config."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor, nn

from quantize.core import Solution
from quantize.shell import offload
from quantize.shell.calibrate.layer import CalibrationLinear
from quantize.shell.config import QuantizeError, refusal, shown
from quantize.shell.deploy import state as saved
from quantize.shell.deploy.layer import QuantizedLinear
from quantize.shell.disk.names import of_checkpoint


def quantized(model: object) -> dict[str, QuantizedLinear]:
    """The quantized layers of a converted model, under all of their names.

    Raises:
        QuantizeError: a model that is not converted.
    """
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


def unsmoothed(name: str, layer: QuantizedLinear) -> Solution:
    """The solution of a layer; one that smooths its inputs is refused, as no format has a place for that."""
    solved = layer.solution
    if solved.smoothing is not None:
        fold = f"algorithm {{{layer.row.algorithm!r}: {{'fold': True}}}}"
        how = f"{fold}, which smooths in the module before (report says why it did not), or the layer in skip_layers"
        raise refusal(f"layer {name!r}", "its inputs are smoothed at run time, which the format cannot hold", how)
    return solved


class Parts:
    """A converted model taken apart; nothing is copied.

    - ``layers``: the quantized layers, by all names. ``names``: by these, those in a checkpoint.
    - ``others``: every other tensor of the ``state_dict``, the layers' biases among them; tied ones once. Under the
      names of checkpoints.
    - ``tied``: the names that ``others`` leaves out, since the config makes loaders tie them.

    Raises:
        QuantizeError: a model that is not converted, or a state that no checkpoint can hold.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.layers, state = model, quantized(model), offload.state(model)
        tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        # A weight that was quantized is no longer the embedding's.
        self.untied = any(key.rpartition(".")[0] in self.layers for pair in tied.items() for key in pair)
        named = dict(model.named_parameters(remove_duplicate=False))
        pairs = () if self.untied else tied.items()
        self.tied = {key for key, source in pairs if key in named and named[key] is named.get(source)}
        others: dict[str, Tensor] = {}
        for key, value in state.items():
            owner, _, last = key.rpartition(".")
            if key in self.tied or (owner in self.layers and last in (*saved.TENSORS, saved.EXTRA)):
                continue
            if not isinstance(value, Tensor):
                raise refusal(f"{key!r} in the state", f"a {type(value).__name__}", "tensors only")
            if value.is_meta:
                raise refusal(f"{key!r} in the state", "on the meta device", "a tensor with data")
            others[key] = value
        self.names, self.others = of_checkpoint(model, self.layers, others)

    def configs(self, **extra: Any) -> dict[str, str]:
        """``config.json`` with ``extra`` in it, and ``generation_config.json``, where the model has such configs.

        Raises:
            QuantizeError: a config that JSON cannot hold.
        """
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


def as_json(where: str, value: object) -> str:
    """``value`` as the text of a file.

    Raises:
        QuantizeError: it holds something else than plain containers, strings and numbers.
    """
    try:
        return json.dumps(value, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise QuantizeError(f"{where}: {error}; accepted: what JSON can hold") from error


def _without_ties(config: dict[str, Any]) -> dict[str, Any]:
    nested = {key: _without_ties(value) if isinstance(value, dict) else value for key, value in config.items()}
    return {**nested, "tie_word_embeddings": False} if "tie_word_embeddings" in nested else nested
