"""Scales that move into what makes the inputs: where that holds, where it does not, and what stays as it was."""

import copy
import dataclasses
import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import quantize as qz
from quantize.core import smoothquant
from quantize.shell import folding
from quantize.shell.calibration import CalibrationLinear
from tests.models import config, filled, randn

C, HEADS = 32, 4
INT4 = {"type": "int4", "symmetric": True, "strategy": "channel"}
TOKEN = {"type": "int8", "symmetric": True, "strategy": "token"}
TENSOR = {"type": "int8", "symmetric": False, "strategy": "tensor"}
CONFIGS = {
    "awq": config({"awq": {"fold": True}}, weights=INT4),
    "smoothquant, token": config({"smoothquant": {"fold": True}}, inputs=TOKEN),
    "smoothquant, tensor": config({"smoothquant": {"fold": True, "grids_num": 5}}, inputs=TENSOR),
}
every_config = pytest.mark.parametrize("given", CONFIGS.values(), ids=CONFIGS.keys())


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))

    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * self.weight


class OnePlusNorm(Norm):
    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * (1 + self.weight)


class BareNorm(nn.Module):
    def forward(self, x):
        return functional.rms_norm(x, (C,))


class Block(nn.Module):
    """A block of Llama, with ``kv`` heads for keys and values."""

    def __init__(self, norm=Norm, kv=HEADS, activation=functional.silu):
        super().__init__()
        self.first, self.second, self.activation = norm(), norm(), activation
        width = kv * C // HEADS
        self.q, self.k, self.v, self.o = nn.Linear(C, C), nn.Linear(C, width), nn.Linear(C, width), nn.Linear(C, C)
        self.gate, self.up, self.down = nn.Linear(C, 48), nn.Linear(C, 48), nn.Linear(48, C)

    def attend(self, x):
        b, t, _ = x.shape
        q, k, v = (m(x).view(b, t, -1, C // HEADS).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).reshape(b, t, C))

    def forward(self, x):
        x = x + self.attend(self.first(x))
        y = self.second(x)
        return x + self.down(self.activation(self.gate(y)) * self.up(y))


class Model(nn.Module):
    def __init__(self, block=Block, **options):
        super().__init__()
        self.embed = nn.Embedding(20, C)
        self.blocks = nn.ModuleList(block(**options) for _ in range(2))
        self.norm = Norm()
        self.head = nn.Linear(C, 20, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


TOKENS = torch.randint(0, 20, (3, 40), generator=torch.Generator().manual_seed(0))


def made(block=Block, dtype=torch.float32, **options):
    model = filled(Model(block, **options))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Norm):
                # A few channels stand out, as in real models.
                module.weight.copy_(0.5 + randn(C, seed=3).abs())
                module.weight[::7] *= 6
    return model.to(dtype)


def run(model, given, told=()):
    """Quantize with one batch; returns what the model gave while it was observed, and the report."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", qz.QuantizeWarning)
        qz.quantize(model, {**given, "batch_num": 1})
        with torch.no_grad():
            output = model(TOKENS)
    report = qz.report(model)
    assert bool(told) == any("not folded" in str(each.message) for each in caught) == bool(report.remarks)
    for remark in told:
        assert any(remark in each for each in report.remarks), report.remarks
    return output, report


def folded(model):
    return {m.names[0] for m in model.modules() if isinstance(m, CalibrationLinear) and m.folded is not None}


def float_again(model):
    """What the float model computes with the parameters as they are now."""
    layers = [module for module in model.modules() if isinstance(module, CalibrationLinear)]
    for layer in layers:
        layer.active = False
    with torch.no_grad():
        output = model(TOKENS)
    for layer in layers:
        layer.active = True
    return output


ALL = {f"blocks.{i}.{name}" for i in range(2) for name in ("q", "k", "v", "o", "gate", "up", "down")} | {"head"}


@every_config
def test_everything_in_a_block_of_llama_folds(given):
    model = made()
    before, report = run(model, given)
    assert folded(model) == ALL
    assert not report.remarks
    assert all(row.notes["folded"] == 1 for row in report.rows)
    for layer in model.modules():
        if isinstance(layer, CalibrationLinear):
            assert layer.solution.smoothing is None
            assert not torch.equal(layer.folded, torch.ones_like(layer.folded))
    # Siblings have one scale.
    assert model.blocks[0].q.folded is model.blocks[0].v.folded
    # Norms, rows and columns are each rounded once more, in layers one after the other.
    after = float_again(model)
    assert (after - before).abs().max() <= 64 * torch.finfo(torch.float32).eps * before.abs().max()
    qz.convert(model)
    assert not any("smoothing" in key for key in model.state_dict())
    with torch.no_grad():
        assert torch.isfinite(model(TOKENS)).all()


def test_the_folded_form_computes_what_the_scale_at_run_time_computes():
    # One layer behind each norm: the common scale is its own.
    model = nn.Sequential(Norm(), nn.Linear(C, 16))
    with torch.no_grad():
        model[0].weight.copy_(randn(C, seed=1).exp())
    other, x = copy.deepcopy(model), randn(50, C, seed=2)
    for each, fold in ((model, True), (other, False)):
        qz.quantize(each, config({"awq": {"fold": fold}}, weights=INT4))
        each(x)
    a, b = model[1].solution, other[1].solution
    # The norm's weight was rounded to float32, so the scales agree to a rounding; codes hardly ever change by that.
    assert torch.allclose(model[1].folded, b.smoothing, rtol=2 * torch.finfo(torch.float32).eps)
    assert (a.weight.codes != b.weight.codes).float().mean() <= 0.01
    # Codes that differ lie on a tie: a step of a channel, times the inputs that meet it.
    slack = b.weight.scale.T * (x * model[0].weight).abs().sum(-1, keepdim=True) * 0.01
    assert ((model(x) - other(x)).abs() <= slack + 1e-5 * other(x).abs().max()).all()


def test_a_norm_that_adds_one_to_its_weight():
    model = made(norm=OnePlusNorm)
    old = model.blocks[0].first.weight.clone()
    before, _ = run(model, CONFIGS["awq"])
    assert folded(model) == ALL
    real = (1 + old) / (1 + model.blocks[0].first.weight)
    assert torch.allclose(real, model.blocks[0].q.folded, rtol=1e-6)
    assert (float_again(model) - before).abs().max() <= 64 * torch.finfo(torch.float32).eps * before.abs().max()


@pytest.mark.parametrize("norm", [Norm, OnePlusNorm])
def test_half_precision(norm):
    model = made(norm=norm, dtype=torch.bfloat16)
    before, _ = run(model, CONFIGS["awq"])
    assert folded(model) == ALL
    drift = (float_again(model) - before).float().square().mean().sqrt()
    assert drift <= 8 * torch.finfo(torch.bfloat16).eps * len(ALL) ** 0.5 * before.float().square().mean().sqrt()


class Mlp(Block):
    """No attention."""

    def __init__(self, **options):
        super().__init__(**options)
        del self.q, self.k, self.v, self.o


class Routed(Mlp):
    """A router of another kind reads what the norm gives."""

    def __init__(self, **options):
        super().__init__(**options)
        self.router = nn.Parameter(randn(C, seed=9))

    def forward(self, x):
        y = self.second(x)
        return x + self.down(self.activation(self.gate(y)) * self.up(y)) * (y @ self.router).sigmoid()[..., None]


class Residual(Mlp):
    def forward(self, x):
        y = self.second(x)
        return y + self.down(self.activation(self.gate(y)) * self.up(y))


class Tiled(Block):
    """Heads get their keys and values in turn."""

    def attend(self, x):
        b, t, _ = x.shape
        q, k, v = (m(x).view(b, t, -1, C // HEADS).transpose(1, 2) for m in (self.q, self.k, self.v))
        k, v = (y.repeat(1, HEADS // y.shape[1], 1, 1) for y in (k, v))
        return self.o(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, C))


class Smeared(Tiled):
    """Values that mix neighbouring channels."""

    def attend(self, x):
        v = self.v(x)
        y = (v + v.roll(1, -1)).repeat(1, 1, C // v.shape[-1])
        return self.o(y * (self.q(x).mean(-1, keepdim=True) + self.k(x).mean(-1, keepdim=True)).sigmoid())


class SharedNorm(Block):
    def forward(self, x):
        x = x + self.attend(self.first(x))
        y = self.first(x)
        return x + self.down(self.activation(self.gate(y)) * self.up(y))


class Ungated(Mlp):
    def __init__(self, activation=functional.gelu, **options):
        super().__init__(activation=activation, **options)
        del self.gate

    def forward(self, x):
        return x + self.down(self.activation(self.up(self.second(x))))


class Mixed(Mlp):
    def forward(self, x):
        y = self.second(x)
        up = self.up(y)
        return x + self.down(self.activation(self.gate(y)) * up) + up.mean(-1, keepdim=True)


@every_config
@pytest.mark.parametrize(
    ("options", "at_run_time", "undone", "told"),
    [
        ({"norm": BareNorm}, {"q", "k", "v", "gate", "up"}, None, "no module before has a weight for each channel"),
        (
            {"block": Smeared, "kv": 2},
            {"o"},
            None,
            "0.o: scale at run time, no module before makes each channel",
        ),
        ({"block": Routed}, {"gate", "up"}, "second", "Routed reads the inputs as well"),
        ({"block": Residual}, {"gate", "up"}, "second", "Residual reads the inputs as well"),
        ({"block": SharedNorm}, {"q", "k", "v", "gate", "up"}, "first", "a Norm that is called more than once"),
        ({"block": Ungated}, {"down"}, None, "down: scale at run time, no module before makes each channel"),
        # Rows that line up with columns, and are read by another as well.
        ({"block": Mixed}, {"down"}, None, "down: scale at run time, no module before makes each channel"),
    ],
    ids=["no weight", "mixed heads", "router", "residual", "shared norm", "gelu", "another reader"],
)
def test_what_does_not_hold_stays_at_run_time(given, options, at_run_time, undone, told):
    model = made(**options)
    parameters = dict(model.named_parameters())
    before, report = run(model, given, [told])
    called = {row.name for row in report.rows if row.tokens}
    assert {name.split(".")[-1] for name in called - folded(model)} == at_run_time
    assert all(model.get_submodule(name).solution.smoothing is not None for name in called - folded(model))
    if undone:
        # Exactly: the very same parameters.
        for i in range(2):
            name = f"blocks.{i}.{undone}.weight"
            assert model.get_parameter(name) is parameters[name]
    assert (float_again(model) - before).abs().max() <= 64 * torch.finfo(torch.float32).eps * before.abs().max()


@every_config
def test_relu_keeps_channels_apart(given):
    model = made(Ungated, activation=functional.relu)
    run(model, given)
    assert {"blocks.0.down", "blocks.1.down"} <= folded(model)


def test_a_layer_that_the_first_batch_did_not_reach_is_not_folded():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(C, C), nn.Linear(C, C)

        def forward(self, x):
            chosen = x[x[:, 0] > 0]
            return self.down(self.up(chosen).relu()).sum() + x.sum()

    model = filled(Late())
    given, x = config({"awq": {"fold": True}}, weights=INT4, batch_num=2), randn(50, C)
    qz.quantize(model, given)
    model(-x.abs())
    with pytest.warns(qz.QuantizeWarning, match="no token of the first batch reached it"):
        model(x.abs())
    assert not folded(model)


class Chained(nn.Module):
    """Two layers and what is between and behind them."""

    def __init__(self, between=functional.relu, behind=lambda y, _: y):
        super().__init__()
        self.up, self.down = nn.Linear(C, C), nn.Linear(C, C)
        self.between, self.behind = between, behind

    def forward(self, x):
        h = self.between(self.up(x))
        return self.behind(self.down(h), h)


def added(y, h, channels):
    y = y.clone()
    y[..., channels] += h[..., channels]
    return y


@dataclasses.dataclass
class Opaque:
    y: torch.Tensor


class Mapping(dict):
    pass


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = (nn.Linear(C, C, bias=False) for _ in range(3))

    def forward(self, x):
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Tasks(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(C), nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x):
        y = self.norm(x)
        return (self.a if x.mean() > 0 else self.b)(y)


class TiedNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.LayerNorm(C), nn.LayerNorm(C)
        self.two.weight = self.one.weight
        self.a, self.b = nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x):
        return self.b(self.two(x + self.a(self.one(x))))


@pytest.mark.parametrize(
    ("model", "batches"),
    [
        (Chained(behind=lambda y, h: Opaque(y + h)), [1.0]),
        (Chained(behind=lambda y, h: Mapping(y=Opaque(y + h))), [1.0]),
        (Chained(behind=lambda y, h: (y + h).numpy()), [1.0]),
        (Chained(behind=lambda y, h: (y + h).sum().item()), [1.0]),
        (Chained(behind=lambda y, h: added(y, h, slice(1, None, 2))), [1.0]),
        (Chained(behind=lambda y, h: added(y, h, slice(1, 2))), [1.0]),
        (Chained(behind=lambda y, h: torch.stack((y, y + h), -1)), [1.0]),
        (Chained(between=functional.relu6), [0.3]),
        (Chained(between=functional.hardtanh), [0.3]),
        (Gate(), [0.0, 1.0]),
        (Tasks(), [1.0, -1.0]),
        (Tasks(), [1.0]),
        (TiedNorms(), [1.0]),
    ],
    ids=[
        "opaque",
        "mapping",
        "array",
        "number",
        "odd channels",
        "one channel",
        "stacked",
        "relu6",
        "hardtanh",
        "zeros",
        "tasks",
        "idle",
        "tied",
    ],
)
def test_what_the_first_batch_does_not_show_is_not_folded(model, batches):
    model = filled(model)
    plain, x = copy.deepcopy(model), randn(8, 16, C)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qz.QuantizeWarning)
        qz.quantize(model, config({"smoothquant": {"fold": True}}, inputs=TOKEN, batch_num=len(batches)))
        with torch.no_grad():
            for factor in batches:
                model(x * factor + (0.1 if isinstance(model, Tasks) else 0.0) * factor)
    assert qz.report(model).remarks
    assert not folded(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_channels_that_are_silent_in_the_first_batch_have_no_known_row():
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.v, self.o = nn.Linear(C, 16), nn.Linear(C, C)

        def forward(self, x):
            return self.o(torch.relu(self.v(x)).repeat(1, 1, 2))

    model = filled(Silent())
    with torch.no_grad():
        model.v.bias[:4] = -50
    qz.quantize(model, config({"smoothquant": {"fold": True}}, inputs=TOKEN))
    with pytest.warns(qz.QuantizeWarning, match="not folded"), torch.no_grad():
        model(randn(4, 8, C))
    assert not folded(model)


class Limited(Chained):
    limit = None

    def forward(self, x):
        h = torch.relu(self.up(x))
        if self.limit is not None and h.max() > self.limit:
            raise ValueError("activations too large")
        self.largest = h.max().item()
        return self.down(h)


def test_a_model_that_refuses_a_scale_is_left_as_it_was():
    model, x = filled(Limited()), randn(8, 16, C)
    with torch.no_grad():
        model(x)
    model.limit = 1.01 * model.largest
    parameters = list(model.parameters())
    qz.quantize(model, config({"smoothquant": {"fold": True}}, inputs=TOKEN))
    with pytest.warns(qz.QuantizeWarning, match="not folded"), torch.no_grad():
        model(x)
    assert not folded(model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_an_error_of_the_search_leaves_nothing_folded(monkeypatch):
    model, whole = made(), made()
    run(whole, CONFIGS["smoothquant, token"])
    parameters, maxima, count = list(model.parameters()), smoothquant._maxima, iter(range(99))

    def failing(*arguments):
        if next(count) == 2:
            raise MemoryError
        return maxima(*arguments)

    monkeypatch.setattr(smoothquant, "_maxima", failing)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", qz.QuantizeWarning)
        qz.quantize(model, {**CONFIGS["smoothquant, token"], "batch_num": 1})
        with pytest.raises(MemoryError):
            model(TOKENS)
    assert not folded(model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    monkeypatch.undo()
    qz.finish(model)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), whole(TOKENS))


def test_outputs_in_an_object_are_compared():
    model = filled(Chained(behind=lambda y, h: Opaque(y)))
    qz.quantize(model, config({"smoothquant": {"fold": True}}, inputs=TOKEN))
    with pytest.warns(qz.QuantizeWarning, match="up: scale at run time"), torch.no_grad():
        model(randn(4, 8, C))
    assert folded(model) == {"down"}


def test_masked_outputs_are_compared_where_they_are_finite():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(C), nn.Linear(C, 8)

        def forward(self, x):
            return self.layer(self.norm(x)).index_fill(-1, torch.tensor([0]), -torch.inf)

    model = filled(Masked())
    qz.quantize(model, config({"smoothquant": {"fold": True}}, inputs=TOKEN))
    with torch.no_grad():
        model(randn(4, 8, C))
    assert folded(model) == {"layer"}


def test_arguments_that_cannot_be_given_twice_leave_all_at_run_time():
    class Odd(Model):
        def forward(self, tokens, more=None):
            return super().forward(tokens)

    model = filled(Odd())
    with pytest.warns(qz.QuantizeWarning, match="Embedding"):
        qz.quantize(model, {**CONFIGS["awq"], "batch_num": 1})
    with pytest.warns(qz.QuantizeWarning, match="may not be given twice"):
        model(TOKENS, more=object())
    assert not folded(model)
    assert all(m.solution.smoothing is not None for m in model.modules() if isinstance(m, CalibrationLinear))


@pytest.mark.filterwarnings("ignore:left in floating point:quantize.QuantizeWarning")
def test_an_interrupted_solve_goes_on_with_what_is_folded(monkeypatch):
    model, whole = made(), made()
    run(whole, CONFIGS["awq"])
    solve, count = CalibrationLinear.solve, iter(range(99))

    def failing(self):
        if next(count) == 5:
            raise RuntimeError("out of memory")
        solve(self)

    monkeypatch.setattr(CalibrationLinear, "solve", failing)
    qz.quantize(model, {**CONFIGS["awq"], "batch_num": 1})
    with torch.no_grad(), pytest.raises(RuntimeError, match="out of memory"):
        model(TOKENS)
    monkeypatch.undo()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = made()
    qz.quantize(again, {**CONFIGS["awq"], "batch_num": 1})
    again.load_state_dict(torch.load(file, weights_only=True))
    for each in (model, again):
        qz.finish(each)
        with torch.no_grad():
            assert torch.equal(each(TOKENS), whole(TOKENS))


def test_calibration_is_left_alone():
    # Random numbers, buffers and hooks as without folding.
    model, calls = made(), []
    model.blocks[0].first.register_forward_hook(lambda *_: calls.append(1))
    model.train()
    state = torch.get_rng_state()
    run(model, CONFIGS["awq"])
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    hooks = [len(m._forward_hooks) for m in model.modules()]
    assert sum(hooks) == 2  # the user's, and the session's on the model


def test_the_options_are_checked():
    with pytest.raises(qz.QuantizeError, match="fold: True with sequential"):
        qz.quantize(made(), config({"awq": {"fold": True, "sequential": True}}, weights=INT4))


def test_blocks_that_are_alike_are_tried_at_once(monkeypatch):
    tried, hold = [], folding._hold
    monkeypatch.setattr(folding, "_hold", lambda *a: tried.append(1) or hold(*a))
    run(made(), CONFIGS["awq"])
    # The norms of a block, values to outputs, up to down, the last norm: a run each. All hold at once.
    assert len(tried) == 5


@pytest.mark.parametrize("block", [Block, Tiled])
@pytest.mark.parametrize("kv", [1, 2, HEADS])
@pytest.mark.parametrize("given", list(CONFIGS.values())[:2], ids=list(CONFIGS)[:2])
def test_heads_that_share_their_values_get_one_scale(block, kv, given):
    model = made(block, kv=kv)
    before, _ = run(model, given)
    assert folded(model) == ALL
    width = C // HEADS
    heads = model.blocks[0].o.folded.view(HEADS, width)
    serve = [h % kv if block is Tiled else h // (HEADS // kv) for h in range(HEADS)]
    assert all(torch.equal(heads[h], heads[serve.index(serve[h])]) for h in range(HEADS))
    assert (float_again(model) - before).abs().max() <= 64 * torch.finfo(torch.float32).eps * before.abs().max()


@pytest.mark.parametrize("norm", [Norm, OnePlusNorm])
def test_a_wrong_proposal_takes_no_other_with_it(norm):
    # Any two layers of the block may have as many channels: what holds is found whatever is tried beside it.
    model = made(Smeared, kv=2, norm=norm)
    run(model, CONFIGS["awq"], ["scale at run time"])
    assert folded(model) == ALL - {"blocks.0.o", "blocks.1.o"}
