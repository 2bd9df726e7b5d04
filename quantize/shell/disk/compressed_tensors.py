"""The format of compressed-tensors, as transformers and vLLM load it.

Source: compressed-tensors 0.20, compressors ``pack_quantized`` and ``naive_quantized`` and ``quantization.quant_args``;
vLLM, ``compressed_tensors.py``, for the schemes that loaders
accept.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantize.core import LayerSpec, Scheme
from quantize.core.packing import pack_offset
from quantize.shell.config import refusal
from quantize.shell.deploy.layer import QuantizedLinear
from quantize.shell.disk.parts import Parts, check_scale

FILE, LIMIT = "model.safetensors", math.inf


def tensors(layer: QuantizedLinear, bias: Tensor | None) -> dict[str, Tensor]:
    """The tensors of one layer in the checkpoint. A scale for the whole tensor is repeated for each channel."""
    solved = layer.solution
    weight, static, (n, c) = solved.weight, solved.static, solved.weight.codes.shape
    bits, zero_point, scale = weight.scheme.bits, weight.zero_point, weight.scale.expand(n, -1)
    held = {} if bias is None else {"bias": bias}
    if solved.inputs is None:
        # All loaders compute with these scales in the dtype of the model.
        held |= {"weight_packed": pack_offset(weight.codes, bits), "weight_scale": scale.to(layer.layout.dtype)}
        if zero_point is not None:
            held["weight_zero_point"] = pack_offset(zero_point.expand(n, -1).T, bits).T
        return {**held, "weight_shape": torch.tensor([n, c])}
    held |= {"weight": weight.codes, "weight_scale": scale}
    if static is not None:
        held |= {"input_scale": static.scale[0]}
        held |= {} if static.zero_point is None else {"input_zero_point": static.zero_point[0]}
    return held


def texts(parts: Parts) -> dict[str, str]:
    """``config.json`` with the formats of all layers.

    Targets are the full names of layers. vLLM would match the name of a class to parts of other class names, and so to
    routers and experts.

    Raises:
        QuantizeError: a layer whose format vLLM does not support, whose last group is shorter than the others, or whose
            scale is too small for its dtype; or different formats of layers that loaders compute as one.
    """
    names: dict[LayerSpec, list[str]] = {}
    kinds = dict[str, str]()
    for name, layer in parts.layers.items():
        _check(name, layer)
        spec = _written(layer.layout.spec)
        kinds[name] = f"{spec.weight} weights, {spec.inputs or 'float'} inputs"
        names.setdefault(spec, []).append(parts.names[name])
    parts.check_merged(kinds)
    groups = {f"group_{i}": {"targets": held, **_group(spec)} for i, (spec, held) in enumerate(names.items())}
    formats = {group["format"] for group in groups.values()}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        # vLLM needs every linear layer here or among the targets.
        "ignore": _left(parts),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    return parts.configs(quantization_config=quantization)


def _written(spec: LayerSpec) -> LayerSpec:
    return spec if spec.weight.strategy == "group" else replace(spec, weight=replace(spec.weight, strategy="channel"))


def _check(name: str, layer: QuantizedLinear) -> None:
    (weight, inputs), c = (layer.layout.spec.weight, layer.layout.spec.inputs), layer.in_features
    size, found = weight.group_size, ""
    if size is not None and c % size:
        found = f"in_features {c} in groups of {size}: the format cannot hold a shorter last group"
        wanted = "a group_size that divides in_features, or the layer in skip_layers"
    elif inputs is not None and not weight.symmetric:
        found = "asymmetric weights with quantized inputs, which no loader supports"
        wanted = "symmetric weights, or inputs in floating point"
    elif inputs is not None and weight.bits == 4 and inputs.strategy == "tensor":
        found = "int4 weights with static inputs, which no loader supports"
        wanted = "inputs with strategy 'token', weights of type 'int8', or inputs in floating point"
    if found:
        raise refusal(f"layer {name!r}", found, wanted)
    check_scale(name, layer)


def _left(parts: Parts) -> list[str]:
    """The layers in floating point that are linear layers here or, as routers are, in vLLM."""
    modules = dict(parts.model.named_modules(remove_duplicate=False))
    embeddings = {f"{name}.weight" for name, module in modules.items() if isinstance(module, nn.Embedding)}
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    matrices = [key.removesuffix(".weight") for key, tensor in parts.others.items()
                if key.endswith(".weight") and tensor.ndim == 2 and key not in embeddings]  # fmt: skip
    return list(dict.fromkeys([*linears, *matrices]))


def _group(spec: LayerSpec) -> dict[str, Any]:
    return {
        "weights": _arguments(spec.weight, spec.weight.strategy),
        "input_activations": None if spec.inputs is None else _arguments(spec.inputs, spec.inputs.strategy),
        "output_activations": None,
        # Weights alone are packed, even int8 ones: vLLM takes no other format with float inputs.
        "format": "pack-quantized" if spec.inputs is None else "int-quantized",
    }


def _arguments(scheme: Scheme, strategy: str) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": strategy,
        "group_size": scheme.group_size,
        "dynamic": strategy == "token",
    }
