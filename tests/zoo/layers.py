"""Models that use their layers in unusual ways: under two names, for nothing, with weights or inputs of others."""

import torch
from torch import nn


class Tied(nn.Module):
    """The head has the weight of the embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 64)
        self.body = nn.Linear(64, 64)
        self.head = nn.Linear(64, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, *, tokens):
        return self.head(self.body(self.embed(tokens)))


class Shared(nn.Module):
    """One layer under two names, called under both."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.inner = nn.ModuleList([self.first, nn.Linear(8, 8)])

    def forward(self, x):
        return self.inner[1](self.first(self.inner[0](x)))


class Siblings(nn.Module):
    """Three layers that read one tensor, which may be written to before the third."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 8) for _ in range(3))
        self.o = nn.Linear(8, 16)

    def forward(self, x, *, write=False):
        y = self.q(x) + self.k(x)
        if write:
            x.mul_(2)
        return self.o(y + self.v(x))


class Idle(nn.Module):
    """A layer that is called only if asked for."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, *, wake=False):
        return self.idle(self.used(x)) if wake else self.used(x)


class TwoExperts(nn.Module):
    """Every token goes to one of two layers, by the sign of its first channel."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x):
        rare, y = x[:, 0] < 0, torch.zeros_like(x)
        y[rare], y[~rare] = self.experts[0](x[rare]), self.experts[1](x[~rare])
        return y


class Moody(nn.Module):
    """Fails between its layers when told to."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.fail = False

    def forward(self, x):
        x = self.a(x)
        if self.fail:
            raise RuntimeError("in the middle")
        return self.b(x)
