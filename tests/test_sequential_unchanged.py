"""Sequential calibration runs a model several times, and leaves everything that the model does besides as it was."""

import contextvars
import random
import warnings

import pytest
import torch
from torch import nn

import quantize as qz
from tests.models import solutions
from tests.zoo.sequential import Block, C, Chain, batches, given, made

full_passes = pytest.mark.filterwarnings("ignore:calibrated in full passes:quantize.QuantizeWarning")


def run(model, *, sequential=True, asymmetric=0.0, batch_num=3):
    qz.quantize(model, given(batch_num, sequential=sequential, asymmetric=asymmetric))
    for x in batches()[:batch_num]:
        model(x)
    return model


def assert_same_codes(a, b, names):
    a, b = solutions(a), solutions(b)
    for name in names:
        assert torch.equal(a[name].weight.codes, b[name].weight.codes), name


@full_passes
def test_randomness_buffers_modes_and_arguments_stay():
    class Noisy(Chain):
        def __init__(self):
            super().__init__()
            self.drop, self.batch_norm = nn.Dropout(0.5), nn.BatchNorm1d(C)

        def forward(self, x):
            return super().forward(self.batch_norm(self.drop(x).transpose(1, 2)).transpose(1, 2))

    model, plain = made(Noisy).train(), made(Noisy).train()
    qz.quantize(model, given())
    states = []
    for each in (model, plain):
        torch.manual_seed(5)
        for x in batches():
            kept = x.clone()
            each(x)
            assert torch.equal(x, kept)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert torch.equal(model.batch_norm.running_mean, plain.batch_norm.running_mean)
    assert model.batch_norm.num_batches_tracked == 3
    assert model.training


def test_hooks_of_the_user_run_once_on_what_is_kept():
    model, plain = made(Chain), made(Chain)
    for each, sequential in ((model, True), (plain, False)):
        each.register_forward_pre_hook(lambda _module, args: (torch.sinh(args[0] * 0.5) + 1,))
        run(each, sequential=sequential)
    assert_same_codes(model, plain, ["first"])


def test_a_forward_that_the_user_put_on_a_module_is_there_again():
    model, calls = made(Chain), []
    for block in model.blocks:
        block.forward = lambda x, f=block.forward: calls.append(1) or f(x)
    own = [block.forward for block in model.blocks]
    run(model)
    assert all(vars(block)["forward"] is forward for block, forward in zip(model.blocks, own, strict=True))
    assert not any("forward" in vars(module) for module in model.modules() if not isinstance(module, Block))
    assert len(calls) >= 3 * len(own)


@pytest.mark.parametrize("asymmetric", [0.0, 0.5])
def test_every_run_draws_the_same_numbers(asymmetric):
    # Runs stand side by side: each has a list of its own.
    runs, drawn = [], contextvars.ContextVar("drawn")

    class DrawingBlock(Block):
        def forward(self, x):
            drawn.get().append(torch.rand(1).item())
            return super().forward(x * (0.5 + drawn.get()[-1]))

    class Drawing(Chain):
        kind = DrawingBlock

        def forward(self, x):
            runs.append([])
            drawn.set(runs[-1])
            return super().forward(x)

        def step(self, block, x):
            x = block(nn.functional.dropout(x, 0.3, training=True))
            drawn.get().append(random.random())
            return x * torch.rand(1) if drawn.get()[-1] > 0.5 else x

    states = []
    for calibrating in (False, True):
        model = made(Drawing)
        if calibrating:
            qz.quantize(model, given(1, asymmetric=asymmetric))
        torch.manual_seed(3)
        random.seed(3)
        model(batches()[0])
        states.append((torch.get_rng_state(), random.getstate()))
    assert torch.equal(states[0][0], states[1][0])
    assert states[0][1] == states[1][1]
    plain, *later = runs
    # The user's own pass, and one for each way through the model.
    assert len(later) == (3 if asymmetric else 2)
    assert len(set(plain)) == 6
    assert all(each == plain for each in later)


@full_passes
def test_buffers_that_a_model_writes_go_from_batch_to_batch():
    class Remembering(Chain):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(C))
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            x = x + self.mean
            self.mean = self.mean * 0.5 + x.mean((0, 1))
            self.count += 1
            return super().forward(x)

    with torch.no_grad():
        model, plain = run(made(Remembering)), run(made(Remembering), sequential=False)
    assert_same_codes(model, plain, ["first"])
    assert any("the model writes to its buffers" in remark for remark in qz.report(model).remarks)
    assert model.count == plain.count == 3
    assert torch.equal(model.mean, plain.mean)


@full_passes
def test_buffers_of_inference_mode_are_replaced():
    class Averaging(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(C, C)
            self.register_buffer("mean", torch.zeros(C))

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.mean((0, 1))
            return self.layer(x - self.mean)

    models = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            models.append(run(made(Averaging), asymmetric=0.5))
    assert_same_codes(*models, ["layer"])
    assert torch.equal(models[0].mean, models[1].mean)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.enable_grad])
def test_any_gradient_mode_and_cached_tensors(context):
    class Cached(Chain):
        scale = None

        def forward(self, x):
            if self.scale is None:
                self.scale = torch.ones(C) * 0.5
            return super().forward(x * self.scale)

    with context():
        model = run(made(Cached))
    with torch.no_grad():
        plain = run(made(Cached))
    assert_same_codes(model, plain, solutions(plain))


def test_autocast_is_in_force_again():
    seen = []

    class Casting(Chain):
        def step(self, block, x):
            seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
            return super().step(block, x)

    models = []
    for sequential in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
            models.append(run(made(Casting), sequential=sequential, batch_num=1))
    assert_same_codes(*models, ["first"])
    # One pass each, and the runs of sequential calibration.
    assert len(seen) > 2 * Chain.depth
    assert set(seen) == {(True, torch.bfloat16)}
