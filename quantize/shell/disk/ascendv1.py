"""AscendV1, the format of msModelSlim, as vLLM on Ascend and MindIE load it.

Source: msModelSlim, "AscendV1 Format Description" and ``ascendv1.py``; vllm-ascend, ``methods/w8a8_static.py``,
``w8a8_dynamic.py`` and ``w8a16.py``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from quantize.core import LayerSpec
from quantize.core.linear import integer_bias
from quantize.shell.config import refusal
from quantize.shell.deploy.layer import QuantizedLinear
from quantize.shell.disk.parts import Parts, as_json, unsmoothed

FILE = "quant_model_weights.safetensors"
# By the strategy of the inputs; the last one in a model names the whole model.
_KINDS = {None: "W8A16", "token": "W8A8_DYNAMIC", "tensor": "W8A8"}


def tensors(name: str, layer: QuantizedLinear) -> dict[str, Tensor]:
    """What the checkpoint holds of a layer.

    Raises:
        QuantizeError: a layer that the format, or its loaders, have no type for.
    """
    _kind(name, layer.layout.spec)
    solved = unsmoothed(name, layer)
    weight, static = solved.weight, solved.static
    scale = weight.scale.expand(len(weight.codes), -1).float()
    if static is None:
        return {"weight": weight.codes, "weight_scale": scale, "weight_offset": torch.zeros_like(scale)}
    total = integer_bias(weight, static, layer.bias)
    bias = total.to(torch.int32)
    if bool((bias != total).any()):
        raise refusal(f"layer {name!r}", "a bias too large for int32 beside its scales", "the layer in skip_layers")
    deq = (static.scale.float() * scale)[:, 0]
    # Elsewhere than with bfloat16 the operator takes the bits of a float32 in an int64.
    bits = deq if layer.layout.dtype == torch.bfloat16 else deq.view(torch.int32).to(torch.int64)
    offset = torch.zeros_like(static.scale) if static.zero_point is None else static.zero_point
    return {
        "weight": weight.codes,
        "input_scale": static.scale[0].float(),
        "input_offset": offset[0].float(),
        "deq_scale": bits,
        "quant_bias": bias,
    }


def texts(parts: Parts, names: Iterable[str]) -> dict[str, str]:
    """The type of every tensor, and the ``config.json`` of the model."""
    found = {parts.names[name]: _kind(name, layer.layout.spec) for name, layer in parts.layers.items()}
    kinds = {
        name: "FLOAT" if name in parts.others else found.get(name.rpartition(".")[0], "FLOAT")
        for name in (*names, *parts.tied)
    }
    whole = max(found.values(), key=list(_KINDS.values()).index)
    general = {"version": "1.0.0", "model_quant_type": whole, "group_size": 0, "metadata": {}, "optional": {}}
    return {"quant_model_description.json": as_json("description", {**kinds, **general}), **parts.configs()}


def _kind(name: str, spec: LayerSpec) -> str:
    weight, inputs = spec.weight, spec.inputs
    if weight.bits != 8:
        found = f"int{weight.bits} weights: the loaders have no linear layer of them with inputs in floating point"
        wanted = "weights of type 'int8'"
    elif not weight.symmetric:
        # The format subtracts the offset of a weight, the operator adds it.
        found = "asymmetric weights: format and loaders disagree on the sign of their offset"
        wanted = "symmetric weights"
    elif weight.strategy == "group":
        found, wanted = "weights in groups: the loaders read one scale for a channel", "strategy 'channel' or 'tensor'"
    elif inputs is not None and inputs.strategy == "token" and not inputs.symmetric:
        found = "asymmetric inputs by token: the loaders quantize tokens symmetrically"
        wanted = "symmetric inputs or strategy 'tensor'"
    else:
        return _KINDS[None if inputs is None else inputs.strategy]
    raise refusal(f"layer {name!r}", found, f"{wanted}, or format 'compressed-tensors'")
