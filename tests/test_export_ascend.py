"""AscendV1 checkpoints, read as vLLM on Ascend reads them, and computed with its operators as they are documented."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import quantize as qz
from quantize.core import dequantize, fake_quantize, linear
from quantize.shell.disk import ascendv1
from tests import ascend
from tests.ascend_loader import Loader, fused
from tests.bounds import V, matmul_bound, unit
from tests.models import TENSOR, TOKEN, WEIGHTS, config, filled, mlp, randn
from tests.test_export import PRODUCT, converted, flat, listed, llama, mixed, moved, quantized, reason
from tests.zoo import experts

pytestmark = pytest.mark.filterwarnings("ignore:.*stay in floating point", "ignore:fewer than 16 tokens")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ASYMMETRIC = {**TENSOR, "symmetric": False}
SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
         "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": None}  # fmt: skip


def cast(model, dtype):
    # Not the frequencies of the positions, which loaders keep in float32.
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model.eval()


MODELS = {
    "llama": lambda dtype: llama(dtype, blocks=1),
    "qwen2": lambda dtype: cast(filled(Qwen2ForCausalLM(Qwen2Config(**SIZES))), dtype),
    "qwen3": lambda dtype: cast(filled(Qwen3ForCausalLM(Qwen3Config(**SIZES))), dtype),
    "qwen3_moe": lambda dtype: experts.made("qwen3_moe", dtype),
    "deepseek_v3": lambda dtype: experts.made("deepseek_v3", dtype),
}
DENSE, MIXTURES = ["llama", "qwen2", "qwen3"], ["qwen3_moe", "deepseek_v3"]
# By name: formats, the types of the layers in attention and of the last in a block, and dtypes.
SCHEMES = {
    "alone": ({}, "W8A16", "W8A16", (BF16, FP16, FP32)),
    "by tensor": ({"w": {**WEIGHTS, "strategy": "tensor"}}, "W8A16", "W8A16", (BF16,)),
    "static": ({"inputs": TENSOR}, "W8A8", "W8A8", (BF16, FP16)),
    "asymmetric": ({"inputs": ASYMMETRIC, "w": {**WEIGHTS, "strategy": "tensor"}}, "W8A8", "W8A8", (BF16, FP16)),
    "token": ({"inputs": TOKEN}, "W8A8_DYNAMIC", "W8A8_DYNAMIC", (BF16, FP16, FP32)),
    "mixed": ({"inputs": TENSOR, "down_proj.inputs": TOKEN}, "W8A8", "W8A8_DYNAMIC", (BF16, FP16)),
    "experts": ({"inputs": ASYMMETRIC, "mlp.*.inputs": TOKEN}, "W8A8", "W8A8_DYNAMIC", (BF16, FP16)),
}
CASES = [
    pytest.param(kind, *SCHEMES[name][:3], dtype, id=f"{kind}-{name}-{str(dtype).removeprefix('torch.')}")
    for kind in MODELS
    for name in (SCHEMES if kind in DENSE else ("token", "experts"))
    for dtype in SCHEMES[name][3]
    if kind == "llama" or name != "by tensor"
]


def entered(layer, x):
    """What our layer makes of inputs ``[t, c]``, how far a loader's may be from it, and its relative error of a sum."""
    s, u, dtype = layer.solution, unit(x.dtype), x.dtype
    p = linear.input_params(x, s.inputs, s.static)
    ours, scale = fake_quantize(x.double(), p, s.inputs), p.scale.double()
    if s.static is None:
        # Both steps are absmax / 127, and the codes the same, but where absmax is that of a negative number: there ours
        # is absmax / 128, and each side is within half a step. The scale of a weight is rounded to the dtype.
        negative = x.amin(1, keepdim=True) == -x.abs().amax(1, keepdim=True)
        return ours, (negative * scale * (1 + 128 / 127) / 2).expand_as(ours), u
    # Inputs are multiplied with a rounded reciprocal, of which deq_scale knows: a code is worth 1 / r.
    r = (1 / s.static.scale.to(dtype)).double()
    quotient = x.double() / scale
    codes = moved(quotient, quotient.abs() * ((scale * r - 1).abs() + 2 * V) + 2 * V * 256)
    # deq_scale is rounded to float32, or to 10 bits of the mantissa.
    return ours, codes / r + ours.abs() * (1 / (r * scale) - 1).abs(), V if dtype == BF16 else 2.0**-11


def bound(layer, x, deq):
    """How far the output ``[t, n]`` of a loaded layer may be from ours, for the same input ``[t, c]``.

    Inputs and scales as above, and roundings: one of each side to the dtype (2 u), and steps in float32 (8 v). A bias
    in integers is off by half of ``deq`` ``[n]``, of which it is a multiple.
    """
    if layer.solution.inputs is None:
        return matmul_bound(layer, x)
    ours, change, scales = entered(layer, x)
    reach = dequantize(layer.solution.weight).double().abs()
    m = (ours.abs() + change) @ reach.T + (0 if layer.bias is None else layer.bias.double().abs())
    half = 0 if deq is None else deq.double() / 2
    return change @ reach.T + half + (scales + 2 * unit(x.dtype) + 8 * V) * (m + half)


def floats(deq):
    return deq.to(torch.int32).view(torch.float32) if deq is not None and deq.dtype == torch.int64 else deq


@torch.no_grad()
def assert_computes(theirs, layers, seed):
    """``theirs`` is the loader's one layer for all of ``layers``."""
    x = randn(24, layers[0].in_features, seed=seed, dtype=theirs.dtype)
    deq, wide = floats(theirs.p.get("deq_scale") if theirs.kind == "W8A8" else None), theirs(x).double()
    sizes = [layer.out_features for layer in layers]
    parts = [None] * len(layers) if deq is None else deq.split(sizes)
    for layer, y, part in zip(layers, wide.split(sizes, 1), parts, strict=True):
        difference, allowed = (y - layer(x).double()).abs(), bound(layer, x, part)
        assert (difference <= allowed).all(), (layer.row.name, (difference / allowed).max())


@pytest.mark.parametrize(("kind", "given", "attention", "last", "dtype"), CASES)
def test_the_loader_computes_what_we_compute(kind, given, attention, last, dtype, tmp_path):
    model = mixed(dtype, make=MODELS[kind], skip=("embed", "head", "kv_b_proj"), **given)
    qz.export(model, tmp_path / "out", format="ascendv1")
    loader = Loader(tmp_path / "out")
    # Ours for the dtype in which the loader computes.
    layers = quantized(cast(model, loader.dtype))
    assert loader.dtype == (BF16 if dtype == FP32 else dtype)
    mixtures = {name.rpartition(".")[0] for name in layers if ".experts." in name}
    for seed, names in enumerate(fused(name for name in layers if name.rpartition(".")[0] not in mixtures)):
        wanted = last if ("mlp" if "mlp.*.inputs" in given else "down_proj") in names[0] else attention
        assert loader.type(names) == wanted, names
        assert_computes(loader.layer(*names), [layers[name] for name in names], seed)
    for name in mixtures:
        both = (("gate_proj", "up_proj"), ("down_proj",))
        for theirs, parts in zip(loader.expert(name), both, strict=True):
            assert_computes(theirs, [layers[f"{name}.{part}"] for part in parts], 1)
    # All else is as it was.
    assert bool(mixtures) == (kind in MIXTURES)
    for key in loader.held.keys() - loader.read:
        assert loader.types[key] == "FLOAT"
        assert torch.equal(loader.held[key], model.state_dict()[key]) or dtype == FP32, key
    assert loader.types["model_quant_type"] == ("W8A8" if "W8A8" in (attention, last) else attention)
    assert {key for key, t in loader.held.items() if key.endswith(".bias") and t.dtype != FP32} == set()


HELD = {name: given for name, given in PRODUCT.items() if not reason("ascendv1", *given)}


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("w", "inputs"), HELD.values(), ids=HELD.keys())
def test_every_format_that_is_held_is_computed(w, inputs, dtype, tmp_path):
    model = flat(w, inputs, dtype)
    for form, decodes in (("ascendv1", False), ("ascendv1-mix", True)):
        qz.export(model, tmp_path / form, format=form)
        loader = Loader(tmp_path / form, dtype, decodes=decodes)
        for name, layer in quantized(model).items():
            assert_computes(loader.layer(name), [layer], 0)


# As the format lists them; a bias beside them is in floating point.
MIX = {"weight", "weight_scale", "weight_offset", "input_scale", "input_offset", "deq_scale", "quant_bias"}


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("kind", [*DENSE, "qwen3_moe"])
@pytest.mark.parametrize("inputs", [TENSOR, ASYMMETRIC], ids=["symmetric", "asymmetric"])
def test_a_mixed_layer_is_static_where_the_loader_decodes_and_by_token_elsewhere(inputs, kind, dtype, tmp_path):
    rest = {"make": MODELS[kind], "down_proj.inputs": TOKEN, **({"mlp.*.inputs": TOKEN} if kind in MIXTURES else {})}
    model = mixed(dtype, inputs=inputs, **rest)
    # The same weights: rounding looks at no inputs.
    tokens = mixed(dtype, inputs=TOKEN, make=MODELS[kind])
    qz.export(model, tmp_path / "out", format="ascendv1-mix")
    count = 0
    for decodes, ours in ((True, quantized(model)), (False, quantized(tokens))):
        loader = Loader(tmp_path / "out", decodes=decodes)
        assert loader.types["model_quant_type"] == "W8A8_MIX"
        for seed, names in enumerate(fused(name for name in ours if ".experts." not in name)):
            dynamic = "down_proj" in names[0] or (kind in MIXTURES and "mlp" in names[0])
            assert loader.type(names) == ("W8A8_DYNAMIC" if dynamic else "W8A8_MIX"), names
            assert_computes(loader.layer(*names), [ours[name] for name in names], seed)
            for name in names if not dynamic else ():
                told = {key.removeprefix(f"{name}."): value for key, value in loader.types.items()
                        if key.startswith(f"{name}.")}  # fmt: skip
                assert told == dict.fromkeys(MIX, "W8A8_MIX") | ({"bias": "FLOAT"} if "bias" in told else {})
                assert {f"{name}.{key}" for key in told} <= loader.held.keys()
                count += "bias" in told
        for name in {name.rpartition(".")[0] for name in ours if ".experts." in name}:
            for theirs, parts in zip(loader.expert(name), (("gate_proj", "up_proj"), ("down_proj",)), strict=True):
                assert_computes(theirs, [ours[f"{name}.{part}"] for part in parts], 1)
    # Qwen2 has them for q, k and v, our Llama for all of attention.
    assert (count > 0) == (kind in ("llama", "qwen2"))


def test_fused_layers_of_the_families_are_fused():
    names = [f"a.{key}" for key in ("q_proj", "o_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa")]
    assert fused(names) == [["a.q_proj", "a.k_proj", "a.v_proj"], ["a.o_proj"], ["a.q_a_proj", "a.kv_a_proj_with_mqa"]]


def test_the_loader_refuses_what_it_cannot_read(tmp_path):
    model = mixed(BF16, inputs=TENSOR, make=MODELS["llama"])
    qz.export(model, tmp_path / "out", format="ascendv1")
    block = "model.layers.0"
    together = [f"{block}.self_attn.{key}_proj" for key in "qkv"]
    for key, error in (("types", ValueError), ("held", AssertionError)):
        loader = Loader(tmp_path / "out")
        if key == "types":
            loader.types[f"{together[1]}.weight"] = "W8A8_DYNAMIC"
        else:
            loader.held[f"{together[1]}.input_scale"] = torch.ones(2)
        with pytest.raises(error):
            loader.layer(*together)
    loader = Loader(tmp_path / "out")
    del loader.types[f"{block}.mlp.up_proj.weight"]
    with pytest.raises(KeyError):
        loader.layer(f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj")
    del loader.held[f"{block}.mlp.down_proj.input_offset"]
    with pytest.raises(AssertionError, match="input_offset is not in the checkpoint"):
        loader.layer(f"{block}.mlp.down_proj")
    # Bits that are taken for numbers, as those of a model in float32 would be.
    name = f"{block}.self_attn.o_proj"
    bits = loader.held[f"{name}.deq_scale"].view(torch.int32).to(torch.int64)
    loader.held[f"{name}.deq_scale"] = bits
    with pytest.raises(AssertionError):
        assert_computes(loader.layer(name), [quantized(model)[name]], 0)


def static_of(high, c=64):
    """A layer for inputs up to ``high``, with weights of the code 127 alone, so that they are exact."""
    model = torch.nn.Sequential(torch.nn.Linear(c, 8, bias=False)).bfloat16()
    model[0].weight.data.fill_(1)
    qz.quantize(model, config(inputs=TENSOR))
    with torch.no_grad():
        model(torch.full((1, c), high, dtype=BF16))
    qz.convert(model, kernel="reference")
    return model


def test_deq_scale_knows_how_the_loader_rounds_the_scale_of_inputs(tmp_path):
    """The gain over ``input_scale weight_scale``, before the output is rounded, as derived.

    The loader multiplies with ``r``, and a code is ``x r + e``. Then, for one ``x`` in all places::

        deq sum q w - sum x w = deq sum e w                       if deq = weight_scale / r
        deq sum q w - sum x w = deq sum e w + (s r - 1) sum x w   if deq = weight_scale s

    so that the second is the greater by far where ``e`` is small, and ``s r``, both rounded, is not 1.
    """
    proven = 0
    for step in range(16):
        # Inputs are exact in bfloat16, which has 8 bits.
        high = 128.0 + 8 * step
        model, path = static_of(high), tmp_path / str(step)
        qz.export(model, path, format="ascendv1")
        p, s = Loader(path, BF16).layer("0").p, model[0].solution
        reciprocal, scale, weight = 1 / p["input_scale"], s.static.scale.item(), s.weight.scale[0].item()
        r = reciprocal.double().item()
        grid = torch.arange(64, int(high)).to(BF16)
        residual = (grid.double() * r - (grid.double() * r).round()).abs()
        x = grid[residual.argmin()].repeat(64)
        codes = ascend.quantize(x[None], reciprocal.repeat(64), torch.zeros(64, dtype=BF16), ascend._QINT8, -1, False)
        total, exact = 127.0 * codes.sum().item(), 127.0 * x.double().sum().item() * weight
        new, old = (abs(total * deq - exact) for deq in (p["deq_scale"][0].item(), scale * weight))
        # Products in float32: x r, and deq_scale.
        allowed = residual.min().item() * 127 * 64 * weight / r + 4 * V * exact
        factor = abs(scale * r - 1) * exact
        assert new <= allowed
        # s / (1 / r) is at most 1 + 2^-7.
        assert old >= factor * (1 - 2 * V) - (1 + 2.0**-7) * allowed
        if factor > 4 * allowed:
            proven += 1
            assert old > 2 * new
    assert proven


def test_deq_scale_has_the_bits_that_the_operator_reads(tmp_path):
    model = mlp(dtype=FP16)
    qz.quantize(model, config(inputs=TENSOR))
    model(randn(16, 64, dtype=FP16))
    qz.convert(model)
    qz.export(model, tmp_path / "out", format="ascendv1")
    loader = Loader(tmp_path / "out", FP16)
    better = 0
    for name in ("0", "2"):
        s = model.get_submodule(name).solution
        exact = (s.weight.scale.double() / (1 / s.static.scale.to(FP16)).double())[:, 0]
        written, bits = floats(loader.held[f"{name}.deq_scale"]), exact.float().numpy().view(np.uint32)
        cut = torch.from_numpy((bits & np.uint32(0xFFFFE000)).view(np.float32))
        mask = torch.from_numpy((written.numpy().view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32))
        assert torch.equal(mask, written)
        off, before = (written.double() - exact).abs(), (cut.double() - exact).abs()
        # Half of the last of 10 bits; and never farther than what is cut.
        assert (off <= 2.0**-11 * exact).all()
        assert (off <= before).all()
        better += int((off < before).sum())
    assert better


def test_dtypes_and_shapes_are_those_of_the_format(tmp_path):
    for dtype, deq in ((BF16, FP32), (FP16, torch.int64)):
        model = mlp(dtype=dtype)
        qz.quantize(model, config(inputs=ASYMMETRIC))
        model(randn(32, 64, dtype=dtype))
        qz.convert(model)
        qz.export(model, tmp_path / str(dtype), format="ascendv1")
        held = load_file(tmp_path / str(dtype) / "quant_model_weights.safetensors")
        for key, wanted, shape in (
            ("0.weight", torch.int8, (96, 64)),
            ("0.input_scale", FP32, (1,)),
            ("0.input_offset", FP32, (1,)),
            ("0.deq_scale", deq, (96,)),
            ("0.quant_bias", torch.int32, (96,)),
            ("0.bias", FP32, (96,)),
        ):
            assert (held[key].dtype, tuple(held[key].shape)) == (wanted, shape), key


def test_every_tensor_has_a_type_and_a_tied_head_too(tmp_path):
    model = converted(WEIGHTS, TOKEN, BF16, tied=True, skip=("embed", "head", "o_proj"))
    qz.export(model, tmp_path / "out", format="ascendv1")
    loader = Loader(tmp_path / "out")
    names = loader.types.keys() - {"version", "model_quant_type", "group_size", "metadata", "optional"}
    # Loaders ask for the type of the head by its name, whether it is stored or not.
    assert names == {*loader.held, "lm_head.weight"}
    assert loader.types["lm_head.weight"] == loader.types["model.layers.0.self_attn.o_proj.weight"] == "FLOAT"
    assert loader.types["model.layers.0.self_attn.q_proj.bias"] == "FLOAT"
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["tie_word_embeddings"] is True
    assert "quantization_config" not in told


def test_parts_are_of_four_gibibytes_and_have_the_names_of_the_format(tmp_path, monkeypatch):
    assert ascendv1.LIMIT == 4 * 2**30
    monkeypatch.setattr(ascendv1, "LIMIT", 40_000)
    model = converted(WEIGHTS, TOKEN, BF16)
    qz.export(model, tmp_path / "out", format="ascendv1")
    stem, files = "quant_model_weights", listed(tmp_path / "out")
    parts = [file for file in files if file.endswith(".safetensors")]
    assert len(parts) > 1
    assert parts == [f"{stem}-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    assert {*files} - {*parts} == {
        "config.json", "generation_config.json", "quant_model_description.json", f"{stem}.safetensors.index.json",
    }  # fmt: skip
    where = json.loads((tmp_path / "out" / f"{stem}.safetensors.index.json").read_text())["weight_map"]
    assert where.keys() == Loader(tmp_path / "out").held.keys()
    qz.export(model, tmp_path / "one", format="ascendv1", max_shard_size="1GB")
    assert f"{stem}.safetensors" in listed(tmp_path / "one")
