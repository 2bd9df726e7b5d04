"""Models that accelerate has dispatched: calibrated, solved and converted as they would be in memory."""

import copy
import functools
import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

import quantize as qz
from quantize.core import ALGORITHMS as MODULES
from quantize.shell import offload
from tests.models import TENSOR, TOKEN, assert_same_snapshot, config, mlp, randn, snapshot

accelerate = pytest.importorskip("accelerate")
CPU = torch.device("cpu")
ALGORITHMS = {
    "minmax": ("minmax", None),
    "gptq one pass": ({"gptq": {"sequential": False}}, None),
    "gptq": ("gptq", None),
    "awq": ("awq", None),
    "awq fold": ({"awq": {"fold": True, "sequential": False}}, None),
    "smoothquant": ("smoothquant", TENSOR),
    "smoothquant fold": ({"smoothquant": {"fold": True}}, TOKEN),
}
WAYS = ["cpu", "disk", "mixed", "part"]


def llama():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()


def dispatched(model, way, folder):
    """``model`` with all parameters in host memory or on disk, or some of them in each, or a part on disk."""
    if way == "cpu":
        return accelerate.cpu_offload(model, CPU)
    if way == "disk":
        return accelerate.disk_offload(model, folder, CPU)
    names = [name for name, module in model.named_modules()
             if name.count(".") < 3 and (not list(module.children()) or name.split(".")[-1].isdigit())
             and not any(part.isdigit() for part in name.split(".")[:-1])]  # fmt: skip
    places = {name: ("disk", "cpu")[i % 2] for i, name in enumerate(names)}
    # What is to be on the main device is in place; accelerate compares it with the name.
    main = CPU if way == "mixed" else "cpu"
    return accelerate.dispatch_model(model, places, main_device=main, offload_dir=folder)


def tokens(seed):
    return torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(seed))


def given(model):
    """Three batches for ``model``, by keyword for a language model."""
    if isinstance(model, nn.Sequential):
        return [((randn(12, 64, seed=seed),), {}) for seed in range(3)]
    return [((), {"input_ids": tokens(seed)}) for seed in range(3)]


def logits(model):
    args, kwargs = given(model)[2]
    with torch.no_grad():
        found = model(*args, **kwargs)
    return found if isinstance(found, torch.Tensor) else found.logits


def calibrated(model, algorithm, inputs=None, **rest):
    qz.quantize(model, config(algorithm, inputs=inputs, batch_num=2, **rest))
    with torch.no_grad():
        for args, kwargs in given(model)[:2]:
            model(*args, **kwargs)
    return model


def codes(model):
    return {key: value for key, value in model.state_dict().items() if key.endswith((".codes", ".scale", ".smoothing"))}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@functools.cache
def expected(make, name):
    """Report, outputs before and after ``convert``, and codes of the model that was never dispatched."""
    model = calibrated(make(), *ALGORITHMS[name])
    told, before = qz.report(model), logits(model)
    qz.convert(model)
    return told, before, logits(model), codes(model)


@pytest.mark.filterwarnings("ignore:.*stay in floating point", "ignore:not folded")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("make", [llama, mlp])
def test_results_are_those_of_the_model_in_memory(make, name, way, tmp_path):
    report, before, after, found = expected(make, name)
    model = calibrated(dispatched(make(), way, tmp_path), *ALGORITHMS[name])
    # Lock step and folds among the rest: what was not done as asked is in the report.
    assert qz.report(model).as_dict() == report.as_dict()
    assert torch.equal(logits(model), before)
    qz.convert(model)
    assert equal(codes(model), found)
    assert torch.equal(logits(model), after)


@pytest.mark.filterwarnings("ignore:.*stay in floating point", "ignore:not folded")
def test_a_fold_into_what_is_kept_elsewhere_leaves_it_as_it_is(tmp_path):
    model = accelerate.disk_offload(llama(), tmp_path, CPU)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    calibrated(model, *ALGORITHMS["smoothquant fold"])
    assert any("folded" in row.notes for row in qz.report(model).rows)
    with pytest.raises(qz.QuantizeError, match="model: scales are folded into weights that are offloaded; accepted"):
        qz.save_calibration(model, tmp_path / "calibration.pt")
    qz.convert(model)
    assert {path: path.read_bytes() for path in files} == files
    assert {*tmp_path.iterdir()} == {*files}


@pytest.mark.parametrize("way", WAYS)
def test_layers_stay_where_they_are_kept(way, tmp_path):
    plain, model = mlp(), dispatched(mlp(), way, tmp_path)
    kept = [module for module in model if offload.offload_hook(module) is not None]
    maps = {
        module: {key: offload.offload_hook(module).weights_map[key] for key in module._parameters} for module in kept
    }
    calibrated(model, "gptq")
    layers = [module for module in model if offload.offload_hook(module) is not None]
    assert len(layers) == len(kept) > 0
    for layer, old in zip(layers, kept, strict=True):
        assert layer.weight.is_meta
        assert not any(leaf.is_meta for leaf in (layer.solution.weight.codes, layer.solution.weight.scale))
        now = offload.offload_hook(layer).weights_map
        assert all(torch.equal(now[key], value) for key, value in maps[old].items())
    # accelerate takes its hooks back, here as from any layer.
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(model[0].weight, plain[0].weight)
    qz.convert(model)
    assert torch.equal(logits(model), expected(mlp, "gptq")[2])


@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_codes_are_kept_elsewhere_on_demand(way, tmp_path):
    model = calibrated(dispatched(mlp(), way, tmp_path), "gptq")
    qz.convert(model, offload=True)
    for layer in (model[0], model[2]):
        assert layer.away == offload.OffloadedStorage(CPU, str(tmp_path) if way == "disk" else None) or way == "disk"
        assert layer.bias.device == CPU
        assert not any(t.is_meta for t in layer.buffers())
    assert torch.equal(logits(model), expected(mlp, "gptq")[2])
    assert equal(codes(model), expected(mlp, "gptq")[3])
    for again in (copy.deepcopy(model), model.double().float()):
        assert torch.equal(logits(again), expected(mlp, "gptq")[2])
    assert pickle.loads(pickle.dumps(model[0])).away == model[0].away


def test_offload_needs_something_that_is_offloaded():
    model = calibrated(mlp(), "gptq")
    for wrong in (True, "cpu"):
        with pytest.raises(qz.QuantizeError, match=rf"offload: {wrong!r}; accepted: False, or True for a calibrated"):
            qz.convert(model, offload=wrong)
    qz.convert(model, offload=False)


def test_kept_tensors_are_the_same_in_files(tmp_path):
    away = offload.OffloadedStorage(CPU, str(tmp_path))
    held = {"a": randn(6, 5).T, "b": randn(0), "c": torch.arange(7, dtype=torch.int8)}
    put = away.put(held)
    assert not [*tmp_path.iterdir()]
    for key, tensor in away.here(put).items():
        assert torch.equal(tensor, held[key])
        assert tensor.stride() == held[key].stride()


def test_skipped_layers_go_on_under_their_hooks(tmp_path):
    model = accelerate.disk_offload(mlp(), tmp_path, CPU)
    old = model[2]
    calibrated(model, "minmax", skip_layers="2")
    qz.convert(model)
    assert model[2] is old
    assert old.weight.is_meta
    plain = mlp()
    qz.quantize(plain, config(skip_layers="2"))
    qz.convert(plain)
    assert torch.equal(logits(model), logits(plain))
    assert qz.report(model).skipped == qz.report(plain).skipped


def test_several_hooks_on_one_layer(tmp_path):
    class Doubles(accelerate.hooks.ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Doubles.calls += 1
            return (args[0] * 2,), kwargs

        def post_forward(self, module, output):
            return output / 2

    def make():
        model = accelerate.cpu_offload(mlp(), CPU)
        accelerate.hooks.add_hook_to_module(model[2], Doubles(), append=True)
        return model

    model, plain = make(), mlp()
    before = logits(model)
    x = randn(12, 64)
    calibrated(model, "minmax", TENSOR)
    assert Doubles.calls > 0
    qz.convert(model)
    now = Doubles.calls
    assert (logits(model) - before).norm() < 0.02 * before.norm()
    assert Doubles.calls == now + 1
    assert offload.offload_hook(model[2]) is None
    assert plain(x).shape == model(x).shape


def test_a_forward_that_is_replaced_beside_the_hook_is_refused():
    def patched(model):
        forward = model[2].forward
        model[2].forward = lambda x: forward(x) + 1
        return model

    before, after = accelerate.cpu_offload(patched(mlp()), CPU), patched(accelerate.cpu_offload(mlp(), CPU))
    for model in (before, after):
        with pytest.warns(qz.QuantizeWarning, match="'2' .its forward is replaced on the instance"):
            qz.quantize(model, config())
        assert [row.name for row in qz.report(model).rows] == ["0"]


def test_a_weight_that_the_hook_of_another_module_keeps_stays_as_it_is():
    model = accelerate.cpu_offload(nn.Sequential(mlp(), nn.Linear(32, 64)), CPU, preload_module_classes=["Sequential"])
    with pytest.raises(qz.QuantizeError, match=r"nothing to quantize .*on the meta device, without data"):
        qz.quantize(model, config())
    model = nn.Sequential(mlp(), nn.Linear(32, 64)).eval()
    model = accelerate.dispatch_model(model, {"0": "cpu", "1": "cpu"}, main_device="cpu", force_hooks=True)
    hooks = [module._hf_hook for module in (model, model[0])]
    calibrated(model, "minmax")
    qz.convert(model)
    assert logits(model).shape == (12, 64)
    assert [module._hf_hook for module in (model, model[0])] == hooks


def test_files_that_are_gone(tmp_path):
    folder = tmp_path / "kept"
    model = accelerate.disk_offload(mlp(), folder, CPU)
    state = snapshot(model)
    moved = shutil.move(folder, tmp_path / "moved")
    message = r"layer '0': its offloaded weight cannot be read \(FileNotFoundError.*accepted: the files or tensors"
    with pytest.raises(qz.QuantizeError, match=message):
        qz.quantize(model, config())
    shutil.move(moved, folder)
    assert_same_tensors(state, snapshot(model))
    # And after half of the batches.
    qz.quantize(model, config("gptq", batch_num=3))
    for args, kwargs in given(model)[:2]:
        model(*args, **kwargs)
    moved = shutil.move(folder, tmp_path / "moved")
    with pytest.raises(qz.QuantizeError, match=message):
        qz.finish(model)
    assert [row.stage for row in qz.report(model).rows] == ["calibrating"] * 2
    shutil.move(moved, folder)
    qz.finish(model)
    qz.convert(model)
    assert equal(codes(model), expected(mlp, "gptq")[3])


def assert_same_tensors(a, b):
    # Tensors on the meta device have no values.
    assert_same_snapshot({**a, "values": []}, {**b, "values": []})


def test_parameters_of_one_layer_that_lie_apart(tmp_path):
    model = mlp()
    model[2].bias = nn.Parameter(torch.empty(32, device="meta"))
    with pytest.raises(qz.QuantizeError, match="layer '2': its bias is on the meta device, without data; accepted"):
        qz.quantize(model, config())
    assert type(model[0]) is nn.Linear
    model = accelerate.cpu_offload(mlp(), CPU)
    kept = offload.offload_hook(model[2]).weights_map.dataset
    bias = kept.pop("2.bias")
    with pytest.raises(qz.QuantizeError, match=r"layer '2': its offloaded bias cannot be read \(KeyError: '2\.bias'\)"):
        qz.quantize(model, config())
    kept["2.bias"] = bias
    qz.convert(calibrated(model, "gptq"))
    assert equal(codes(model), expected(mlp, "gptq")[3])


def test_a_bias_on_another_device_than_the_weight(monkeypatch):
    model = mlp()
    read = offload.bias

    def elsewhere(layer, name):
        return read(layer, name).to("meta") if name == "2" else read(layer, name)

    monkeypatch.setattr(offload, "bias", elsewhere)
    with pytest.raises(qz.QuantizeError, match="layer '2': its weight on cpu, its bias on meta; accepted: one device"):
        qz.quantize(model, config())


def test_nan_is_found_where_it_is_kept(tmp_path):
    model = mlp()
    model[2].weight.data[3, 4] = torch.nan
    model = accelerate.disk_offload(model, tmp_path, CPU)
    with pytest.raises(qz.QuantizeError, match="layer '2': a weight with NaN or inf"):
        qz.quantize(model, config())
    assert type(model[2]) is nn.Linear


@pytest.mark.parametrize("algorithm", ["gptq", {"gptq": {"sequential": False}}])
def test_an_interrupted_solve_goes_on(algorithm, tmp_path, monkeypatch):
    name, gptq = "gptq" if algorithm == "gptq" else "gptq one pass", MODULES["gptq"]
    model, solve, calls = accelerate.disk_offload(mlp(), tmp_path, CPU), gptq.solve_together, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return solve(*args, **kwargs)

    monkeypatch.setattr(gptq, "solve_together", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrated(model, algorithm)
    assert all(layer.weight.is_meta for layer in (model[0], model[2]))
    qz.finish(model)
    qz.convert(model)
    assert equal(codes(model), expected(mlp, name)[3])


def test_a_calibration_goes_on_in_a_model_that_is_dispatched_alike(tmp_path):
    def begun(model):
        qz.quantize(model, config("gptq", batch_num=2))
        return model

    file = tmp_path / "calibration.pt"
    model = begun(accelerate.disk_offload(mlp(), tmp_path / "kept", CPU))
    (args, _), (more, _), _ = given(model)
    model(*args)
    qz.save_calibration(model, file)
    fresh = begun(accelerate.disk_offload(mlp(), tmp_path / "kept", CPU))
    qz.load_calibration(fresh, file)
    fresh(*more)
    # Solved layers are saved as well.
    qz.save_calibration(fresh, file)
    last = begun(accelerate.disk_offload(mlp(), tmp_path / "kept", CPU))
    qz.load_calibration(last, file)
    qz.convert(last)
    assert equal(codes(last), expected(mlp, "gptq")[3])
    with pytest.raises(qz.QuantizeError, match=r"'0\.weight' is without its data; accepted: .* dispatched as this one"):
        qz.load_calibration(begun(mlp()), file)


@pytest.mark.filterwarnings("ignore:.*stay in floating point")
@pytest.mark.parametrize("way", WAYS)
def test_a_converted_model_is_saved_with_what_is_kept_elsewhere(way, tmp_path):
    model = calibrated(dispatched(llama(), way, tmp_path / "kept"), "minmax")
    qz.convert(model)
    qz.save(model, tmp_path / "saved")
    qz.export(model, tmp_path / "exported", format="compressed-tensors")
    fresh = llama()
    qz.load(fresh, tmp_path / "saved")
    assert torch.equal(logits(fresh), logits(model))
    # Weights that hooks keep would come back at every call.
    with pytest.raises(qz.QuantizeError, match=r"module .*: its parameters are offloaded; accepted: a model before"):
        qz.load(dispatched(llama(), "cpu", None), tmp_path / "saved")


@pytest.mark.filterwarnings("ignore:.*stay in floating point")
def test_a_checkpoint_that_transformers_places(tmp_path):
    llama().save_pretrained(tmp_path / "checkpoint")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "disk",
              "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip
    model = type(llama()).from_pretrained(tmp_path / "checkpoint", device_map=places, offload_folder=tmp_path / "kept")
    assert model.lm_head.weight.is_meta
    calibrated(model.eval(), "gptq")
    qz.convert(model)
    assert torch.equal(logits(model), expected(llama, "gptq")[2])


class Sum(nn.Module):
    """Has a parameter of its own, around layers: its hook puts it back where it is kept when the call ends."""

    def __init__(self):
        super().__init__()
        self.shift, self.layers = nn.Parameter(torch.zeros(64)), mlp(out=64)

    def forward(self, x):
        return self.layers(x) + self.shift


def test_a_parameter_around_layers_in_lock_step(tmp_path):
    def make():
        return nn.Sequential(Sum(), nn.Linear(64, 8)).requires_grad_(False).eval()

    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = make()
    model = calibrated(accelerate.disk_offload(copy.deepcopy(plain), tmp_path, CPU), "gptq")
    calibrated(plain, "gptq")
    assert qz.report(model).remarks == ()
    assert model[0].shift.is_meta
    assert offload.offload_hook(model[0]) is not None
    qz.convert(model)
    qz.convert(plain)
    assert equal(codes(model), codes(plain))


def test_buffers_that_are_kept_elsewhere(tmp_path):
    def make():
        return nn.Sequential(nn.Linear(64, 48), nn.BatchNorm1d(48), nn.Linear(48, 8)).eval()

    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = make()
    model = accelerate.cpu_offload(copy.deepcopy(plain), CPU, offload_buffers=True)
    assert model[1].running_mean.is_meta
    for each in (plain, model):
        calibrated(each, "gptq")
        assert qz.report(each).remarks == ()
        qz.convert(each)
    assert equal(codes(model), codes(plain))
    qz.save(model, tmp_path / "saved")
    fresh = make()
    qz.load(fresh, tmp_path / "saved")
    assert torch.equal(logits(fresh), logits(plain))


MEMORY = """
import gc, json, os, sys, threading, time
import torch, accelerate
from torch import nn
from accelerate.utils import offload_weight, save_offload_index
import quantize as qz
torch.set_num_threads(1)
folder, algorithm = sys.argv[1:]
# Wide layers: the statistics of gptq, [c, c] each, are small beside them.
n, c, depth = 4096, 256, 100
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(c, n, bias=False)
    def forward(self, x):
        return x + self.up(x).unflatten(-1, (n // c, c)).mean(-2)
with accelerate.init_empty_weights():
    model = nn.Sequential(*(Block() for _ in range(depth))).eval()
index = {}
for i in range(depth):
    index = offload_weight(torch.randn(n, c) / c**0.5, f"{i}.up.weight", folder, index)
save_offload_index(index, folder)
accelerate.disk_offload(model, folder, torch.device("cpu"))
def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
x = torch.randn(16, c)
with torch.no_grad():
    model(x)
gc.collect()
start, peak, done = rss(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, rss())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
weights = {"type": "int8", "symmetric": True, "strategy": "channel"}
qz.quantize(model, {"quant_cfg": {"weights": weights, "inputs": None}, "algorithm": json.loads(algorithm)})
with torch.no_grad():
    model(x)
str(qz.report(model))
qz.convert(model)
with torch.no_grad():
    model(x)
done = True
thread.join()
print(depth * n * c * 4, peak - start)
"""


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/statm").exists(), reason="reads how much memory is resident from /proc"
)
@pytest.mark.parametrize("algorithm", ['"minmax"', '{"gptq": {"sequential": false}}'])
def test_the_float_weights_are_never_whole_in_memory(algorithm, tmp_path):
    # Layers of this size are so small that the holes between their codes would be counted: not where each has pages.
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", MEMORY, tmp_path, algorithm],
                         env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
                         capture_output=True, text=True, check=True)  # fmt: skip
    size, peak = map(int, run.stdout.split())
    assert size > 390e6
    assert peak < size / 2
    print(f"{algorithm}: {peak / 1e6:.0f} MB above the start, of {size / 1e6:.0f} MB of weights")
