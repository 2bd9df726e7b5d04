"""Models whose layers are fitted in the order of execution: what they run, and what they read later."""

import numpy as np
import torch
from torch import nn

from tests.models import config, filled, randn

C, TOKENS = 16, 20
INT4 = {"type": "int4", "symmetric": True, "strategy": "channel"}


def given(batch_num=3, *, sequential=True, algorithm="gptq", asymmetric=0.0, **rest):
    """The config of all tests of sequential calibration; without the range search, which takes most of the time."""
    options = {"sequential": sequential}
    options |= {"asymmetric": asymmetric, "search_range": False} if algorithm == "gptq" else {"clip": False}
    return config({algorithm: options}, weights=INT4, batch_num=batch_num, **rest)


def made(kind):
    torch.manual_seed(0)
    return filled(kind())


def batches():
    return [randn(2, TOKENS, C, seed=seed) for seed in (1, 2, 3)]


class Block(nn.Module):
    def __init__(self, c=C):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(c, 2 * c), nn.Linear(c, 2 * c), nn.Linear(2 * c, c)

    def forward(self, x):
        return x + self.down(self.up(x) * torch.sigmoid(self.gate(x)))


class Chain(nn.Module):
    """Blocks of one ``kind``, run in ``order`` if that is given; ``step`` runs one."""

    kind, width, depth, order = Block, C, 3, None

    def __init__(self):
        super().__init__()
        c = self.width
        self.first = nn.Linear(c, c)
        self.blocks = nn.ModuleList(self.kind(c) for _ in range(self.depth))
        self.norm, self.head = nn.LayerNorm(c), nn.Linear(c, 8)

    def forward(self, x):
        x = self.first(x)
        for i in self.order or range(self.depth):
            x = self.step(self.blocks[i], x)
        return self.head(self.norm(x))

    def step(self, block, x):
        return block(x)


class LongChain(Chain):
    """For tests whose subject is not the order of the layers: enough of them for several processes to share."""

    width, depth = 32, 4


# What is run, and how often.


class Repeated(Chain):
    """Blocks that run several times, one of them twice in a row."""

    order = (0, 0, 1, 0, 2)

    def step(self, block, x):
        return block(x.tanh())


class Looped(Repeated):
    order = (0, 1, 0, 1, 2)


class Branching(Chain):
    """Which blocks run depends on the numbers."""

    def step(self, block, x):
        if x.mean() > 0 or block is self.blocks[0]:
            x = block(x)
        return x - 0.3


class NoList(nn.Module):
    """Attention, and no list of blocks."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(C, C) for _ in range(4))

    def forward(self, x):
        return self.o(torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2), -1) @ self.v(x))


class NestedLists(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.Sequential(nn.Sequential(nn.Linear(C, C), nn.ReLU()), nn.Sequential(Block(), Block()))
        self.head = nn.Linear(C, 8)

    def forward(self, x):
        return self.head(self.parts(x))


class Experts(nn.Module):
    def __init__(self, c=C):
        super().__init__()
        self.router = nn.Linear(c, 3, bias=False)
        self.experts = nn.ModuleList(Block(c) for _ in range(3))

    def forward(self, x):
        chosen, y = self.router(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            where = (chosen == i).nonzero(as_tuple=True)
            if where[0].numel():
                y[where] = expert(x[where])
        return x + y


class Mixture(Chain):
    kind = Experts


class SharedBlock(nn.Module):
    def __init__(self, up, down):
        super().__init__()
        self.up, self.own, self.down = up, nn.Linear(C, C), down

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.own(x))))


class SharedLinears(Chain):
    """Layers that belong to every block."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)
        self.blocks = nn.ModuleList(SharedBlock(self.up, self.down) for _ in range(3))


# What is read later, and how.


class UShape(Chain):
    """An output that is read two blocks later, and again at the end."""

    def forward(self, x):
        kept, x = [], self.first(x)
        for i, block in enumerate(self.blocks):
            x = block(x + kept[-2] if i > 1 else x)
            kept.append(x)
        return self.head(kept[0] * kept[-1])


class Collected(Chain):
    """Keeps nothing of a block but what is computed from it."""

    def forward(self, x):
        kept, x = [], self.first(x)
        for block in self.blocks:
            x = block(x)
            kept.append(self.norm(x) * 2)
        return self.head(sum(kept))


class Read(Chain):
    """Keeps nothing of a block but a number that Python read; uses the number of the block before the last."""

    read = staticmethod(lambda x: x.std().item())

    def forward(self, x):
        x, scales = self.first(x), [1.0, 1.0]
        for block in self.blocks:
            x = block(x / scales[-2])
            scales.append(self.read(x))
        return self.head(x)


class ReadAtOnce(Chain):
    """The same, with the number of the last block."""

    def forward(self, x):
        x, scale = self.first(x), 1.0
        for block in self.blocks:
            x = block(x / scale)
            scale = x.abs().max().item()
        return self.head(x * scale)


class ReadAsList(Read):
    """The same, without an operator of torch."""

    read = staticmethod(lambda x: max(x.abs().flatten().tolist()))


class ReadByNumpy(Read):
    read = staticmethod(lambda x: float(np.abs(x.numpy()).max()))


class ReadAsArray(Read):
    read = staticmethod(lambda x: float(np.abs(np.asarray(x)).max()))


class AppendingBlock(Block):
    def forward(self, x, kept):
        kept.append(self.up(x).mean(-1, keepdim=True))
        return super().forward(x)


class Appending(Chain):
    """Blocks append to a list of the model."""

    kind = AppendingBlock

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
    """Blocks leave on themselves what is read at the end."""

    kind = LeavingBlock

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x + self.blocks[0].left * self.blocks[2].left)


class Stateful(Chain):
    """The model leaves on an early block what it reads at the end."""

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
            block.left = x * 1.5
        return self.head(x + self.blocks[0].left)


MODELS = [
    *(Chain, Repeated, Looped, Branching, NoList, NestedLists, Mixture, SharedLinears),
    *(UShape, Collected, Read, ReadAtOnce, ReadAsList, ReadByNumpy, ReadAsArray, Appending, Leaving, Stateful),
]
