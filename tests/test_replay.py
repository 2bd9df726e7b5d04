"""What only the replay of stages promises: how often a block computes, and what is kept between its runs.

That the right codes come out is tested in ``test_sequential``, for any mechanism.
"""

from collections import Counter

import pytest
import torch

import quantize as qz
from tests.memory import Alive
from tests.zoo.sequential import TOKENS, Block, C, Chain, Collected, Read, ReadAtOnce, UShape, batches, given, made

# An output of a block, and the Gram matrix of the inputs of ``down``: no other tensors are of these sizes.
OUTPUT, GRAM = 4 * 2 * TOKENS * C, 4 * (2 * C) ** 2


# Each block runs once in floating point and once quantized; with an eye on the float model, up and gate are fitted
# first, and then down: two runs of either model, and one that computes the output of the quantized one.
@pytest.mark.parametrize(("asymmetric", "runs"), [(0.0, 2), (0.5, 5)])
def test_blocks_compute_no_more_than_needed(asymmetric, runs):
    calls = Counter()

    class CountedBlock(Block):
        def forward(self, x):
            calls[self] += 1
            return super().forward(x)

    class Counted(Chain):
        kind = CountedBlock

    model = made(Counted)
    qz.quantize(model, given(asymmetric=asymmetric))
    for x in batches():
        model(x)
    # Three runs by the user, one that surveys.
    assert set(calls) == set(model.blocks)
    assert set(calls.values()) == {3 + 1 + runs * 3}


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
def test_outputs_that_nothing_reads_again_are_freed(asymmetric):
    shallow, deep = (most_alive(OUTPUT, Chain, depth, asymmetric=asymmetric, batch_num=2) for depth in (2, 4))
    assert shallow == deep
    # Two a batch while a block gives way to the next, on the way of the float model as well.
    fewer = most_alive(OUTPUT, Chain, 2, asymmetric=asymmetric)
    assert 1 <= shallow - fewer <= (4 if asymmetric else 2)


@pytest.mark.parametrize("kind", [UShape, Collected, ReadAtOnce, Read], ids=lambda kind: kind.__name__)
def test_what_may_be_read_again_is_kept(kind):
    shallow, deep = (most_alive(OUTPUT, kind, depth) for depth in (3, 5))
    least, most = (most_alive(OUTPUT, kind, depth, calibrating=False) for depth in (3, 5))
    # One output a block, besides what the model itself holds.
    assert (deep - shallow) - (most - least) == 5 - 3


@pytest.mark.parametrize("asymmetric", [0.0, 0.5])
def test_statistics_of_one_stage_are_all_that_is_held(asymmetric):
    shallow, deep = (most_alive(GRAM, Chain, depth, asymmetric=asymmetric) for depth in (1, 3))
    assert shallow == deep > 0
