"""What lock step promises besides the right codes: how often a block computes, and what is kept meanwhile."""

from collections import Counter

import pytest
import torch

import quantize as qz
from quantize.core import LayerSpec, Scheme, gptq, observers
from tests.memory import Alive
from tests.zoo.sequential import TOKENS, Block, C, Chain, Repeated, UShape, batches, given, made

# An output of a block, and the Gram matrix of the inputs of ``down``: no other tensors are of these sizes.
OUTPUT, GRAM = 4 * 2 * TOKENS * C, 4 * (2 * C) ** 2


def calls_of_blocks(kind, number, **options):
    """How often each block computes in all, for ``number`` batches."""
    calls = Counter()

    class CountedBlock(Block):
        def forward(self, x):
            calls[self] += 1
            return super().forward(x)

    model = made(type("Counted", (kind,), {"kind": CountedBlock, "depth": options.pop("depth", kind.depth)}))
    qz.quantize(model, given(number, **options))
    for seed in range(number):
        model(torch.roll(batches()[0], seed, 0) + seed)
    assert set(calls) == set(model.blocks)
    return list(calls.values())


def test_a_block_runs_three_times_a_batch():
    # For the user, in floating point, and quantized.
    assert calls_of_blocks(Chain, 32, asymmetric=0.5, depth=16) == [3 * 32] * 16
    # Without an eye on the float model, two batches run through it to show that they do not disturb each other.
    assert calls_of_blocks(Chain, 32, asymmetric=0.0, depth=16) == [2 * 32 + 2] * 16


def test_layers_that_are_called_again_cost_a_run_each():
    first, *rest = calls_of_blocks(Repeated, 1, asymmetric=0.5)
    # Three calls a pass, in six passes: the user's; float and quantized until up and gate, and until down, are solved;
    # and what follows. A walk ends where the last layer is solved.
    assert 3 * 3 < first <= 3 * 7
    assert all(number <= first for number in rest)


def most_alive(nbytes, kind, depth, *, calibrating=True, asymmetric=0.0, batch_num=1):
    """The largest number of storages of ``nbytes`` at any time of the pass that solves a model of ``depth`` blocks."""
    model = made(type(kind.__name__, (kind,), {"depth": depth}))
    if calibrating:
        qz.quantize(model, given(batch_num, asymmetric=asymmetric))
    *before, last = batches()[:batch_num]
    with torch.no_grad():
        for x in before:
            model(x)
        with Alive(nbytes) as alive:
            model(last)
    return alive.most


@pytest.mark.parametrize("asymmetric", [0.0, 0.5])
def test_nothing_of_a_block_is_kept_that_the_model_does_not_keep(asymmetric):
    shallow, deep = (most_alive(OUTPUT, Chain, depth, asymmetric=asymmetric, batch_num=2) for depth in (2, 4))
    assert shallow == deep
    # Skip connections keep a tensor a block, in every walk of a batch.
    shallow, deep = (most_alive(OUTPUT, UShape, depth, asymmetric=asymmetric) for depth in (3, 5))
    least, most = (most_alive(OUTPUT, UShape, depth, calibrating=False) for depth in (3, 5))
    assert deep - shallow <= (2 if asymmetric else 1) * (most - least)


@pytest.mark.parametrize("asymmetric", [0.0, 0.5])
def test_statistics_of_one_group_are_all_that_is_held(asymmetric):
    shallow, deep = (most_alive(GRAM, Chain, depth, asymmetric=asymmetric) for depth in (1, 3))
    assert shallow == deep > 0


@pytest.mark.parametrize("asymmetric", [0.0, 0.5])
def test_the_solver_holds_three_matrices_besides_the_statistic(asymmetric):
    c, spec = 4 * C, LayerSpec(Scheme(bits=4))
    weight, x = torch.randn(c // 4, c), torch.randn(2 * c, c)
    observer = observers.paired_gram if asymmetric else observers.gram
    statistic = observer.update(observer.init(c), x, *([x + 0.1] if asymmetric else []))
    with Alive(4 * c * c) as alive:
        gptq.solve(spec, gptq.Options(asymmetric=asymmetric), weight, statistic)
    # The matrix in the order of processing, its factor, and that one turned round.
    assert 0 < alive.most <= 3
