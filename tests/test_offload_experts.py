"""Mixtures of experts and GPT-2 that accelerate has dispatched: linear layers on parts of what its hooks keep."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

import quantize as qz
from quantize.shell import offload
from quantize.shell.calibrate.layer import CalibrationLinear
from quantize.shell.deploy.layer import QuantizedLinear
from quantize.shell.views import Experts
from tests.models import assert_same_snapshot, config, snapshot
from tests.test_offload import CPU, WAYS, accelerate, codes, dispatched, equal
from tests.zoo import experts as zoo
from tests.zoo.experts import batch, given, logits, run

# Routers and embeddings are named in the warning, rare experts in another.
pytestmark = pytest.mark.filterwarnings("ignore::quantize.QuantizeWarning")

KINDS = {kind: functools.partial(zoo.made, kind) for kind in zoo.KINDS} | {"gpt2": zoo.gpt2}
BATCHES = [batch(1), batch(2)]


def calibrated(model, name, **rest):
    qz.quantize(model, given(name, **rest))
    return run(model, BATCHES)


@functools.cache
def expected(kind, name, **rest):
    """The converted model that was never dispatched; before, its report and what it computed."""
    model = calibrated(KINDS[kind](), name, **rest)
    told, before = qz.report(model), logits(model, batch(3))
    qz.convert(model)
    return model, told, before


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["minmax", "awq", "one pass", "gptq"])
@pytest.mark.parametrize("kind", KINDS)
def test_results_are_those_of_the_model_in_memory(kind, name, way, tmp_path):
    plain, told, before = expected(kind, name)
    model = dispatched(KINDS[kind](), way, tmp_path / "kept")
    floats = logits(model, batch(3))
    qz.quantize(model, given(name))
    if name != "minmax":
        # By the experts one after the other, and all of them at once.
        torch.testing.assert_close(logits(copy.deepcopy(model), batch(3)), floats, rtol=1e-4, atol=1e-5)
    run(model, BATCHES)
    # Which layers there are, the share of weights that stay, lock step: all as in memory.
    assert qz.report(model).as_dict() == told.as_dict()
    assert torch.equal(logits(model, batch(3)), before)
    qz.convert(model)
    assert equal(codes(model), codes(plain))
    assert torch.equal(logits(model, batch(3)), logits(plain, batch(3)))
    qz.save(model, tmp_path / "saved")
    fresh = KINDS[kind]()
    qz.load(fresh, tmp_path / "saved")
    assert torch.equal(logits(fresh, batch(3)), logits(plain, batch(3)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("skip", ["experts.1.", "down_proj"])
def test_skipped_experts_stay_where_they_are_kept(skip, way, tmp_path):
    plain, told, _ = expected("gpt_oss", "gptq", skip_layers=skip)
    model = calibrated(dispatched(zoo.made("gpt_oss"), way, tmp_path / "kept"), "gptq", skip_layers=skip)
    assert qz.report(model).as_dict() == told.as_dict()
    qz.convert(model)
    for block, kept in zip(model.model.layers, (way != "part", True), strict=True):
        left = [m for m in block.mlp.experts.modules() if type(m) is nn.Linear]
        assert len(left) == (3 if skip == "experts.1." else 4)
        assert all(p.is_meta == kept for layer in left for p in layer.parameters())
    for again in (model, copy.deepcopy(model)):
        assert torch.equal(logits(again, batch(3)), logits(plain, batch(3)))
    qz.save(model, tmp_path / "saved")
    fresh = zoo.made("gpt_oss")
    qz.load(fresh, tmp_path / "saved")
    assert torch.equal(logits(fresh, batch(3)), logits(plain, batch(3)))


@pytest.mark.parametrize("way", ["cpu", "disk"])
@pytest.mark.parametrize("kind", ["gpt_oss", "gpt2"])
def test_codes_are_kept_elsewhere_on_demand(kind, way, tmp_path):
    plain, *_ = expected(kind, "gptq")
    model = calibrated(dispatched(KINDS[kind](), way, tmp_path), "gptq")
    qz.convert(model, offload=True)
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert {layer.away for layer in layers} == {offload.OffloadedStorage(CPU, tmp_path if way == "disk" else None)}
    assert torch.equal(logits(model, batch(3)), logits(plain, batch(3)))
    assert equal(codes(model), codes(plain))
    # Nothing of what was kept is held by a converted layer.
    assert pickle.loads(pickle.dumps(layers[-2])).away == layers[-2].away


def test_of_a_file_no_more_than_one_expert_is_read(tmp_path, monkeypatch):
    loader = accelerate.utils.OffloadedWeightsLoader
    read = loader.__getitem__

    def counted(self, key):
        assert ".experts." not in key
        return read(self, key)

    model = accelerate.disk_offload(zoo.made("gpt_oss", torch.bfloat16), tmp_path, CPU)
    plain = calibrated(zoo.made("gpt_oss", torch.bfloat16), "gptq")
    monkeypatch.setattr(loader, "__getitem__", counted)
    calibrated(model, "gptq", skip_layers="experts.1.gate")
    for name, module in zoo.experts(model).items():
        for number in range(4):
            layer, same = (each.get_submodule(f"{name}.{number}.up_proj") for each in (model, plain))
            found = layer.float_weight()
            assert torch.equal(found, same.weight)
            assert found.untyped_storage().nbytes() == module.num_experts * 2 * same.weight.nbytes
            assert layer.weight.is_meta
    assert logits(model, batch(3)).isfinite().all()


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "gpt2"])
def test_a_checkpoint_that_transformers_places(kind, tmp_path):
    plain = KINDS[kind]()
    plain.save_pretrained(tmp_path / "checkpoint")
    base, blocks, rest = ("transformer", "h", ("wte", "wpe", "ln_f")) if kind == "gpt2" else (
        "model", "layers", ("embed_tokens", "norm", "rotary_emb"))  # fmt: skip
    places = {f"{base}.{name}": "cpu" for name in rest} | {"lm_head": "cpu"}
    places |= {f"{base}.{blocks}.0": "disk", f"{base}.{blocks}.1": "disk"}
    model = type(plain).from_pretrained(
        tmp_path / "checkpoint", device_map=places, offload_folder=tmp_path / "kept", dtype=torch.float32
    )
    calibrated(model.eval(), "gptq")
    assert {layer.weight.is_meta for name, layer in model.named_modules()
            if isinstance(layer, CalibrationLinear) and f".{blocks}." in name} == {True}  # fmt: skip
    qz.convert(model)
    assert torch.equal(logits(model, batch(3)), logits(expected(kind, "gptq")[0], batch(3)))


@pytest.mark.parametrize("kind", ["gpt_oss", "gpt2"])
@pytest.mark.parametrize("way", WAYS)
def test_accelerate_takes_its_hooks_back(kind, way, tmp_path):
    plain, model = KINDS[kind](), dispatched(KINDS[kind](), way, tmp_path)
    calibrated(model, "gptq", skip_layers="experts.1.")
    accelerate.hooks.remove_hook_from_submodules(model)
    assert not any(p.is_meta for p in model.parameters())
    if kind == "gpt2":
        assert torch.equal(model.transformer.h[1].mlp.c_fc.weight, plain.transformer.h[1].mlp.c_fc.weight.T)
    else:
        mine, theirs = (each.model.layers[1].mlp.experts for each in (model, plain))
        assert torch.equal(mine.get_submodule("2.gate_proj").weight, theirs.gate_up_proj[2, :, ::2].T)
        assert torch.equal(mine.get_submodule("2.gate_proj").bias, theirs.gate_up_proj_bias[2, ::2])
    qz.convert(model)
    found, *_ = expected(kind, "gptq", skip_layers="experts.1.")
    assert torch.equal(logits(model, batch(3)), logits(found, batch(3)))


class Counts(accelerate.hooks.ModelHook):
    """Doubles what a module is given and gives, and counts."""

    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return (args[0] * 2, *args[1:]), kwargs

    def post_forward(self, module, output):
        return output * 2


@pytest.mark.parametrize("kind", ["mixtral", "gpt2"])
@pytest.mark.parametrize("way", WAYS)
def test_other_hooks_run_once_for_a_call_of_the_module(kind, way, tmp_path):
    models, found = [], []
    for model in (KINDS[kind](), dispatched(KINDS[kind](), way, tmp_path)):
        module = model.transformer.h[0].mlp.c_fc if kind == "gpt2" else model.model.layers[0].mlp.experts
        hook = Counts()
        accelerate.hooks.add_hook_to_module(module, hook, append=True)
        models.append(calibrated(model, "one pass"))
        qz.convert(model)
        before = hook.calls
        found.append(logits(model, batch(3)))
        assert (before, hook.calls) == (len(BATCHES), len(BATCHES) + 1)
    assert torch.equal(*found)
    assert equal(*map(codes, models))


def test_experts_whose_parameters_are_fetched_with_all_below_stay_in_floating_point():
    model = accelerate.cpu_offload(zoo.made("mixtral"), CPU, preload_module_classes=["MixtralExperts"])
    with pytest.warns(
        qz.QuantizeWarning, match=r"experts' .its forward is replaced .* by a hook of accelerate: its 3-D"
    ):
        qz.quantize(model, given("gptq"))
    run(model, BATCHES)
    assert not any(isinstance(module, Experts) for module in model.modules())
    qz.convert(model)
    assert torch.equal(logits(model, batch(3)), logits(expected("mixtral", "gptq", skip_layers="experts")[0], batch(3)))


@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_a_refused_call_leaves_everything(way, tmp_path):
    model = zoo.made("gpt_oss")
    model.model.layers[1].mlp.experts.gate_up_proj.data[2, 3, 5] = torch.nan
    model = dispatched(model, way, tmp_path)
    before = snapshot(model)
    hooks = [module.__dict__.get("_hf_hook") for module in model.modules()]
    with pytest.raises(qz.QuantizeError, match=r"layers\.1\.mlp\.experts\.2\.up_proj': a weight with NaN or inf"):
        qz.quantize(model, given("gptq"))
    now = snapshot(model)
    # Tensors on the meta device have no values.
    assert_same_snapshot({**before, "values": []}, {**now, "values": []})
    assert [module.__dict__.get("_hf_hook") for module in model.modules()] == hooks
    if way == "disk":
        for file in tmp_path.glob("*experts*"):
            file.unlink()
        told = r"experts\.0\.gate_proj': its offloaded weight cannot be read .*accepted: the files or tensors"
        with pytest.raises(qz.QuantizeError, match=told):
            qz.quantize(model, given("gptq"))


@pytest.mark.parametrize("way", [*WAYS, "one of two", "other of two"])
def test_tied_weights_that_are_kept_elsewhere_count_once(way, tmp_path):
    plain, model = zoo.gpt2(), zoo.gpt2()
    if "of two" in way:
        places = dict(
            zip(("transformer", "lm_head"), ("disk", "cpu") if way == "one of two" else ("cpu", "disk"), strict=True)
        )
        model = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    else:
        model = dispatched(model, way, tmp_path)
    for each in (plain, model):
        qz.quantize(each, config(skip_layers="c_proj"))
    mine, theirs = qz.report(model), qz.report(plain)
    assert mine.elements == theirs.elements == sum(p.numel() for p in zoo.gpt2().parameters() if p.ndim > 1)
    assert [(row.name, row.elements) for row in mine.skipped] == [(row.name, row.elements) for row in theirs.skipped]


@pytest.mark.parametrize("skip", ["lm_head", "experts"])
def test_exports_are_those_of_the_model_in_memory(skip, tmp_path):
    exported = {}
    for name in ("here", "kept"):
        model = zoo.made("mixtral")
        model = model if name == "here" else accelerate.disk_offload(model, tmp_path / "kept", CPU)
        qz.quantize(model, given("minmax", skip_layers=skip))
        qz.convert(model)
        qz.export(model, tmp_path / f"exported {name}", format="compressed-tensors")
        exported[name] = {file.name: file.read_bytes() for file in (tmp_path / f"exported {name}").iterdir()}
    assert exported["here"] == exported["kept"]
