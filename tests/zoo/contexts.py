"""Models that switch something for everybody around their layers, or keep something from call to call.

In each of them the layers stand in places where a forward pass that stops half-way leaves something switched, which
the passes of other batches would meet.
"""

import asyncio
import concurrent.futures
import contextlib
import contextvars
import random
import threading
import warnings

import numpy as np
import torch
import torch.nn.attention
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.sequential import Block, C, Chain

# What torch keeps by thread.


class GradlessBlock(Block):
    def forward(self, x):
        with torch.no_grad():
            gate = torch.sigmoid(self.gate(x))
        return x + self.down(self.up(x) * gate * (2.0 if torch.is_grad_enabled() else 0.5))


class Gradless(Chain):
    """Gradients are off around one layer, and the numbers say whether they are on around the others."""

    kind = GradlessBlock

    def forward(self, x):
        with torch.enable_grad():
            return super().forward(x)


class GradfulBlock(Block):
    def forward(self, x):
        with torch.enable_grad():
            up = self.up(x)
        return x + self.down(up) * (2.0 if torch.is_grad_enabled() else 0.5)


class Gradful(Chain):
    """Gradients are on around one layer."""

    kind = GradfulBlock


class CastBlock(Block):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            up = self.up(x)
        return x + self.down(up.float() * torch.sigmoid(self.gate(x)))


class Cast(Chain):
    """Autocast around one layer."""

    kind = CastBlock


class LongCast(Chain):
    """Autocast that is entered in one block and left in the next."""

    def forward(self, x):
        x = self.blocks[0](self.first(x))
        with torch.autocast("cpu", torch.bfloat16):
            up = self.blocks[0].up(x)
            x = self.blocks[1](x + up[..., :C])
            with torch.autocast("cpu", enabled=False):
                x = self.blocks[2](x.float())
        return self.head(self.norm(x))


class InferenceBlock(Block):
    def forward(self, x):
        with torch.inference_mode():
            up = self.up(x)
        return x + self.down(up.clone())


class Inference(Chain):
    kind = InferenceBlock


class DoubleBlock(Block):
    def forward(self, x):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        up = self.up(x + torch.full((1,), 1 / 3).to(x.dtype))
        torch.set_default_dtype(before)
        return x + self.down(up + torch.full((1,), 1 / 3))


class Double(Chain):
    """The default dtype is another one around a layer; elsewhere, tensors that are made in it would be too wide."""

    kind = DoubleBlock


class PlacedBlock(Block):
    def forward(self, x):
        with torch.device("cpu"):
            up = self.up(x + torch.ones(1))
        return x + self.down(up)


class Placed(Chain):
    kind = PlacedBlock


class VectorizedBlock(Block):
    def forward(self, x):
        return x + self.down(torch.func.vmap(torch.sigmoid)(self.up(x)))


class Vectorized(Chain):
    """A function transform between the layers."""

    kind = VectorizedBlock


class FunctionalBlock(Block):
    def __init__(self, c=C):
        super().__init__(c)
        self.scale = nn.Parameter(torch.ones(c))

    def forward(self, x):
        return super().forward(x * self.scale)


class Functional(Chain):
    """Blocks run with a parameter that is put in the place of their own for the time of the call."""

    kind = FunctionalBlock

    def step(self, block, x):
        return torch.func.functional_call(block, {"scale": 1 + block.scale * x.mean()}, (x,))


class FunctionalWhole(Chain):
    """The same with all parameters, and with numbers that are the same for every batch."""

    def step(self, block, x):
        return torch.func.functional_call(block, {name: p * 1.0 for name, p in block.named_parameters()}, (x,))


class Checkpointed(Chain):
    reentrant = False

    def step(self, block, x):
        return checkpoint(block, x, use_reentrant=self.reentrant)


class Reentrant(Checkpointed):
    reentrant = True


class ScalingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, block):
        return block(x * 0.5)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Custom(Chain):
    """Blocks inside of an autograd function."""

    def step(self, block, x):
        return ScalingFunction.apply(x, block)


# How blocks are put together.


class Row(nn.Sequential):
    """No forward of its own."""

    def __init__(self):
        super().__init__(nn.Linear(C, C), Block(), nn.Tanh(), Block(), nn.LayerNorm(C), nn.Linear(C, 8))


class CacheBlock(Block):
    def forward(self, x, cache):
        before = sum(cache) if cache else torch.zeros_like(x)
        y = super().forward(x + 0.1 * before)
        return y, (*cache, y)


class Cache(Chain):
    """A tuple that grows from block to block."""

    kind = CacheBlock

    def forward(self, x):
        x, cache = self.first(x), ()
        for block in self.blocks:
            x, cache = block(x, cache)
        return self.head(x)


class ThreadBlock(Block):
    def forward(self, x):
        found = []

        def work():
            with torch.no_grad():
                found.append(self.up(x))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return x + self.down(found[0])


class Threads(Chain):
    """A layer that another thread calls."""

    kind = ThreadBlock


class PoolBlock(Block):
    def forward(self, x):
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            up, gate = pool.map(self.work, (self.up, self.gate), (x, x))
        return x + self.down(up * torch.sigmoid(gate))

    @staticmethod
    def work(layer, x):
        with torch.no_grad():
            return layer(x)


class Pool(Chain):
    """Two layers that threads call at the same time."""

    kind = PoolBlock


class Compiled(Chain):
    """A part that is compiled when it runs first."""

    def __init__(self):
        super().__init__()
        self.blocks[1].compile(backend="eager")


class CompiledFunctionBlock(Block):
    def forward(self, x):
        return x + torch.compile(self.inner, backend="eager")(x)

    def inner(self, x):
        return self.down(torch.relu(self.up(x)))


class CompiledFunction(Chain):
    kind = CompiledFunctionBlock


# What is drawn.


class Drawing(Chain):
    """Numbers of torch, Python and NumPy, drawn between the layers."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def step(self, block, x):
        return self.drop(block(x * (0.5 + random.random()))) * (0.5 + np.random.random())  # noqa: NPY002


# What is kept.


class Last(Chain):
    """What one block leaves on the model, another one reads."""

    last = None

    def step(self, block, x):
        if block is self.blocks[1]:
            self.last = x
        y = block(x)
        return y + self.last if self.last is not None and block is self.blocks[2] else y

    def forward(self, x):
        self.last = None
        return super().forward(x)


class Counted(Chain):
    """Counts the calls, and looks at the parity of the steps within one."""

    def __init__(self):
        super().__init__()
        self.calls, self.steps = 0, 0

    def forward(self, x):
        self.calls += 1
        self.steps = 0
        return super().forward(x)

    def step(self, block, x):
        self.steps += 1
        y = block(x)
        return y * (0.5 if self.steps % 2 else 1.5)


class Scaling:
    """A context manager that holds the scale of what it surrounds."""

    def __enter__(self):
        self.scale = None
        return self

    def __exit__(self, *error):
        self.scale = None


class Managed(Chain):
    """State in an object of each call."""

    def forward(self, x):
        with Scaling() as scaling:
            x = self.first(x)
            for block in self.blocks:
                scaling.scale = x.abs().mean()
                x = block(x) / scaling.scale
        return self.head(x)


class SharedManager(Chain):
    """The same in one object of the model."""

    def __init__(self):
        super().__init__()
        self.scaling = Scaling()

    def forward(self, x):
        with self.scaling:
            x = self.first(x)
            self.scaling.scale = x.abs().mean()
            for block in self.blocks:
                x = block(x) / self.scaling.scale
        return self.head(x)


class Generating(Chain):
    """The layers run inside of a generator, which holds what they gave."""

    def forward(self, x):
        *_, last = self.steps(self.first(x))
        return self.head(last)

    def steps(self, x):
        kept = []
        try:
            for block in self.blocks:
                x = block(x + sum(kept) * 0.1)
                kept.append(x)
                yield x
        finally:
            kept.clear()


SCALE = contextvars.ContextVar("SCALE", default=1.0)


class ContextBlock(Block):
    def forward(self, x):
        token = SCALE.set(SCALE.get() * x.abs().mean().item())
        y = x + self.down(self.up(x) / SCALE.get())
        if SCALE.get() < 0.5:
            SCALE.reset(token)
        return y


class Contextual(Chain):
    """State in a context variable."""

    kind = ContextBlock

    def forward(self, x):
        SCALE.set(1.0)
        return super().forward(x)


# What is caught.


class Retrying(Chain):
    """Runs a block once more where it failed, whatever the reason."""

    def step(self, block, x):
        try:
            return block(x)
        except BaseException:
            return block(x)


class FailingBlock(Block):
    def forward(self, x):
        y = super().forward(x)
        if self.training and y.mean() > -9:
            raise ValueError("not this one")
        return y


class Catching(Chain):
    """Goes on without a block that fails behind its layers."""

    kind = FailingBlock

    def __init__(self):
        super().__init__()
        self.blocks[0].eval()

    def step(self, block, x):
        y = x
        with contextlib.suppress(Exception):
            y = block(x)
        return y


class Wrapping(Chain):
    """Says where an error was raised, whatever the error."""

    def step(self, block, x):
        try:
            return block(x)
        except BaseException as error:
            raise RuntimeError("a block failed") from error


class WrappingAll(Chain):
    """The same around all layers."""

    def forward(self, x):
        try:
            return super().forward(x)
        except BaseException as error:
            raise RuntimeError("the model failed") from error


# What is switched for the whole process.


class Switching(Chain):
    """Switches something around every block, and back to what it was."""

    @staticmethod
    def switched():
        raise NotImplementedError

    def step(self, block, x):
        with self.switched():
            return block(x)


class Attention(Switching):
    @staticmethod
    def switched():
        return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)


class Filters(Switching):
    @staticmethod
    @contextlib.contextmanager
    def switched():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="of this model")
            yield


class Anomaly(Switching):
    @staticmethod
    def switched():
        return torch.autograd.set_detect_anomaly(True, check_nan=False)


class Deterministic(Switching):
    @staticmethod
    @contextlib.contextmanager
    def switched():
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(before)


class Precision(Switching):
    @staticmethod
    @contextlib.contextmanager
    def switched():
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        yield
        torch.set_float32_matmul_precision(before)


class ThreadCount(Switching):
    @staticmethod
    @contextlib.contextmanager
    def switched():
        before = torch.get_num_threads()
        torch.set_num_threads(before + 1)
        yield
        torch.set_num_threads(before)


# What lets nobody in a second time.


class Locked(Switching):
    """A lock around the blocks: waits for a moment, where it should wait for ever."""

    lock = threading.Lock()

    @classmethod
    @contextlib.contextmanager
    def switched(cls):
        if not cls.lock.acquire(timeout=0.2):
            raise RuntimeError("locked")
        try:
            yield
        finally:
            cls.lock.release()


class Guarded(Chain):
    busy = False

    def forward(self, x):
        if self.busy:
            raise RuntimeError("this model runs already")
        self.busy = True
        try:
            return super().forward(x)
        finally:
            self.busy = False


class Asynchronous(Chain):
    """The blocks run in an event loop, of which a thread has one at most."""

    def forward(self, x):
        return asyncio.run(self.later(x))

    async def later(self, x):
        return super().forward(x)


MODELS = [
    *(Gradless, Gradful, Cast, LongCast, Inference, Double, Placed, Vectorized, Functional, FunctionalWhole),
    *(Checkpointed, Reentrant, Custom, Row, Cache, Threads, Pool, Compiled, CompiledFunction, Drawing),
    *(Last, Counted, Managed, SharedManager, Generating, Contextual, Retrying, Catching, Wrapping),
]
SWITCHING = [Attention, Filters, Anomaly, Deterministic, Precision, ThreadCount]
EXCLUSIVE = [Locked, Guarded, Asynchronous]
