"""Tiny models of transformers, each calibrated in one pass and in lock step, converted, and exported."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import quantize as qz
from quantize.core import dequantize
from tests.models import WEIGHTS, config, filled
from tests.test_empty import FAMILIES, IDS

pytestmark = pytest.mark.filterwarnings(r"ignore:\d+\.\d % of the model's weights stay:quantize.QuantizeWarning")
DENSE = ["llama", "llama, dynamic", "qwen2, tied", "bert", "gpt2"]
HEADS = ["lm_head"]


def build(family):
    return filled(FAMILIES[family]()).eval()


@torch.no_grad()
def outputs(model, ids):
    # What a cache keeps from pass to pass is none of the model's arguments.
    return model(input_ids=ids, **({} if "Bert" in type(model).__name__ else {"use_cache": False})).logits


@pytest.mark.filterwarnings("ignore:fewer than 16 tokens reached 2 of 14 layers:quantize.QuantizeWarning")
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("family", DENSE)
def test_dense_models_are_fitted_and_converted(family, sequential):
    model = build(family)
    given = config({"gptq": {"sequential": sequential}}, weights={**WEIGHTS, "type": "int4"}, batch_num=2)
    qz.quantize(model, {**given, "skip_layers": HEADS if "bert" not in family else None})
    for seed in (0, 1):
        outputs(model, (IDS + 7 * seed) % 160)
    report = qz.report(model)
    assert not report.remarks
    # Heads and embeddings alone stay as they were.
    assert {s.name.rpartition(".")[2] for s in report.skipped} <= {"embed_tokens", "lm_head", "wte", "wpe",
                                                                   "word_embeddings", "position_embeddings",
                                                                   "token_type_embeddings"}  # fmt: skip
    assert all(row.error <= row.baseline_error for row in report.rows if not row.fell_back)
    wanted = outputs(model, IDS)
    qz.convert(model, kernel="reference")
    # With float inputs, both compute the same expression.
    assert torch.equal(outputs(model, IDS), wanted)


@pytest.mark.parametrize("family", ["llama", "qwen2, tied"])
def test_dense_models_are_exported(family, tmp_path):
    model = build(family)
    qz.quantize(model, config("minmax", weights=WEIGHTS, skip_layers=HEADS))
    qz.convert(model)
    qz.export(model, tmp_path / "ct", format="compressed-tensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ct")
    theirs(input_ids=IDS)
    for row in qz.report(model).rows:
        # Codes times scales in float32, by both.
        assert torch.equal(
            theirs.get_submodule(row.name).weight, dequantize(model.get_submodule(row.name).solution.weight)
        )
    qz.export(model, tmp_path / "ascend", format="ascendv1")
    told = json.loads((tmp_path / "ascend" / "quant_model_description.json").read_text())
    tensors = load_file(tmp_path / "ascend" / "quant_model_weights.safetensors")
    for row in qz.report(model).rows:
        assert told[f"{row.name}.weight"] == "W8A16"
        assert torch.equal(tensors[f"{row.name}.weight"], model.get_submodule(row.name).solution.weight.codes)
