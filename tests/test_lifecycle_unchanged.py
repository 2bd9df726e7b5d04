"""What calibration and conversion leave alone: modes, gradients, hooks, random numbers, and after an error all."""

import pytest
import torch
from torch import nn

import quantize as qz
from quantize.core import minmax
from tests.models import (
    TENSOR,
    TOKEN,
    assert_same_snapshot,
    config,
    filled,
    hooks,
    mlp,
    randn,
    rounding_bound,
    snapshot,
    solutions,
)


def test_modes_grads_hooks_and_randomness_stay():
    model = mlp().train()
    model[0].requires_grad_(False)
    model[2].weight.grad = torch.ones_like(model[2].weight)
    calls = []
    handle = model[2].register_forward_hook(lambda *_: calls.append("hook"))
    own = hooks(model)
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
    assert hooks(model) == own
    handle.remove()
    model(randn(2, 64))
    assert calls == ["hook", "hook"]
    assert not hooks(model)
    assert torch.equal(torch.get_rng_state(), state)


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
    assert x.grad.any()


def test_autocast_does_not_reach_the_statistics():
    # One layer: its inputs are the same with autocast and without.
    model, plain = mlp(), mlp()
    x = randn(40, 64)
    for each, enabled in ((model, True), (plain, False)):
        qz.quantize(each, config({"gptq": {"sequential": False}}))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            each(x)
    found, expected = (solutions(each)["0"] for each in (model, plain))
    assert torch.equal(found.weight.codes, expected.weight.codes)
    assert torch.equal(found.error, expected.error)


# The reference sums integers in floating point, exactly.
@pytest.mark.parametrize("kernel", ["reference", None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_round_the_integer_sums(dtype, kernel):
    model = filled(nn.Sequential(nn.Linear(128, 8)))
    qz.quantize(model, config(inputs=TOKEN))
    x = randn(4, 128)
    model(x)
    solved = model(x)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(model(x), solved)
        qz.convert(model, kernel=kernel)
        assert ((model(x) - solved).abs() <= rounding_bound(model[0], x)).all()


def test_a_failure_inside_quantize_undoes_everything(monkeypatch):
    model = mlp()
    before = snapshot(model)

    def broken(*_arguments):
        raise MemoryError

    monkeypatch.setattr(minmax, "solve", broken)
    with pytest.raises(MemoryError):
        qz.quantize(model, config())
    assert_same_snapshot(before, snapshot(model))


def test_attributes_and_buffers_of_a_layer_go_with_it(tmp_path):
    def made(device="cpu"):
        model = filled(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))).eval()
        for layer in (model[0], model[2]):
            layer.tag, layer.solution, layer.scale = ["a"], "a user's", "likewise"
            layer.register_buffer("mine", torch.arange(3.0))
            layer.register_buffer("hidden", torch.arange(2.0), persistent=False)
        return model.to(device)

    model = made()
    tags = [layer.tag for layer in (model[0], model[2])]
    with torch.no_grad():
        model[0].mine += 1
        model[0].hidden += 1

    def assert_kept(model, *, hidden=True):
        for shift, layer, tag in zip((1, 0), (model[0], model[2]), tags, strict=True):
            assert layer.tag == tag
            assert torch.equal(layer.mine, torch.arange(3.0) + shift)
            assert torch.equal(layer.hidden, torch.arange(2.0) + shift * hidden)
            assert not hasattr(layer, "_old_forward")
        assert {"0.mine", "2.mine"} < model.state_dict().keys()
        assert not {"0.hidden", "2.hidden"} & model.state_dict().keys()

    qz.quantize(model, config("gptq"))
    assert_kept(model)
    assert model[0].tag is tags[0]
    # What a user writes to a layer under calibration is no different.
    model[0].later = 1
    model(randn(32, 64))
    qz.convert(model)
    assert_kept(model)
    assert (model[0].later, model[0].tag) == (1, tags[0])
    # The layer's own come first.
    assert model[0].scale.shape == (32, 1)
    assert not {"session", "statistics", "tokens", "own"} & vars(model[0]).keys()
    assert_kept(model.double().float())
    qz.save(model, tmp_path / "saved")
    y = model(randn(4, 64))
    for device in ("cpu", "meta"):
        fresh = made(device)
        qz.load(fresh, tmp_path / "saved")
        # Those that have data stay.
        assert_kept(fresh, hidden=device == "meta")
        assert torch.equal(fresh(randn(4, 64)), y)
