"""AscendV1 checkpoints, read by a program of its own: written from the description of the format, in NumPy."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import quantize as qz
from quantize.core import dequantize, fake_quantize, linear
from tests.models import TENSOR, TOKEN, WEIGHTS, config, mlp, randn
from tests.test_export import converted

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
ASYMMETRIC = {**TENSOR, "symmetric": False}


class Reader:
    """Layers of a checkpoint, by name: integers are integers, and all else float64."""

    def __init__(self, path):
        self.kinds = json.loads((path / "quant_model_description.json").read_text())
        held = load_file(path / "quant_model_weights.safetensors")
        self.dtypes = {key: tensor.dtype for key, tensor in held.items()}
        self.held = {key: (t.double() if t.is_floating_point() else t.long()).numpy() for key, t in held.items()}

    def deq_scale(self, name):
        scale = self.held[f"{name}.deq_scale"]
        return scale.astype(np.uint32).view(np.float32).astype(np.float64) if scale.dtype == np.int64 else scale

    def __call__(self, name, x):
        kind, x = self.kinds[f"{name}.weight"], x.double().numpy()
        weight, bias = self.held[f"{name}.weight"], self.held.get(f"{name}.bias", 0.0)
        if kind == "W8A8":
            # Division in float32, as operators divide.
            quotient = (x.astype(np.float32) / self.held[f"{name}.input_scale"].astype(np.float32)).astype(np.float64)
            q = np.clip(np.rint(quotient) + self.held[f"{name}.input_offset"], -128, 127).astype(np.int64)
            return (q @ weight.T + self.held[f"{name}.quant_bias"]) * self.deq_scale(name)
        scale = self.held[f"{name}.weight_scale"]
        assert not self.held[f"{name}.weight_offset"].any()
        if kind == "W8A16":
            return x @ (weight * scale).T + bias
        assert kind == "W8A8_DYNAMIC"
        # In float32 too.
        step = np.abs(x).max(1, keepdims=True).astype(np.float32) / np.float32(127)
        q = np.rint(x.astype(np.float32) / step).astype(np.int64)
        return (q @ weight.T) * step.astype(np.float64) * scale.T + bias


def model_of(inputs, dtype, w=WEIGHTS):
    model = mlp(c=64, hidden=96, out=32, dtype=dtype)
    model[2].bias = None
    qz.quantize(model, config("minmax", weights=w, inputs=inputs))
    with torch.no_grad():
        model(randn(32, 64, dtype=dtype))
    qz.convert(model, kernel="reference")
    return model


@DTYPES
@pytest.mark.parametrize("strategy", ["tensor", "channel"])
@pytest.mark.parametrize("inputs", [None, TENSOR, ASYMMETRIC, TOKEN], ids=["none", "tensor", "asymmetric", "token"])
def test_a_reader_of_the_format_computes_what_we_compute(inputs, strategy, dtype, tmp_path):
    model = model_of(inputs, dtype, {**WEIGHTS, "strategy": strategy})
    qz.export(model, tmp_path / "out", format="ascendv1")
    reader, kind = Reader(tmp_path / "out"), "W8A16" if inputs is None else "W8A8"
    kind += "_DYNAMIC" if inputs is TOKEN else ""
    u, v = torch.finfo(dtype).eps / 2, 2.0**-24
    assert reader.kinds["version"] == "1.0.0"
    assert reader.kinds["model_quant_type"] == kind
    for name in ("0", "2"):
        layer = model.get_submodule(name)
        s, c = layer.solution, layer.in_features
        x = randn(32, c, seed=5, dtype=dtype)
        with torch.no_grad():
            ours = layer(x).double()
        p = None if inputs is None else linear.input_params(x, s.inputs, s.static)
        entered = x.double() if inputs is None else fake_quantize(x.double(), p, s.inputs)
        reach = dequantize(s.weight).double().abs()
        bias = 0 if layer.bias is None else layer.bias.detach().double().abs()
        # Ours rounds once to the dtype of the model, after four steps in float32; alone, weights, product and bias
        # are rounded to it, after a sum of c products in float32.
        bound = (u + 4 * v) * (entered.abs() @ reach.T + bias)
        if inputs is None:
            bound = (4 * u + (c + 8) * v) * (entered.abs() @ reach.T + bias)
        elif s.static is not None:
            # The bias is rounded to half a unit of the integer sum; deq_scale is one product in float32.
            unit = torch.from_numpy(reader.deq_scale(name))
            bound = bound + unit / 2 + v * (ours.abs() + bias)
        else:
            # Both steps are absmax / 127, and the codes the same, but where absmax is that of a negative number: there
            # ours is absmax / 128, and each side is within half a step.
            negative = x.amin(1, keepdim=True) == -x.abs().amax(1, keepdim=True)
            assert 0 < negative.sum() < len(x)
            steps = negative * p.scale.double() * (1 + 128 / 127) / 2
            bound = bound + (steps.expand_as(x) @ reach.T) * (1 + 8 * v)
        difference = (torch.from_numpy(reader(name, x)) - ours).abs()
        assert (difference <= bound).all(), (name, (difference / bound).max())
        held = {key.split(".")[1]: reader.kinds[key] for key in reader.held if key.startswith(name)}
        assert held.pop("bias", "FLOAT") == "FLOAT"
        parts = {"W8A8": ("weight", "input_scale", "input_offset", "deq_scale", "quant_bias")}
        assert held == dict.fromkeys(parts.get(kind, ("weight", "weight_scale", "weight_offset")), kind)


@DTYPES
def test_dtypes_and_shapes_are_those_of_the_format(dtype, tmp_path):
    qz.export(model_of(ASYMMETRIC, dtype), tmp_path / "static", format="ascendv1")
    static = Reader(tmp_path / "static")
    deq = torch.float32 if dtype == torch.bfloat16 else torch.int64
    for key, wanted, shape in (
        ("0.weight", torch.int8, (96, 64)),
        ("0.input_scale", torch.float32, (1,)),
        ("0.input_offset", torch.float32, (1,)),
        ("0.deq_scale", deq, (96,)),
        ("0.quant_bias", torch.int32, (96,)),
        ("2.quant_bias", torch.int32, (32,)),
        ("0.bias", dtype, (96,)),
    ):
        assert (static.dtypes[key], static.held[key].shape) == (wanted, shape), key
    for name, inputs in (("alone", None), ("dynamic", TOKEN)):
        qz.export(model_of(inputs, dtype, {**WEIGHTS, "strategy": "tensor"}), tmp_path / name, format="ascendv1")
        reader = Reader(tmp_path / name)
        for key in ("0.weight_scale", "0.weight_offset"):
            assert (reader.dtypes[key], reader.held[key].shape) == (torch.float32, (96, 1)), key


def test_every_tensor_has_a_type_and_a_tied_head_too(tmp_path):
    model = converted(WEIGHTS, TOKEN, torch.bfloat16, tied=True, skip=("embed", "head", "gate"))
    qz.export(model, tmp_path / "out", format="ascendv1")
    reader = Reader(tmp_path / "out")
    names = reader.kinds.keys() - {"version", "model_quant_type", "group_size", "metadata", "optional"}
    # Loaders ask for the type of the head by its name, whether it is stored or not.
    assert names == {*reader.held, "lm_head.weight"}
    assert reader.kinds["lm_head.weight"] == reader.kinds["model.layers.0.mlp.gate_proj.weight"] == "FLOAT"
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["tie_word_embeddings"] is True
    assert "quantization_config" not in told


def test_the_type_of_a_mixed_model_is_the_one_that_the_format_ranks_first(tmp_path):
    model = torch.nn.ModuleList([mlp(), mlp()])
    for part, inputs in zip(model, (TOKEN, TENSOR), strict=True):
        qz.quantize(part, config(inputs=inputs))
        part(randn(4, 64))
        qz.convert(part)
    qz.export(model, tmp_path / "out", format="ascendv1")
    kinds = Reader(tmp_path / "out").kinds
    assert (kinds["0.0.weight"], kinds["1.0.weight"]) == ("W8A8_DYNAMIC", "W8A8")
    assert kinds["model_quant_type"] == "W8A8"
