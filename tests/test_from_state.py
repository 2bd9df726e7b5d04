"""A converted model from its state_dict alone: no float weights, no calibration; and every refusal."""

import copy
import io
import json
import pickle

import pytest
import torch
from torch import nn

import quantize as qz
from quantize.shell.deploy.kernels import OWN
from tests.models import TENSOR, TOKEN, WEIGHTS, assert_same_snapshot, config, filled, randn, snapshot

INT4 = {"type": "int4", "symmetric": False, "strategy": "group", "group_size": 64}
CONFIGS = {
    "minmax": config(),
    "int4": config("gptq", weights=INT4),
    "awq": config({"awq": {"grids_num": 3}}, weights=INT4),
    "static": config("smoothquant", inputs={**TENSOR, "symmetric": False}),
    "token": config("smoothquant", inputs=TOKEN),
}
PROBE = randn(3, 64, seed=3)


class Tied(nn.Module):
    """Embedding and head in one parameter, a layer under two names, a norm, a buffer, and a layer that stays float."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(64, 256)
        self.norm = nn.LayerNorm(256)
        self.first = nn.Linear(256, 64)
        self.again = self.first
        self.head = nn.Linear(256, 64, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("shift", torch.ones(64))

    def forward(self, ids):
        hidden = self.norm(self.embedding(ids))
        return self.first(hidden) + self.again(hidden) + self.head(hidden) + self.shift


IDS = torch.arange(64).view(4, 16)


def converted(given, dtype=torch.float32):
    model = filled(Tied()).to(dtype)
    model.shift.uniform_(generator=torch.Generator().manual_seed(4))
    qz.quantize(model, {**given, "skip_layers": ["head", "embedding"]})
    model(IDS)
    qz.convert(model)
    return model


def loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_state_makes_the_model(given, dtype, device):
    model = converted(given, dtype)
    with torch.device(device):
        fresh = Tied().to(dtype)
    state = loaded(model.state_dict())
    qz.convert(fresh, from_state=state)
    with torch.no_grad():
        assert torch.equal(fresh(IDS), model(IDS))
    assert fresh.first is fresh.again
    assert fresh.head.weight is fresh.embedding.weight
    assert str(fresh) == str(model)
    assert qz.report(fresh).rows == qz.report(model).rows
    assert not any(t.is_meta for t in (*fresh.parameters(), *fresh.buffers()))
    again = fresh.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in again if isinstance(again[key], torch.Tensor))


def test_the_kernel_of_a_loaded_model_can_be_chosen():
    model = converted(CONFIGS["minmax"])
    fresh = Tied()
    qz.convert(fresh, from_state=model.state_dict(), kernel="reference")
    assert fresh.first.kernel == "reference"
    before = snapshot(plain := Tied())
    with pytest.raises(qz.QuantizeError, match="layer 'first': kernel 'npu'; accepted: another kernel"):
        qz.convert(plain, from_state=model.state_dict(), kernel="npu")
    assert_same_snapshot(before, snapshot(plain))


def test_the_tensors_of_a_loaded_model_are_its_own():
    state = converted(CONFIGS["minmax"]).state_dict()
    fresh = Tied()
    qz.convert(fresh, from_state=state)
    expected = fresh(IDS)
    for tensor in state.values():
        if isinstance(tensor, torch.Tensor):
            tensor.zero_()
    assert torch.equal(fresh(IDS), expected)


def test_a_frozen_bias_stays_frozen():
    fresh = Tied().requires_grad_(False)
    qz.convert(fresh, from_state=converted(CONFIGS["minmax"]).state_dict())
    assert not any(p.requires_grad for p in fresh.parameters())


def without(state, *keys):
    return {name: value for name, value in state.items() if name not in keys}


def encoded(told):
    return torch.tensor(list(json.dumps(told).encode().ljust(1024)), dtype=torch.uint8)


def changed(extra, **changes):
    return encoded({**json.loads(bytes(extra.tolist())), **changes})


def extra(state, **changes):
    return {**state, "first._extra_state": changed(state["first._extra_state"], **changes)}


def with_row(state, **changes):
    told = json.loads(bytes(state["first._extra_state"].tolist()))
    return extra(state, row={**told["row"], **changes})


BROKEN = {
    "no mapping": (lambda s: [1], r"from_state: \[1\]; accepted: the state_dict of a converted model"),
    "nothing converted": (lambda s: {"a": torch.ones(1)}, "from_state: no converted layer"),
    "codes": (
        lambda s: without(s, "first.codes", "again.codes"),
        "layer 'first': no 'codes' in the state; accepted: 'codes', torch.u",
    ),
    "scale": (lambda s: without(s, "first.scale", "again.scale"), "layer 'first': no 'scale' in the state"),
    "zero_point": (
        lambda s: without(s, "first.zero_point", "again.zero_point"),
        "layer 'first': no 'zero_point' in the state",
    ),
    "bias": (
        lambda s: without(s, "first.bias", "again.bias"),
        r"from_state: no 'first.bias' in the state; accepted: 'first.bias', torch.float32 \[64\]",
    ),
    "norm": (
        lambda s: without(s, "norm.weight"),
        r"from_state: no 'norm.weight' in the state; accepted: 'norm.weight', torch.float32 \[256\]",
    ),
    "unknown": (
        lambda s: {**s, "x.y": torch.ones(1)},
        "from_state: 'x.y' in the state; accepted: keys of the model only",
    ),
    "unknown in layer": (lambda s: {**s, "first.z": torch.ones(1)}, "layer 'first': 'z' in the state"),
    "shape": (
        lambda s: {**s, "first.codes": s["first.codes"][:, :-1]},
        r"layer 'first': 'codes', torch.uint8 \[64, 127\]; accepted: 'codes', torch.uint8 \[64, 128\]",
    ),
    "codes dtype": (lambda s: {**s, "first.codes": s["first.codes"].int()}, "layer 'first': 'codes', torch.int32"),
    "scale dtype": (lambda s: {**s, "first.scale": s["first.scale"].half()}, "layer 'first': 'scale', torch.float16"),
    "other shape": (
        lambda s: {**s, "shift": torch.ones(65)},
        r"from_state: 'shift', torch.float32 \[65\]; accepted: 'shift', torch.float32 \[64\]",
    ),
    "other dtype": (
        lambda s: {**s, "shift": torch.ones(64).half()},
        r"from_state: 'shift', torch.float16 \[64\]; accepted: 'shift', torch.float32 \[64\]",
    ),
    "layer size": (lambda s: with_row(s, shape=[64, 128]), "layer 'first': 64x128 in torch.float32 in the state"),
    "layer dtype": (lambda s: extra(s, dtype="bfloat16"), "layer 'first': 64x256 in torch.bfloat16 in the state"),
    "version": (lambda s: extra(s, quantized_linear=3), "layer 'first': version 3; accepted: .* version 2"),
    "old version": (
        lambda s: {**s, "first._extra_state": {"quantized_linear": 1}},
        "layer 'first': version 1; accepted: .* version 2",
    ),
    "no such layer": (
        lambda s: {**s, "second._extra_state": s["first._extra_state"]},
        "layer 'second': not in the model",
    ),
    "no linear": (
        lambda s: {**s, "norm._extra_state": s["first._extra_state"]},
        "layer 'norm': a LayerNorm in the model",
    ),
}


@pytest.mark.parametrize(("broken", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_state_that_does_not_fit_changes_nothing(broken, message):
    state = converted(CONFIGS["int4"]).state_dict()
    fresh = Tied()
    before = snapshot(fresh)
    with pytest.raises(qz.QuantizeError, match=message):
        qz.convert(fresh, from_state=broken(dict(state)))
    assert_same_snapshot(before, snapshot(fresh))


def test_a_buffer_that_no_state_brings_must_be_real():
    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)
            self.register_buffer("frequencies", torch.ones(3), persistent=False)

        def forward(self, x):
            return self.layer(x)

    model = filled(Rotary())
    qz.quantize(model, config())
    qz.convert(model)
    with torch.device("meta"):
        fresh = Rotary()
    with pytest.raises(qz.QuantizeError, match="buffer 'frequencies': on the meta device"):
        qz.convert(fresh, from_state=dict(model.state_dict()))
    fresh.frequencies = torch.full((3,), 5.0)
    qz.convert(fresh, from_state=model.state_dict())
    assert torch.equal(fresh(PROBE), model(PROBE))
    # A real one keeps its own.
    assert torch.equal(fresh.frequencies, torch.full((3,), 5.0))


def test_the_state_of_a_model_under_calibration_is_refused():
    model = nn.Sequential(nn.Linear(64, 64))
    qz.quantize(model, config(inputs=TENSOR))
    with pytest.raises(qz.QuantizeError, match="from_state: no converted layer"):
        qz.convert(nn.Sequential(nn.Linear(64, 64)), from_state=model.state_dict())


OTHERS = {
    "another scheme": (config(weights={**WEIGHTS, "symmetric": False}), torch.float32, "int8 channel asymmetric"),
    "another dtype": (config(), torch.bfloat16, "torch.bfloat16"),
    "other inputs": (config(inputs=TOKEN), torch.float32, "inputs int8 token symmetric"),
}


@pytest.mark.parametrize(("given", "dtype", "told"), OTHERS.values(), ids=OTHERS.keys())
def test_load_state_dict_refuses_another_format(given, dtype, told):
    def make(config, dtype):
        model = filled(nn.Sequential(nn.Linear(64, 64))).to(dtype)
        qz.quantize(model, config)
        model(PROBE.to(dtype))
        qz.convert(model)
        return model

    mine, other = make(config(), torch.float32), make(given, dtype)
    with pytest.raises(
        qz.QuantizeError, match=f"layer '0': .*{told}.*; accepted: 64x64, weights int8 channel symmetric"
    ):
        mine.load_state_dict(other.state_dict())
    short = without(mine.state_dict(), "0.codes")
    with pytest.raises(qz.QuantizeError, match="layer '0': no 'codes' in the state"):
        mine.load_state_dict(short)
    with pytest.raises(RuntimeError, match=r"Missing key.*0\._extra_state"):
        mine.load_state_dict({})
    assert mine.load_state_dict({}, strict=False).missing_keys == [
        "0.bias",
        "0._extra_state",
        "0.codes",
        "0.scale",
    ]


def test_load_state_dict_takes_every_tensor_and_copies_it():
    first, second = (converted(CONFIGS["int4"], torch.bfloat16) for _ in range(2))
    with torch.no_grad():
        second.first.bias.add_(1)
    changed = second.state_dict()
    changed["first.codes"] = changed["again.codes"] = changed["first.codes"].flip(0)
    first.load_state_dict(changed)
    assert torch.equal(first.first.solution.weight.codes, second.first.solution.weight.codes.flip(0))
    assert torch.equal(first.first.bias, second.first.bias)
    codes = first.first.solution.weight.codes
    changed["first.codes"].zero_()
    assert torch.equal(first.first.solution.weight.codes, codes)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_hold_the_form_of_the_reference(copied, monkeypatch):
    model = converted(CONFIGS["int4"], torch.bfloat16)
    twin = copied(model)
    with torch.no_grad():
        assert torch.equal(twin(IDS), model(IDS))
    # A processor without this kernel: the codes are the same all the same.
    file = pickle.dumps(model)
    monkeypatch.delitem(OWN, "cpu")
    elsewhere = pickle.loads(file)
    assert elsewhere.first.kernel == "reference"
    assert torch.equal(elsewhere.first.solution.weight.codes, model.first.solution.weight.codes)


def test_unfinished_calibration_names_the_first_layer_and_the_batches_that_are_missing():
    model = filled(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    qz.quantize(model, config(inputs=TENSOR, batch_num=3))
    for missing in (3, 2, 1):
        before = snapshot(model)
        message = f"layer '0': {3 - missing} of 3 batches seen; accepted: {missing} more forward passes"
        with pytest.raises(qz.QuantizeError, match=message):
            qz.convert(model)
        assert_same_snapshot(before, snapshot(model))
        model(PROBE)
    qz.convert(model)


def test_a_partly_calibrated_model_names_the_part():
    model = filled(nn.Sequential(nn.Sequential(nn.Linear(64, 64)), nn.Sequential(nn.Linear(64, 64))))
    for part in model:
        qz.quantize(part, config(inputs=TENSOR, batch_num=2))
    for _ in range(2):
        model[0](PROBE)
    with pytest.raises(qz.QuantizeError, match="layer '0': 0 of 2 batches seen; accepted: 2 more"):
        qz.convert(model)
    assert [row.stage for row in qz.report(model).rows] == ["quantized", "calibrating"]


def test_a_layer_under_two_names_must_be_the_same_in_the_state():
    state = converted(CONFIGS["int4"]).state_dict()
    for change in (
        {"again.codes": state["again.codes"][:, :5]},
        {"again.codes": torch.zeros_like(state["again.codes"])},
        {"again.bias": state["again.bias"] + 1},
    ):
        fresh = Tied()
        before = snapshot(fresh)
        with pytest.raises(qz.QuantizeError, match=r"layer 'again': its '.*' differs from that of 'first'"):
            qz.convert(fresh, from_state={**state, **change})
        assert_same_snapshot(before, snapshot(fresh))


class Migrating(nn.Module):
    """Multiplies states of an older version by 10; refuses to be loaded where it is told to."""

    _version = 2

    def __init__(self, *, refuses=False):
        super().__init__()
        self.layer, self.factor, self.refuses = nn.Linear(64, 64), nn.Parameter(torch.ones(3)), refuses

    def forward(self, x):
        return self.layer(x)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if self.refuses:
            raise RuntimeError("not today")
        if local_metadata.get("version", 1) < 2:
            state_dict[prefix + "factor"] = state_dict[prefix + "factor"] * 10
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_modules_see_the_version_of_the_state_and_may_fail(device):
    model = filled(Migrating())
    qz.quantize(model, config())
    qz.convert(model)
    with torch.device(device):
        fresh, failing = Migrating(), Migrating(refuses=True)
    qz.convert(fresh, from_state=model.state_dict())
    assert torch.equal(fresh.factor, model.factor)
    with pytest.raises(RuntimeError, match="not today"):
        qz.convert(failing, from_state=model.state_dict())
    assert type(failing.layer) is nn.Linear


@pytest.mark.parametrize("given", [config(), config(inputs=TOKEN)], ids=["weights", "token"])
def test_tensors_that_do_not_belong_to_the_format_are_refused(given):
    model = filled(nn.Sequential(nn.Linear(64, 64)))
    qz.quantize(model, given)
    model(PROBE)
    qz.convert(model)
    for key, value in (("zero_point", torch.full((64, 1), 5, dtype=torch.int8)), ("input_scale", torch.ones(1, 1))):
        broken = {**model.state_dict(), f"0.{key}": value}
        message = f"layer '0': '{key}' in the state; accepted: codes, scale with 64x64"
        with pytest.raises(qz.QuantizeError, match=message):
            qz.convert(nn.Sequential(nn.Linear(64, 64)), from_state=broken)
        with pytest.raises(qz.QuantizeError, match=message):
            model.load_state_dict(broken)


def test_assigned_tensors_leave_the_meta_device():
    model = filled(nn.Sequential(nn.Linear(64, 64)))
    qz.quantize(model, config())
    qz.convert(model)
    fresh = copy.deepcopy(model).to("meta")
    fresh.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(fresh(PROBE), model(PROBE))


class SharedBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(64))
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.first.bias = self.second.bias = self.bias
        self.register_buffer("shift", torch.ones(64))
        self.part = nn.Module()
        self.part.register_buffer("shift", self.shift)

    def forward(self, x):
        return self.second(self.first(x)) + self.bias + self.part.shift


@pytest.mark.parametrize("device", ["cpu", "meta", "partly"])
def test_whatever_was_one_tensor_stays_one(device):
    model = filled(SharedBias())
    qz.quantize(model, config())
    qz.convert(model)
    with torch.device("meta" if device == "meta" else "cpu"):
        fresh = SharedBias()
    if device == "partly":
        fresh.second = fresh.second.to("meta")
        fresh.second.bias = fresh.bias
    kept = None if device == "meta" else fresh.bias
    qz.convert(fresh, from_state=model.state_dict())
    assert torch.equal(fresh(PROBE), model(PROBE))
    assert fresh.bias is fresh.first.bias is fresh.second.bias
    assert fresh.shift is fresh.part.shift
    if kept is not None:
        # What was real is the same object, and no alias of the state.
        assert kept is fresh.bias
        with torch.no_grad():
            fresh.bias.add_(1)
        assert not torch.equal(fresh.bias, model.bias)


def test_tensors_of_a_state_may_lie_as_they_like():
    model = filled(nn.Sequential(nn.Linear(64, 64))).bfloat16()
    qz.quantize(model, config())
    qz.convert(model)
    state = model.state_dict()
    state["0.codes"] = state["0.codes"].T.contiguous().T
    fresh = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    qz.convert(fresh, from_state=state)
    with torch.no_grad():
        assert torch.equal(fresh(PROBE.bfloat16()), model(PROBE.bfloat16()))
    model.load_state_dict(state, assign=True)
    with torch.no_grad():
        assert torch.equal(fresh(PROBE.bfloat16()), model(PROBE.bfloat16()))


def test_a_bias_alone_can_be_loaded():
    model = filled(nn.Sequential(nn.Linear(64, 64)))
    qz.quantize(model, config())
    qz.convert(model)
    found = model.load_state_dict({"0.bias": torch.full((64,), 3.0)}, strict=False)
    assert found.missing_keys == ["0._extra_state", "0.codes", "0.scale"]
    assert (model[0].bias == 3).all()


@pytest.mark.parametrize(
    "extra",
    [
        {"quantized_linear": 2},
        {"row": {"weights": {"bits": 99}}},
        {"dtype": "foo"},
        {"row": {}},
        {"row": {"shape": [64]}},
        {"row": None},
        {"row": {"weights": 3}},
    ],
    ids=str,
)
def test_a_state_that_cannot_be_read_is_refused_by_name(extra):
    model = filled(nn.Sequential(nn.Linear(64, 64)))
    qz.quantize(model, config())
    qz.convert(model)
    state = model.state_dict()
    told = {} if "quantized_linear" in extra else json.loads(bytes(state["0._extra_state"].tolist()))
    row = extra.get("row", {})
    state["0._extra_state"] = encoded({**told, **extra, "row": row and {**told["row"], **row}})
    with pytest.raises(qz.QuantizeError, match="layer '0': a state that cannot be read"):
        qz.convert(nn.Sequential(nn.Linear(64, 64)), from_state=state)
