"""What every format needs of a converted model: its quantized layers, all other tensors, and its config."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from quantize.shell import offload
from quantize.shell.calibrate.layer import CalibrationLinear
from quantize.shell.config import refusal, shown
from quantize.shell.deploy.layer import QuantizedLinear
from quantize.shell.deploy.state import Outline
from quantize.shell.disk.files import as_json
from quantize.shell.disk.names import of_checkpoint


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


def _without_ties(config: dict[str, Any]) -> dict[str, Any]:
    nested = {key: _without_ties(value) if isinstance(value, dict) else value for key, value in config.items()}
    return {**nested, "tie_word_embeddings": False} if "tie_word_embeddings" in nested else nested
