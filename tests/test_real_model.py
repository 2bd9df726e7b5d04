"""all-MiniLM-L6-v2 on the docstrings of the standard library."""

import ast
import copy
import pathlib
import statistics

import pytest
import torch

import quantize as qz
from quantize.shell import demo
from tests.models import TENSOR, TOKEN, WEIGHTS, config

LINEARS = 37
INT4_GROUP = {**WEIGHTS, "type": "int4", "strategy": "group", "group_size": 64}


@pytest.fixture(scope="module")
def encoder():
    from transformers.utils import logging

    logging.disable_progress_bar()
    return demo.Encoder(demo.packaged_model())


@pytest.fixture(scope="module")
def sentences():
    """First sentences of docstrings, the same on every machine with the same Python."""
    found = []
    for file in sorted(pathlib.Path(statistics.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (text := ast.get_docstring(node)):
                sentence = " ".join(text.split("\n\n")[0].split())
                if 40 < len(sentence) < 200 and sentence not in found:
                    found.append(sentence)
    return found[::5][:256]


@pytest.fixture(scope="module")
def before(encoder, sentences):
    return embeddings(encoder, sentences)


def embeddings(encoder, sentences):
    return torch.cat([encoder(sentences[i : i + 16]) for i in range(0, len(sentences), 16)])


@pytest.mark.filterwarnings("ignore::quantize.QuantizeWarning")
@pytest.mark.parametrize(
    ("given", "least"),
    [
        (config(), 0.999),
        (config(inputs=TOKEN, batch_num=4), 0.99),
        (config({"smoothquant"}, inputs=TENSOR, batch_num=4), 0.9),
        (config("gptq", weights=INT4_GROUP, batch_num=4), 0.95),
        (config({"awq": {"grids_num": 8}}, weights=INT4_GROUP, batch_num=4), 0.95),
    ],
    ids=["int8 channel", "int8 token inputs", "smoothquant static", "gptq int4 g64", "awq int4 g64"],
)
def test_embeddings_stay_close(encoder, sentences, before, given, least):
    assert len(sentences) >= 200
    quantized = copy.copy(encoder)
    quantized.model = copy.deepcopy(encoder.model)
    sizes = {n: sum(p.nbytes for p in m.parameters()) for n, m in quantized.model.named_modules()}
    qz.quantize(quantized.model, given)
    # Calibrated on other sentences than it is measured on.
    for start in range(0, 4 * given.get("batch_num", 0), 4):
        quantized(demo.SENTENCES[start : start + 4])
    qz.convert(quantized.model)
    report = qz.report(quantized.model)
    assert len(report.rows) == LINEARS
    for row in report.rows:
        layer = quantized.model.get_submodule(row.name)
        held = sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))
        if row.weights.startswith("int8") and row.inputs is None:
            assert held <= 0.26 * sizes[row.name]
    cosine = torch.cosine_similarity(before, embeddings(quantized, sentences))
    assert cosine.mean() >= least


def test_the_demonstration_shows_what_it_promises(encoder):
    quantized = copy.copy(encoder)
    quantized.model = copy.deepcopy(encoder.model)
    outcome = demo.demonstrate(quantized, demo.CONFIG, demo.SENTENCES)
    assert len(outcome.report.rows) == LINEARS
    assert outcome.cosine.shape == (len(demo.SENTENCES) // 2,)
    assert outcome.cosine.mean() >= 0.99
    before, after = outcome.layer_bytes
    assert after <= 0.26 * before
    total_before, total_after = outcome.model_bytes
    assert total_before - total_after == before - after
    text = demo.text(outcome)
    assert f"quantized layers: {before:,} bytes before, {after:,} after" in text
    assert "pooler.dense" in text
