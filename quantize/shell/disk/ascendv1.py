"""AscendV1, the format of msModelSlim, as vLLM on Ascend and MindIE load it.

Source: msModelSlim, "AscendV1 Format Description" and ``ascendv1.py``; vllm-ascend, ``methods/w8a8_static.py``,
``w8a8_dynamic.py`` and ``w8a16.py``.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from quantize.core import LayerSpec
from quantize.core.linear import integer_bias
from quantize.shell.config import refusal
from quantize.shell.deploy.layer import QuantizedLinear
from quantize.shell.disk.parts import Contents, Parts, as_json, only, per_row, unsmoothed

# From what gives the name of the whole model last to what gives it first.
_RANKS = ("W8A16", "W8A8_DYNAMIC", "W8A8")


def contents(parts: Parts) -> Contents:
    """The files of the checkpoint.

    Raises:
        QuantizeError: a layer that the format, or its loaders, have no type for.
    """
    tensors, kinds = dict(parts.others), dict.fromkeys([*parts.others, *parts.tied], "FLOAT")
    found: set[str] = set()
    for name, layer in parts.layers.items():
        kind = _kind(name, layer.layout.spec)
        found.add(kind)
        for key, tensor in _tensors(name, layer, kind).items():
            tensors[f"{name}.{key}"], kinds[f"{name}.{key}"] = tensor, kind
    description = {
        **kinds,
        "version": "1.0.0",
        "model_quant_type": max(found, key=_RANKS.index),
        "group_size": 0,
        "metadata": {},
        "optional": {},
    }
    texts = {"quant_model_description.json": as_json("description", description), **parts.configs()}
    return {"quant_model_weights.safetensors": tensors}, texts


def _kind(name: str, spec: LayerSpec) -> str:
    where, weight, inputs = f"layer {name!r}", spec.weight, spec.inputs
    if weight.bits != 8:
        found = f"int{weight.bits} weights: the loaders have no linear layer of them with inputs in floating point"
        raise refusal(where, found, "weights of type 'int8', or format 'compressed-tensors'")
    if not weight.symmetric:
        # The format subtracts the offset of a weight, the operator adds it.
        found = "asymmetric weights: format and loaders disagree on the sign of their offset"
        raise refusal(where, found, "symmetric weights, or format 'compressed-tensors'")
    if weight.strategy == "group":
        found = "weights in groups: the loaders read one scale for a channel"
        raise refusal(where, found, "strategy 'channel' or 'tensor', or format 'compressed-tensors'")
    if inputs is None:
        return "W8A16"
    if inputs.strategy == "tensor":
        return "W8A8"
    if not inputs.symmetric:
        found = "asymmetric inputs by token: the loaders quantize tokens symmetrically"
        raise refusal(where, found, "symmetric inputs or strategy 'tensor', or format 'compressed-tensors'")
    return "W8A8_DYNAMIC"


def _tensors(name: str, layer: QuantizedLinear, kind: str) -> dict[str, Tensor]:
    solved = unsmoothed(name, layer)
    weight, static = solved.weight, solved.static
    scale = per_row(weight.scale, len(weight.codes)).float()
    if static is None:
        return {"weight": weight.codes, "weight_scale": scale, "weight_offset": torch.zeros_like(scale)}
    total = integer_bias(weight, static, layer.bias)
    limits = torch.iinfo(torch.int32)
    if bool((total < limits.min).any() | (total > limits.max).any()):
        raise refusal(f"layer {name!r}", "a bias too large for int32 beside its scales", "the layer in skip_layers")
    deq = rearrange(static.scale.float() * scale, "n 1 -> n")
    # Elsewhere than with bfloat16 the operator takes the bits of a float32 in an int64.
    bits = deq if layer.layout.dtype == torch.bfloat16 else deq.view(torch.int32).to(torch.int64)
    offset = torch.zeros_like(static.scale) if static.zero_point is None else static.zero_point
    return {
        "weight": weight.codes,
        "input_scale": only(static.scale).float(),
        "input_offset": only(offset).float(),
        "deq_scale": bits,
        "quant_bias": total.to(torch.int32),
    }
