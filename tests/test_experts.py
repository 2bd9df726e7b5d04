"""Mixtures of experts, and GPT-2's linear layers, as transformers keeps them: quantized like any other."""

import copy
import importlib
import inspect
import io
import pickle

import pytest
import torch
import torch.multiprocessing
import torch.nn.utils.prune
from torch import nn

import quantize as qz
from quantize.core import LayerSpec, Scheme, gptq
from quantize.shell.calibrate.layer import CalibrationLinear
from quantize.shell.deploy.layer import QuantizedLinear
from quantize.shell.plan import swap
from quantize.shell.views import Experts, view
from tests import bounds, oracle, ranks
from tests.models import (
    TENSOR,
    TOKEN,
    assert_converts_by_rounding_only,
    assert_same_snapshot,
    config,
    randn,
    snapshot,
    solutions,
)
from tests.zoo import experts as zoo
from tests.zoo.experts import batch, built, given, logits, made, run

# Routers and embeddings are named in the warning, rare experts in another.
pytestmark = pytest.mark.filterwarnings("ignore::quantize.QuantizeWarning")

U = bounds.V
BATCHES = [batch(1), batch(2)]
# Their own forward refuses the index of no expert, though the interface that they stand behind has it.
WITHOUT_SENTINEL = {"GptOssExperts", "NemotronHExperts", "OpenAIPrivacyFilterExperts"}
# Stacked weights that have no decorator, and so no attributes that tell how they are used.
UNDECORATED = {
    "inkling": "InklingSharedExperts",
    "jetmoe": "JetMoeParallelExperts",
    "llama4": "Llama4TextExperts",
    "longcat_flash": "LongcatFlashExperts",
    "step3p7": "Step3p7Experts",
}


# The views.


def routed(tokens=20, k=2, idle=(1, 4)):
    """Tokens, experts ``[t, k]`` of which ``idle`` get none, and their weights.

    Every third token has one expert, and one has the same twice.
    """
    chosen = torch.tensor([e for e in range(zoo.Small.experts) if e not in idle])
    order = torch.stack(
        [torch.randperm(len(chosen), generator=torch.Generator().manual_seed(t)) for t in range(tokens)]
    )
    index = chosen[order[:, :k]]
    index[::3, 1] = zoo.Small.experts
    index[1, 1] = index[1, 0]
    return randn(tokens, zoo.Small.hidden, seed=1), index, randn(tokens, k, seed=2).abs()


def roundings(model, expert, x):
    """What ``expert`` of the view ``model`` gives for tokens ``[t, h]``, and by how much roundings may move it.

    To the first order. Sums of products and a bias: ``c + 1`` roundings of the sum of magnitudes. Roundings inside the
    gate function are moves of its arguments, by 16 units of themselves and of 1; those of the norm, of its result.
    """

    def matmul(layer, x):
        size = x.abs() @ layer.weight.abs().T + (0 if layer.bias is None else layer.bias.abs())
        return layer(x), (layer.in_features + 16) * U * size

    def joined(parts):
        return torch.cat(parts, -1) if model.is_concatenated else torch.stack(parts, -1).flatten(-2)

    def gate(both):
        return model.original._apply_gate(model, both) if model.has_gate else model.act_fn(both)

    def end(y):
        return model.post_expert_norm(y) if model.has_post_expert_norm else y

    def slope(function, x):
        return torch.vmap(torch.func.jacrev(function))(x).abs()

    pairs = [matmul(expert[key], x) for key in ("gate_proj", "up_proj") if key in expert]
    both, moved = (joined(parts) for parts in zip(*pairs, strict=True))
    y, last = matmul(expert["down_proj"], gate(both))
    moved = moved + 16 * U * (both.abs() + 1)
    spread = (slope(lambda z: end(expert["down_proj"](gate(z))), both) @ moved[..., None])[..., 0]
    return end(y), spread + (slope(end, y) @ last[..., None])[..., 0] + 16 * U * end(y).abs()


@torch.no_grad()
def bound(model, x, index, weights):
    """How far two float evaluations may be apart, ``[t, h]``: both are off, and twice that for the second order."""
    model, x, weights = copy.deepcopy(model).double(), x.double(), weights.double()
    found = torch.zeros_like(x)
    for number in range(model.num_experts):
        token, place = torch.where(index == number)
        if len(token):
            y, moved = roundings(model, model.get_submodule(str(number)), x[token])
            w = weights[token, place, None].abs()
            found.index_add_(0, token, 4 * w * (moved + (index.shape[1] + 2) * U * y.abs()))
    return found


@pytest.mark.parametrize(("module", "name"), zoo.classes(), ids=[name for _, name in zoo.classes()])
def test_a_view_computes_what_the_class_computes(module, name):
    original = built(module, name)
    seen = view("mlp.experts", original)
    x, index, weights = routed()
    most = bound(seen, x, index, weights)
    nobody = index == zoo.Small.experts
    with torch.no_grad():
        y = seen(x, index, weights)
        # A weight of 0 is no expert either.
        assert ((original(x, index.where(~nobody, 0), weights.where(~nobody, 0.0)) - y).abs() <= most).all()
        if name in WITHOUT_SENTINEL:
            with pytest.raises((RuntimeError, IndexError), match=r"num_classes|out of bounds"):
                original(x, index, weights)
        else:
            assert ((original(x, index, weights) - y).abs() <= most).all()
        assert torch.equal(seen(x[:0], index[:0], weights[:0]), x[:0])
    assert (y.abs() > 0).all()
    assert (most < 1e-3 * y.abs().max()).all()


@pytest.mark.parametrize(("module", "name"), zoo.classes()[::12], ids=[name for _, name in zoo.classes()[::12]])
def test_a_view_copies_nothing(module, name):
    original = built(module, name)
    seen = view("experts", original)
    parts = [p for layer in seen.modules() if type(layer) is nn.Linear for p in layer.parameters()]
    storages = {p.untyped_storage().data_ptr() for p in original.parameters(recurse=False)}
    assert {p.untyped_storage().data_ptr() for p in parts} == storages
    # Every number is in one of them.
    assert sum(p.numel() for p in parts) == sum(p.numel() for p in original.parameters(recurse=False))
    with torch.no_grad():
        for p in parts:
            p.zero_()
    assert not any(p.any() for p in original.parameters(recurse=False))


def test_all_kinds_of_experts_are_known():
    names = [name for _, name in zoo.classes()]
    assert len(names) >= 60
    assert {"MixtralExperts", "GptOssExperts", "NemotronHExperts", "MuseSparkExperts", "AriaExperts"} < {*names}


@pytest.mark.parametrize(("family", "name"), UNDECORATED.items())
def test_stacked_weights_without_the_decorator_are_named(family, name):
    kind = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)
    needed = [p for p in inspect.signature(kind).parameters.values() if p.default is p.empty]
    mixture = kind(zoo.Small()) if len(needed) == 1 else kind(3, 8, 16)
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "e": mixture})
    assert view("e", model["e"]) is None
    qz.quantize(model, config())
    assert any(row.name.startswith("e") and name in row.reason for row in qz.report(model).skipped)


def test_a_forward_of_its_own_is_not_replaced():
    """That of an instance, of a subclass, and a weight that a hook computes."""
    import transformers.models.mixtral.modeling_mixtral as mixtral
    import transformers.pytorch_utils as utils

    class Own(mixtral.MixtralExperts):
        def forward(self, x, index, weights):
            return super().forward(x, index, weights) * 2

    class Gate(mixtral.MixtralExperts):
        def _apply_gate(self, both):
            return both.chunk(2, -1)[0]

    patched = zoo.drawn(mixtral.MixtralExperts(zoo.Small()))
    patched.forward = lambda *args: args[0]
    conv, pruned = utils.Conv1D(8, 4), utils.Conv1D(8, 4)
    conv.forward = lambda x: x
    nn.utils.prune.identity(pruned, "weight")
    for each in (Own(zoo.Small()), patched, conv, pruned):
        assert view("e", each) is None
    gate = zoo.drawn(Gate(zoo.Small()))
    seen, (x, index, weights) = view("e", gate), routed()
    assert isinstance(seen, Experts)
    # What the interface calls, the one that goes through _apply_gate.
    gate.config._experts_implementation = "batched_mm"
    gate._is_expert_parallel = True
    torch.testing.assert_close(seen(x, index, weights), gate(x, index, weights))


# Models.

RUNS = {
    "minmax": given("minmax"),
    "minmax int8": given("minmax", inputs=TENSOR),
    "awq": given("awq"),
    "smoothquant": given("smoothquant", inputs=TENSOR),
    "smoothquant token": given("smoothquant", inputs=TOKEN),
    "one pass": given("one pass"),
    "gptq": given("gptq"),
}
# Tokens below which an expert is rounded.
FEWEST = {
    "minmax": 0,
    "minmax int8": 1,
    "awq": 16,
    "smoothquant": 1,
    "smoothquant token": 1,
    "one pass": 16,
    "gptq": 16,
}


def calibrated(kind, name, dtype=torch.float32, batches=BATCHES, **rest):
    model = made(kind, dtype)
    qz.quantize(model, {**RUNS[name], **rest})
    return run(model, batches)


def assert_nothing_is_forgotten(model, original):
    """Routers and embeddings alone stay, and are named; they are a small part."""
    left = {row.name for row in qz.report(model).skipped}
    kept = {name for name, m in model.named_modules() if any(p.ndim > 1 for p in m.parameters(recurse=False))}
    quantized = {row.name for row in qz.report(model).rows}
    assert kept - quantized == left
    assert all(name.endswith(("embed_tokens", ".gate", ".router")) for name in left)
    sizes = [sum(model.get_submodule(name).weight.numel() for name in names if "embed" not in name)
             for names in (quantized, left)]  # fmt: skip
    held = [p for name, p in original.named_parameters() if p.ndim > 1 and "embed" not in name and "bias" not in name]
    assert sum(sizes) == sum(p.numel() for p in held)
    assert sizes[1] < 0.1 * sizes[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("kind", zoo.KINDS)
def test_models_are_quantized_and_converted(kind, name, dtype):
    original = made(kind, dtype)
    model = calibrated(kind, name, dtype)
    assert_nothing_is_forgotten(model, original)
    found = qz.report(model)
    assert {row.stage for row in found.rows} == {"quantized"}
    assert not found.remarks
    assert not found.unmatched
    for row in found.rows:
        assert row.fell_back == (row.tokens < FEWEST[name])
        if name in ("one pass", "gptq") and row.tokens >= 16:
            assert row.error < row.baseline_error, row.name
    fake, float_ = logits(model, batch(3)), logits(original, batch(3))
    assert not torch.equal(fake, float_)
    if RUNS[name]["quant_cfg"]["inputs"] is None:
        plain = copy.deepcopy(model)
        qz.convert(plain, kernel="reference")
        # The reference computes weight-only layers as they were computed before.
        assert torch.equal(logits(plain, batch(3)), fake)
    with torch.no_grad():
        assert_converts_by_rounding_only(model, batch(3))
    assert not any(type(m) in (nn.Linear, CalibrationLinear) for m in model.modules())
    assert torch.isfinite(logits(model, batch(3))).all()


def test_outputs_stay_near_to_those_of_the_float_model():
    original = made("qwen3_moe")
    wanted = logits(original, batch(3))
    errors = {}
    for bits in (8, 4):
        model = made("qwen3_moe")
        qz.quantize(model, config(weights={**zoo.INT4, "type": f"int{bits}"}))
        errors[bits] = (logits(model, batch(3)) - wanted).norm() / wanted.norm()
    # Sixteen times finer steps.
    assert errors[8] < errors[4] / 4
    assert errors[4] < 1


def biased():
    """Routers that never choose the third expert, and hardly ever the last."""
    model = made("gpt_oss")
    with torch.no_grad():
        for block, last in zip(model.model.layers, (-2.5, -1.5), strict=True):
            block.mlp.router.bias.copy_(torch.tensor([0.0, 0.0, -100.0, last]))
    return model


@pytest.mark.parametrize("name", ["one pass", "gptq", "awq", "smoothquant"])
def test_rare_experts_fall_back_and_are_told(name):
    model = biased()
    qz.quantize(model, RUNS[name])
    run(model, BATCHES[:1])
    folded = r"experts\.(2\.gate_proj, |\*\.gate_proj \(2\) \(0\.\.\d+\))"
    with pytest.warns(qz.QuantizeWarning, match=rf"tokens? reached .* fall back to minmax: .*{folded}"):
        run(model, BATCHES[1:])
    rows = {row.name: row for row in qz.report(model).rows}
    fewest = FEWEST[name]
    told = qz.report(model).as_dict()["layers"]
    for row, plain in zip(rows.values(), told, strict=True):
        assert row.fell_back == (row.tokens < fewest)
        assert plain["algorithm"].startswith("minmax (") == row.fell_back
    part = [row for row in rows.values() if "experts.3" in row.name]
    assert all(0 < row.tokens < 16 for row in part)
    idle = [row for row in rows.values() if "experts.2" in row.name]
    assert {row.tokens for row in idle} == {0}
    rounded = biased()
    qz.quantize(rounded, config(weights={**zoo.INT4, "type": "int4" if fewest == 16 else "int8"}))
    for row in (*idle, *(part if fewest == 16 else ())):
        mine, theirs = (each.get_submodule(row.name).solution.weight for each in (model, rounded))
        assert torch.equal(mine.codes, theirs.codes)
        assert torch.equal(mine.scale, theirs.scale)
    qz.convert(model)
    assert torch.isfinite(logits(model, batch(3))).all()


# Skipping.


def test_one_expert_can_be_skipped():
    model, original = calibrated("mixtral", "gptq", skip_layers="experts.1."), made("mixtral")
    names = {row.name for row in qz.report(model).rows}
    assert not any(".experts.1." in name for name in names)
    assert sum(".experts." in name for name in names) == 2 * 3 * 3
    skipped = [row for row in qz.report(model).skipped if row.asked]
    assert len(skipped) == 6
    assert {row.reason for row in skipped} == {"skip_layers: 'experts.1.'"}
    qz.convert(model)
    for name, module in zoo.experts(original).items():
        kept = model.get_submodule(f"{name}.1")
        assert torch.equal(torch.cat([kept["gate_proj"].weight, kept["up_proj"].weight]), module.gate_up_proj[1])
        assert torch.equal(kept["down_proj"].weight, module.down_proj[1])
    # Nothing holds the weights of the others any more.
    tensors = [*model.parameters(), *model.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert sum(storages.values()) <= 1.01 * sum(t.nbytes for t in {id(t): t for t in tensors}.values())


def test_skipped_mixtures_stay_as_they_were():
    model = made("mixtral")
    before = {name: (module, module.gate_up_proj, type(module)) for name, module in zoo.experts(model).items()}
    qz.quantize(model, given("minmax", skip_layers="experts"))
    assert {name: (m, m.gate_up_proj, type(m)) for name, m in zoo.experts(model).items()} == before
    qz.convert(model)
    assert {name: (m, m.gate_up_proj, type(m)) for name, m in zoo.experts(model).items()} == before
    assert len(qz.report(model).rows) == 2 * 4 + 1


def test_one_projection_of_all_experts_can_be_skipped():
    model, original = calibrated("gpt_oss", "one pass", skip_layers="gate_proj"), made("gpt_oss")
    assert sum(row.asked for row in qz.report(model).skipped) == 2 * 4
    assert sum("experts" in row.name for row in qz.report(model).rows) == 2 * 4 * 2
    fake = logits(model, batch(3))
    qz.convert(model, kernel="reference")
    assert torch.equal(logits(model, batch(3)), fake)
    for name, module in zoo.experts(original).items():
        kept = model.get_submodule(f"{name}.2")["gate_proj"]
        assert torch.equal(kept.weight, module.gate_up_proj[2, :, ::2].T)
        assert torch.equal(kept.bias, module.gate_up_proj_bias[2, ::2])


def test_hooks_and_attributes_of_a_mixture_stay():
    model, calls = made("mixtral"), []
    for module in zoo.experts(model).values():
        module.register_forward_hook(lambda *_: calls.append(1))
        module.mine = "kept"
    qz.quantize(model, given("minmax"))
    run(model, BATCHES[:1])
    qz.convert(model)
    run(model, BATCHES[:1])
    assert len(calls) == 4
    assert {module.mine for module in zoo.experts(model).values()} == {"kept"}


# Calibrations that are copied, saved, merged and interrupted.


def assert_same_solutions(found, wanted):
    mine, theirs = solutions(found), solutions(wanted)
    assert mine.keys() == theirs.keys()
    for name, solution in theirs.items():
        leaves, others = (torch.utils._pytree.tree_leaves(each) for each in (mine[name], solution))
        assert all(torch.equal(a, b) for a, b in zip(leaves, others, strict=True)), name


def saved(model, path, name):
    qz.save_calibration(model, path)
    fresh = calibrated("qwen3_moe", name, batches=[])
    qz.load_calibration(fresh, path)
    return fresh


def reloaded(value, **kwargs):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **kwargs)


@pytest.mark.parametrize("name", ["one pass", "gptq", "smoothquant"])
def test_a_calibration_goes_on_in_copies_and_files(name, tmp_path):
    model = calibrated("qwen3_moe", name, batches=BATCHES[:1])
    fresh = calibrated("qwen3_moe", name, batches=[])
    fresh.load_state_dict(reloaded(model.state_dict(), weights_only=True))
    heirs = {
        "copy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": reloaded(model, weights_only=False),
        "calibration": saved(model, tmp_path / "calibration.pt", name),
        "state": fresh,
    }
    run(model, BATCHES[1:])
    for heir in heirs.values():
        assert_same_solutions(run(heir, BATCHES[1:]), model)
    wanted = logits(model, batch(3))
    assert all(torch.equal(logits(heir, batch(3)), wanted) for heir in heirs.values())
    # What is solved is in the state as well.
    fresh = calibrated("qwen3_moe", name, batches=[])
    fresh.load_state_dict(reloaded(model.state_dict(), weights_only=True))
    assert torch.equal(logits(fresh, batch(3)), wanted)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_a_converted_model_is_saved_without_float_weights(kind):
    original, model = made(kind), calibrated(kind, "one pass")
    qz.convert(model)
    file = io.BytesIO()
    torch.save(model, file)
    kept = sum(p.nbytes for name, p in original.named_parameters() if "proj" not in name and "lm_head" not in name)
    matrices = sum(p.nbytes for name, p in original.named_parameters() if "proj" in name or "lm_head" in name)
    # An eighth of the bytes, and for each layer scales, a bias, and some 3 kB of description.
    assert len(file.getvalue()) < kept + matrices / 4 + 4000 * len(qz.report(model).rows)
    assert torch.equal(logits(reloaded(model, weights_only=False), batch(3)), logits(model, batch(3)))


def failing(patch, error, when):
    """Let the solver raise at the call number ``when``; returns the list of the calls."""
    calls = []
    for name in ("solve_together", "solve_stack"):
        plain = getattr(gptq, name, None)

        def solve(*args, plain=plain, **kwargs):
            calls.append(1)
            if len(calls) == when + 1:
                raise error
            return plain(*args, **kwargs)

        if plain is not None:
            patch.setattr(gptq, name, solve)
    return calls


@pytest.mark.parametrize("name", ["one pass", "gptq"])
def test_an_interrupted_solve_is_continued(name, monkeypatch):
    with monkeypatch.context() as patch:
        calls = failing(patch, KeyboardInterrupt, -1)
        whole = calibrated("mixtral", name)
    wanted, plain = logits(whole, batch(3)), logits(made("mixtral"), batch(3))
    for when in (0, len(calls) // 2, len(calls) - 1):
        model = calibrated("mixtral", name, batches=BATCHES[:1])
        with monkeypatch.context() as patch:
            failing(patch, KeyboardInterrupt, when)
            with pytest.raises(KeyboardInterrupt):
                run(model, BATCHES[1:])
        near = logits(model, batch(3))
        assert torch.allclose(near, plain, atol=1e-5)
        qz.finish(model)
        assert torch.equal(logits(model, batch(3)), wanted)


RANK_RUNS = ("one pass", "gptq", "smoothquant")


def test_ranks_agree(tmp_path):
    ranks.warm()
    torch.multiprocessing.start_processes(
        zoo.work, (2, tmp_path, {name: RUNS[name] for name in RANK_RUNS}), nprocs=2, start_method="forkserver"
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name in RANK_RUNS:
        alone = calibrated("gpt_oss", name)
        assert first[name].keys() == second[name].keys() == solutions(alone).keys()
        for layer, (tokens, leaves) in first[name].items():
            assert tokens == second[name][layer][0]
            assert all(torch.equal(a, b) for a, b in zip(leaves, second[name][layer][1], strict=True))
        if name == "gptq":
            continue
        # In one pass every rank sees its part of what one process sees. Ranges are the same, sums up to roundings.
        assert {row.name: row.tokens for row in qz.report(alone).rows} == {n: t for n, (t, _) in first[name].items()}
        if name == "smoothquant":
            for layer, solution in solutions(alone).items():
                mine = torch.utils._pytree.tree_leaves(solution)
                assert all(torch.equal(a, b) for a, b in zip(mine, first[name][layer][1], strict=True)), layer


# Refused calls.


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_refused_call_leaves_everything(kind, monkeypatch):
    model = made(kind)
    mixture = model.model.layers[1].mlp.experts
    for child in mixture.children():
        child.train()
    before, vars_before = snapshot(model), {name: dict(vars(m)) for name, m in model.named_modules()}

    def assert_as_before():
        assert_same_snapshot(snapshot(model), before)
        assert all(vars(m) == vars_before[name] for name, m in model.named_modules())

    with pytest.raises(qz.QuantizeError, match="quant_cfg"):
        qz.quantize(model, {})
    assert_as_before()
    with monkeypatch.context() as patch:
        patch.setattr(CalibrationLinear, "adopt", interrupted)
        with pytest.raises(KeyboardInterrupt):
            qz.quantize(model, given("minmax"))
    assert_as_before()
    with torch.no_grad():
        mixture.down_proj[2, 3, 4] = torch.nan
    before = snapshot(model)
    with pytest.raises(qz.QuantizeError, match=r"layer 'model\.layers\.1\.mlp\.experts\.2\.down_proj': a weight with"):
        qz.quantize(model, given("minmax"))
    assert_as_before()


CHANGES = {
    "experts": (lambda m: setattr(m, "num_experts", 5), r"'gate_up_proj' as \[4, 192, 64\].*\[5, 192, 64\]"),
    "transposed": (lambda m: setattr(m, "is_transposed", True), r"'gate_up_proj' as \[4, 192, 64\].*\[4, 96, 128\]"),
    "gate": (lambda m: setattr(m, "has_gate", False), r"'up_proj' as None.*\[4, 96, 64\]"),
    "bias": (lambda m: setattr(m, "has_bias", True), r"'gate_up_proj_bias' as None.*\[4, 192\]"),
    "no bias": (
        lambda m: m.register_parameter("down_proj_bias", nn.Parameter(torch.zeros(4, 64))),
        r"'down_proj_bias' as \[4, 64\].*None",
    ),
    "flat": (lambda m: setattr(m, "down_proj", nn.Parameter(torch.zeros(4, 64))), r"'down_proj' as \[4, 64\]"),
    "narrow": (
        lambda m: setattr(m, "gate_up_proj", nn.Parameter(torch.zeros(4, 190, 64))),
        r"'gate_up_proj' as \[4, 190, 64\].*\[4, 192, 64\]",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_attributes_that_do_not_fit_are_refused(change):
    model, (apply, told) = made("mixtral"), CHANGES[change]
    apply(model.model.layers[1].mlp.experts)
    before = snapshot(model)
    with pytest.raises(qz.QuantizeError, match=rf"module 'model\.layers\.1\.mlp\.experts': {told}"):
        qz.quantize(model, given("gptq"))
    assert_same_snapshot(snapshot(model), before)


@pytest.mark.parametrize("index", [-1, 5, 1000])
def test_an_expert_that_is_none_is_refused(index):
    model = made("mixtral")
    qz.quantize(model, RUNS["one pass"])
    run(model, BATCHES[:1])
    name, mixture = next(iter(zoo.experts(model).items()))
    states = [layer.statistics for layer in model.modules() if isinstance(layer, CalibrationLinear)]
    chosen = torch.tensor([[0, 1], [2, index]])

    def divert(_module, args):
        return args[0][:2], chosen, args[2][:2]

    handle = mixture.register_forward_pre_hook(divert)
    with pytest.raises(qz.QuantizeError, match=rf"module '{name}': expert {index}; accepted: 0 to 4"):
        run(model, BATCHES[1:])
    handle.remove()
    assert states == [layer.statistics for layer in model.modules() if isinstance(layer, CalibrationLinear)]
    run(model, BATCHES[1:])
    assert_same_solutions(model, calibrated("mixtral", "one pass"))


# Sequential calibration.


def fitted(kind, batches, asymmetric, seed=0):
    """A model calibrated layer by layer, and what full passes find for it."""
    options = {"asymmetric": asymmetric, "search_range": False}
    model, plain = made(kind, seed=seed), made(kind, seed=seed)
    given = config({"gptq": {"sequential": True, **options}}, weights=zoo.INT4, batch_num=len(batches))
    qz.quantize(model, given)
    run(model, batches)
    swap(plain, {module: view(name, module) for name, module in zoo.experts(plain).items()})
    wanted = oracle.solve(plain, gptq.algorithm(LayerSpec(Scheme(4)), gptq.Options(**options)), batches)
    found = solutions(model)
    assert found.keys() == wanted.keys()
    for name, solution in wanted.items():
        assert torch.equal(found[name].weight.codes, solution.weight.codes), name
        assert torch.equal(found[name].weight.scale, solution.weight.scale), name
    assert not qz.report(model).remarks
    return model


@pytest.mark.parametrize("asymmetric", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_are_fitted_to_the_quantized_ones_before(kind, asymmetric):
    batches = [batch(seed, tokens=40) for seed in (1, 2)]
    model = fitted(kind, batches, asymmetric)
    # The route of some tokens is another one.
    before, after = (zoo.routes(each, batches[0]) for each in (made(kind), model))
    assert any(not torch.equal(a, b) for name in before for a, b in zip(before[name], after[name], strict=True))


def test_experts_that_no_batch_calls_together_stay_in_lock_step():
    batches = [batch(seed, rows=1, tokens=9) for seed in (136, 137, 138)]
    called = [{(name, e) for name, chosen in zoo.routes(model, x).items() for e in chosen[0].unique().tolist()}
              for model in (made("qwen3_moe", seed=12), fitted("qwen3_moe", batches, 0.5, seed=12))
              for x in batches]  # fmt: skip
    apart = {(a, b) for calls in called[3:] for a in calls for b in calls if a[0] == b[0] and a < b}
    # Quantized routes call experts together of which no float route called both, though it called each.
    apart -= {(a, b) for calls in called[:3] for a in calls for b in calls}
    assert {pair for pair in apart if all(any(e in calls for calls in called[:3]) for e in pair)}


# GPT-2.


def with_linears():
    """The same GPT-2 with ``nn.Linear`` in the place of its own class."""
    import transformers.pytorch_utils as utils

    model = zoo.gpt2()
    for name, module in list(model.named_modules()):
        if isinstance(module, utils.Conv1D):
            layer = nn.Linear(*module.weight.shape)
            layer.weight, layer.bias = nn.Parameter(module.weight.detach().T), nn.Parameter(module.bias.detach())
            model.set_submodule(name, layer)
    return model


@pytest.mark.parametrize("name", ["minmax", "smoothquant", "awq", "one pass", "gptq"])
def test_conv1d_is_a_linear_layer(name):
    model, twin = zoo.gpt2(), with_linears()
    names = {n for n, m in model.named_modules() if type(m).__name__ == "Conv1D"}
    for each in (model, twin):
        qz.quantize(each, RUNS[name] | {"skip_layers": "lm_head"})
        run(each, BATCHES)
    assert {row.name for row in qz.report(model).rows} == names
    assert_same_solutions(model, twin)
    fake = logits(model, batch(3))
    assert torch.equal(fake, logits(twin, batch(3)))
    assert not qz.report(model).remarks
    with torch.no_grad():
        assert_converts_by_rounding_only(model, batch(3))
    assert {type(model.get_submodule(n)) for n in names} == {QuantizedLinear}


def test_conv1d_computes_as_before():
    model = zoo.gpt2()
    conv = model.transformer.h[0].mlp.c_fc
    conv.register_forward_hook(lambda _m, _a, y: y * 2)
    layer, x = view("c_fc", conv), randn(5, zoo.WIDTH)
    assert type(layer) is nn.Linear
    assert layer.weight.untyped_storage().data_ptr() == conv.weight.untyped_storage().data_ptr()
    assert layer.bias is not conv.bias
    assert layer.bias.data_ptr() == conv.bias.data_ptr()
    size = x.abs().double() @ conv.weight.abs().double() + conv.bias.abs()
    with torch.no_grad():
        assert ((layer(x) - conv(x)).abs() <= 2 * 2 * (zoo.WIDTH + 2) * U * size).all()


def test_a_refused_call_leaves_conv1d():
    model = zoo.gpt2()
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[0, 0] = torch.inf
    before = snapshot(model)
    with pytest.raises(qz.QuantizeError, match=r"layer 'transformer\.h\.1\.attn\.c_attn': a weight with NaN or inf"):
        qz.quantize(model, given("minmax"))
    assert_same_snapshot(snapshot(model), before)


@pytest.mark.parametrize(("name", "stateful"), [("one pass", False), ("gptq", False), ("gptq", True)])
def test_padding_does_not_count_for_experts(name, stateful):
    model = made("qwen3_moe")
    if stateful:
        # What writes to its buffers is calibrated in full passes.
        model.register_buffer("passes", torch.zeros(()))
        model.register_forward_pre_hook(lambda module, _: module.passes.add_(1) and None)
    qz.quantize(model, {**RUNS[name], "batch_num": 1})
    tokens, mask = batch(), torch.ones(2, 24, dtype=torch.int64)
    mask[0, :6] = 0
    with torch.no_grad():
        model(tokens, attention_mask=mask)
    assert any("full passes" in remark for remark in qz.report(model).remarks) == stateful
    for block in ("model.layers.0", "model.layers.1"):
        counts = {row.name.removeprefix(f"{block}."): row.tokens for row in qz.report(model).rows
                  if row.name.startswith(block)}  # fmt: skip
        assert counts["self_attn.q_proj"] == 48 - 6
        for kind in ("gate", "down"):
            # Each token has two experts.
            found = sum(n for layer, n in counts.items() if layer.startswith("mlp.experts") and f"{kind}_proj" in layer)
            assert found == 2 * (48 - 6)
