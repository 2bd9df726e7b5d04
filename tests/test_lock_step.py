"""Calibration in lock step: models in which batches that run side by side could meet; each is right, or falls back.

Right is what the oracle finds, which runs every batch alone: codes and scales to the last bit.
"""

import gc
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch._dynamo  # adds filters of warnings once, when a model first asks for it
from torch import nn

import quantize as qz
from quantize.core import gptq
from quantize.shell.calibrate.layer import calibrated as layers_of
from quantize.shell.calibrate.lockstep import Walk
from quantize.shell.calibrate.units import merged
from tests import oracle
from tests.models import filled, randn, solutions
from tests.shared import modes, random_states
from tests.zoo import contexts
from tests.zoo.sequential import TOKENS, C, Chain, batches, given, made

ALL_BACKENDS = [getattr(torch.nn.attention.SDPBackend, name) for name in (
    "MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")]  # fmt: skip
THREADS = torch.get_num_threads()
FALLBACK = "calibrated in full passes for each layer"


def seeded():
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002 - the generator that models draw from


def state():
    """Whatever a forward pass may switch or draw; also where no public function of torch tells."""
    return {
        **modes(),
        **random_states(),
        "forward gradients": torch._C._is_fwd_grad_enabled(),
        "excluded keys": str(torch._C._dispatch_tls_local_exclude_set()),
        "included keys": str(torch._C._dispatch_tls_local_include_set()),
        "function modes": torch._C._len_torch_function_stack(),
        "saved tensors": torch._C._autograd._top_saved_tensors_default_hooks(True),
        "attention": [
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
        ],
        "filters of warnings": list(warnings.filters),
    }


def restore():
    """The state that tests begin with: a failure in one must not be one in all others."""
    torch._C._set_fwd_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(THREADS)
    torch.autograd.set_detect_anomaly(False)
    torch.nn.attention._sdpa_kernel(ALL_BACKENDS)


def differing_state(after, wanted):
    return sorted(name for name in wanted if after[name] != wanted[name])


def differing(found, wanted):
    """The names of the layers whose weights are not the same to the last bit."""
    assert found.keys() == wanted.keys()
    return [
        name
        for name, solution in wanted.items()
        if not torch.equal(found[name].weight.codes, solution.weight.codes)
        or not torch.equal(found[name].weight.scale, solution.weight.scale)
    ]


class Each:
    """The batches; the random numbers that a model draws are those that the user's own pass of each one drew."""

    def __init__(self, model, given=None):
        self.given = given or batches()
        seeded()
        self.states = []
        for x in self.given:
            self.states.append((torch.get_rng_state(), random.getstate(), np.random.get_state()))  # noqa: NPY002
            model(x.clone())

    def __iter__(self):
        for x, (mine, pythons, numpys) in zip(self.given, self.states, strict=True):
            torch.set_rng_state(mine)
            random.setstate(pythons)
            np.random.set_state(numpys)  # noqa: NPY002
            yield x


@torch.no_grad()
def expected(kind, asymmetric=0.0, given=None):
    options = gptq.Options(asymmetric=asymmetric, search_range=False)
    with torch.compiler.set_stance("force_eager"):
        return oracle.solve(made(kind), gptq.algorithm(oracle.SPEC, options), Each(made(kind), given))


def calibrated(kind, inputs=None, **options):
    """A model after calibration, and whether it fell back, which both the warning and the report say."""
    model, inputs = made(kind), inputs or batches()
    qz.quantize(model, given(batch_num=len(inputs), **options))
    with torch.no_grad(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        seeded()
        for x in inputs:
            model(x)
    fell_back = [each for each in told if FALLBACK in str(each.message)]
    assert len(fell_back) <= 1
    remarks = [remark for remark in qz.report(model).remarks if FALLBACK in remark]
    assert remarks == [str(each.message) for each in fell_back]
    assert all(each.category is qz.QuantizeWarning for each in fell_back)
    return model, bool(fell_back)


def right(kind, asymmetric=0.0, inputs=None):
    """Calibrate a model, and compare it with the oracle; returns whether it fell back."""
    wanted = expected(kind, asymmetric, inputs)
    model, fell_back = calibrated(kind, inputs, asymmetric=asymmetric)
    assert {row.stage for row in qz.report(model).rows} == {"quantized"}
    assert differing(solutions(model), wanted) == []
    return fell_back


# Models whose layers stand where a walk cannot be stopped, or whose batches disturb each other.
FALLING_BACK = {
    *(contexts.Inference, contexts.Placed, contexts.Threads, contexts.Pool),
    *(contexts.Last, contexts.Counted, contexts.SharedManager, contexts.Functional),
}

quiet = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")


@quiet
@pytest.mark.parametrize("asymmetric", [0.0, 0.5])
@pytest.mark.parametrize("kind", contexts.MODELS, ids=lambda kind: kind.__name__)
def test_it_is_what_every_batch_alone_gives_or_falls_back(kind, asymmetric):
    assert right(kind, asymmetric) == (kind in FALLING_BACK)


@quiet
@pytest.mark.parametrize("kind", contexts.MODELS, ids=lambda kind: kind.__name__)
def test_everything_is_left_as_one_pass_leaves_it(kind):
    after = []
    for calibrating in (False, True):
        model = made(kind)
        seeded()
        if calibrating:
            qz.quantize(model, given(asymmetric=0.5))
        before = state()
        parameters = dict(model.named_parameters())
        kept = {name: p.clone() for name, p in parameters.items()}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for x in batches():
                    model(x)
            after.append(state())
        finally:
            restore()
        drawn = {"torch", "python", "numpy"}
        assert set(differing_state(after[-1], before)) <= drawn
        assert {name: id(p) for name, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
        assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters())
    assert differing_state(after[1], after[0]) == []


@pytest.mark.parametrize("kind", contexts.SWITCHING, ids=lambda kind: kind.__name__)
def test_what_is_switched_for_the_whole_process_is_as_before(kind):
    try:
        before = state()
        right(kind, 0.5)
        assert set(differing_state(state(), before)) <= {"torch", "python", "numpy"}
    finally:
        restore()


@pytest.mark.parametrize("asymmetric", [0.0, 0.5])
@pytest.mark.parametrize("kind", contexts.EXCLUSIVE, ids=lambda kind: kind.__name__)
def test_a_model_that_only_one_batch_may_be_in_falls_back(kind, asymmetric):
    wanted = expected(Chain, asymmetric)
    model, fell_back = calibrated(kind, asymmetric=asymmetric)
    assert fell_back
    assert differing(solutions(model), wanted) == []


def test_a_layer_inside_of_an_operator_does_not_end_the_process():
    # Operators keep records on the stack of the thread, which must end in the reverse order of their beginning.
    code = """
import torch
import quantize as qz
from tests.zoo.sequential import Chain, batches, given, made

@torch.library.custom_op("lockstep::block", mutates_args=())
def run(x: torch.Tensor, i: int) -> torch.Tensor:
    return model.blocks[i](x)

class Operator(Chain):
    def step(self, block, x):
        return run(x, list(self.blocks).index(block))

model = made(Operator)
qz.quantize(model, given())
with torch.no_grad():
    for x in batches():
        model(x)
print(qz.report(model).rows[0].stage)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-300:]
    assert done.stdout.strip() == "quantized"


# How walks end.


def walking():
    """How many walks have begun, and not ended: those that were closed know nothing any more."""
    gc.collect()
    return sum(type(each) is Walk and bool(vars(each)) and not each.ended for each in gc.get_objects())


@pytest.mark.parametrize("asymmetric", [0.0, 0.5])
def test_walks_may_end_in_any_error(asymmetric):
    assert not right(contexts.WrappingAll, asymmetric)


@pytest.mark.filterwarnings(f"ignore:{FALLBACK}:quantize.QuantizeWarning")
@pytest.mark.parametrize("kind", [contexts.Wrapping, contexts.WrappingAll])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_first_error_is_raised_and_all_walks_have_ended(kind, error):
    class Failing(kind):
        left = None

        def step(self, block, x):
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    # Behind the place where errors are wrapped: it names what went wrong.
                    raise error("the first")
            return super().step(block, x)

    model, before = made(Failing), walking()
    qz.quantize(model, given(3))
    for x in batches()[:2]:
        model(x)
    # In the user's own pass, nothing fails; afterwards, while others wait.
    model.left = Chain.depth + 4
    with pytest.raises(BaseException) as raised:  # noqa: PT011 - whatever wraps it
        model(batches()[2])
    chain = [raised.value]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    assert type(chain[-1]) is error
    assert walking() == before
    assert all(layer.session.watching is None for layer in layers_of(model))
    model.left = None
    qz.finish(model)
    assert differing(solutions(model), expected(Chain)) == []


# What batches see of each other.


class Faint(Chain):
    """A little of what the last batch left; ``part`` says how much."""

    part, last = 0.01, None

    def step(self, block, x):
        if block is self.blocks[0]:
            self.last = x
        y = block(x)
        return y + self.part * self.last if block is self.blocks[2] else y


@pytest.mark.parametrize("asymmetric", [0.0, 0.5])
@pytest.mark.parametrize(
    ("dtype", "part"), [(torch.float32, 1e-2), (torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 3e-2)]
)
def test_a_little_of_another_batch_is_noticed(dtype, part, asymmetric, monkeypatch):
    # Against the user's own pass, which may compute in other ways, a quarter of the digits is left to roundings.
    part *= 10 if asymmetric and dtype != torch.float32 else 1
    monkeypatch.setattr(Faint, "part", part)
    inputs = [x.to(dtype) for x in batches()]
    algorithm = gptq.algorithm(oracle.SPEC, gptq.Options(asymmetric=asymmetric, search_range=False))
    with torch.no_grad():
        wanted = oracle.solve(made(Faint).to(dtype), algorithm, inputs)
    model = made(Faint).to(dtype)
    qz.quantize(model, given(asymmetric=asymmetric))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", qz.QuantizeWarning)
        for x in inputs:
            model(x)
    assert differing(solutions(model), wanted) == []


def test_large_numbers_in_float16_are_no_disturbance():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x):
            return self.layer(x)

    # The weights of the fingerprint are cosines; with these signs their products add up, beyond what float16 holds.
    signs = torch.arange(1, 65).float().cos().sign()
    model = filled(Plain()).half()
    qz.quantize(model, given(1, asymmetric=0.5))
    with torch.no_grad():
        model((torch.ones(2, 20, 64) * 6e3 * signs).half())
    assert qz.report(model).remarks == ()


# Ways through the model that differ from batch to batch.


class Routed(Chain):
    """The first number of a batch says which blocks it goes through, whatever the layers give."""

    depth = 4
    routes = ()

    def forward(self, x):
        route = self.routes[round(x[0, 0, 0].item())]
        x = self.first(x)
        for i in route:
            x = self.blocks[i](x.tanh())
        return self.head(x)


def routed(routes):
    found = [randn(2, TOKENS, C, seed=seed) for seed in range(len(routes))]
    for number, x in enumerate(found):
        x[0, 0, 0] = number
    return type("Routed", (Routed,), {"routes": routes}), found


ROUTES = [
    ((0, 3, 2), (0,), (3,), (2, 2, 0)),
    ((0, 1, 0, 2), (2, 2, 1), (1,)),
    ((0, 1), (1, 0)),
    ((0,), (1, 2), (2, 1)),
    ((0, 0), (1, 2, 1), (2, 1, 1)),
]


@pytest.mark.filterwarnings("ignore:no token reached:quantize.QuantizeWarning")
@pytest.mark.parametrize("asymmetric", [0.0, 0.5])
@pytest.mark.parametrize("routes", ROUTES, ids=str)
def test_all_that_reaches_a_layer_counts(routes, asymmetric):
    kind, inputs = routed(routes)
    wanted = expected(kind, asymmetric, inputs)
    model, _ = calibrated(kind, inputs, asymmetric=asymmetric)
    tokens = {row.name: row.tokens for row in qz.report(model).rows}
    calls = {f"blocks.{i}.down": sum(route.count(i) for route in routes) for i in range(Routed.depth)}
    calls |= {"first": len(routes), "head": len(routes)}
    assert {name: tokens[name] for name in calls} == {name: n * 2 * TOKENS for name, n in calls.items()}
    assert differing(solutions(model), wanted) == []


def test_what_all_sequences_have_last_comes_last():
    assert merged([["a", "head"], ["b", "c", "head"], ["c", "b", "head"]])[-1] == "head"


# Full passes.


@pytest.mark.parametrize("routes", [((0, 1), (1, 0)), ((0,), (1, 2), (2, 1))], ids=str)
def test_where_the_warning_is_an_error_nothing_of_lock_step_is_kept(routes):
    kind, inputs = routed(routes)
    wanted = expected(kind, 0.5, inputs)
    model = made(kind)
    qz.quantize(model, given(len(inputs), asymmetric=0.5))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", qz.QuantizeWarning)
        for x in inputs[:-1]:
            model(x)
        with pytest.raises(qz.QuantizeWarning, match=FALLBACK):
            model(inputs[-1])
        warnings.simplefilter("ignore", qz.QuantizeWarning)
        qz.finish(model)
    assert differing(solutions(model), wanted) == []
    assert len(qz.report(model).remarks) == 1


def test_nothing_watches_the_layers_after_full_passes():
    model, fell_back = calibrated(contexts.Threads)
    assert fell_back
    assert all(layer.session.watching is None for layer in layers_of(model))


def test_nothing_watches_the_layers_after_full_passes_that_fail():
    class Failing(contexts.Threads):
        left = None

        def forward(self, x):
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    raise KeyboardInterrupt
            return super().forward(x)

    model = made(Failing)
    qz.quantize(model, given(3))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", qz.QuantizeWarning)
        for x in batches()[:2]:
            model(x)
        model.left = 12
        with pytest.raises(KeyboardInterrupt):
            model(batches()[2])
        assert all(layer.session.watching is None for layer in layers_of(model))
        model.left = None
        qz.finish(model)
    assert differing(solutions(model), expected(contexts.Threads)) == []


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_is_calibrated(in_place):
    model = made(Chain)
    if in_place:
        model.compile(backend="eager")
    qz.quantize(model, given())
    run = model if in_place else torch.compile(model, backend="eager")
    with torch.no_grad():
        for x in batches():
            run(x)
    assert differing(solutions(model), expected(Chain)) == []
    assert qz.report(model).remarks == ()
