"""From float over calibrating and quantized to converted, and everything that models do on the way."""

import warnings

import pytest
import torch
from torch import nn

import quantize as qz
from quantize.core import Scheme, dequantize, fake_quantize, linear, minmax, round_to_nearest
from quantize.shell.calibration import CalibrationLinear
from tests.models import (
    TENSOR,
    TOKEN,
    WEIGHTS,
    assert_same_snapshot,
    config,
    filled,
    mlp,
    randn,
    rounding_bound,
    snapshot,
)

GROUP = {**WEIGHTS, "strategy": "group", "group_size": 32}


def test_the_documented_example_quantizes_float32():
    model = mlp()
    x = randn(8, 64)
    before = model(x)
    qz.quantize(
        model,
        {
            "batch_num": 1,
            "quant_cfg": {"weights": {"type": "int8", "symmetric": True, "strategy": "tensor"}},
            "algorithm": {"minmax"},
        },
    )
    after = model(x)
    # Half a step of each weight, times the inputs that meet it, through both layers.
    scheme = Scheme(8, True, "tensor")
    first, second = (round_to_nearest(model[i].weight, scheme).scale.item() / 2 for i in (0, 2))
    hidden = x.abs().sum(1, keepdim=True) * first
    bound = hidden * model[2].weight.abs().sum(1) + (model[1](model[0](x)).abs().sum(1, keepdim=True)) * second
    assert (after - before).abs().max() > 0
    assert ((after - before).abs() <= bound + 1e-5).all()
    assert [row.name for row in qz.report(model).rows] == ["0", "2"]


def test_none_means_the_weight_only_preset():
    model = mlp()
    with pytest.warns(qz.QuantizeWarning, match="skip_layers entry 'lm_head' matched nothing"):
        qz.quantize(model)
    (row, _) = qz.report(model).rows
    assert (row.weights, row.inputs, row.algorithm) == ("int8 channel symmetric", None, "minmax")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("inputs", [None, TOKEN, TENSOR], ids=["weight-only", "token", "tensor"])
def test_a_layer_computes_what_the_core_says(dtype, inputs):
    model = filled(nn.Sequential(nn.Linear(64, 32))).to(dtype)
    layer, batches = model[0], [randn(6, 64, seed=seed, dtype=dtype) for seed in (1, 2, 3)]
    weight = layer.weight.detach().clone()
    plain = [model(x) for x in batches]
    qz.quantize(model, config(inputs=inputs, batch_num=2))
    if inputs is not None:
        assert all(torch.equal(model(x), y) for x, y in zip(batches[:2], plain[:2], strict=True))
    scheme = None if inputs is None else Scheme(8, True, inputs["strategy"])
    static = None
    if scheme is not None and scheme.strategy == "tensor":
        seen = torch.cat(batches[:2]).to(torch.float64 if dtype == torch.float64 else torch.float32)
        static = linear.static_params(seen.amin(0).clamp(max=0), seen.amax(0).clamp(min=0), scheme)
    quantized = round_to_nearest(weight, Scheme())
    options = {"inputs": scheme, "static": static}
    expected = linear.fake_quantized_linear(batches[2], quantized, layer.bias, **options)
    assert torch.equal(model(batches[2]), expected)
    assert not torch.equal(expected, plain[2])
    qz.convert(model, kernel="reference")
    assert torch.equal(model(batches[2]), linear.quantized_linear(batches[2], quantized, layer.bias, **options))
    assert model(batches[2]).dtype == dtype
    assert model[0].scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_all_batches_are_used_and_later_ones_change_nothing():
    model = filled(nn.Sequential(nn.Linear(4, 4)))
    qz.quantize(model, config(inputs=TENSOR, batch_num=3))
    for peak in (1.0, 5.0, 2.0):
        model(torch.full((1, 4), peak))
    assert model[0].solution.static.scale.item() == pytest.approx(5 / 127)
    kept = model[0].solution
    model(torch.full((1, 4), 100.0))
    assert model[0].solution is kept
    assert qz.report(model).rows[0].tokens == 3


def test_dynamic_inputs_take_any_length_after_calibration():
    model = mlp()
    qz.quantize(model, config(inputs=TOKEN))
    model(randn(2, 7, 64))
    assert model(randn(5, 3, 64)).shape == (5, 3, 32)
    # A token's result does not depend on its neighbours.
    x = randn(4, 64)
    assert torch.allclose(model(x)[1], model(x[1:2])[0], atol=1e-6)


def test_convert_before_the_end_says_what_is_missing():
    model = mlp()
    qz.quantize(model, config(inputs=TENSOR, batch_num=4))
    model(randn(2, 64))
    before = snapshot(model)
    with pytest.raises(qz.QuantizeError, match="1 of 4 batches seen; accepted: 3 more forward passes"):
        qz.convert(model)
    assert_same_snapshot(before, snapshot(model))


def test_finish_solves_with_what_was_seen():
    model = mlp()
    qz.quantize(model, config(inputs=TENSOR, batch_num=4))
    with pytest.raises(qz.QuantizeError, match="0 batches seen"):
        qz.finish(model)
    model(randn(2, 64))
    qz.finish(model)
    qz.finish(model)
    qz.convert(model)
    assert [row.tokens for row in qz.report(model).rows] == [2, 2]


@pytest.mark.parametrize("call", [qz.finish, qz.convert, qz.report])
def test_a_float_model_is_refused(call):
    model = mlp()
    with pytest.raises(qz.QuantizeError, match="accepted: a model after quantize"):
        call(model)


def test_converting_twice_is_refused():
    model = mlp()
    qz.quantize(model, config())
    qz.convert(model)
    with pytest.raises(qz.QuantizeError, match="not calibrated"):
        qz.convert(model)


@pytest.mark.parametrize("stage", ["calibrating", "quantized", "converted"])
def test_quantizing_twice_is_refused_and_touches_nothing(stage):
    model = mlp()
    qz.quantize(model, config(inputs=TOKEN))
    if stage != "calibrating":
        model(randn(2, 64))
    if stage == "converted":
        qz.convert(model)
    before = snapshot(model)
    with pytest.raises(qz.QuantizeError, match="layer '0' is quantized already"):
        qz.quantize(model, config())
    assert_same_snapshot(before, snapshot(model))


def test_converted_layers_hold_codes_and_no_float_weight():
    model = mlp(c=512, hidden=256, out=512)
    sizes = [sum(p.nbytes for p in model[i].parameters()) for i in (0, 2)]
    qz.quantize(model, config())
    qz.convert(model)
    for i, size in zip((0, 2), sizes, strict=True):
        layer = model[i]
        assert isinstance(layer, qz.QuantizedLinear)
        assert [name for name, _ in layer.named_parameters()] == ["bias"]
        assert layer.codes.dtype == torch.int8
        held = sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))
        # 1 byte a weight, 4 a scale, 4 a bias.
        assert held == layer.codes.numel() + 8 * layer.out_features
        assert held <= 0.26 * size


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 64)
        self.body = nn.Linear(64, 64)
        self.head = nn.Linear(64, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, *, tokens):
        return self.head(self.body(self.embed(tokens)))


@pytest.mark.filterwarnings("ignore::quantize.QuantizeWarning")
def test_a_tied_embedding_stays_as_it_is_and_keywords_arrive():
    model = filled(Tied())
    kept = model.embed.weight.detach().clone()
    qz.quantize(model, config(inputs=TOKEN))
    assert model.head.weight is model.embed.weight
    model(tokens=torch.arange(10))
    qz.convert(model)
    assert torch.equal(model.embed.weight, kept)
    assert model.head.codes.shape == (10, 64)
    assert torch.isfinite(model(tokens=torch.arange(3))).all()


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.inner = nn.ModuleList([self.first, nn.Linear(8, 8)])

    def forward(self, x):
        return self.inner[1](self.first(self.inner[0](x)))


def test_one_layer_under_two_names_is_one_layer():
    model = filled(Shared())
    qz.quantize(model, config(inputs=TENSOR))
    assert model.first is model.inner[0]
    model(torch.ones(3, 8))
    report = qz.report(model)
    assert [row.names for row in report.rows] == [("first", "inner.0"), ("inner.1",)]
    # Called twice in a forward pass: 2 x 3 tokens.
    assert [row.tokens for row in report.rows] == [6, 3]
    assert "first = inner.0" in str(report)
    qz.convert(model)
    assert model.first is model.inner[0]
    assert isinstance(model.first, qz.QuantizedLinear)


def test_a_layer_called_twice_sees_both_inputs():
    model = filled(Shared())
    inputs = []
    model.first.register_forward_pre_hook(lambda _module, args: inputs.append(args[0].detach()))
    qz.quantize(model, config(inputs=TENSOR))
    model(randn(5, 8))
    assert len(inputs) == 2
    assert model.first.solution.static.scale.item() == pytest.approx(
        float(torch.cat(inputs).abs().max()) / 127, rel=0.02
    )


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (2, 1, 3, 64), (1, 2, 1, 3, 64)])
def test_batches_have_any_number_of_axes(shape):
    model = mlp()
    qz.quantize(model, config(inputs=TENSOR))
    model(randn(*shape))
    assert model(randn(*shape)).shape == (*shape[:-1], 32)
    assert qz.report(model).rows[0].tokens == randn(*shape).numel() // 64


def test_an_empty_batch_counts_and_changes_no_statistic():
    model = mlp()
    qz.quantize(model, config(inputs=TENSOR, batch_num=2))
    model(torch.zeros(0, 64))
    model(randn(3, 64))
    assert qz.report(model).rows[0].tokens == 3
    qz.convert(model)
    assert model(torch.zeros(0, 64)).shape == (0, 32)


class Moody(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.fail = False

    def forward(self, x):
        x = self.a(x)
        if self.fail:
            raise RuntimeError("in the middle")
        return self.b(x)


def test_a_forward_that_raises_counts_for_nothing():
    model = filled(Moody())
    qz.quantize(model, config(inputs=TENSOR, batch_num=2))
    model(torch.ones(1, 4))
    kept = (model.a.statistics, model.a.seen, model.a.tokens)
    model.fail = True
    with pytest.raises(RuntimeError, match="in the middle"):
        model(torch.full((1, 4), 1000.0))
    model.a(torch.full((1, 4), 1000.0))
    model.fail = False
    assert (model.a.statistics, model.a.seen, model.a.tokens) == kept
    model(torch.full((1, 4), 2.0))
    assert model.a.solution.static.scale.item() == pytest.approx(2 / 127)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("algorithm", ["minmax", "gptq"])
def test_inputs_that_are_not_finite_name_the_layer(bad, algorithm):
    model = mlp()
    qz.quantize(model, config(algorithm, inputs=TENSOR if algorithm == "minmax" else None, batch_num=2))
    model(randn(20, 64))
    x = randn(20, 64)
    x[1, 3] = bad
    with pytest.raises(qz.QuantizeError, match="layer '0': NaN or inf in batch 2; accepted: finite inputs"):
        model(x)
    assert model[0].seen == 1
    model(randn(20, 64))
    qz.convert(model)
    assert torch.isfinite(model(randn(20, 64))).all()


def test_weights_that_are_not_finite_name_the_layer():
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    before = snapshot(model)
    with pytest.raises(qz.QuantizeError, match="layer '2': a weight with NaN or inf"):
        qz.quantize(model, config())
    assert_same_snapshot(before, snapshot(model))
    qz.quantize(model, config(skip_layers="2"))


def test_weights_that_break_during_calibration_name_the_layer():
    model = mlp()
    qz.quantize(model, config(inputs=TENSOR))
    with torch.no_grad():
        model[2].weight[0, 0] = torch.inf
    with pytest.raises(qz.QuantizeError, match="layer '2': a weight with NaN or inf"):
        model(randn(2, 64))
    with torch.no_grad():
        model[2].weight[0, 0] = 0
    qz.finish(model)
    qz.convert(model)


def test_a_row_of_zeros_stays_zero():
    model = filled(nn.Sequential(nn.Linear(8, 4, bias=False)))
    with torch.no_grad():
        model[0].weight[1] = 0
    qz.quantize(model, config(inputs=TOKEN))
    model(randn(2, 8))
    qz.convert(model)
    assert not model(randn(3, 8))[:, 1].any()
    assert not model(torch.zeros(1, 8)).any() or model[0].bias is not None


def test_a_group_size_that_does_not_divide_the_channels():
    model = filled(nn.Sequential(nn.Linear(80, 4)))
    weight = model[0].weight.detach().clone()
    qz.quantize(model, config(weights=GROUP))
    expected = round_to_nearest(weight, Scheme(8, True, "group", 32))
    assert model[0].solution.weight.scale.shape == (4, 3)
    qz.convert(model)
    assert torch.equal(dequantize(model[0].solution.weight), dequantize(expected))


@pytest.mark.filterwarnings("ignore::quantize.QuantizeWarning")
def test_a_layer_that_no_token_reached_falls_back_to_minmax():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, *, wake=False):
            return self.idle(self.used(x)) if wake else self.used(x)

    model = filled(Idle())
    weight = model.idle.weight.detach().clone()
    qz.quantize(model, config(inputs=TENSOR))
    with pytest.warns(qz.QuantizeWarning, match="no token reached 1 of 2 layers, which fall back to minmax: idle"):
        model(randn(3, 8))
    row = qz.report(model).rows[1]
    assert (row.algorithm, row.inputs, row.tokens) == ("minmax (no tokens)", "int8 token symmetric", 0)
    qz.convert(model)
    assert torch.equal(model.idle.codes, round_to_nearest(weight, Scheme()).codes)
    # No range was seen: each token brings its own.
    x = randn(3, 8) * 1e4
    middle = model.used(x)
    token = Scheme(8, True, "token")
    entered = fake_quantize(middle, round_to_nearest(middle, token).params, token)
    expected = entered @ dequantize(model.idle.solution.weight).T + model.idle.bias
    assert torch.allclose(model(x, wake=True), expected, rtol=1e-4, atol=1e-2)


def test_modes_grads_hooks_and_randomness_stay():
    model = mlp().train()
    model[0].requires_grad_(False)
    model[2].weight.grad = torch.ones_like(model[2].weight)
    calls = []
    handle = model[2].register_forward_hook(lambda *_: calls.append("hook"))
    parameters = [(name, p, p.requires_grad) for name, p in model.named_parameters()]
    state = torch.get_rng_state()
    qz.quantize(model, config(inputs=TENSOR))
    model(randn(2, 64))
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(model.get_parameter(name) is p and p.requires_grad == flag for name, p, flag in parameters)
    assert torch.equal(model[2].weight.grad, torch.ones_like(model[2].weight))
    qz.convert(model)
    model(randn(2, 64))
    assert calls == ["hook", "hook"]
    handle.remove()
    model(randn(2, 64))
    assert calls == ["hook", "hook"]
    assert torch.equal(torch.get_rng_state(), state)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_gradients_flow_while_calibrating():
    model = mlp()
    plain = mlp()
    qz.quantize(model, config(inputs=TENSOR, batch_num=2))
    for each in (model, plain):
        each(randn(2, 64)).sum().backward()
    assert torch.equal(model[0].weight.grad, plain[0].weight.grad)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_calibration_under_any_gradient_mode_gives_ordinary_tensors(context):
    model = mlp()
    qz.quantize(model, config("gptq"))
    with context():
        model(randn(40, 64))
    x = randn(2, 64).requires_grad_()
    model(x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_autocast_does_not_reach_the_statistics():
    model, plain = mlp(), mlp()
    x = randn(40, 64)
    for each in (model, plain):
        qz.quantize(each, config({"gptq": {"sequential": False}}, batch_num=2))
    plain(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)
    assert torch.equal(model[0].statistics.total, plain[0].statistics.total)


def test_siblings_share_one_observation():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

        def forward(self, x, *, write=False):
            y = self.q(x) + self.k(x)
            if write:
                x.mul_(2)
            return self.o(y + self.v(x))

    model = filled(Attention())
    qz.quantize(model, config({"gptq": {"sequential": False}}, batch_num=3))
    with torch.no_grad():
        model(randn(4, 16))
        assert model.q.statistics is model.k.statistics is model.v.statistics
        assert model.o.statistics is not model.q.statistics
        # Written to in between, the same tensor is another observation.
        model(randn(4, 16), write=True)
    assert model.q.statistics is model.k.statistics
    assert model.v.statistics is not model.q.statistics
    first, second = randn(4, 16), randn(4, 16)
    assert torch.allclose(model.v.statistics.total, first.T @ first + 4 * second.T @ second, rtol=1e-5, atol=1e-5)


def test_an_interrupted_solve_can_be_finished(monkeypatch):
    model = mlp()
    qz.quantize(model, config(inputs=TENSOR))
    plain = mlp()
    solve, calls = minmax.solve, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return solve(*arguments)

    monkeypatch.setattr(minmax, "solve", interrupted)
    x = randn(3, 64)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    assert torch.equal(model(x), plain(x))
    with pytest.raises(qz.QuantizeError, match="interrupted"):
        qz.convert(model)
    qz.finish(model)
    assert len(calls) == 3
    qz.convert(model)


def test_a_failure_inside_quantize_undoes_everything(monkeypatch):
    model = mlp()
    before = snapshot(model)

    def broken(*_arguments):
        raise MemoryError

    monkeypatch.setattr(minmax, "solve", broken)
    with pytest.raises(MemoryError):
        qz.quantize(model, config())
    assert_same_snapshot(before, snapshot(model))


def test_a_quiet_model_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = mlp()
        qz.quantize(model, config(inputs=TENSOR))
        model(randn(2, 64))
        qz.convert(model)


def test_a_part_of_a_model_can_be_quantized_and_converted_from_outside():
    model = filled(nn.Sequential(mlp(), nn.Linear(32, 8)))
    qz.quantize(model[0], config(inputs=TENSOR))
    model(randn(2, 64))
    qz.convert(model)
    assert isinstance(model[0][0], qz.QuantizedLinear)
    assert type(model[1]) is nn.Linear
    assert len(qz.report(model).rows) == 2
    assert not any(isinstance(module, CalibrationLinear) for module in model.modules())


def test_layers_take_their_input_by_name():
    model = nn.Sequential(nn.Linear(8, 8))
    qz.quantize(model, config(inputs=TOKEN))
    x = randn(2, 8)
    for _ in range(2):
        assert model[0](input=x).shape == (2, 8)
        model(x)
    qz.convert(model)
    assert model[0](input=x).shape == (2, 8)


def test_parts_with_sessions_of_their_own_are_finished_together():
    model = nn.Sequential(mlp(), nn.Sequential(nn.Linear(32, 8)))
    for part in model:
        qz.quantize(part, config(inputs=TENSOR, batch_num=2))
    model[0](randn(2, 64))
    with pytest.raises(qz.QuantizeError, match="layer '0': 0 batches seen"):
        qz.finish(model)
    model[1](randn(2, 32))
    qz.finish(model)
    qz.convert(model)
    assert not model[0]._forward_hooks
    assert [row.stage for row in qz.report(model).rows] == ["converted"] * 3


def test_every_kind_of_hook_moves_with_its_layer():
    model = mlp()
    calls = []
    layer = model[0]
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    layer.register_forward_hook(lambda *_, **__: calls.append("keywords"), with_kwargs=True)
    layer.register_forward_hook(lambda *_: calls.append("always"), always_call=True)
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    expected = ["pre", "keywords", "always", "backward"]
    qz.quantize(model, config(inputs=TOKEN))
    for stage in ("calibrating", "quantized", "converted"):
        assert qz.report(model).rows[0].stage == stage
        calls.clear()
        model(randn(2, 64).requires_grad_()).sum().backward()
        assert calls == expected
        if stage == "quantized":
            qz.convert(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_round_the_integer_sums(dtype):
    model = filled(nn.Sequential(nn.Linear(1024, 8)))
    qz.quantize(model, config(inputs=TOKEN))
    x = randn(4, 1024)
    model(x)
    solved = model(x)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(model(x), solved)
        qz.convert(model)
        assert ((model(x) - solved).abs() <= rounding_bound(model[0], x)).all()


@pytest.mark.parametrize("algorithm", ["minmax", "awq"])
def test_an_owner_may_read_the_weight_of_a_converted_layer(algorithm):
    model = mlp().bfloat16()
    weight = model[0].weight.detach().clone()
    qz.quantize(model, config(algorithm))
    model(randn(40, 64, dtype=torch.bfloat16))
    qz.convert(model)
    assert model[0].weight.dtype == torch.bfloat16
    # Half a step of the row's scale, and the rounding to bfloat16.
    bound = weight.abs().amax(1, keepdim=True) * (0.5 / 127 * 4 + 2.0**-8)
    assert ((model[0].weight - weight).abs() <= bound).all()


@pytest.mark.parametrize("algorithm", ["gptq", "awq"])
@pytest.mark.parametrize(("first", "then"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_a_model_may_be_cast_during_calibration(algorithm, first, then):
    model = mlp(dtype=first)
    qz.quantize(model, config(algorithm, batch_num=2))
    model(randn(40, 64, dtype=first))
    model.to(then)
    model(randn(40, 64, dtype=then))
    qz.convert(model)
    assert torch.isfinite(model(randn(4, 64, dtype=then))).all()


def test_converting_a_layer_itself_is_refused():
    model = mlp()
    qz.quantize(model, config())
    with pytest.raises(qz.QuantizeError, match="the layer itself"):
        qz.convert(model[0])


def test_a_layer_called_often_keeps_one_state():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.entries = []

        def forward(self, x):
            for _ in range(20):
                x = self.layer(x.tanh())
                if self.layer.recorder is not None:
                    self.entries.append(len(self.layer.recorder._known._entries))
            return x

    model = filled(Loop())
    qz.quantize(model, config({"gptq": {"sequential": False}}))
    with torch.no_grad():
        model(randn(4, 8))
    assert max(model.entries) <= 2
    assert qz.report(model).rows[0].tokens == 80


@pytest.mark.parametrize("algorithm", ["gptq", "awq"])
@pytest.mark.parametrize(("tokens", "told"), [(15, "minmax (15 tokens)"), (16, None)])
def test_a_layer_that_few_tokens_reached_falls_back_to_minmax(algorithm, tokens, told):
    class Mixture(nn.Module):
        """Every token goes to one of two experts, by the sign of its first channel."""

        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))

        def forward(self, x):
            rare, y = x[:, 0] < 0, torch.zeros_like(x)
            y[rare], y[~rare] = self.experts[0](x[rare]), self.experts[1](x[~rare])
            return y

    model = filled(Mixture())
    weight = model.experts[0].weight.detach().clone()
    qz.quantize(model, config(algorithm, weights={**WEIGHTS, "type": "int4"}))
    x = randn(100, 64)
    x[:, 0] = x[:, 0].abs()
    x[:tokens, 0] *= -1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(x)
    rounded = round_to_nearest(weight, Scheme(4))
    same = torch.equal(model.experts[0].solution.weight.codes, rounded.codes)
    rows = qz.report(model).rows
    assert [row.tokens for row in rows] == [tokens, 100 - tokens]
    assert rows[1].algorithm == algorithm
    assert rows[0].algorithm == (told or algorithm)
    assert same == (told is not None)
    messages = [str(each.message) for each in caught if issubclass(each.category, qz.QuantizeWarning)]
    expected = f"fewer than 16 tokens reached 1 of 2 layers, which fall back to minmax: experts.0 ({tokens})"
    assert messages == ([expected] if told else [])


def test_a_part_may_be_converted_before_the_next_is_quantized():
    model = filled(nn.Sequential(nn.Sequential(nn.Linear(64, 64)), nn.Sequential(nn.Linear(64, 8))))
    qz.quantize(model[0], config(inputs=TENSOR))
    model(randn(2, 64))
    qz.convert(model[0])
    qz.quantize(model[1], config(inputs=TENSOR, batch_num=9))
    model(randn(2, 64))
    qz.finish(model)
    qz.convert(model)
    assert [row.stage for row in qz.report(model).rows] == ["converted"] * 2
