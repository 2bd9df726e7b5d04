"""Checkpoints of compressed-tensors, read by transformers: a program that knows nothing of this library."""

import itertools
import json
import os
import re
import sys

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM

import quantize as qz
from quantize.core import affine, dequantize, fake_quantize, linear
from tests.models import TENSOR, TOKEN, WEIGHTS, config, filled, generator, mlp, randn
from tests.zoo import experts

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# What transformers says where asymmetric weights are dequantized on loading: see test_transformers_loads_the_model.
OVERWRITTEN = "ignore:You passed `quantization_config` or equivalent parameters:UserWarning"
IDS = torch.arange(64).mul(37).remainder(128).view(4, 16)


def weights(bits, symmetric, strategy, size=None):
    given = {"type": f"int{bits}", "symmetric": symmetric, "strategy": strategy}
    return given if size is None else {**given, "group_size": size}


def named(w, inputs=None):
    entered = "" if inputs is None else f"-{inputs['strategy']}-{inputs['symmetric']}"
    return f"{w['type']}-{w['strategy']}{w.get('group_size', '')}-{w['symmetric']}{entered}"


GRIDS = [("tensor", None), ("channel", None), ("group", 32), ("group", 64), ("group", 128)]
INPUTS = [None, TENSOR, {**TENSOR, "symmetric": False}, TOKEN, {**TOKEN, "symmetric": False}]
# All that a config may ask for: groups stand alone.
PRODUCT = {
    named(w, i): (w, i)
    for b, y, g, i in itertools.product((4, 8), (True, False), GRIDS, INPUTS)
    for w in [weights(b, y, *g)]
    if i is None or "group_size" not in w
}
BOTH = ("compressed-tensors", "ascendv1")
ALL = (*BOTH, "ascendv1-mix")


def reason(form, w, inputs):
    """Why no loader of the format has a layer of such weights and inputs, for a model in bfloat16; None: one has."""
    int4, by = w["type"] == "int4", inputs and inputs["strategy"]
    if form == "compressed-tensors":
        found = {
            "asymmetric weights with quantized inputs": inputs is not None and not w["symmetric"],
            "int4 weights with static inputs": int4 and by == "tensor",
        }
    else:
        found = {
            "int4 weights": int4,
            "asymmetric weights": not w["symmetric"],
            "weights in groups": "group_size" in w,
            "asymmetric inputs by token": by == "token" and not inputs["symmetric"],
        }
    return next((words for words, so in found.items() if so), None)


SCHEMES = {name: given for name, given in PRODUCT.items() if not reason(BOTH[0], *given)}


def llama(dtype=torch.float32, *, tied=False, blocks=2, sizes=(128, 192)):
    """Biases in attention, and a head that reads the embedding of the current token back."""
    given = LlamaConfig(
        vocab_size=128, hidden_size=sizes[0], intermediate_size=sizes[1], num_hidden_layers=blocks,
        num_attention_heads=4, num_key_value_heads=2, attention_bias=True, tie_word_embeddings=tied, bos_token_id=1,
        eos_token_id=None,
    )  # fmt: skip
    model, source = LlamaForCausalLM(given), generator(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=source)
            p.copy_(1 + noise / 8 if "norm" in name else noise / 8 if p.ndim == 1 else noise / p.shape[1] ** 0.5)
        model.model.embed_tokens.weight.mul_(8)
        if not tied:
            model.lm_head.weight.add_(model.model.embed_tokens.weight.roll(1, 0) / 3)
    # Not the frequencies of the positions, which loaders keep in float32.
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model.eval()


def converted(w=WEIGHTS, inputs=None, dtype=torch.float32, *, algorithm="minmax", skip=("embed",), **shape):
    model = llama(dtype, **shape)
    qz.quantize(model, config(algorithm, weights=w, inputs=inputs, skip_layers=skip))
    with torch.no_grad():
        model(IDS)
    qz.convert(model, kernel="reference")
    return model


def quantized(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, qz.QuantizedLinear)}


def listed(path):
    return sorted(entry.name for entry in path.iterdir())


def exported(model, path, form="compressed-tensors"):
    qz.export(model, path, format=form)
    return path


def loaded(path, symmetric=True):
    # Left compressed, transformers 5.24 gives packed zero points the shape of unpacked ones, and refuses every
    # checkpoint that has them, whoever wrote it; dequantized on loading they are read as they should be.
    how = {} if symmetric else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **how)
    assert not any(info.values()), info
    # The first call decompresses the weights.
    with torch.no_grad():
        model(IDS)
    return model


def moved(v, d):
    """By how many whole numbers rounding may differ, where ``v`` is known up to ``d``."""
    return torch.maximum((v + d).round() - v.round(), v.round() - (v - d).round())


def weight_change(layer):
    """How far a loaded weight may be from ours, relative to it.

    float32: the same product of the same numbers. Else theirs is ``k s (1 + a)(1 + b)``, from the rounded scale and
    the product, and ours ``k s (1 + c)(1 + d)``, from the product in float32 and the weight in the dtype of the model.
    """
    dtype = layer.layout.dtype
    u = torch.finfo(dtype).eps / 2
    return 0.0 if dtype == torch.float32 else (1 + u) ** 2 - 1 + u + 2.0**-23


def input_change(layer, x):
    """How far quantized inputs ``[t, c]`` may be from ours, ``[t, c]``, and ours.

    compressed-tensors computes scale, quotient, sum and product in the dtype of ``x``, with unit roundoff ``u``.
    With ``rho`` for the relative difference of the scales, a quotient ``v`` moves by ``|v| (rho + 2 u)``, and
    asymmetric by another ``256 u`` in the sum with the zero point; a zero point of a token's own moves likewise.
    Clipping brings nothing further apart than it was, up to the move of the zero point. A code is worth one scale.
    """
    s, u = layer.solution, torch.finfo(x.dtype).eps / 2
    p = linear.input_params(x, s.inputs, s.static)
    ours = fake_quantize(x.double(), p, s.inputs)
    # Static: the scale is rounded. By token: symmetric, theirs is absmax / 127.5, and ours absmax / 127 or / 128;
    # asymmetric, the same expression.
    rho = u if s.static else 4 * u + (0.5 / 127 if s.inputs.symmetric else 0)
    scale, shift = p.scale.double(), 0.0
    v = x.double() / scale
    spread = v.abs() * (rho + 2 * u)
    if not s.inputs.symmetric:
        spread = spread + 256 * u
        if s.static is None:
            low, _ = affine.group_ranges(x.double(), s.inputs)
            shift = moved(-128 - low / scale, torch.tensor(256 * (rho + 3 * u)))
    return scale * (1 + rho) * (moved(v, spread) + shift) + ours.abs() * (rho + 2 * u), ours


def output_bound(layer, x):
    """How far the output ``[t, n]`` of a loaded layer may be from ours, for the same input ``[t, c]``.

    What inputs and weights move, and the roundings: of both sides' operands, outputs and biases to the dtype of the
    model (5 u), and of two sums of ``c`` products and scales in float32 (2 (c + 8) v).
    """
    s, u, v, c = layer.solution, torch.finfo(x.dtype).eps / 2, 2.0**-24, x.shape[1]
    change, entered = (torch.zeros(()), x.double()) if s.inputs is None else input_change(layer, x)
    reach, r = dequantize(s.weight).double().abs(), weight_change(layer)
    m = (entered.abs() + change) @ (reach.T * (1 + r)) + (0 if layer.bias is None else layer.bias.double().abs())
    spread = change.expand_as(x).double() @ (reach.T * (1 + r)) + entered.abs() @ reach.T * r
    return spread + (5 * u + 2 * (c + 8) * v) * m


def run(model):
    """The hidden states after the last block, and the inputs and outputs of the quantized layers by name."""
    calls = {}

    def keep(name):
        return lambda _module, args, y: calls.update({name: (args[0].flatten(0, -2), y.flatten(0, -2))})

    handles = [layer.register_forward_hook(keep(name)) for name, layer in quantized(model).items()]
    hidden = model(IDS, output_hidden_states=True).hidden_states[-1]
    for handle in handles:
        handle.remove()
    return hidden, calls


@torch.no_grad()
def assert_loaded(model, theirs):
    """``theirs`` is the checkpoint of ``model``; afterwards it holds the quantized layers of ``model``.

    No bound is put on the output of the whole model: where a layer moves by a rounding error, an input of the next may
    take another code. Each layer is compared for the inputs that ours saw, and the model around the layers is compared
    with the very same layers in it: then all is equal, to the last bit.
    """
    layers, dtype = quantized(model), model.dtype
    assert layers
    assert theirs.dtype == dtype
    # The sums of a matmul may depend on where a tensor begins: those of a file begin anywhere.
    for tensor in (*theirs.parameters(), *theirs.buffers()):
        tensor.data = tensor.data.clone()
    hidden, calls = run(model)
    for name, layer in layers.items():
        other, s, (x, y) = theirs.get_submodule(name), layer.solution, calls[name]
        # The same codes, and the scale in the dtype of the model: the weight is known bit for bit.
        k = affine.to_groups(s.weight.codes, s.weight.scheme).to(dtype)
        zero = 0 if s.weight.zero_point is None else s.weight.zero_point[..., None].to(dtype)
        expected = (k - zero) * s.weight.scale[..., None].to(dtype)
        assert torch.equal(other.weight, affine.from_groups(expected, s.weight.scheme, s.weight.codes.shape)), name
        assert ((other.weight - layer.weight).double().abs() <= weight_change(layer) * layer.weight.abs()).all()
        if s.static is not None:
            assert torch.equal(other.input_scale, s.static.scale[0].to(dtype))
            if s.static.zero_point is not None:
                assert torch.equal(other.input_zero_point.to(torch.int8), s.static.zero_point[0])
        # By token, it takes the first two axes of its input for those of tokens.
        assert ((other(x[None])[0] - y).double().abs() <= output_bound(layer, x)).all(), name
    rest = {key: t for key, t in model.state_dict().items() if key.rpartition(".")[0] not in layers}
    assert rest
    for key, tensor in rest.items():
        assert torch.equal(theirs.state_dict()[key], tensor), key
    for name, layer in layers.items():
        theirs.set_submodule(name, layer)
    assert torch.equal(run(theirs)[0], hidden)


@pytest.mark.filterwarnings(OVERWRITTEN)
@DTYPES
@pytest.mark.parametrize(("w", "inputs"), SCHEMES.values(), ids=SCHEMES.keys())
def test_transformers_loads_the_model(w, inputs, dtype, tmp_path):
    # Groups of 128 are for wider layers.
    sizes = {"sizes": (256, 256)} if w.get("group_size") == 128 else {}
    model = converted(w, inputs, dtype, blocks=1, **sizes)
    assert_loaded(model, loaded(exported(model, tmp_path / "out"), w["symmetric"]))


def test_a_loaded_model_goes_on_with_a_text(tmp_path):
    model = converted(inputs=TOKEN)
    theirs = loaded(exported(model, tmp_path / "out"))
    prompts = IDS[:, :5]

    def told(each):
        return each.generate(prompts, max_new_tokens=6, do_sample=False).tolist()

    assert [len(text) for text in told(theirs)] == [11] * len(prompts)
    assert_loaded(model, theirs)
    assert told(theirs) == told(model)


@pytest.mark.parametrize(
    ("algorithm", "w", "inputs"),
    [("awq", weights(4, True, "group", 32), None), ("smoothquant", WEIGHTS, {**TENSOR, "symmetric": False})],
    ids=["awq", "smoothquant"],
)
def test_folded_smoothing_is_in_the_checkpoint(algorithm, w, inputs, tmp_path):
    model = converted(w, inputs, algorithm={algorithm: {"fold": True}}, skip=("embed", "head", "o_proj"))
    theirs = loaded(exported(model, tmp_path / "out"))
    assert_loaded(model, theirs)
    # What smooths the inputs of q, k, v and of gate and up; awq may find that nothing is best.
    norms = [f"model.layers.{i}.{name}_layernorm.weight" for i in (0, 1) for name in ("input", "post_attention")]
    assert not all(torch.equal(theirs.get_parameter(name), llama().get_parameter(name)) for name in norms)


def settings(path):
    return json.loads((path / "config.json").read_text())


def test_the_config_is_that_of_the_model_and_says_what_stays_float(tmp_path):
    model = converted(weights(4, True, "group", 32), dtype=torch.bfloat16, skip=("embed", "head", "o_proj"))
    model.config.name_or_path = "/home/somebody/model"
    told = settings(exported(model, tmp_path / "out"))
    assert told["architectures"] == ["LlamaForCausalLM"]
    assert told["dtype"] == "bfloat16"
    assert told["hidden_size"] == 128
    assert "somebody" not in json.dumps(told)
    quantization = told["quantization_config"]
    assert quantization["format"] == "pack-quantized"
    assert quantization["ignore"] == [
        *(f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)),
        "lm_head",
    ]
    (group,) = quantization["config_groups"].values()
    assert group["targets"] == list(quantized(model))
    assert group["weights"]["group_size"] == 32
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["bos_token_id"] == 1
    theirs = loaded(tmp_path / "out")
    assert theirs.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(theirs.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("skip", [("embed",), ("embed", "head")], ids=["head quantized", "head float"])
def test_tied_weights_are_written_once_and_a_quantized_head_is_tied_no_more(skip, tmp_path):
    model = converted(tied=True, skip=skip)
    path = exported(model, tmp_path / "out")
    held = load_file(path / "model.safetensors")
    float_head = len(skip) == 2
    assert "lm_head.weight" not in held
    assert ("lm_head.weight_packed" in held) is not float_head
    assert settings(path)["tie_word_embeddings"] is float_head
    (group,) = settings(path)["quantization_config"]["config_groups"].values()
    assert group["targets"] == list(quantized(model))
    assert ("lm_head" in group["targets"]) is not float_head
    theirs = loaded(path)
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) is float_head
    assert_loaded(model, theirs)


def mixed(dtype=torch.float32, *, inputs=None, make=llama, skip=("embed", "head"), w=WEIGHTS, **patterns):
    """A converted model with the formats of ``patterns``, whose keys have no star: ``k_proj.inputs``."""
    model = make(dtype)
    given = config("minmax", weights=w, inputs=inputs, skip_layers=skip)
    given["quant_cfg"] |= {f"*{key}": value for key, value in patterns.items()}
    qz.quantize(model, given)
    with torch.no_grad():
        model(IDS % 96)
    qz.convert(model, kernel="reference")
    return model


INT4, OFF = weights(4, True, "group", 64), {"enable_quant": False}


@pytest.mark.filterwarnings(OVERWRITTEN)
@DTYPES
def test_layers_of_different_formats_are_groups_of_names(dtype, tmp_path):
    model = mixed(dtype, inputs=TENSOR, **{
        "gate_proj.inputs": TOKEN, "up_proj.inputs": TOKEN, "down_proj.inputs": OFF, "down_proj.weights": INT4,
        "gate_proj.weights": weights(4, True, "tensor"), "up_proj.weights": weights(4, True, "channel"),
        # Written as the same format as by channel.
        "k_proj.weights": weights(8, True, "tensor"),
    })  # fmt: skip
    path = exported(model, tmp_path / "out")
    quantization = settings(path)["quantization_config"]
    assert quantization["format"] == "mixed-precision"
    assert quantization["ignore"] == ["lm_head"]
    found = {tuple(sorted({name.rpartition(".")[2] for name in group["targets"]})): group["format"]
             for group in quantization["config_groups"].values()}  # fmt: skip
    assert found == {
        ("k_proj", "o_proj", "q_proj", "v_proj"): "int-quantized",
        ("gate_proj", "up_proj"): "int-quantized",
        ("down_proj",): "pack-quantized",
    }
    named = [name for group in quantization["config_groups"].values() for name in group["targets"]]
    assert sorted(named) == sorted(quantized(model))
    assert_loaded(model, loaded(path))


def tiny(kind):
    return lambda dtype: experts.made(kind, dtype)


ASYMMETRIC = {**TENSOR, "symmetric": False}
# What is asked for, and the two layers that a loader cannot compute as one, by the ends of their names.
APART = {
    "skipped": ({"skip": ("embed", "head", "k_proj")}, "q_proj", "k_proj"),
    "layers skipped": ({"skip": ("embed", "head", "1.mlp.up_proj")}, "layers.1.mlp.gate_proj", "1.mlp.up_proj"),
    "inputs": ({"inputs": TENSOR, "up_proj.inputs": TOKEN}, "gate_proj", "up_proj"),
    "no inputs": ({"inputs": TOKEN, "v_proj.inputs": OFF}, "q_proj", "v_proj"),
    # Of one type in ascendv1, but with different scales.
    "static": ({"inputs": TENSOR, "k_proj.inputs": ASYMMETRIC}, "q_proj", "k_proj"),
    "experts": ({"make": tiny("qwen3_moe"), "inputs": TOKEN, "skip": ("head", "experts.1.")}, "0.gate_proj", "1.gate_"),
    "expert": ({"make": tiny("qwen3_moe"), "inputs": TOKEN, "skip": ("head", "experts.1.down")}, "0.gate_", "1.down_"),
    "mixtral": ({"make": tiny("mixtral"), "inputs": TOKEN, "skip": ("head", "experts.2.")}, "0.gate_proj", "2.gate_"),
    "latent": ({"make": tiny("deepseek_v3"), "inputs": TOKEN, "skip": ("head", "kv_", "experts")}, "q_a_", "kv_a_"),
}


@pytest.mark.filterwarnings("ignore:.*stay in floating point", "ignore:fewer than")
@pytest.mark.parametrize(("given", "one", "other"), APART.values(), ids=APART.keys())
def test_layers_that_loaders_compute_as_one_have_one_format(given, one, other, tmp_path):
    model = mixed(torch.bfloat16, **given)
    for form in ALL:
        found = rf"layers '[^']*{one}[^']*', '[^']*{other}[^']*': .* and .*, but loaders compute these layers as one"
        with pytest.raises(qz.QuantizeError, match=f"^{found}; accepted: one format for .*, or all in skip_layers$"):
            exported(model, tmp_path / "out", form)
        assert not listed(tmp_path)


def test_formats_of_weights_that_differ_are_apart_too(tmp_path):
    model = mixed(**{"gate_proj.weights": INT4})
    found = "int4 group 64 symmetric weights, float inputs and int8 channel symmetric weights, float inputs"
    with pytest.raises(qz.QuantizeError, match=f"gate_proj', .*up_proj': {found}, .*one format for gate_proj, up_proj"):
        exported(model, tmp_path / "out")
    assert not listed(tmp_path)


def flat(w, inputs, dtype=torch.bfloat16):
    model = mlp(c=256, hidden=256).to(dtype)
    qz.quantize(model, config(weights=w, inputs=inputs))
    with torch.no_grad():
        model(randn(16, 256, dtype=dtype))
    qz.convert(model, kernel="reference")
    return model


@pytest.mark.parametrize(("w", "inputs"), PRODUCT.values(), ids=PRODUCT.keys())
def test_every_format_is_held_or_refused_in_one_sentence(w, inputs, tmp_path):
    """What is held is read where the loaders are: above, and in ``test_export_ascend.py``."""
    model = flat(w, inputs)
    for form in ALL:
        path = tmp_path / form
        told = reason(form, w, inputs)
        if told is None:
            exported(model, path, form)
            continue
        with pytest.raises(qz.QuantizeError) as caught:
            exported(model, path, form)
        assert re.fullmatch(rf"layer '0': {told}[:,] [^;.]*; accepted: [^;.]*", str(caught.value)), caught.value
        assert not path.exists()


def test_the_formats_are_all_that_there_are():
    assert len(PRODUCT) == 2 * 2 * (5 + 2 * 4)
    refused = {form: sum(reason(form, *given) is not None for given in PRODUCT.values()) for form in ALL}
    # compressed-tensors: with inputs, zero points of weights, or int4 with static ones.
    assert refused == {ALL[0]: 2 * 2 * 4 + 2 * 2, ALL[1]: 52 - 2 * 4, ALL[2]: 52 - 2 * 4}


@pytest.mark.parametrize("algorithm", ["gptq", "awq"])
@pytest.mark.parametrize("w", [weights(4, True, "group", 32), WEIGHTS], ids=["int4", "int8"])
def test_negative_scales_are_read_as_they_are(w, algorithm, tmp_path):
    folded = {"awq": {"fold": True}} if algorithm == "awq" else algorithm
    model = converted(w, algorithm=folded, skip=("embed", "head", "o_proj"), blocks=1)
    path = exported(model, tmp_path / "out")
    held, negative = load_file(path / "model.safetensors"), 0
    (group,) = settings(path)["quantization_config"]["config_groups"].values()
    scheme = QuantizationScheme(**group)
    for name, layer in quantized(model).items():
        own = {key.rpartition(".")[2]: t for key, t in held.items() if key.startswith(f"{name}.")}
        weight = PackedQuantizationCompressor.decompress(own, scheme)["weight"]
        # The same product of the same numbers in float32.
        assert torch.equal(weight, dequantize(layer.solution.weight)), name
        negative += int((layer.solution.weight.scale < 0).sum())
    assert negative
    assert_loaded(model, loaded(path))


def test_a_model_without_a_config(tmp_path):
    model = mlp()
    qz.quantize(model, config())
    qz.convert(model)
    path = exported(model, tmp_path / "out")
    assert listed(path) == ["config.json", "model.safetensors"]
    held = load_file(path / "model.safetensors")
    assert held["0.weight_shape"].tolist() == [96, 64]
    assert torch.equal(held["0.bias"], model[0].bias)


class Others(nn.Module):
    """A layer under two names, a buffer that is saved, one that is not, and a layer inside of another kind."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.again = self.first
        self.attention = nn.MultiheadAttention(64, 2)
        self.register_buffer("kept", torch.ones(3))
        self.register_buffer("passing", torch.ones(3), persistent=False)


def test_everything_else_is_written_too(tmp_path):
    model = filled(Others())
    with pytest.warns(qz.QuantizeWarning):
        qz.quantize(model, config())
    qz.convert(model)
    path = exported(model, tmp_path / "out")
    held = load_file(path / "model.safetensors")
    assert settings(path)["quantization_config"]["ignore"] == ["attention.out_proj"]
    for name in ("first", "again"):
        assert {key.rpartition(".")[2] for key in held if key.startswith(name)} == {
            "weight_packed", "weight_scale", "weight_shape", "bias",
        }  # fmt: skip
    assert torch.equal(held["kept"], model.kept)
    assert torch.equal(held["attention.in_proj_weight"], model.attention.in_proj_weight)
    assert "passing" not in held


def smoothed():
    model = mlp()
    qz.quantize(model, config("smoothquant", inputs=TOKEN))
    model(randn(8, 64))
    qz.convert(model)
    return model


def ragged():
    return converted(weights(4, True, "group", 128), skip=("embed", "head", "attn", "gate", "up"))


def big_bias():
    model = mlp(dtype=torch.bfloat16)
    model[0].bias.data.fill_(1e9)
    qz.quantize(model, config(inputs=TENSOR))
    model(randn(8, 64, dtype=torch.bfloat16) / 1e6)
    qz.convert(model)
    return model


def small_inputs():
    model = mlp(dtype=torch.float16)
    qz.quantize(model, config(inputs=TENSOR))
    model(randn(8, 64, dtype=torch.float16) / 2**14)
    qz.convert(model)
    return model


def small_weights():
    model = mlp(dtype=torch.float16)
    model[0].weight.data[3] = 2.0**-20
    qz.quantize(model, config())
    qz.convert(model)
    return model


def calibrating():
    model = mlp()
    qz.quantize(model, config(inputs=TOKEN))
    return model


def with_extra_state():
    class Counter(nn.Module):
        def get_extra_state(self):
            return {"counted": 3}

        def set_extra_state(self, state):
            pass

    model = nn.Sequential(nn.Linear(8, 8), Counter())
    qz.quantize(model, config())
    qz.convert(model)
    return model


def latent():
    return mixed(torch.bfloat16, make=tiny("deepseek_v3"), skip=("head", "experts"), inputs=TOKEN)


def expert():
    return mixed(torch.bfloat16, make=tiny("qwen3_moe"), skip=("head",))


def alone(w, inputs=None):
    return lambda: converted(w, inputs)


REFUSED = {
    "float": (mlp, BOTH, r"model: no converted layer .*; accepted: a model after convert\(model\)"),
    "calibrating": (calibrating, BOTH, r"layer '0': under calibration; accepted: a model after convert\(model\)"),
    "no module": (lambda: 3, BOTH, r"model: 3; accepted: a torch.nn.Module"),
    "smoothing": (smoothed, ALL, r"layer '0': its inputs are smoothed .*'smoothquant': \{'fold': True\}"),
    "extra state": (with_extra_state, BOTH, r"'1._extra_state' in the state: a dict; accepted: tensors only"),
    "ragged": (ragged, BOTH[:1], r"layer 'model.layers.0.mlp.down_proj': in_features 192 in groups of 128"),
    "scale": (small_weights, ALL, r"layer '0': a scale too small for torch.float16, in .*; accepted: a model in bfl"),
    "input scale": (small_inputs, ALL[1:], r"layer '0': scales too small for torch.float16, .*; accepted: a model in"),
    "float32": (alone(WEIGHTS, TENSOR), ALL[1:], r"q_proj': static inputs of a model in torch.float32, .*'token'$"),
    "latent": (latent, ALL[1:], r"kv_b_proj': .* dequantizing them; accepted: 'kv_b_proj' in skip_layers, or format"),
    "experts": (
        expert,
        ALL[1:],
        r"0.gate_proj': an expert of type W8A16, but .*; accepted: .*'token', the experts in",
    ),
    "bias": (big_bias, ALL[1:], r"layer '0': a bias too large for int32.*; accepted: the layer in skip_layers, or"),
}


@pytest.mark.filterwarnings("ignore:.*stay in floating point")
@pytest.mark.parametrize(("make", "forms", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_a_format_cannot_hold_is_refused_before_anything_is_written(make, forms, message, tmp_path):
    model = make()
    for form in forms:
        with pytest.raises(qz.QuantizeError, match=message):
            exported(model, tmp_path / "out", form)
        assert not listed(tmp_path)


def test_other_words_for_a_format_are_refused(tmp_path):
    for word in ("gguf", None, ["ascendv1"]):
        with pytest.raises(qz.QuantizeError, match=r"format: .*; accepted: one of 'compressed-tensors', 'ascendv1', "):
            exported(smoothed(), tmp_path / "out", word)
    assert not listed(tmp_path)


def write(word, model, path):
    if word == "save":
        qz.save(model, path)
    else:
        qz.export(model, path, format=word)


WORDS = pytest.mark.parametrize("word", [*BOTH, "save"])


def plain():
    model = mlp()
    qz.quantize(model, config())
    qz.convert(model)
    return model


@WORDS
def test_a_directory_with_content_stays_as_it_is(word, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "kept").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name in ("old", "file"):
        with pytest.raises(qz.QuantizeError, match=f"{name}: it has content; accepted: a new or an empty"):
            write(word, plain(), tmp_path / name)
    assert listed(tmp_path) == ["file", "old"]
    assert listed(tmp_path / "old") == ["kept"]


@WORDS
def test_a_missing_parent_is_refused_before_the_model_is_looked_at(word, tmp_path):
    with pytest.raises(qz.QuantizeError, match=r"out: .*new is not a directory .*; accepted: a new .* parent can"):
        write(word, None, tmp_path / "new" / "out")
    assert not listed(tmp_path)


@WORDS
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_are_open_to_those_whom_the_umask_lets_in(mask, word, tmp_path):
    before = os.umask(mask)
    try:
        write(word, plain(), tmp_path / "out")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o666 & ~mask}


@WORDS
def test_an_empty_directory_is_filled(word, tmp_path):
    (tmp_path / "out").mkdir()
    write(word, plain(), tmp_path / "out")
    assert len(listed(tmp_path / "out")) >= (1 if word == "save" else 2)
    assert listed(tmp_path) == ["out"]


@WORDS
@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt()], ids=["OSError", "interrupt"])
@pytest.mark.parametrize("at", ["pathlib.Path.write_text", "os.fsync", "pathlib.Path.replace"])
def test_an_interrupted_write_leaves_nothing(at, error, word, tmp_path, monkeypatch):
    def stop(*_args, **_kwargs):
        assert listed(tmp_path)
        raise error

    model = plain()
    # A model of our own is one file of tensors.
    at = at.replace("pathlib.Path.write_text", "safetensors.torch.save_file") if word == "save" else at
    with monkeypatch.context() as patched:
        patched.setattr(at, stop)
        with pytest.raises(type(error)):
            write(word, model, tmp_path / "out")
    assert not listed(tmp_path)
    write(word, model, tmp_path / "out")


@WORDS
def test_without_safetensors_it_says_what_to_install(word, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    told = r"safetensors: not installed; accepted: .*pip install 'torch-quantize-core\[export\]'"
    with pytest.raises(qz.QuantizeError, match=told):
        write(word, plain(), tmp_path / "out")
    assert not listed(tmp_path)


@WORDS
def test_the_model_stays_as_it_is(word, tmp_path):
    model = plain()
    before = {key: t.clone() for key, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    write(word, model, tmp_path / "out")
    after = model.state_dict()
    assert all(torch.equal(after[key], t) for key, t in before.items())
