"""A converted model on disk in the library's own format; what a state must fit is tested in ``test_from_state.py``."""

import json

import pytest
import torch
from safetensors.torch import load_file

import quantize as qz
from tests.models import assert_same_snapshot, mlp, snapshot
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
    for counted, accepted in (({1, 2}, "what JSON can hold"), ((1, 2), "what JSON gives back as it was")):
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


def broken(path):
    yield "quantize.json", "{", r"cannot be read \(JSONDecodeError"
    yield "quantize.json", "{}", r"cannot be read \(KeyError"
    yield "quantize.json", "[]", r"cannot be read \(TypeError"
    rest = json.loads((path / "quantize.json").read_text())
    yield "quantize.json", json.dumps({**rest, "version": 2}), "version 2; accepted: version 1"
    yield "quantize.json", json.dumps({**rest, "aliases": {"a": "b"}}), r"cannot be read \(KeyError: 'b'\)"
    yield "model.safetensors", "nothing", r"cannot be read \(SafetensorError"


def test_other_directories_are_refused_and_the_model_stays(tmp_path):
    path = tmp_path / "out"
    qz.save(converted(CONFIGS["minmax"]), path)
    fresh = Tied()
    before = snapshot(fresh)
    for file, text, message in list(broken(path)):
        kept = (path / file).read_bytes()
        (path / file).write_text(text)
        with pytest.raises(qz.QuantizeError, match=message):
            qz.load(fresh, path)
        (path / file).write_bytes(kept)
    for file in ("quantize.json", "model.safetensors"):
        (path / file).rename(path / "away")
        with pytest.raises(FileNotFoundError):
            qz.load(fresh, path)
        (path / "away").rename(path / file)
    with pytest.raises(qz.QuantizeError, match="layer 'first': not in the model"):
        qz.load(mlp(), path)
    assert_same_snapshot(before, snapshot(fresh))
    qz.load(fresh, path)
