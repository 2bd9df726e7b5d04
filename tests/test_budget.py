"""A format for every layer under a budget: what is chosen, what it may cost, and that the model stays as it is."""

import pytest
import torch
from torch import nn

import quantize as qz
from quantize.shell.budget import FORMATS
from tests.models import assert_same_snapshot, filled, randn, snapshot

CHANNEL, *GROUPS, INT8 = FORMATS


class Block(nn.Module):
    """q and k read one tensor; what down reads is as large as both together."""

    def __init__(self, c):
        super().__init__()
        self.q, self.k, self.down = nn.Linear(c, c), nn.Linear(c, 64), nn.Linear(c + 64, c)

    def forward(self, x):
        return x + self.down(torch.cat([self.q(x), self.k(x)], -1).relu())


def model():
    return filled(nn.Sequential(Block(128), Block(128), nn.Linear(128, 32))).eval()


def calibrate(model):
    model(randn(100, 128, seed=1))
    model(randn(100, 128, seed=2))


def bits(weights, layer):
    """Codes, and a float32 scale for each channel or group."""
    n, c = layer.weight.shape
    groups = -(-c // weights.get("group_size", c))
    return n * c * (4 if weights["type"] == "int4" else 8) + 32 * n * groups


def chosen(found, module):
    """The entry for every layer, as quantize itself reads them."""
    qz.quantize(module, {"quant_cfg": found, "algorithm": "minmax"})
    schemes = {row.name: row.weights for row in qz.report(module).rows}
    names = {qz.core.Scheme(4, True, "channel"): CHANNEL, qz.core.Scheme(8, True, "channel"): INT8}
    names |= {qz.core.Scheme(4, True, "group", each["group_size"]): each for each in GROUPS}
    return {name: names[scheme] for name, scheme in schemes.items()}


@pytest.mark.parametrize("limit", [0.133, 0.15, 0.18, 0.24])
def test_the_formats_fit_into_the_limit_and_use_it(limit):
    subject = model()
    before = snapshot(subject)
    found = qz.assign_formats(subject, calibrate, limit)
    assert_same_snapshot(snapshot(subject), before)
    assert type(subject[0].q) is nn.Linear
    assert not subject._forward_hooks
    layers = {name: module for name, module in subject.named_modules() if isinstance(module, nn.Linear)}
    entries = chosen(found, model())
    whole = sum(32 * layer.weight.numel() for layer in layers.values())
    used = sum(bits(entries[name], layer) for name, layer in layers.items())
    assert used <= limit * whole
    # The layers that read one tensor have one format.
    for block in "01":
        assert entries[f"{block}.q"] == entries[f"{block}.k"]
    # From the smallest format to the largest, no step of one group of layers is larger than this.
    steps = [32 * layer.weight.numel() for layer in layers.values()]
    assert used > limit * whole - 2 * max(steps) or all(entry == INT8 for entry in entries.values())


def test_where_there_is_room_everything_is_int8_and_where_there_is_none_int4_by_channel():
    assert qz.assign_formats(model(), calibrate, 1.0) == {"weights": INT8}
    layers = [module for module in model().modules() if isinstance(module, nn.Linear)]
    least = sum(bits(CHANNEL, layer) for layer in layers) / sum(32 * layer.weight.numel() for layer in layers)
    assert qz.assign_formats(model(), calibrate, least * (1 + 1e-6)) == {"weights": CHANNEL}
    subject = model()
    before = snapshot(subject)
    with pytest.raises(qz.QuantizeError, match=f"limit: 0.1; accepted: at least {least:.4f}, which the smallest"):
        qz.assign_formats(subject, calibrate, 0.1)
    assert_same_snapshot(snapshot(subject), before)


def test_the_layer_that_loses_most_gets_the_bits():
    # Weights on the grid of int4 by channel lose nothing there: 7 and -8 steps are in every row. The other layer does.
    subject = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    source = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (64, 64), generator=source)
    codes[:, 0], codes[:, 1] = -8, 7
    with torch.no_grad():
        subject[0].weight.copy_(codes / 8)
        subject[1].weight.copy_(torch.randn(64, 64, generator=source))
    found = qz.assign_formats(subject, lambda model: model(torch.randn(200, 64, generator=source)), 0.21)
    entries = chosen(found, subject)
    assert entries == {"0": CHANNEL, "1": INT8}


def test_a_name_that_ends_in_another_has_its_own_format():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.inner = nn.Linear(64, 64), nn.ModuleDict({"down": nn.Linear(64, 64)})
            self.third = nn.Linear(64, 64)

        def forward(self, x):
            return self.third(self.inner["down"](self.down(x)))

    for limit in (0.15, 0.17, 0.2, 0.22):
        subject = filled(Nested())
        found = qz.assign_formats(subject, lambda model: model(randn(100, 64)), limit)
        layers = {name: module for name, module in subject.named_modules() if isinstance(module, nn.Linear)}
        used = sum(bits(entry, layers[name]) for name, entry in chosen(found, filled(Nested())).items())
        assert used <= limit * 3 * 32 * 64 * 64


@pytest.mark.parametrize(("arguments", "told"), [
    ({"formats": []}, "formats: "),
    ({"formats": [{"type": "int5", "symmetric": True, "strategy": "channel"}]}, "quant_cfg.weights.type: 'int5'"),
    ({"calibrate": lambda model: None}, "calibrate: no forward pass reached a layer; accepted: a function"),
    ({"skip_layers": [""]}, "skip_layers: "),
])  # fmt: skip
def test_calls_that_are_refused_leave_the_model(arguments, told):
    subject = model()
    before = snapshot(subject)
    with pytest.raises(qz.QuantizeError, match=told):
        qz.assign_formats(**{"model": subject, "calibrate": calibrate, "limit": 0.2, **arguments})
    assert_same_snapshot(snapshot(subject), before)


def test_an_error_of_the_model_is_its_own_and_leaves_it():
    subject = model()
    before = snapshot(subject)
    with pytest.raises(RuntimeError):
        qz.assign_formats(subject, lambda model: model(randn(3, 5)), 0.2)
    assert_same_snapshot(snapshot(subject), before)


class Weighed(nn.Module):
    """Two layers on inputs of their own; the model's output hears one of them a thousand times less."""

    def __init__(self, loud):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.loud = loud

    def forward(self, x):
        first, second = self.a(x[:, :64]), self.b(x[:, 64:])
        return first + 0.001 * second if self.loud == "a" else 0.001 * first + second


@pytest.mark.parametrize("loud", ["a", "b"])
@pytest.mark.parametrize("form", ["scalar", "generator", "list"])
def test_with_losses_what_the_outputs_hear_gets_the_bits(loud, form):
    def losses(model):
        passes = ((model(randn(100, 128, seed=seed)) * randn(100, 64, seed=seed + 9)).sum() for seed in range(2))
        return next(passes) if form == "scalar" else passes if form == "generator" else [next(passes)]

    subject = filled(Weighed(loud))
    before = snapshot(subject)
    entries = chosen(qz.assign_formats(subject, losses, 0.21), filled(Weighed(loud)))
    # The squared gradients are a million times as large: no error of rounding differs by as much.
    assert entries == {"a": CHANNEL, "b": CHANNEL} | {loud: INT8}
    assert_same_snapshot(snapshot(subject), before)
    assert all(p.grad is None for p in subject.parameters())


def test_outputs_are_no_losses_and_losses_need_gradients():
    subject = filled(Weighed("a"))

    def silent(model):
        model(randn(100, 128))

    plain = qz.assign_formats(subject, silent, 0.21)
    assert qz.assign_formats(subject, lambda model: model(randn(100, 128)), 0.21) == plain
    before = snapshot(subject.requires_grad_(False))
    with pytest.raises(qz.QuantizeError, match="calibrate: a loss without a gradient; accepted: scalars with"):
        qz.assign_formats(subject, lambda model: model(randn(100, 128)).sum(), 0.21)
    assert_same_snapshot(snapshot(subject), before)


def test_a_second_name_that_ends_in_another_layers_name_keeps_its_own_format():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.x, self.y = nn.Linear(64, 256), nn.Module()
            self.y.fc, self.fc, self.z = self.x, nn.Linear(256, 64), nn.Linear(64, 256)

        def forward(self, x):
            return self.z(self.fc(self.y.fc(x)))

    for limit in (0.15, 0.18, 0.23):
        subject = filled(Shared())
        found = qz.assign_formats(subject, lambda model: model(randn(256, 64)), limit)
        entries = chosen(found, filled(Shared()))
        assert entries.keys() == {"x", "fc", "z"}
        used = sum(bits(entries[name], subject.get_submodule(name)) for name in entries)
        assert used <= limit * 3 * 32 * 64 * 256


def test_names_may_have_brackets():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("a[0]", nn.Linear(64, 64))
            self.b = nn.Linear(64, 64)

        def forward(self, x):
            return self.get_submodule("a[0]")(x[:, :64]) + 0.001 * self.b(x[:, 64:])

    found = qz.assign_formats(filled(Odd()), lambda model: [model(randn(99, 128)).square().sum()], 0.21)
    assert chosen(found, filled(Odd())) == {"a[0]": INT8, "b": CHANNEL}


def test_a_mixture_of_experts_gets_one_format_and_no_group_is_shorter():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=96, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, vocab_size=128, use_cache=False)  # fmt: skip
    ids = torch.randint(0, 128, (4, 32), generator=torch.Generator().manual_seed(0))
    subject = transformers.MixtralForCausalLM(config)
    mixed = set()
    for limit in (0.15, 0.18, 0.2):
        found = qz.assign_formats(subject, lambda model: model(ids), limit, skip_layers="lm_head")
        fresh = transformers.MixtralForCausalLM(config)
        with pytest.warns(qz.QuantizeWarning, match="embed_tokens"):
            qz.quantize(fresh, {"quant_cfg": found, "algorithm": "minmax", "skip_layers": "lm_head"})
        rows = qz.report(fresh).rows
        for block in "01":
            formats = {row.weights for row in rows if row.name.startswith(f"model.layers.{block}.mlp.experts")}
            assert len(formats) == 1
        assert all(row.shape[1] % (row.weights.group_size or 1) == 0 for row in rows)
        mixed |= {row.weights for row in rows}
    assert len(mixed) > 1


def test_offloaded_models_get_the_formats_of_those_in_memory():
    accelerate = pytest.importorskip("accelerate")
    kept = accelerate.cpu_offload(model(), torch.device("cpu"))
    assert qz.assign_formats(kept, calibrate, 0.18) == qz.assign_formats(model(), calibrate, 0.18)


def test_a_model_that_is_being_quantized_is_refused_and_goes_on():
    subject = model()
    qz.quantize(subject, {"quant_cfg": {"weights": INT8}, "algorithm": "gptq", "skip_layers": "0."})
    with pytest.raises(qz.QuantizeError, match=r"layer '1\.q' is quantized already; accepted: a model in floating"):
        qz.assign_formats(subject, calibrate, 0.5)
    subject(randn(100, 128))
    assert {row.stage for row in qz.report(subject).rows} == {"quantized"}


@pytest.mark.parametrize("limit", [float("inf"), float("nan"), None, "0.2", 0, -1, True])
def test_limits_that_are_none_are_refused_before_anything_runs(limit):
    def never(model):
        raise AssertionError

    with pytest.raises(qz.QuantizeError, match=r"limit: .*; accepted: a number above 0"):
        qz.assign_formats(model(), never, limit)
