"""Scales that stay at run time: folding them would change what the model computes. Then nothing is changed."""

import copy
import dataclasses
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import quantize as qz
from tests.folds import ALL, AWQ, INT4, every_config, float_again, folded, powers_of_two, run
from tests.models import TOKEN, config, filled, randn, solutions
from tests.zoo.folding import (
    TOKENS,
    BareNorm,
    C,
    Chained,
    Decoder,
    Gate,
    Mixed,
    Norm,
    OnePlusNorm,
    Residual,
    Routed,
    SharedNorm,
    Smeared,
    Tasks,
    TiedNorms,
    Ungated,
    decoder,
)


@every_config
@pytest.mark.parametrize(
    ("options", "at_run_time", "undone", "told"),
    [
        ({"norm": BareNorm}, {"q", "k", "v", "gate", "up"}, None, "no preceding module has a weight for each channel"),
        (
            {"block": Smeared, "kv": 2},
            {"o"},
            None,
            "0.o: scale at run time, no preceding module scales each channel",
        ),
        ({"block": Routed}, {"gate", "up"}, "second", "Routed reads the inputs as well"),
        ({"block": Residual}, {"gate", "up"}, "second", "Residual reads the inputs as well"),
        ({"block": SharedNorm}, {"q", "k", "v", "gate", "up"}, "first", "a Norm that is called more than once"),
        ({"block": Ungated}, {"down"}, "up", "down: scale at run time, no preceding module scales each channel"),
        # Rows that line up with columns, and are read by another as well.
        ({"block": Mixed}, {"down"}, "up", "down: scale at run time, no preceding module scales each channel"),
    ],
    ids=["no weight", "mixed heads", "router", "residual", "shared norm", "gelu", "another reader"],
)
def test_what_does_not_hold_stays_at_run_time(given, options, at_run_time, undone, told, monkeypatch):
    powers_of_two(monkeypatch)
    model = decoder(**options)
    parameters = dict(model.named_parameters())
    before, report = run(model, given, [told])
    called = {row.name for row in report.rows if row.tokens}
    assert {name.split(".")[-1] for name in called - folded(model)} == at_run_time
    assert all(solutions(model)[name].smoothing is not None for name in called - folded(model))
    if undone:
        # Exactly: the very same parameters.
        for i in range(2):
            name = f"blocks.{i}.{undone}.weight"
            assert model.get_parameter(name) is parameters[name]
    assert torch.equal(float_again(model, lambda: model(TOKENS)), before)


@pytest.mark.parametrize("norm", [Norm, OnePlusNorm])
def test_a_wrong_proposal_takes_no_other_with_it(norm):
    # Any two layers of the block may have as many channels: what holds is found whatever is tried beside it.
    model = decoder(Smeared, kv=2, norm=norm)
    run(model, AWQ, ["scale at run time"])
    assert folded(model) == ALL - {"blocks.0.o", "blocks.1.o"}


def test_a_layer_that_the_first_batch_did_not_reach_is_not_folded():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(C, C), nn.Linear(C, C)

        def forward(self, x):
            chosen = x[x[:, 0] > 0]
            return self.down(self.up(chosen).relu()).sum() + x.sum()

    model = filled(Late())
    plain, x = copy.deepcopy(model), randn(50, C)
    qz.quantize(model, config({"awq": {"fold": True}}, weights=INT4, batch_num=2))
    model(-x.abs())
    with pytest.warns(qz.QuantizeWarning, match="no token of the first batch reached it"):
        model(x.abs())
    assert_nothing_folded(model, plain)


def assert_nothing_folded(model, plain):
    assert {row.stage for row in qz.report(model).rows} == {"quantized"}
    assert not folded(model)
    assert all(solution.smoothing is not None for solution in solutions(model).values())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@dataclasses.dataclass
class Opaque:
    y: torch.Tensor


class Mapping(dict):
    pass


class Listed(list):
    pass


def added(y, h, channels):
    y = y.clone()
    y[..., channels] += h[..., channels]
    return y


UNSEEN = {
    "opaque": (lambda: Chained(behind=lambda y, h: Opaque(y + h)), [1.0]),
    "mapping": (lambda: Chained(behind=lambda y, h: Mapping(y=Opaque(y + h))), [1.0]),
    "list": (lambda: Chained(behind=lambda y, h: (y, Listed([y + h]))), [1.0]),
    "sparse": (lambda: Chained(behind=lambda y, h: (y, (y + h).to_sparse())), [1.0]),
    "array": (lambda: Chained(behind=lambda y, h: (y + h).numpy()), [1.0]),
    "number": (lambda: Chained(behind=lambda y, h: (y + h).sum().item()), [1.0]),
    "odd channels": (lambda: Chained(behind=lambda y, h: added(y, h, slice(1, None, 2))), [1.0]),
    "one channel": (lambda: Chained(behind=lambda y, h: added(y, h, slice(1, 2))), [1.0]),
    "stacked": (lambda: Chained(behind=lambda y, h: torch.stack((y, y + h), -1)), [1.0]),
    "relu6": (lambda: Chained(between=functional.relu6), [0.3]),
    "hardtanh": (lambda: Chained(between=functional.hardtanh), [0.3]),
    "zeros": (Gate, [0.0, 1.0]),
    "tasks": (Tasks, [1.0, -1.0]),
    "idle": (Tasks, [1.0]),
    "tied": (TiedNorms, [1.0]),
}


@pytest.mark.parametrize(("make", "factors"), UNSEEN.values(), ids=UNSEEN.keys())
def test_what_the_first_batch_does_not_show_is_not_folded(make, factors):
    model = filled(make())
    plain, x = copy.deepcopy(model), randn(4, 8, C)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qz.QuantizeWarning)
        qz.quantize(model, config({"smoothquant": {"fold": True}}, inputs=TOKEN, batch_num=len(factors)))
        with torch.no_grad():
            for factor in factors:
                # The mean of the inputs decides which task it is.
                model((x + 0.5 if make is Tasks else x) * factor)
    assert qz.report(model).remarks
    reached = [row.name for row in qz.report(model).rows if row.tokens]
    assert reached
    assert all(solutions(model)[name].smoothing is not None for name in reached)
    assert not folded(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_channels_that_are_silent_in_the_first_batch_have_no_known_row():
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.v, self.o = nn.Linear(C, C // 2), nn.Linear(C, C)

        def forward(self, x):
            return self.o(torch.relu(self.v(x)).repeat(1, 1, 2))

    model = filled(Silent())
    with torch.no_grad():
        model.v.bias[:4] = -50
    plain = copy.deepcopy(model)
    qz.quantize(model, config({"smoothquant": {"fold": True}}, inputs=TOKEN))
    with pytest.warns(qz.QuantizeWarning, match="not folded"), torch.no_grad():
        model(randn(4, 8, C))
    assert_nothing_folded(model, plain)


def test_a_model_that_refuses_a_scale_is_left_as_it_was():
    class Limited(Chained):
        limit = None

        def forward(self, x):
            h = torch.relu(self.up(x))
            if self.limit is not None and h.max() > self.limit:
                raise ValueError("activations too large")
            self.largest = h.max().item()
            return self.down(h)

    model, x = filled(Limited()), randn(4, 8, C)
    with torch.no_grad():
        model(x)
    model.limit = 1.01 * model.largest
    plain, parameters = copy.deepcopy(model), list(model.parameters())
    qz.quantize(model, config({"smoothquant": {"fold": True}}, inputs=TOKEN))
    with pytest.warns(qz.QuantizeWarning, match="not folded"), torch.no_grad():
        model(x)
    assert_nothing_folded(model, plain)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_arguments_that_cannot_be_given_twice_leave_all_at_run_time():
    class Odd(Decoder):
        def forward(self, tokens, more=None):
            return super().forward(tokens)

    model = filled(Odd())
    plain = copy.deepcopy(model)
    with pytest.warns(qz.QuantizeWarning, match="Embedding"):
        qz.quantize(model, {**AWQ, "batch_num": 1})
    with pytest.warns(qz.QuantizeWarning, match="cannot be copied and passed again"):
        model(TOKENS, more=object())
    assert_nothing_folded(model, plain)
