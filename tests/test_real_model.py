"""all-MiniLM-L6-v2 on the docstrings of the standard library."""

import ast
import copy
import pathlib

import pytest
import torch

import quantize as qz
from quantize.core import (
    ALGORITHMS,
    LayerSpec,
    Scheme,
    channel_absmean,
    dequantize,
    gram,
    metrics,
    product,
    round_to_nearest,
)
from quantize.shell import demo
from tests.models import TENSOR, TOKEN, WEIGHTS, assert_converts_by_rounding_only, config, statistics

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
    for file in sorted(pathlib.Path(ast.__file__).parent.glob("*.py")):
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


WEIGHT_FORMATS = [
    {"type": kind, "symmetric": symmetric, **strategy}
    for kind in ("int8", "int4")
    for symmetric in (True, False)
    for strategy in ({"strategy": "tensor"}, {"strategy": "channel"}, {"strategy": "group", "group_size": 128})
]
INPUT_FORMATS = [
    {"type": "int8", "symmetric": symmetric, "strategy": strategy}
    for symmetric in (True, False)
    for strategy in ("tensor", "token")
]
EVERY_FORMAT = [(name, weights, None) for name in ("minmax", "gptq", "awq") for weights in WEIGHT_FORMATS]
EVERY_FORMAT += [
    (name, {**WEIGHTS, "strategy": strategy}, inputs)
    for name in ("minmax", "smoothquant")
    for strategy in ("tensor", "channel")
    for inputs in INPUT_FORMATS
]


@pytest.fixture(scope="module")
def first_block(encoder):
    """The first block of the encoder, and hidden states as they enter it."""
    tokens = encoder.tokenizer(list(demo.SENTENCES[:8]), return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden = encoder.model.embeddings(input_ids=tokens["input_ids"])
    return encoder.model.encoder.layer[0], hidden


@pytest.mark.parametrize(("name", "weights", "inputs"), EVERY_FORMAT, ids=str)
def test_every_format_runs_and_converts_by_rounding_only(first_block, name, weights, inputs):
    block, hidden = first_block
    block = copy.deepcopy(block)
    with torch.no_grad():
        before = block(hidden)
        qz.quantize(block, config(name, weights=weights, inputs=inputs))
        block(hidden)
        assert_converts_by_rounding_only(block, hidden)
        after = block(hidden)
    assert len(qz.report(block).rows) == 6
    assert torch.isfinite(after).all()
    assert not torch.equal(after, before)


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_one_small_batch_stays_close_to_rounding_on_other_text(encoder, sentences, name):
    layers = {n: m for n, m in encoder.model.named_modules() if type(m) is torch.nn.Linear}

    def observed(*batches):
        observer = product(channel_absmean, gram)
        return statistics(encoder.model, layers, observer, lambda: [encoder(batch) for batch in batches])

    # Four sentences, some 60 tokens, against 384 and 1536 channels.
    seen, others = observed(demo.SENTENCES[:4]), observed(*(sentences[i : i + 16] for i in range(0, 128, 16)))
    scheme = Scheme(4, True, "group", 64)
    solve = ALGORITHMS[name].algorithm(LayerSpec(scheme), ALGORITHMS[name].Options()).solve
    with torch.no_grad():
        for n, layer in layers.items():
            solution = solve(layer.weight, seen[n] if name == "awq" else seen[n][1])
            reached = solution.effective_weight(), dequantize(round_to_nearest(layer.weight, scheme))
            errors = [metrics.output_error(w - layer.weight, others[n][1].total) for w in reached]
            assert errors[0] <= 1.02 * errors[1], n
