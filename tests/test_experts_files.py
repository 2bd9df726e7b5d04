"""Mixtures of experts in files: names of checkpoints, as loaders read them, and converted models that come back."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import quantize as qz
from quantize.core import dequantize
from tests.models import TOKEN, WEIGHTS, config
from tests.zoo.experts import batch, logits, made, run

pytestmark = pytest.mark.filterwarnings(r"ignore:\d+\.\d % of the model's weights stay:quantize.QuantizeWarning")

# Of the first expert in the last block: gate, up and down in a checkpoint.
NAMES = {
    "mixtral": [f"model.layers.1.block_sparse_moe.experts.0.{name}" for name in ("w1", "w3", "w2")],
    "qwen3_moe": [f"model.layers.1.mlp.experts.0.{name}_proj" for name in ("gate", "up", "down")],
    "deepseek_v3": [f"model.layers.1.mlp.experts.0.{name}_proj" for name in ("gate", "up", "down")],
}
ROUTERS = {
    "mixtral": "model.layers.1.block_sparse_moe.gate",
    "qwen3_moe": "model.layers.1.mlp.gate",
    "deepseek_v3": "model.layers.1.mlp.gate",
}
INT8 = config("minmax", weights=WEIGHTS, skip_layers="lm_head")
DYNAMIC = config("minmax", weights=WEIGHTS, inputs=TOKEN, skip_layers=["lm_head", "kv_b_proj"])


def converted(kind, given=INT8):
    model = made(kind)
    qz.quantize(model, given)
    run(model, [batch()])
    qz.convert(model)
    return model


def weight(model, name):
    return dequantize(model.get_submodule(name).solution.weight)


@pytest.mark.parametrize("kind", NAMES)
def test_transformers_reads_the_experts_of_a_checkpoint(kind, tmp_path):
    model = converted(kind)
    qz.export(model, tmp_path / "out", format="compressed-tensors")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    targets = [name for group in settings["config_groups"].values() for name in group["targets"]]
    assert {f"{name}.weight_packed" for name in NAMES[kind]} < tensors.keys()
    assert {*NAMES[kind]} < {*targets}
    assert {"lm_head", ROUTERS[kind]} <= {*settings["ignore"]}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    # Codes times scales in float32, by both.
    for name, module in theirs.named_modules():
        if name.endswith(".experts"):
            for i in range(module.num_experts):
                gate, up = module.gate_up_proj[i].chunk(2)
                assert torch.equal(gate, weight(model, f"{name}.{i}.gate_proj"))
                assert torch.equal(up, weight(model, f"{name}.{i}.up_proj"))
                assert torch.equal(module.down_proj[i], weight(model, f"{name}.{i}.down_proj"))


@pytest.mark.parametrize("kind", NAMES)
def test_experts_that_stay_in_floating_point_have_the_same_names(kind, tmp_path):
    qz.export(converted(kind), tmp_path / "all", format="compressed-tensors")
    given = config("minmax", weights=WEIGHTS, skip_layers=["lm_head", "layers.1.mlp.experts"])
    qz.export(converted(kind, given), tmp_path / "some", format="compressed-tensors")
    whole, part = ({key.rpartition(".")[0] for key in load_file(tmp_path / name / "model.safetensors")}
                   for name in ("all", "some"))  # fmt: skip
    assert part == whole
    settings = json.loads((tmp_path / "some" / "config.json").read_text())["quantization_config"]
    assert {*NAMES[kind]} < {*settings["ignore"]}


@pytest.mark.parametrize("kind", NAMES)
def test_ascendv1_has_the_names_of_checkpoints(kind, tmp_path):
    model = converted(kind, DYNAMIC)
    qz.export(model, tmp_path / "out", format="ascendv1")
    told = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    tensors = load_file(tmp_path / "out" / "quant_model_weights.safetensors")
    for name in NAMES[kind]:
        n = len(tensors[f"{name}.weight"])
        assert tensors[f"{name}.weight"].dtype == torch.int8
        for key in ("weight_scale", "weight_offset"):
            assert tensors[f"{name}.{key}"].shape == (n, 1)
        assert {told[f"{name}.{key}"] for key in ("weight", "weight_scale", "weight_offset")} == {"W8A8_DYNAMIC"}
    assert told[f"{ROUTERS[kind]}.weight"] == "FLOAT"


@pytest.mark.parametrize("form", ["compressed-tensors", "ascendv1"])
def test_experts_that_checkpoints_keep_in_one_tensor_are_refused(form, tmp_path):
    with pytest.raises(
        qz.QuantizeError, match=r"experts\.gate_up_proj' is one tensor .*; accepted: the experts in skip"
    ):
        qz.export(converted("gpt_oss"), tmp_path / "out", format=form)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("form", ["compressed-tensors", "ascendv1"])
def test_checkpoints_lie_in_shards(form, tmp_path):
    model = converted("qwen3_moe", DYNAMIC)
    qz.export(model, tmp_path / "one", format=form)
    qz.export(model, tmp_path / "many", format=form, max_shard_size=20_000)
    (index,) = (tmp_path / "many").glob("*.safetensors.index.json")
    where = json.loads(index.read_text())["weight_map"]
    shards = {file: load_file(tmp_path / "many" / file) for file in {*where.values()}}
    assert len(shards) > 2
    (single,) = (tmp_path / "one").glob("*.safetensors")
    whole = load_file(single)
    assert whole.keys() == where.keys()
    assert all(torch.equal(shards[where[key]][key], tensor) for key, tensor in whole.items())
    largest = max(tensor.nbytes for tensor in whole.values())
    assert max(sum(t.nbytes for t in shard.values()) for shard in shards.values()) <= max(20_000, largest)


@pytest.mark.parametrize("kind", [*NAMES, "gpt_oss"])
def test_converted_experts_come_back(kind, tmp_path):
    model, tokens = converted(kind), batch()
    wanted = logits(model, tokens)
    qz.save(model, tmp_path / "out", max_shard_size=20_000)
    empty, loaded, stated = made(kind).to("meta"), made(kind, seed=1), made(kind, seed=1)
    qz.load(empty, tmp_path / "out")
    qz.load(loaded, tmp_path / "out")
    qz.convert(stated, from_state=model.state_dict())
    for other in (empty, loaded, stated):
        assert torch.equal(logits(other.eval(), tokens), wanted)
        assert [row.name for row in qz.report(other).rows] == [row.name for row in qz.report(model).rows]


def test_a_state_that_does_not_fit_leaves_experts_as_they_were():
    model = converted("qwen3_moe")
    state = {key: value for key, value in model.state_dict().items() if "experts.1.up_proj.codes" not in key}
    fresh = made("qwen3_moe", seed=1)
    classes = [type(module) for module in fresh.modules()]
    with pytest.raises(qz.QuantizeError, match=r"experts\.1\.up_proj"):
        qz.convert(fresh, from_state=state)
    assert [type(module) for module in fresh.modules()] == classes
