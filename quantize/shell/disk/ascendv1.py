"""AscendV1, the format of msModelSlim, as vLLM on Ascend and MindIE load it.

With ``mix``, static layers are of type W8A8_MIX: loaders quantize their inputs by token when they process prompts, and
with the static scale when they only decode. Both use one weight, so the layer has the tensors of both types.

Source: msModelSlim, "AscendV1 Format Description" and ``ascendv1.py``; vllm-ascend, ``modelslim_config.py``,
``methods/w8a8_static.py``, ``w8a8_dynamic.py``, ``w8a8_pdmix.py`` and ``w8a16.py``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantize.core import LayerSpec, QParams, QTensor
from quantize.core.linear import integer_bias
from quantize.shell.config import refusal
from quantize.shell.deploy.layer import QuantizedLinear
from quantize.shell.disk.files import as_json
from quantize.shell.disk.parts import Parts, check_scale
from quantize.shell.views import Experts

FILE, LIMIT = "quant_model_weights.safetensors", 4 * 2**30
_SCALED = ("weight", "weight_scale", "weight_offset")
_STATIC = ("input_scale", "input_offset", "deq_scale", "quant_bias")
# The types of layers, each with its tensors. A model has the last of the types that its layers have.
_TYPES = {"W8A16": _SCALED, "W8A8_DYNAMIC": _SCALED, "W8A8": ("weight", *_STATIC), "W8A8_MIX": (*_SCALED, *_STATIC)}
_OTHER = "or format 'compressed-tensors'"


def tensors(layer: QuantizedLinear, bias: Tensor | None, *, mix: bool = False) -> dict[str, Tensor]:
    """The tensors of one layer in the checkpoint."""
    solved, dtype = layer.solution, layer.layout.dtype
    weight, static = solved.weight, solved.static
    held = {"weight": weight.codes} if bias is None else {"weight": weight.codes, "bias": bias.float()}
    if mix or static is None:
        scale = weight.scale.expand(len(weight.codes), -1).float()
        held |= {"weight_scale": scale, "weight_offset": torch.zeros_like(scale)}
    if static is not None:
        offset = torch.zeros_like(static.scale) if static.zero_point is None else static.zero_point
        deq, total = _integer(weight, static, bias, dtype)
        # With float16 the operator takes the bits of a float32 in an int64.
        bits = deq.view(torch.int32).to(torch.int64) if dtype == torch.float16 else deq
        parts = (static.scale[0].float(), offset[0].float(), bits, total.to(torch.int32))
        held |= dict(zip(_STATIC, parts, strict=True))
    return held


def _integer(weight: QTensor, static: QParams, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``deq_scale`` and the integer bias, ``[n]`` each, of a static layer in a model of ``dtype``.

    1. The loader multiplies inputs by ``r = 1 / input_scale``; scale and quotient are rounded to the dtype of the
       model. So a code stands for ``1 / r``, and ``deq_scale`` is ``weight_scale / r``. It is inf or 0 if ``r`` does
       not fit the dtype.
    2. With float16 the operator truncates the mantissa of ``deq_scale`` to 10 bits, so it is rounded to 10 bits before.
    """
    deq = (weight.scale / (1 / static.scale.to(dtype)).double()).float()
    if dtype == torch.float16:
        mantissa, exponent = torch.frexp(deq)
        deq = torch.ldexp(torch.round(mantissa * 2**11), exponent - 11)
    unit = QParams(torch.ones_like(static.scale), static.zero_point)
    return deq[:, 0].expand(len(weight.codes)), integer_bias(replace(weight, scale=deq), unit, bias)


def texts(parts: Parts, *, mix: bool = False) -> dict[str, str]:
    """The text files of the checkpoint: the type of every tensor, and the ``config.json`` of the model.

    Raises:
        QuantizeError: a layer for which the format or its loaders have no type.
    """
    mixtures = [name for name, m in parts.model.named_modules(remove_duplicate=False) if isinstance(m, Experts)]
    kinds = {name: _type(name, layer.layout.spec, mix=mix) for name, layer in parts.layers.items()}
    alike = dict(kinds)
    for name, layer in parts.layers.items():
        if "input_scale" in _TYPES[kinds[name]]:
            alike[name] += _static(name, layer, parts.biases.get(name))
        if "weight_scale" in _TYPES[kinds[name]]:
            check_scale(name, layer)
        if name.endswith("kv_b_proj"):
            found = "loaders read parts of its weight without dequantizing them"
            raise refusal(f"layer {name!r}", found, f"'kv_b_proj' in skip_layers, {_OTHER}")
        if kinds[name] != "W8A8_DYNAMIC" and any(name.startswith(f"{mixture}.") for mixture in mixtures):
            found = f"an expert of type {kinds[name]}, but loaders have experts of type W8A8_DYNAMIC only"
            wanted = f"symmetric inputs with strategy 'token', the experts in skip_layers, {_OTHER}"
            raise refusal(f"layer {name!r}", found, wanted)
    parts.check_merged(alike)
    told = dict.fromkeys((*parts.others, *parts.tied, *(f"{parts.names[name]}.bias" for name in parts.biases)), "FLOAT")
    told |= {f"{parts.names[name]}.{key}": kind for name, kind in kinds.items() for key in _TYPES[kind]}
    whole = max(kinds.values(), key=[*_TYPES].index)
    general = {"version": "1.0.0", "model_quant_type": whole, "group_size": 0, "metadata": {}, "optional": {}}
    return {"quant_model_description.json": as_json("description", {**told, **general}), **parts.configs()}


def _type(name: str, spec: LayerSpec, *, mix: bool) -> str:
    weight, inputs = spec.weight, spec.inputs
    if weight.bits != 8:
        found, wanted = f"int{weight.bits} weights: no loader has a dense layer for them", "weights of type 'int8'"
    elif not weight.symmetric:
        # The format subtracts the offset of a weight, and the operator adds it.
        found = "asymmetric weights: format and loaders disagree on the sign of their offset"
        wanted = "symmetric weights"
    elif weight.strategy == "group":
        found, wanted = (
            "weights in groups: loaders read one scale for each channel",
            "strategy 'channel' or 'tensor'",
        )
    elif inputs is None or inputs.strategy == "tensor":
        return "W8A16" if inputs is None else "W8A8_MIX" if mix else "W8A8"
    elif inputs.symmetric:
        return "W8A8_DYNAMIC"
    else:
        found = "asymmetric inputs by token: the loaders quantize tokens symmetrically"
        wanted = "symmetric inputs or strategy 'tensor'"
    raise refusal(f"layer {name!r}", found, f"{wanted}, {_OTHER}")


def _static(name: str, layer: QuantizedLinear, bias: Tensor | None) -> str:
    """Refuse a static layer that loaders would misread; return what layers that are computed as one have to share."""
    solved, dtype = layer.solution, layer.layout.dtype
    static = solved.static
    assert static is not None
    deq, total = _integer(solved.weight, static, bias, dtype)
    if dtype not in (torch.bfloat16, torch.float16):
        found = f"static inputs of a model in {dtype}, which loaders cast"
        wanted = "the model in bfloat16 or float16, for example model.to(torch.bfloat16)"
    elif not bool((torch.isfinite(deq) & (deq != 0)).all()):
        found, wanted = f"scales too small for {dtype}, in which loaders hold them", "a model in bfloat16"
    elif bool((total != total.to(torch.int32)).any()):
        found, wanted = "a bias too large for int32 beside its scales", "the layer in skip_layers"
    else:
        zero = 0 if static.zero_point is None else int(static.zero_point)
        return f" of input scale {float(static.scale):.9g} and offset {zero}"
    raise refusal(f"layer {name!r}", found, f"{wanted}, or inputs with strategy 'token'")
