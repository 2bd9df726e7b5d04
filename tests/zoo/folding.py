"""Models in which the scale of a layer's inputs may be moved into what makes them, and models in which it may not."""

import torch
from torch import nn
from torch.nn import functional

from tests.models import filled, randn

C, HEADS, HIDDEN, VOCABULARY = 16, 4, 24, 20
TOKENS = torch.randint(0, VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(0))


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))

    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * self.factor()

    def factor(self):
        """What each channel is multiplied by."""
        return self.weight


class OnePlusNorm(Norm):
    def factor(self):
        return 1 + self.weight


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
        self.gate, self.up, self.down = nn.Linear(C, HIDDEN), nn.Linear(C, HIDDEN), nn.Linear(HIDDEN, C)

    def attend(self, x):
        b, t, _ = x.shape
        q, k, v = (m(x).view(b, t, -1, C // HEADS).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).reshape(b, t, C))

    def forward(self, x):
        x = x + self.attend(self.first(x))
        y = self.second(x)
        return x + self.down(self.activation(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    def __init__(self, block=Block, depth=2, **options):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, C)
        self.blocks = nn.ModuleList(block(**options) for _ in range(depth))
        self.norm = Norm()
        self.head = nn.Linear(C, VOCABULARY, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def decoder(block=Block, dtype=torch.float32, **options):
    """In all that linear layers read a few channels stand out, as in real models."""
    model = filled(Decoder(block, **options))
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, Norm):
                # Multiples of 1/4: 1 + weight is exact in every dtype.
                module.weight.copy_((0.5 + randn(C, seed=3).abs()).mul(4).round() / 4)
                module.weight[::7] *= 6
            elif name.endswith((".v", ".up")):
                module.weight[::5] *= 6
    return model.to(dtype)


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
    """What the norm gives goes past the layers as well."""

    def forward(self, x):
        y = self.second(x)
        return y + self.down(self.activation(self.gate(y)) * self.up(y))


class Mixed(Mlp):
    """What ``up`` gives is read by others as well."""

    def forward(self, x):
        y = self.second(x)
        up = self.up(y)
        return x + self.down(self.activation(self.gate(y)) * up) + up.mean(-1, keepdim=True)


class Ungated(Mlp):
    def __init__(self, activation=functional.gelu, **options):
        super().__init__(activation=activation, **options)
        del self.gate

    def forward(self, x):
        return x + self.down(self.activation(self.up(self.second(x))))


class SharedNorm(Block):
    """One norm for attention and what follows."""

    def forward(self, x):
        x = x + self.attend(self.first(x))
        y = self.first(x)
        return x + self.down(self.activation(self.gate(y)) * self.up(y))


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


class Chained(nn.Module):
    """Two layers, what is between them, and ``behind(y, h)``: their output, and what is between."""

    def __init__(self, between=functional.relu, behind=lambda y, _: y):
        super().__init__()
        self.up, self.down = nn.Linear(C, C), nn.Linear(C, C)
        self.between, self.behind = between, behind

    def forward(self, x):
        h = self.between(self.up(x))
        return self.behind(self.down(h), h)


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = (nn.Linear(C, C, bias=False) for _ in range(3))

    def forward(self, x):
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Tasks(nn.Module):
    """Which layer reads the norm depends on the numbers."""

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
