"""What the properties draw. Tested itself in ``test_strategies.py``."""

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantize.core import QTensor, Scheme

sizes = st.integers(1, 9)
seeds = st.integers(0, 2**31)


@st.composite
def weight_schemes(draw, strategies=("tensor", "channel", "group"), bits=(4, 8)):
    strategy = draw(st.sampled_from(strategies))
    size = draw(st.integers(1, 7)) if strategy == "group" else None
    return Scheme(draw(st.sampled_from(bits)), draw(st.booleans()), strategy, size)


def input_schemes():
    return st.builds(Scheme, st.just(8), st.booleans(), st.sampled_from(["tensor", "token"]))


@st.composite
def matrices(draw, n=sizes, c=sizes, bound=2.0**99, dtype=np.float32):
    """Any finite numbers up to ``bound``: subnormal ones, zeros of both signs and equal rows included."""
    width = np.dtype(dtype).itemsize * 8
    elements = st.floats(-bound, bound, width=width) | st.sampled_from([0.0, 1.0, -1.0])
    return torch.from_numpy(draw(hnp.arrays(dtype, (draw(n), draw(c)), elements=elements)))


@st.composite
def integer_matrices(draw, n=sizes, c=sizes, bound=15):
    """Small whole numbers: sums and products of a few are exact in float32, so that laws hold bit for bit."""
    return torch.from_numpy(draw(hnp.arrays(np.int32, (draw(n), draw(c)), elements=st.integers(-bound, bound)))).float()


@st.composite
def normal_matrices(draw, n, c, dtype=torch.float32):
    """Gaussian numbers with heavy-tailed channels, as the inputs of transformers have them."""
    generator = torch.Generator().manual_seed(draw(seeds))
    channels = torch.randn(draw(c), generator=generator, dtype=torch.float64).mul(draw(st.sampled_from([0, 0.5, 2])))
    x = torch.randn(draw(n), len(channels), generator=generator, dtype=torch.float64) * channels.exp()
    return x.to(dtype)


@st.composite
def correlated_tokens(draw, t, c, dtype=torch.float64):
    """Tokens ``[t, c]`` with correlated, heavy-tailed channels, some of them dead, at times of low rank."""
    c = draw(c)
    x = draw(normal_matrices(t, st.just(c), torch.float64))
    generator = torch.Generator().manual_seed(draw(seeds))
    rank = draw(st.integers(1, c))
    mix = torch.randn(c, rank, generator=generator, dtype=torch.float64) @ torch.randn(
        rank, c, generator=generator, dtype=torch.float64
    )
    x = x @ (torch.eye(c, dtype=torch.float64) * draw(st.sampled_from([0.0, 1.0])) + mix / rank**0.5)
    if draw(st.booleans()):
        x[:, draw(st.integers(0, c - 1))] = 0
    return x.to(dtype)


def whole_quantized(source, n, c, scheme):
    """Random codes and zero points from -8 to 7, with float64 steps of 1/4 to 2: exact in all sums and products.

    Steps of symmetric schemes are of both signs.
    """
    p, g = scheme.grid_shape(n, c)
    signs = source.choice([-1.0, 1.0], (p, g)) if scheme.symmetric else 1.0
    scale = torch.from_numpy(signs * 2.0 ** source.integers(-2, 2, (p, g)))
    zero = None if scheme.symmetric else torch.from_numpy(source.integers(-8, 8, (p, g))).to(torch.int8)
    return QTensor(torch.from_numpy(source.integers(-8, 8, (n, c))).to(torch.int8), scale, zero, scheme)
