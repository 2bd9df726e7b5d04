"""The format of compressed-tensors, as transformers and vLLM load it.

Source: compressed-tensors 0.20, compressors ``pack_quantized`` and ``naive_quantized`` and ``quantization.quant_args``;
which of them a loader takes for which scheme: vLLM, ``compressed_tensors.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from quantize.core import LayerSpec, Scheme
from quantize.core.packing import pack_offset
from quantize.shell.config import refusal
from quantize.shell.deploy.layer import QuantizedLinear
from quantize.shell.disk.parts import Contents, Parts, only, per_row, unsmoothed


def contents(parts: Parts) -> Contents:
    """The files of the checkpoint.

    Weights alone are ``pack-quantized``, int8 ones too: vLLM takes no other format without inputs. With inputs they are
    ``int-quantized``. One scale for a tensor becomes the same scale for each channel.

    Raises:
        QuantizeError: a layer with smoothing, or with a last group that is shorter than the others.
    """
    tensors = dict(parts.others)
    for name, layer in parts.layers.items():
        held = _tensors(name, layer)
        tensors.update({f"{name}.{key}": tensor for key, tensor in held.items()})
    return {"model.safetensors": tensors}, parts.configs(quantization_config=_config(parts))


def _tensors(name: str, layer: QuantizedLinear) -> dict[str, Tensor]:
    solved = unsmoothed(name, layer)
    weight, static = solved.weight, solved.static
    n, c = weight.codes.shape
    size = weight.scheme.group_size
    if size is not None and c % size:
        found = f"in_features {c} in groups of {size}, the last one shorter, which the format cannot hold"
        raise refusal(f"layer {name!r}", found, "a group_size that divides in_features, or the layer in skip_layers")
    scale = per_row(weight.scale, n)
    if solved.inputs is None:
        # All loaders compute with these scales in the dtype of the model.
        if not bool(scale.to(layer.layout.dtype).all()):
            found = f"a scale too small for {layer.layout.dtype}, in which the format holds it"
            raise refusal(f"layer {name!r}", found, "a model in bfloat16 or float32, or the layer in skip_layers")
        held = {
            "weight_packed": pack_offset(weight.codes, weight.scheme.bits),
            "weight_scale": scale.to(layer.layout.dtype),
        }
        if weight.zero_point is not None:
            zeros = pack_offset(rearrange(per_row(weight.zero_point, n), "n g -> g n"), weight.scheme.bits)
            held["weight_zero_point"] = rearrange(zeros, "g n -> n g")
        return {**held, "weight_shape": torch.tensor([n, c])}
    held = {"weight": weight.codes, "weight_scale": scale}
    if static is not None:
        held["input_scale"] = only(static.scale)
        if static.zero_point is not None:
            held["input_zero_point"] = only(static.zero_point)
    return held


def _config(parts: Parts) -> dict[str, Any]:
    names: dict[LayerSpec, list[str]] = {}
    for name, layer in parts.layers.items():
        names.setdefault(layer.layout.spec, []).append(name)
    groups = {
        f"group_{i}": {
            "targets": _targets(parts, held) if len(names) == 1 else held,
            "weights": _arguments(spec.weight, tensor="channel"),
            "input_activations": None if spec.inputs is None else _arguments(spec.inputs),
            "output_activations": None,
            "format": _format(spec),
        }
        for i, (spec, held) in enumerate(names.items())
    }
    formats = {_format(spec) for spec in names}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        # Whatever a target 'Linear' would match by the name of its class.
        "ignore": [
            name
            for name, module in parts.model.named_modules(remove_duplicate=False)
            if any(kind.__name__ == "Linear" for kind in type(module).__mro__)
        ],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _targets(parts: Parts, names: list[str]) -> list[str]:
    head = getattr(parts.model, "get_output_embeddings", lambda: None)()
    # In vLLM the output head is no linear layer by class. The first target that matches is the one that counts.
    return [*(name for name in names if isinstance(head, nn.Module) and parts.layers[name] is head), "Linear"]


def _format(spec: LayerSpec) -> str:
    return "pack-quantized" if spec.inputs is None else "int-quantized"


def _arguments(scheme: Scheme, *, tensor: str = "tensor") -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": tensor if scheme.strategy == "tensor" else scheme.strategy,
        "group_size": scheme.group_size,
        "dynamic": scheme.strategy == "token",
    }
