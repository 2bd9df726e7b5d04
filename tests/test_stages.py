"""Calibration stage by stage, against a plain oracle that remembers and frees nothing, on models of every shape."""

import copy
import dataclasses
import io
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import quantize as qz
from quantize.core import LayerSpec, Scheme, gptq, gram, linear, paired_gram
from quantize.shell import stages
from quantize.shell.batches import copied
from quantize.shell.calibration import CalibrationLinear
from tests.models import config, filled, randn

C = 32
GROUP = {"type": "int4", "symmetric": True, "strategy": "channel"}
SPEC = LayerSpec(Scheme(4))


def given(batch_num=3, *, sequential=True, algorithm="gptq", asymmetric=0.0, **rest):
    options = {"sequential": sequential} | ({"asymmetric": asymmetric} if algorithm == "gptq" else {})
    return config({algorithm: options}, weights=GROUP, batch_num=batch_num, **rest)


class Block(nn.Module):
    def __init__(self, c=C):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(c, 2 * c), nn.Linear(c, 2 * c), nn.Linear(2 * c, c)

    def forward(self, x):
        return x + self.down(self.up(x) * torch.sigmoid(self.gate(x)))


class Chain(nn.Module):
    kind, depth = Block, 4

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(C, C)
        self.blocks = nn.ModuleList(self.kind() for _ in range(self.depth))
        self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, 8)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class UShape(Chain):
    def forward(self, x):
        kept, x = [], self.first(x)
        for i, block in enumerate(self.blocks):
            x = block(x + kept[-(i - 1)] if i > 2 else x)
            kept.append(x)
        return self.head(kept[0] * kept[-1])


class Collected(Chain):
    """Keeps nothing of a stage but what is computed from it."""

    def forward(self, x):
        kept, x = [], self.first(x)
        for block in self.blocks:
            x = block(x)
            kept.append(self.norm(x) * 2)
        return self.head(sum(kept))


class Read(Chain):
    """Keeps nothing of a stage but a number that Python read."""

    def forward(self, x):
        x, scale = self.first(x), 1.0
        for block in self.blocks:
            x = block(x / scale)
            scale = x.abs().max().item()
        return self.head(x * scale)


class Late(Chain):
    """Reads the number two stages late."""

    def forward(self, x):
        x, scales = self.first(x), [1.0, 1.0]
        for block in self.blocks:
            x = block(x / scales[-2])
            scales.append(x.std().item())
        return self.head(x)


class Repeated(Chain):
    def forward(self, x):
        x = self.first(x)
        for i in (0, 0, 1, 0, 2):
            x = self.blocks[i](x.tanh())
        return self.head(x)


class Branching(Chain):
    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            if x.mean() > 0 or block is self.blocks[0]:
                x = block(x)
            x = x - 0.3
        return self.head(x)


class NoList(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(C, C) for _ in range(4))

    def forward(self, x):
        return self.o(torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2), -1) @ self.v(x))


class InPlace(Chain):
    """Blocks that write to their input, which is used again."""

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            y = block(x.mul_(0.5))
            x = x + y
        return self.head(x)


class WritingBlock(Block):
    def forward(self, x):
        return x.add_(self.down(self.up(x)))


class Writing(Chain):
    kind, depth = WritingBlock, 3

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            y = block(x)
            x = x * 0.5 + y
        return self.head(x)


class TupleBlock(Block):
    def forward(self, x, *, mask, cache=None):
        return super().forward(x * mask), {"hidden": x.mean(-1), "cache": cache}


class Tuples(Chain):
    kind, depth = TupleBlock, 3

    def forward(self, x, mask=None):
        x, seen = self.first(x), 0
        for block in self.blocks:
            x, more = block(x, mask=torch.ones_like(x) if mask is None else mask, cache=object())
            seen = seen + more["hidden"]
        return self.head(x + seen[..., None])


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(C, 3, bias=False)
        self.experts = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        chosen, y = self.router(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            where = (chosen == i).nonzero(as_tuple=True)
            if where[0].numel():
                y[where] = expert(x[where])
        return x + y


class Mixture(Chain):
    kind, depth = Experts, 3


class Argument(Chain):
    """Writes to its argument."""

    def forward(self, x):
        return super().forward(x.mul_(0.5).add_(0.1))


class Stateful(Chain):
    """Later blocks read what earlier ones left on the model."""

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
            block.left = x * 1.5
        return self.head(x + self.blocks[0].left)


@dataclasses.dataclass
class Opaque:
    hidden: torch.Tensor


class OpaqueBlock(Block):
    def forward(self, x):
        return Opaque(super().forward(x))


class Opaques(Chain):
    """Blocks whose outputs are in an object that nobody can look into."""

    kind, depth = OpaqueBlock, 4

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x).hidden
        return self.head(x)


class Looped(Chain):
    def forward(self, x):
        x = self.first(x)
        for i in (0, 1, 0, 1, 2, 3):
            x = self.blocks[i](x.tanh())
        return self.head(x)


class SharedBlock(nn.Module):
    def __init__(self, up, down):
        super().__init__()
        self.up, self.own, self.down = up, nn.Linear(C, C), down

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.own(x))))


class SharedLinears(Chain):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)
        self.blocks = nn.ModuleList(SharedBlock(self.up, self.down) for _ in range(3))


class Escaping(Chain):
    """Reads numbers without an operator, and uses them two stages later."""

    read = staticmethod(lambda x: max(x.abs().flatten().tolist()))

    def forward(self, x):
        x, scales = self.first(x), [1.0, 1.0]
        for block in self.blocks:
            x = block(x / scales[-2])
            scales.append(self.read(x))
        return self.head(x)


class EscapingByNumpy(Escaping):
    read = staticmethod(lambda x: float(np.abs(x.numpy()).max()))


class EscapingByArray(Escaping):
    read = staticmethod(lambda x: float(np.abs(np.asarray(x)).max()))


class AppendingBlock(Block):
    def forward(self, x, kept):
        kept.append(self.up(x).mean(-1, keepdim=True))
        return super().forward(x)


class Appending(Chain):
    kind, depth = AppendingBlock, 4

    def forward(self, x):
        x, kept = self.first(x), []
        for block in self.blocks:
            x = block(x, kept)
        return self.head(x + sum(kept))


class LeavingBlock(Block):
    def forward(self, x):
        self.left = self.up(x).mean(-1, keepdim=True)
        return super().forward(x)


class Leaving(Chain):
    kind, depth = LeavingBlock, 4

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x + self.blocks[0].left * self.blocks[2].left)


class BehindBlock(Block):
    def forward(self, x):
        y = super().forward(x)
        x.data.mul_(0.5)
        return y


class Behind(Chain):
    """Blocks that write to their input where autograd does not look."""

    kind, depth = BehindBlock, 3

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x) + x
        return self.head(x)


class AliasBlock(Block):
    def forward(self, x):
        y = super().forward(x)
        return y, y.view(-1, C), x


class Aliases(Chain):
    kind, depth = AliasBlock, 3

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            y, flat, same = block(x)
            flat.mul_(0.5)
            x = y + same
        return self.head(x)


class Twice(Chain):
    """Its arguments are one tensor, and it looks."""

    def forward(self, x):
        return self.both(x, x)

    def both(self, q, k):
        q.mul_(2)
        return super().forward(q + k if q is k else q - k)


class NestedLists(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.Sequential(nn.Sequential(nn.Linear(C, C), nn.ReLU()), nn.Sequential(Block(), Block()))
        self.head = nn.Linear(C, 8)

    def forward(self, x):
        return self.head(self.parts(x))


class Sparse(Chain):
    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(torch.sparse.mm(torch.eye(40).to_sparse(), x.reshape(40, C)).view(2, 20, C))
        return self.head(x)


MODELS = [
    *(Opaques, Looped, SharedLinears, Escaping, EscapingByNumpy, EscapingByArray, Appending, Leaving, Behind, Aliases),
    *(Twice, NestedLists, Sparse),
    *(Chain, UShape, Collected, Read, Late, Repeated, Branching),
    *(NoList, InPlace, Writing, Tuples, Mixture, Argument, Stateful),
]


class Fake(nn.Module):
    def __init__(self, solution, bias):
        super().__init__()
        self.solution, self.bias = solution, bias

    def forward(self, x):
        return linear.fake_quantized_linear(x, self.solution.weight, self.bias)


def groups(model):
    """The names of the layers of every stage, in the order of their first calls in a plain run."""
    order = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: order.append(name) if name not in order else None)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        for x in batches():
            model(x)
    for handle in handles:
        handle.remove()
    found = {}
    for name in order:
        path = name.split(".")
        lists = [
            i
            for i in range(len(path))
            if isinstance(model.get_submodule(".".join(path[:i])), (nn.ModuleList, nn.Sequential))
        ]
        found.setdefault(".".join(path[: lists[0] + 1]) if lists else name, []).append(name)
    return list(found.values())


def batches():
    return [randn(2, 20, C, seed=seed) for seed in (1, 2, 3)]


@torch.no_grad()
def inputs_of(model, names):
    """What every call of the layers reads in full runs: for every batch, layer and call a copy; and first tensors."""
    calls, first, alive = [], {}, []
    for x in batches():
        found = {name: [] for name in names}

        def observe(_module, args, name, found=found):
            found[name].append(args[0].clone())
            # Kept alive, so that an id is one tensor.
            alive.append(args[0])
            first.setdefault(name, (id(args[0]), args[0]._version))

        handles = [
            model.get_submodule(name).register_forward_pre_hook(lambda m, a, name=name: observe(m, a, name))
            for name in names
        ]
        model(x)
        for handle in handles:
            handle.remove()
        calls.append(found)
    return calls, first


@torch.no_grad()
def oracle(model, asymmetric=0.0):
    """Every stage fitted to a full run of the model as it is after the stages before: codes by name.

    With ``asymmetric``, every group of layers that read one tensor, and with an eye on the float model.
    """
    codes, original = {}, copy.deepcopy(model)
    options = gptq.Options(sequential=True, asymmetric=asymmetric)
    observer = paired_gram if asymmetric else gram
    steps = groups(model)
    if asymmetric:
        apart = []
        for names in steps:
            first = inputs_of(original, names)[1]
            found = {}
            for name in names:
                found.setdefault(first[name], []).append(name)
            apart += found.values()
        steps = apart
    for names in steps:
        arriving, floating = inputs_of(model, names)[0], inputs_of(original, names)[0]
        for name in names:
            layer = model.get_submodule(name)
            state = observer.init(layer.in_features)
            for mine, theirs in zip(arriving, floating, strict=True):
                for call, x in enumerate(mine[name]):
                    pair = theirs[name][call].reshape(-1, x.shape[-1]) if call < len(theirs[name]) else None
                    state = observer.update(state, x, pair) if asymmetric else observer.update(state, x)
            solution = gptq.solve(SPEC, options, layer.weight, observer.finalize(state))
            codes[name] = solution.weight.codes
            fake = Fake(solution, layer.bias)
            for parent in list(model.modules()):
                parent._modules.update({key: fake for key, child in parent._modules.items() if child is layer})
    return codes


def made(kind):
    torch.manual_seed(0)
    return filled(kind())


@pytest.mark.filterwarnings("ignore:no token reached:quantize.QuantizeWarning")
@pytest.mark.parametrize("asymmetric", [0.0, 0.5])
@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_every_stage_is_fitted_to_the_quantized_ones_before(kind, asymmetric):
    expected = oracle(made(kind), asymmetric)
    model = made(kind)
    qz.quantize(model, given(asymmetric=asymmetric))
    for x in batches():
        with torch.no_grad():
            model(x)
    assert {row.stage for row in qz.report(model).rows} == {"quantized"}
    for name, codes in expected.items():
        assert torch.equal(model.get_submodule(name).solution.weight.codes, codes), name
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_it_is_not_what_one_pass_gives():
    expected = oracle(made(Chain))
    model = made(Chain)
    qz.quantize(model, given(sequential=False))
    for x in batches():
        model(x)
    assert torch.equal(model.first.solution.weight.codes, expected["first"])
    assert not torch.equal(model.head.solution.weight.codes, expected["head"])


# Each block runs once in floating point and once quantized; with an eye on the float model, up and gate are fitted
# first, and then down: two runs of either model, and one that computes the output of the quantized one.
@pytest.mark.parametrize(("asymmetric", "runs", "paths"), [(0.0, 2, 1), (0.5, 5, 2)])
def test_blocks_compute_no_more_than_needed_and_outputs_are_freed(monkeypatch, asymmetric, runs, paths):
    model, calls, peaks = made(Chain), [], []
    qz.quantize(model, given(asymmetric=asymmetric))
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda x, f=forward, b=block: calls.append(b) or f(x)
    run = stages.Replay.run

    def watched(self, *arguments, **named):
        try:
            return run(self, *arguments, **named)
        finally:
            memories = [memory for path in self._paths.values() for memory in path.memory]
            held = [output for memory in memories for output in memory.values() if not output.freed]
            peaks.append(len(held))

    monkeypatch.setattr(stages.Replay, "run", watched)
    for x in batches():
        model(x)
    # Three runs by the user, one that surveys.
    assert all(calls.count(block) == 3 + 1 + runs * 3 for block in model.blocks)
    # Two a batch while a stage gives way to the next.
    assert max(peaks) <= 2 * 3 * paths
    assert all("forward" in block.__dict__ for block in model.blocks)


@pytest.mark.parametrize("kind", [UShape, Collected, Read, Late], ids=lambda kind: kind.__name__)
def test_what_may_be_read_again_is_kept(kind, monkeypatch):
    held = []
    run = stages.Replay.run

    def watched(self, *arguments):
        try:
            return run(self, *arguments)
        finally:
            held.append({event for event, output in self._paths[False].memory[0].items() if not output.freed})

    monkeypatch.setattr(stages.Replay, "run", watched)
    model = made(kind)
    qz.quantize(model, given(batch_num=1))
    model(batches()[0])
    assert len(held[-1]) > 2


def test_awq_runs_in_stages_too():
    models = [made(Chain) for _ in range(2)]
    for model, sequential in zip(models, (True, False), strict=True):
        qz.quantize(model, given(sequential=sequential, algorithm="awq"))
        for x in batches():
            model(x)
    assert torch.equal(models[0].first.solution.weight.codes, models[1].first.solution.weight.codes)
    assert not torch.equal(models[0].head.solution.weight.scale, models[1].head.solution.weight.scale)


class Cache:
    def __init__(self):
        self.seen = []


class Caching(Chain):
    def forward(self, x, cache=None):
        if cache is not None:
            cache.seen.append(x)
        return super().forward(x)


def test_arguments_that_cannot_be_given_twice_are_calibrated_in_one_pass():
    model, plain = made(Caching), made(Caching)
    qz.quantize(model, given())
    qz.quantize(plain, given(sequential=False))
    told = "calibrated in one pass, not stage by stage: the model was called with an argument of type Cache"
    with pytest.warns(qz.QuantizeWarning, match=told):
        model(batches()[0], cache=Cache())
    plain(batches()[0])
    for x in batches()[1:]:
        model(x, cache=Cache())
        plain(x)
    for name in ("first", "head"):
        a, b = (each.get_submodule(name).solution.weight.codes for each in (model, plain))
        assert torch.equal(a, b)
    assert told in str(qz.report(model))
    assert qz.report(model).as_dict()["remarks"][0].startswith(told)


def test_a_later_batch_that_cannot_be_given_twice_is_refused():
    model = made(Caching)
    qz.quantize(model, given())
    model(batches()[0])
    with pytest.raises(qz.QuantizeError, match="model: an argument of type Cache"):
        model(batches()[1], cache=Cache())
    assert qz.report(model).rows[0].tokens == 0
    for x in batches()[1:]:
        model(x)
    assert qz.report(model).rows[0].stage == "quantized"


def test_randomness_buffers_modes_and_arguments_stay():
    class Noisy(Chain):
        def __init__(self):
            super().__init__()
            self.drop, self.batch_norm = nn.Dropout(0.5), nn.BatchNorm1d(C)

        def forward(self, x):
            return super().forward(self.batch_norm(self.drop(x).transpose(1, 2)).transpose(1, 2))

    model, plain = made(Noisy).train(), made(Noisy).train()
    qz.quantize(model, given())
    for each in (model, plain):
        torch.manual_seed(5)
        for x in batches():
            kept = x.clone()
            each(x)
            assert torch.equal(x, kept)
        each.state = torch.get_rng_state()
    assert torch.equal(model.state, plain.state)
    assert torch.equal(model.batch_norm.running_mean, plain.batch_norm.running_mean)
    assert model.batch_norm.num_batches_tracked == 3
    assert model.training


def test_hooks_of_the_user_run_once_on_what_is_kept():
    model, plain = made(Chain), made(Chain)
    for each, sequential in ((model, True), (plain, False)):
        each.register_forward_pre_hook(lambda _module, args: (torch.sinh(args[0] * 0.5) + 1,))
        qz.quantize(each, given(sequential=sequential))
        for x in batches():
            each(x)
    assert torch.equal(model.first.solution.weight.codes, plain.first.solution.weight.codes)


def test_every_replay_draws_the_same_numbers():
    class Drawing(Chain):
        def forward(self, x):
            x = self.first(x)
            for block in self.blocks:
                x = block(nn.functional.dropout(x, 0.3, training=True))
                if random.random() > 0.5:
                    x = x * torch.rand(1)
            return self.head(x)

    class DrawingBlock(Block):
        def forward(self, x):
            drawn.append(torch.rand(1).item())
            return super().forward(x * (0.5 + drawn[-1]))

    drawn, model = [], made(Drawing)
    model.blocks = filled(nn.ModuleList(DrawingBlock() for _ in range(3)))
    qz.quantize(model, given(batch_num=1))
    torch.manual_seed(3)
    random.seed(3)
    model(batches()[0])
    states = torch.get_rng_state(), random.getstate()
    first, *later = [drawn[i : i + 3] for i in range(0, 6, 3)]
    assert later == [first]
    assert {round(number, 6) for number in drawn} == {round(number, 6) for number in first}
    plain = made(Drawing)
    plain.blocks = filled(nn.ModuleList(DrawingBlock() for _ in range(3)))
    torch.manual_seed(3)
    random.seed(3)
    plain(batches()[0])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


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

    model, plain = made(Remembering), made(Remembering)
    for each, sequential in ((model, True), (plain, False)):
        qz.quantize(each, given(sequential=sequential))
        with torch.no_grad():
            for x in batches():
                each(x)
    assert torch.equal(model.first.solution.weight.codes, plain.first.solution.weight.codes)
    assert model.count == plain.count == 3
    assert torch.equal(model.mean, plain.mean)


def test_a_part_of_a_staged_model_is_not_finished_alone():
    model = made(Chain)
    qz.quantize(model, given())
    model(batches()[0])
    with pytest.raises(qz.QuantizeError, match="a part of a model that is calibrated stage by stage"):
        qz.finish(model.blocks[1])
    for x in batches()[1:]:
        model(x)
    assert qz.report(model).rows[0].tokens == 3 * 40


@pytest.mark.parametrize("sequential", [True, False])
def test_nan_in_padding_does_not_matter(sequential):
    class Masked(Chain):
        def forward(self, x, attention_mask=None):
            return super().forward(x)

    model = made(Masked)
    qz.quantize(model, given(batch_num=1, sequential=sequential))
    x = batches()[0]
    x[0, 15:] = torch.nan
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, 15:] = False
    model(x, attention_mask=mask)
    assert {row.tokens for row in qz.report(model).rows} == {35}


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_any_gradient_mode_and_cached_tensors(context):
    class Cached(Chain):
        scale = None

        def forward(self, x):
            if self.scale is None:
                self.scale = torch.ones(C) * 0.5
            return super().forward(x * self.scale)

    model, plain = made(Cached), made(Cached)
    for each, mode in ((model, context), (plain, torch.no_grad)):
        qz.quantize(each, given())
        with mode():
            for x in batches():
                each(x)
    assert torch.equal(model.head.solution.weight.codes, plain.head.solution.weight.codes)


def test_a_state_in_the_middle_continues_as_the_original_does():
    model = made(Chain)
    qz.quantize(model, given())
    for x in batches()[:2]:
        model(x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = made(Chain)
    qz.quantize(fresh, given())
    fresh.load_state_dict(torch.load(file, weights_only=True))
    twin = copy.deepcopy(model)
    for each in (model, fresh, twin):
        each(batches()[2])
    for other in (fresh, twin):
        for a, b in zip(model.modules(), other.modules(), strict=True):
            if isinstance(a, CalibrationLinear):
                assert torch.equal(a.solution.weight.codes, b.solution.weight.codes)


@pytest.mark.parametrize("place", [0, 5, 13])
def test_an_interrupted_solve_is_continued(place, monkeypatch):
    whole = made(Chain)
    qz.quantize(whole, given())
    for x in batches():
        whole(x)
    model, plain = made(Chain), made(Chain)
    qz.quantize(model, given())
    solve, calls = gptq.solve, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == place + 1:
            raise KeyboardInterrupt
        return solve(*arguments)

    monkeypatch.setattr("quantize.core.algorithms.gptq.solve", interrupted)
    for x in batches()[:2]:
        model(x)
    with pytest.raises(KeyboardInterrupt):
        model(batches()[2])
    probe = randn(1, 3, C, seed=9)
    assert torch.equal(model(probe), plain(probe))
    assert not any("forward" in module.__dict__ for module in model.modules())
    with pytest.raises(qz.QuantizeError, match="interrupted"):
        qz.convert(model)
    qz.finish(model)
    assert torch.equal(model(probe), whole(probe))
    assert qz.report(model).rows[0].tokens == 3 * 2 * 20


def test_a_failing_layer_is_named_and_the_others_stay(monkeypatch):
    model, plain = made(Chain), made(Chain)
    qz.quantize(model, given(batch_num=1))
    solve, calls = gptq.solve, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("no convergence")
        return solve(*arguments)

    monkeypatch.setattr("quantize.core.algorithms.gptq.solve", failing)
    with pytest.raises(RuntimeError, match="no convergence") as error:
        model(batches()[0])
    assert any("while solving layer 'blocks.0.down'" in note for note in error.value.__notes__)
    assert torch.equal(model(batches()[0]), plain(batches()[0]))
    qz.finish(model)
    assert qz.report(model).rows[0].stage == "quantized"


def test_nan_is_refused_at_its_batch():
    model = made(Chain)
    qz.quantize(model, given())
    model(batches()[0])
    with pytest.raises(qz.QuantizeError, match="layer 'first': NaN or inf in batch 2; accepted: finite inputs"):
        model(batches()[1] * torch.nan)
    for x in batches()[1:]:
        model(x)
    assert qz.report(model).rows[0].tokens == 3 * 2 * 20


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("positional", [True, False])
def test_padding_does_not_count(sequential, positional):
    class Masked(Chain):
        def forward(self, x, attention_mask=None):
            return super().forward(x)

    model, plain = made(Masked), made(Masked)
    for each in (model, plain):
        qz.quantize(each, given(batch_num=1, sequential=sequential))
    x = batches()[0]
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, 15:] = 0
    mask[1, :3] = 0
    spoiled = torch.where(mask[..., None] == 0, 1e3, x)
    model(spoiled, mask) if positional else model(spoiled, attention_mask=mask)
    plain(x[mask.bool()][None])
    assert {row.tokens for row in qz.report(model).rows} == {40 - 8}
    for name in ("first", "blocks.2.down", "head"):
        a, b = (each.get_submodule(name).solution.weight for each in (model, plain))
        # Sums of other shapes may differ in the last bit.
        assert (a.codes != b.codes).float().mean() <= 0.01


def test_a_stage_that_no_batch_reaches_falls_back():
    class Idle(Chain):
        def forward(self, x):
            return self.head(self.blocks[0](self.first(x)))

    model = made(Idle)
    qz.quantize(model, given(batch_num=1))
    with pytest.warns(
        qz.QuantizeWarning, match="no token reached 9 of 14 layers, which fall back to minmax: blocks.1.up"
    ):
        model(batches()[0])
    assert qz.report(model).rows[-2].algorithm == "minmax (no tokens)"


def test_statistics_of_one_stage_are_all_that_is_held():
    model, held = made(Chain), []
    qz.quantize(model, given(batch_num=1))
    for layer in model.modules():
        if isinstance(layer, CalibrationLinear):
            solve = layer.solve

            def counting(solve=solve):
                states = {id(m.statistics): m.statistics for m in model.modules() if isinstance(m, CalibrationLinear)}
                held.append(sum(state is not None and bool(state.tokens) for state in states.values()))
                solve()

            layer.solve = counting
    model(batches()[0])
    # up and gate read one tensor; down another.
    assert max(held) == 2


def test_autocast_is_in_force_again():
    models = [made(Chain) for _ in range(2)]
    for model, sequential in zip(models, (True, False), strict=True):
        qz.quantize(model, given(batch_num=1, sequential=sequential))
        with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
            model(batches()[0])
    assert torch.equal(models[0].first.solution.weight.codes, models[1].first.solution.weight.codes)


def test_batches_are_kept_without_what_they_are_cut_from():
    class Pair(Chain):
        def forward(self, x, y, z):
            return super().forward(x + y + z[1])

    model, data = made(Pair), torch.zeros(1000, 20, C)
    qz.quantize(model, given())
    model(data[:2], data[2:4], [data, data[:2]][0:2])
    (batch,) = model.first.batches
    x, y, (whole, part) = batch.args
    for tensor in (x, y, whole, part):
        assert tensor.untyped_storage()._cdata != data.untyped_storage()._cdata
    model(data[:2], data[2:4], [None, data[:2]])
    small = model.first.batches[1]
    assert sum(t.untyped_storage().nbytes() for t in (*small.args[:2], small.args[2][1])) == 3 * x.nbytes
    # One tensor under two names stays one.
    own = x.clone()
    twice = copied((own, own, own[:1]))
    assert twice[0] is twice[1]
    assert twice[2].untyped_storage()._cdata == twice[0].untyped_storage()._cdata


class Averaging(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(C, C)
        self.register_buffer("mean", torch.zeros(C))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean((0, 1))
        return self.layer(x - self.mean)


def test_buffers_of_inference_mode_are_replaced():
    models = [made(Averaging) for _ in range(2)]
    for model, mode in zip(models, (torch.no_grad, torch.inference_mode), strict=True):
        qz.quantize(model, given(asymmetric=0.5))
        with mode():
            for x in batches():
                model(x)
    assert torch.equal(models[0].layer.solution.weight.codes, models[1].layer.solution.weight.codes)
    assert torch.equal(models[0].mean, models[1].mean)
