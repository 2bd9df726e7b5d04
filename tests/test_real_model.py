"""all-MiniLM-L6-v2 on the sentences of the demonstration."""

import copy

import pytest
import torch
from torch import nn

import quantize as qz
from quantize.core import (
    ALGORITHMS,
    LayerSpec,
    Scheme,
    affine,
    channel_absmean,
    dequantize,
    gram,
    linear,
    metrics,
    product,
    round_to_nearest,
)
from quantize.shell.cli import commandline
from quantize.shell.cli.commandline import CONFIG
from quantize.shell.cli.outcome import demonstrate
from quantize.shell.cli.subjects import Encoder, packaged
from tests.models import (
    TENSOR,
    TOKEN,
    WEIGHTS,
    assert_converts_by_rounding_only,
    config,
    generator,
    solutions,
    statistics,
)

SENTENCES = commandline.SENTENCES.read_text("utf-8").splitlines()
LINEARS = 37
INT4_GROUP = {**WEIGHTS, "type": "int4", "strategy": "group", "group_size": 64}
# What takes long is fitted in the first and the last of the six blocks, and in the pooler.
ENDS = {"skip_layers": [f"layer.{i}." for i in range(1, 5)]}


@pytest.fixture(scope="module")
def encoder():
    from transformers.utils import logging

    logging.disable_progress_bar()
    return Encoder(packaged())


def fresh(encoder):
    """The encoder with a model of its own."""
    twin = copy.copy(encoder)
    twin.model = copy.deepcopy(encoder.model)
    return twin


def signs(shape, source):
    return torch.randint(0, 2, shape, generator=source) * 2.0 - 1


def disturbed(encoder, solutions):
    """The float encoder with every weight off by as much as rounding may move it, and every input too: signs at random.

    Rounding moves a number by half a step at most; and a weight by no more than itself, since 0 is on the grid.
    """
    twin, source = fresh(encoder), generator(1)

    def disturb(s):
        def pre_hook(_layer, args):
            tokens = linear.smooth(args[0].flatten(0, -2), s.smoothing)
            moved = tokens + signs(tokens.shape, source) * linear.input_params(tokens, s.inputs, s.static).scale / 2
            return (moved if s.smoothing is None else moved * s.smoothing).view(args[0].shape)

        return pre_hook

    for name, s in solutions.items():
        layer, scheme, shape = twin.model.get_submodule(name), s.weight.scheme, s.weight.codes.shape
        step = affine.from_groups(
            affine.to_groups(torch.ones(shape), scheme) * s.weight.scale[..., None], scheme, shape
        )
        with torch.no_grad():
            most = torch.minimum(linear.smooth(step / 2, s.smoothing), layer.weight.abs())
            layer.weight += signs(shape, source) * most
        if s.inputs is not None:
            layer.register_forward_pre_hook(disturb(s))
    return twin


def held(layer):
    """The bytes of a converted layer, from its format: codes, scales, zero points, and a bias in float32."""
    spec = layer.layout.spec
    n, c, groups = layer.out_features, layer.in_features, spec.weight.grid_shape(layer.out_features, layer.in_features)
    per_byte = 8 // spec.weight.bits
    zero_points = 0 if spec.weight.symmetric else groups[0] * -(-groups[1] // per_byte)
    static = 0 if spec.inputs is None or spec.inputs.strategy == "token" else 4 + (not spec.inputs.symmetric)
    smoothing = 0 if layer.solution.smoothing is None else 4 * c
    return n * -(-c // per_byte) + 4 * groups[0] * groups[1] + zero_points + static + smoothing + 4 * n


def sizes(model):
    return {name: sum(t.nbytes for t in (*m.parameters(), *m.buffers())) for name, m in model.named_modules()}


@pytest.mark.filterwarnings("ignore::quantize.QuantizeWarning")
@pytest.mark.parametrize(
    ("given", "layers"),
    [
        (config(), LINEARS),
        (config(inputs=TOKEN, batch_num=2), LINEARS),
        (config({"smoothquant"}, inputs=TENSOR, batch_num=2), LINEARS),
        (config("gptq", weights=INT4_GROUP, batch_num=2, **ENDS), 13),
        (config({"awq": {"grids_num": 4}}, weights=INT4_GROUP, batch_num=2, **ENDS), 13),
    ],
    ids=["int8 channel", "int8 token inputs", "smoothquant static", "gptq int4 g64", "awq int4 g64"],
)
def test_embeddings_stay_close(encoder, given, layers):
    quantized = fresh(encoder)
    qz.quantize(quantized.model, given)
    # Calibrated on other sentences than it is measured on.
    for start in range(0, 8 * given.get("batch_num", 0), 8):
        quantized(SENTENCES[start : start + 8])
    qz.convert(quantized.model)
    found = solutions(quantized.model)
    assert len(found) == layers
    bytes_of = sizes(quantized.model)
    for name in found:
        layer = quantized.model.get_submodule(name)
        # For integer sums the kernel keeps the sum of each row of codes beside what a file holds.
        sums = 4 * layer.out_features * hasattr(layer, "sums")
        assert bytes_of[name] == held(layer) + sums, name
    # The errors of rounding lie anywhere between none and the most, in the mean square at a third of the most; and the
    # distance grows with the mean square.
    before, after, random = (each(SENTENCES[16:]) for each in (encoder, quantized, disturbed(encoder, found)))
    distances = [1 - torch.cosine_similarity(before, other).double().mean() for other in (after, random)]
    assert 0 < distances[0] < distances[1]
    # Each is still the nearest of all.
    assert (before @ after.T).argmax(1).tolist() == list(range(16))


def test_the_demonstration_shows_what_it_promises(encoder):
    quantized, plain = fresh(encoder), fresh(encoder)
    before = sizes(plain.model)
    outcome = demonstrate(quantized, CONFIG, *quantized.split(SENTENCES, 4, 4, evaluate=True))
    names = list(solutions(quantized.model))
    assert [row.name for row in outcome.report.rows] == names
    assert len(names) == LINEARS
    own = torch.cat([plain(SENTENCES[i : i + 8 : 2]) for i in range(1, len(SENTENCES), 8)])
    assert torch.equal(outcome.measured[0], own)
    cosine = torch.cosine_similarity(*outcome.measured)
    assert outcome.comparison.endswith(f"before and after: mean {cosine.mean():.5f}, lowest {cosine.min():.5f}")
    assert (outcome.measured[0] @ outcome.measured[1].T).argmax(1).tolist() == list(range(16))
    after = sum(held(quantized.model.get_submodule(name)) for name in names)
    layers_before = sum(before[name] for name in names)
    assert (outcome.before[0], outcome.after[0]) == (layers_before, after)
    total_before, total_after = outcome.before[1], outcome.after[1]
    assert total_before == before[""]
    assert total_before - total_after == layers_before - after
    text = str(outcome)
    assert f"quantized layers: {layers_before:,} bytes before, {after:,} after" in text
    assert "pooler.dense" in text
    assert text.endswith(outcome.comparison)


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
EVERY_FORMAT = [
    (name, weights, None) for name in ("minmax", "gptq", {"awq": {"grids_num": 3}}) for weights in WEIGHT_FORMATS
]
EVERY_FORMAT += [
    (name, {**WEIGHTS, "strategy": strategy}, inputs)
    for name in ("minmax", "smoothquant")
    for strategy in ("tensor", "channel")
    for inputs in INPUT_FORMATS
]


@pytest.fixture(scope="module")
def first_block(encoder):
    """The first block of the encoder with the first 256 of its 1536 hidden units, and hidden states that enter it."""
    tokens = encoder.tokenizer(list(SENTENCES[:8]), return_tensors="pt", padding=True)
    block = copy.deepcopy(encoder.model.encoder.layer[0])
    up, down = block.intermediate.dense, block.output.dense
    with torch.no_grad():
        up.weight, up.bias = nn.Parameter(up.weight[:256].clone()), nn.Parameter(up.bias[:256].clone())
        down.weight = nn.Parameter(down.weight[:, :256].clone())
        return block, encoder.model.embeddings(input_ids=tokens["input_ids"])


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


@pytest.fixture(scope="module")
def observed(encoder):
    """The layers at both ends of the model, and what they saw: of four sentences, some 60 tokens, and of others."""
    names = [n for n, m in encoder.model.named_modules() if type(m) is nn.Linear]
    names = [n for n in names if not any(skipped in n for skipped in ENDS["skip_layers"])]
    observer = product(channel_absmean, gram)
    texts = ([SENTENCES[:4]], [SENTENCES[4:18], SENTENCES[18:]])
    return [statistics(encoder.model, names, observer, lambda b=b: [encoder(text) for text in b]) for b in texts]


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_one_small_batch_gains_on_other_text_over_rounding(encoder, observed, name):
    seen, others = observed
    scheme = Scheme(4, True, "group", 64)
    solve = ALGORITHMS[name].algorithm(LayerSpec(scheme), ALGORITHMS[name].Options()).solve
    fitted, rounded = {}, {}
    with torch.no_grad():
        for n, state in seen.items():
            weight = encoder.model.get_submodule(n).weight
            solution = solve(weight, state if name == "awq" else state[1])
            kind = n.partition(".layer.")[2][2:]
            for errors, w in (
                (fitted, solution.effective_weight()),
                (rounded, dequantize(round_to_nearest(weight, scheme))),
            ):
                errors[kind] = errors.get(kind, 0) + metrics.output_error(w - weight, others[n][1].total)
    # Of the layers of one kind together: 60 tokens say little about the 384 or 1536 channels of a single one.
    assert len(fitted) == 7
    for kind, error in fitted.items():
        assert error < rounded[kind], kind
