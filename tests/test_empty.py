"""Converted models of transformers from the meta device, and in shards: bit-equal, and no float weight on the way."""

import copy
import json
import warnings

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import quantize as qz
from quantize.shell.disk import files
from tests.memory import Alive
from tests.models import config, filled, mlp, randn
from tests.test_export import listed

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 160}
SIZES |= {"intermediate_size": 192, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
FEW = {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0]}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
NARROW = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 160, "n_positions": 32}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **FEW)),
    "llama, dynamic": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **FEW, rope_parameters=DYNAMIC)),
    "qwen2, tied": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, **FEW, tie_word_embeddings=True)),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **FEW, **EXPERTS, head_dim=16)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**NARROW, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)),
}
INT4 = {"type": "int4", "symmetric": False, "strategy": "group", "group_size": 32}
IDS = torch.arange(32).view(2, 16)


def converted(family, given, dtype):
    model = filled(FAMILIES[family]()).eval()
    # Not the frequencies of the positions, which loaders keep in float32.
    for p in model.parameters():
        p.data = p.data.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qz.QuantizeWarning)
        qz.quantize(model, {**given, "skip_layers": ["head"] if "tied" in family else []})
    qz.convert(model)
    return model


class Watch(TorchDispatchMode):
    """Remembers of which shapes tensors in floating point were made elsewhere than on the meta device."""

    def __init__(self):
        super().__init__()
        self.made = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.is_floating_point() and not t.is_meta:
                self.made.add(tuple(t.shape))
        return out


def through_state_dict(model, fresh, path):
    qz.convert(fresh, from_state=model.state_dict())


def through_torch_save(model, fresh, path):
    torch.save(model.state_dict(), path)
    qz.convert(fresh, from_state=torch.load(path, weights_only=True))


def through_save(model, fresh, path):
    qz.save(model, path)
    qz.load(fresh, path)


def through_shards(model, fresh, path):
    qz.save(model, path, max_shard_size="20KB")
    assert len(listed(path)) > 5
    qz.load(fresh, path)


@pytest.mark.parametrize("way", [through_state_dict, through_torch_save, through_save, through_shards])
@pytest.mark.parametrize(
    ("given", "dtype"), [(config(), torch.float32), (config(weights=INT4), torch.bfloat16)], ids=["int8", "int4"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_model_becomes_the_converted_one(family, given, dtype, way, tmp_path):
    model = converted(family, given, dtype)
    with torch.device("meta"):
        fresh = FAMILIES[family]().to(dtype).eval()
    with Watch() as watch:
        way(model, fresh, tmp_path / "out")
    layers = [m for m in fresh.modules() if isinstance(m, qz.QuantizedLinear)]
    assert layers
    # The embedding may have the shape of a head.
    others = {tuple(p.shape) for p in fresh.parameters()}
    assert not watch.made & ({(m.out_features, m.in_features) for m in layers} - others)
    with torch.no_grad():
        assert torch.equal(fresh(IDS).logits, model(IDS).logits)
    assert not any(t.is_meta for t in (*fresh.parameters(), *fresh.buffers()))
    assert str(fresh) == str(model)
    # What came back goes on, and no state_dict has other keys for it.
    again = copy.deepcopy(fresh)
    assert again.load_state_dict(model.state_dict()).missing_keys == []
    with torch.device("meta"):
        last = FAMILIES[family]().to(dtype).eval()
    qz.convert(last, from_state=again.state_dict())
    with torch.no_grad():
        assert torch.equal(last(IDS).logits, model(IDS).logits)


def test_a_model_with_data_keeps_its_own_buffers(tmp_path):
    model = converted("llama", config(), torch.float32)
    fresh = FAMILIES["llama"]()
    fresh.model.rotary_emb.inv_freq.mul_(2)
    mine = fresh.model.rotary_emb.inv_freq.clone()
    qz.save(model, tmp_path / "out")
    qz.load(fresh, tmp_path / "out")
    assert torch.equal(fresh.model.rotary_emb.inv_freq, mine)
    # Some of the model is empty, some is not.
    with torch.device("meta"):
        partly = FAMILIES["llama"]()
    partly.model.rotary_emb = copy.deepcopy(fresh.model.rotary_emb)
    qz.load(partly, tmp_path / "out")
    assert torch.equal(partly.model.rotary_emb.inv_freq, mine)


class Sharing(nn.Module):
    """One hidden buffer under two names, which is saved under a third, and one of a part."""

    def __init__(self):
        super().__init__()
        self.layer, self.part = nn.Linear(64, 64), nn.Module()
        self.register_buffer("a", torch.ones(64), persistent=False)
        self.part.register_buffer("b", self.a, persistent=False)
        self.part.register_buffer("c", torch.ones(64), persistent=False)
        self.part.register_buffer("absent", None, persistent=False)

    def forward(self, x):
        return self.layer(x) + self.a + self.part.b + self.part.c


def test_hidden_buffers_that_are_one_stay_one(tmp_path):
    model = filled(Sharing())
    model.a.fill_(3)
    model.part.c = torch.arange(64.0)
    qz.quantize(model, config())
    qz.convert(model)
    for way in (through_state_dict, through_save):
        with torch.device("meta"):
            fresh = Sharing()
        way(model, fresh, tmp_path / "out")
        assert fresh.a is fresh.part.b
        assert torch.equal(fresh(randn(3, 64)), model(randn(3, 64)))
        assert fresh.state_dict().keys() == {f"layer.{key}" for key in ("bias", "codes", "scale", "_extra_state")}


def test_shards_are_as_transformers_writes_them(tmp_path):
    model = converted("llama", config(), torch.float32)
    qz.save(model, tmp_path / "out", max_shard_size=30_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    many = len(listed(tmp_path / "out")) - 1
    names = [f"model-{i + 1:05}-of-{many:05}.safetensors" for i in range(many)]
    assert listed(tmp_path / "out") == [*names, "model.safetensors.index.json"]
    held = {}
    for name in names:
        with safe_open(tmp_path / "out" / name, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
            assert file.metadata()["format"] == "pt"
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 30_000
        held |= dict.fromkeys(tensors, name)
        index["metadata"]["total_size"] -= sum(t.nbytes for t in tensors.values())
    assert index == {"metadata": {"total_size": 0}, "weight_map": held}


@pytest.mark.parametrize("size", [0, -1, True, 1.5, "", "GB", "5 apples", "0KB", "-1GB"])
def test_sizes_that_are_none_are_refused(size, tmp_path):
    model = mlp()
    qz.quantize(model, config())
    qz.convert(model)
    with pytest.raises(
        qz.QuantizeError, match=r"max_shard_size: .*; accepted: bytes as an int, or a string such as '5G"
    ):
        qz.save(model, tmp_path / "out", max_shard_size=size)
    assert not listed(tmp_path)


def test_sizes_are_read_as_transformers_reads_them():
    sizes = {7: 7, "7B": 7, "5GB": 5e9, "5gb": 5e9, "1.5 MiB": 1.5 * 2**20, "2KiB": 2048, "1TB": 1e12}
    assert {given: files.shard_size(given) for given in sizes} == sizes
    assert files.shard_size(None) == float("inf")


def test_a_lost_shard_leaves_the_model(tmp_path):
    model = converted("llama", config(), torch.float32)
    qz.save(model, tmp_path / "out", max_shard_size="30KB")
    (tmp_path / "out" / listed(tmp_path / "out")[1]).unlink()
    fresh = FAMILIES["llama"]()
    with pytest.raises(FileNotFoundError):
        qz.load(fresh, tmp_path / "out")
    assert not any(isinstance(m, qz.QuantizedLinear) for m in fresh.modules())


def test_no_more_than_a_shard_is_made_at_a_time(tmp_path):
    pairs = ((str(i), torch.zeros(1000, dtype=torch.uint8)) for i in range(20))
    with Alive(1000) as alive:
        files.write(tmp_path / "out", "a.safetensors", pairs, {}, {}, 3000)
    # A shard, and the first of the next.
    assert alive.most == 4
    assert listed(tmp_path / "out")[-1] == "a.safetensors.index.json"
    assert len(listed(tmp_path / "out")) == 8


def test_layers_are_unpacked_one_shard_at_a_time(tmp_path):
    model = filled(nn.Sequential(*(nn.Linear(256, 256) for _ in range(12)))).bfloat16()
    qz.quantize(model, config(weights=INT4))
    qz.convert(model)
    # Two int4 in a byte, as the reference keeps them; biases and two layers fill a shard.
    with Alive(256 * 128) as alive:
        qz.save(model, tmp_path / "out", max_shard_size="93KB")
    assert len(listed(tmp_path / "out")) == 7
    assert alive.most <= 4
    with Alive(256 * 128) as alive:
        qz.export(model, tmp_path / "exported", format="compressed-tensors", max_shard_size="93KB")
    assert len(listed(tmp_path / "exported")) == 8
    assert alive.most <= 4
    with torch.device("meta"):
        fresh = nn.Sequential(*(nn.Linear(256, 256) for _ in range(12))).bfloat16()
    qz.load(fresh, tmp_path / "out")
    x = randn(3, 256).bfloat16()
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))
