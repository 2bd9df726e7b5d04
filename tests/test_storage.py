"""A converted model on disk in the library's own format; what a state must fit is tested in ``test_from_state.py``."""

import json
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model

import quantize as qz
from tests.models import TENSOR, WEIGHTS, assert_same_snapshot, config, filled, mlp, randn, snapshot
from tests.test_export import converted as converted_llama
from tests.test_export import listed, llama
from tests.test_from_state import CONFIGS, IDS, Tied, converted


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_directory_makes_the_model(given, dtype, device, tmp_path):
    model = converted(given, dtype)
    qz.save(model, tmp_path / "out")
    with torch.device(device):
        fresh = Tied().to(dtype)
    qz.load(fresh, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(fresh(IDS), model(IDS))
    assert str(fresh) == str(model)
    assert qz.report(fresh).rows == qz.report(model).rows
    assert fresh.head.weight is fresh.embedding.weight
    assert fresh.first is fresh.again
    assert not any(t.is_meta for t in (*fresh.parameters(), *fresh.buffers()))


def test_a_language_model(tmp_path):
    model = converted_llama(tied=True, skip=("embed", "head"))
    qz.save(model, tmp_path / "out")
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in held) + ("model.embed_tokens.weight" in held) == 1
    fresh = llama(tied=True)
    qz.load(fresh, tmp_path / "out", kernel="reference")
    with torch.no_grad():
        assert torch.equal(fresh(IDS).logits, model(IDS).logits)
    assert {row.kernel for row in qz.report(fresh).rows} == {"reference"}


class Empty(torch.nn.Sequential):
    """Two buffers without any place in memory: they are not one."""

    def __init__(self):
        super().__init__(torch.nn.Linear(8, 8))
        torch.nn.init.zeros_(self[0].weight)
        self.register_buffer("none", torch.empty(0))
        self.register_buffer("nothing", torch.empty(0))


def test_what_is_exact_or_empty_comes_back(tmp_path):
    model, fresh = Empty(), Empty()
    qz.quantize(model, CONFIGS["minmax"])
    qz.convert(model)
    qz.save(model, tmp_path / "out")
    qz.load(fresh, tmp_path / "out")
    assert qz.report(fresh).rows == qz.report(model).rows
    assert qz.report(fresh).rows[0].weight_sqnr == float("inf")
    assert {"none", "nothing"} <= load_file(tmp_path / "out" / "model.safetensors").keys()


class Counter(torch.nn.Module):
    counted = 3

    def get_extra_state(self):
        return self.counted

    def set_extra_state(self, state):
        self.counted = state


def counting():
    return torch.nn.Sequential(torch.nn.Linear(8, 8), Counter())


def test_extra_state_of_others_is_kept_where_json_can_hold_it(tmp_path):
    model = counting()
    qz.quantize(model, CONFIGS["minmax"])
    qz.convert(model)
    model[1].counted = {"a": [5]}
    qz.save(model, tmp_path / "out")
    fresh = counting()
    qz.load(fresh, tmp_path / "out")
    assert fresh[1].counted == {"a": [5]}
    for counted, accepted in (({1, 2}, "what JSON can hold"), ((1, 2), "what JSON does not change")):
        model[1].counted = counted
        with pytest.raises(qz.QuantizeError, match=rf"'1._extra_state' in the state: .*; accepted: {accepted}"):
            qz.save(model, tmp_path / "other")
    assert listed(tmp_path) == ["out"]


class Versioned(torch.nn.BatchNorm1d):
    """Reads its state as that of the version that it was saved from."""

    _version = 7

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        self.read = local_metadata.get("version")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_modules_learn_the_version_of_their_state(tmp_path):
    model, fresh = (torch.nn.Sequential(torch.nn.Linear(8, 8), Versioned(8)) for _ in range(2))
    qz.quantize(model, CONFIGS["minmax"])
    qz.convert(model)
    model[1]._version = 5
    qz.save(model, tmp_path / "out")
    qz.load(fresh, tmp_path / "out")
    assert fresh[1].read == 5


def test_only_converted_models_are_saved(tmp_path):
    for model in (mlp(), 3):
        with pytest.raises(qz.QuantizeError, match="model: "):
            qz.save(model, tmp_path / "out")
    assert not listed(tmp_path)


def rewritten(path, header):
    """The file of tensors with another header, under the key that ``save`` uses; None: without."""
    with safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "quantize"}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    save_file(tensors, path, metadata=metadata | ({} if header is None else {"quantize": header}))


def broken(path):
    with safe_open(path, framework="pt") as file:
        rest = json.loads(file.metadata()["quantize"])
    yield "{", r"cannot be read \(JSONDecodeError"
    yield "[]", r"cannot be read \(AttributeError"
    yield "{}", "version None; accepted: version 2"
    yield '{"version": 2}', r"cannot be read \(KeyError"
    yield json.dumps({**rest, "version": 3}), "version 3; accepted: version 2"
    yield json.dumps({**rest, "aliases": {"a": "b"}}), r"cannot be read \(KeyError: 'b'\)"
    yield None, "version None; accepted: version 2 of save"


def test_other_directories_are_refused_and_the_model_stays(tmp_path):
    path = tmp_path / "out"
    qz.save(converted(CONFIGS["minmax"]), path)
    assert listed(path) == ["model.safetensors"]
    fresh, file = Tied(), path / "model.safetensors"
    before, kept = snapshot(fresh), file.read_bytes()
    for header, message in list(broken(file)):
        rewritten(file, header)
        with pytest.raises(qz.QuantizeError, match=message):
            qz.load(fresh, path)
        file.write_bytes(kept)
    file.write_text("nothing")
    with pytest.raises(qz.QuantizeError, match=r"cannot be read \(SafetensorError"):
        qz.load(fresh, path)
    file.unlink()
    with pytest.raises(FileNotFoundError):
        qz.load(fresh, path)
    file.write_bytes(kept)
    # As earlier versions wrote it.
    (path / "quantize.json").write_text("{}")
    rewritten(file, None)
    with pytest.raises(qz.QuantizeError, match=r"out: version 1; accepted: version 2 of save, .* no quantize\.json"):
        qz.load(fresh, path)
    (path / "quantize.json").unlink()
    file.write_bytes(kept)
    with pytest.raises(qz.QuantizeError, match="layer 'first': not in the model"):
        qz.load(mlp(), path)
    assert_same_snapshot(before, snapshot(fresh))
    qz.load(fresh, path)


def twins(given, dtype):
    """A converted model, and another of the same format, which holds other numbers."""
    model, other = converted(given, dtype), converted(given, dtype)
    changed = {key: t if "extra" in key else t.flip(0) for key, t in other.state_dict().items()}
    other.load_state_dict(changed)
    other.first.row = replace(other.first.row, tokens=7, algorithm="another")
    with torch.no_grad():
        assert not torch.equal(other(IDS), model(IDS))
    return model, other


def assert_same(fresh, model):
    with torch.no_grad():
        assert torch.equal(fresh(IDS), model(IDS))
    assert qz.report(fresh).rows == qz.report(model).rows
    assert fresh.head.weight is fresh.embedding.weight
    assert fresh.first is fresh.again


every_model = pytest.mark.parametrize(
    ("given", "dtype"),
    [(given, dtype) for given in CONFIGS.values() for dtype in (torch.float32, torch.bfloat16)],
    ids=[f"{name}-{dtype}" for name in CONFIGS for dtype in ("float32", "bfloat16")],
)


@every_model
def test_safetensors_saves_and_loads_whole_models(given, dtype, tmp_path):
    model, other = twins(given, dtype)
    save_model(model, tmp_path / "model.safetensors")
    assert sum(key.endswith(".codes") for key in load_file(tmp_path / "model.safetensors")) == 1
    assert load_model(other, tmp_path / "model.safetensors") == (set(), [])
    assert_same(other, model)
    fresh = Tied().to(dtype)
    qz.convert(fresh, from_state=load_file(tmp_path / "model.safetensors"))
    assert_same(fresh, model)


def test_layers_that_share_what_was_learned_are_saved_each_for_itself(tmp_path):
    model, other = (siblings(seed) for seed in (0, 1))
    save_model(model, tmp_path / "model.safetensors")
    load_model(other, tmp_path / "model.safetensors")
    x = randn(5, 64)
    assert torch.equal(other(x), model(x))


class Siblings(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(64, 32), torch.nn.Linear(64, 32)

    def forward(self, x):
        return self.a(x) + self.b(x)


def siblings(seed):
    model = filled(Siblings(), seed)
    qz.quantize(model, config("smoothquant", inputs=TENSOR, weights={**WEIGHTS, "strategy": "tensor"}))
    model(randn(40, 64, seed=seed))
    qz.convert(model)
    return model


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@every_model
def test_distributed_checkpoints_are_read_in_place(given, dtype, tmp_path):
    model, other = twins(given, dtype)
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "out", no_dist=True)
    state = other.state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "out", no_dist=True)
    other.load_state_dict(state)
    assert_same(other, model)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_transformers_saves_what_a_state_is_read_from(tied, device, tmp_path):
    model = converted_llama(dtype=torch.bfloat16, tied=tied, skip=("embed", "head"))
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in state) != tied
    fresh = llama(torch.bfloat16, tied=tied)
    if device == "meta":
        with torch.device("meta"):
            empty = type(fresh)(fresh.config).bfloat16()
        # No state holds the frequencies of the positions.
        empty.model.rotary_emb, fresh = fresh.model.rotary_emb, empty
    qz.convert(fresh, from_state=state, kernel="reference")
    with torch.no_grad():
        assert torch.equal(fresh(IDS).logits, model(IDS).logits)
    assert (fresh.lm_head.weight is fresh.model.embed_tokens.weight) == tied
    assert qz.report(fresh).rows == qz.report(model).rows
