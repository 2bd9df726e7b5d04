"""AscendV1, the format of msModelSlim, as vLLM on Ascend and MindIE load it.

Source: msModelSlim, "AscendV1 Format Description" and ``ascendv1.py``; vllm-ascend, ``methods/w8a8_static.py``,
``w8a8_dynamic.py`` and ``w8a16.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.core import LayerSpec
from quantize.core.linear import integer_bias
from quantize.shell.config import refusal
from quantize.shell.deploy.layer import QuantizedLinear
from quantize.shell.disk.files import as_json
from quantize.shell.disk.parts import Parts

FILE = "quant_model_weights.safetensors"
_SCALED = ("weight", "weight_scale", "weight_offset")
_STATIC = ("weight", "input_scale", "input_offset", "deq_scale", "quant_bias")
# The types of layers and their tensors; the last type in a model names the whole model.
_TYPES = {"W8A16": _SCALED, "W8A8_DYNAMIC": _SCALED, "W8A8": _STATIC}


def tensors(layer: QuantizedLinear) -> dict[str, Tensor]:
    """What the checkpoint holds of a layer.

    Raises:
        QuantizeError: a bias that does not fit the format.
    """
    solved = layer.solution
    weight, static = solved.weight, solved.static
    scale = weight.scale.expand(len(weight.codes), -1).float()
    if static is None:
        return dict(zip(_SCALED, (weight.codes, scale, torch.zeros_like(scale)), strict=True))
    total = integer_bias(weight, static, layer.bias)
    bias = total.to(torch.int32)
    if bool((bias != total).any()):
        found = "a bias too large for int32 beside its scales"
        raise refusal(f"layer {layer.row.name!r}", found, "the layer in skip_layers")
    deq = (static.scale.float() * scale)[:, 0]
    # Elsewhere than with bfloat16 the operator takes the bits of a float32 in an int64.
    bits = deq if layer.layout.dtype == torch.bfloat16 else deq.view(torch.int32).to(torch.int64)
    offset = torch.zeros_like(static.scale) if static.zero_point is None else static.zero_point
    held = (weight.codes, static.scale[0].float(), offset[0].float(), bits, bias)
    return dict(zip(_STATIC, held, strict=True))


def texts(parts: Parts) -> dict[str, str]:
    """The type of every tensor, and the ``config.json`` of the model.

    Raises:
        QuantizeError: a layer that the format, or its loaders, have no type for.
    """
    kinds = {name: _type(name, layer.layout.spec) for name, layer in parts.layers.items()}
    told = dict.fromkeys((*parts.others, *parts.tied), "FLOAT")
    told |= {f"{parts.names[name]}.{key}": kind for name, kind in kinds.items() for key in _TYPES[kind]}
    whole = max(kinds.values(), key=[*_TYPES].index)
    general = {"version": "1.0.0", "model_quant_type": whole, "group_size": 0, "metadata": {}, "optional": {}}
    return {"quant_model_description.json": as_json("description", {**told, **general}), **parts.configs()}


def _type(name: str, spec: LayerSpec) -> str:
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
    elif inputs is None or inputs.strategy == "tensor":
        return "W8A16" if inputs is None else "W8A8"
    elif inputs.symmetric:
        return "W8A8_DYNAMIC"
    else:
        found = "asymmetric inputs by token: the loaders quantize tokens symmetrically"
        wanted = "symmetric inputs or strategy 'tensor'"
    raise refusal(f"layer {name!r}", found, f"{wanted}, or format 'compressed-tensors'")
