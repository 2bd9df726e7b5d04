"""The core under torch's own function transforms: traced whole, and mapped over a stack of layers."""

import pytest
import torch

from property_tests.laws import same_bits
from quantize.core import (
    Scheme,
    channel_absmean,
    channel_range,
    dequantize,
    gram,
    group_ranges,
    linear,
    product,
    qparams,
    quantize,
    round_to_nearest,
)

SCHEMES = [
    Scheme(bits, symmetric, strategy, 5 if strategy == "group" else None)
    for bits in (4, 8)
    for symmetric in (True, False)
    for strategy in ("tensor", "channel", "group")
]
OBSERVERS = [channel_range, channel_absmean, gram, product(channel_range, gram)]
STACK = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(0))


def compiled(function):
    # aot_eager traces everything and generates no code: no C++ compiler is needed, and the bits must be eager's.
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_affine_functions_compile_and_map(scheme):
    def both(x):
        q = quantize(x, qparams(*group_ranges(x, scheme), scheme), scheme)
        return q, dequantize(q)

    whole = compiled(both)
    for x in STACK[:2]:
        same_bits(whole(x), both(x))
    mapped, values = torch.func.vmap(both)(STACK)
    for i, x in enumerate(STACK):
        q, value = both(x)
        same_bits((mapped.codes[i], mapped.scale[i], values[i]), (q.codes, q.scale, value))
        if q.zero_point is not None:
            same_bits(mapped.zero_point[i], q.zero_point)


@pytest.mark.parametrize("observer", OBSERVERS, ids=["channel_range", "channel_absmean", "gram", "product"])
def test_the_observers_compile_and_map(observer):
    def statistic(x):
        state = observer.update(observer.init(x.shape[-1]), x)
        return observer.finalize(observer.merge(state, state))

    whole = STACK.mul(8).round()
    traced = compiled(statistic)
    for x in whole[:2]:
        same_bits(traced(x), statistic(x))
    mapped = torch.utils._pytree.tree_leaves(torch.func.vmap(statistic)(whole))
    for i, x in enumerate(whole):
        for leaf, expected in zip(mapped, torch.utils._pytree.tree_leaves(statistic(x)), strict=True):
            # A count that is the same for the whole stack may stay without the mapped axis inside.
            same_bits(leaf[i], expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_layer_compiles(symmetric):
    weight = round_to_nearest(STACK[0], Scheme(symmetric=symmetric))

    def layer(x):
        return linear.quantized_linear(x, weight, inputs=Scheme(strategy="token", symmetric=False))

    same_bits(compiled(layer)(STACK[1]), layer(STACK[1]))
    mapped = torch.func.vmap(layer)(STACK)
    for i, x in enumerate(STACK):
        same_bits(mapped[i], layer(x))
