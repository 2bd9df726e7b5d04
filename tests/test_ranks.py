"""Several processes against one."""

import pytest
import torch
import torch.multiprocessing

import quantize as qz
from tests import ranks

SIZE = 3


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    ranks.warm()
    torch.multiprocessing.start_processes(
        ranks.work, (SIZE, directory / "rendezvous", directory), nprocs=SIZE, start_method="forkserver"
    )
    return [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in range(SIZE)]


@pytest.mark.parametrize("name", ranks.CONFIGS)
def test_all_ranks_end_with_the_same_bits(found, name):
    first = found[0][name]
    assert first["tokens"] == [5 * 2 * 20] * 14
    for other in found[1:]:
        assert other[name]["tokens"] == first["tokens"]
        for layer, leaves in first["solutions"].items():
            theirs = other[name]["solutions"][layer]
            assert len(theirs) == len(leaves)
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(leaves, theirs, strict=True))


@pytest.mark.parametrize("name", ["minmax", "static"])
def test_ranges_are_those_of_one_process(found, name):
    model = ranks.calibrated(name, ranks.share(0, 1))
    ranks.qz.finish(model)
    notes = {row.name: len(row.notes) for row in qz.report(model).rows}
    for layer, leaves in ranks.solutions(model).items():
        theirs = found[0][name]["solutions"][layer]
        sums = len(leaves) - notes[layer]
        # The weight, smoothing and input scales come from ranges, and notes, which are last, from sums of squares.
        assert all(torch.equal(a, b) for a, b in zip(leaves[:sums], theirs[:sums], strict=True))
        # Terms that are not negative: over 200 tokens, over channels and rows on both sides, and two dozen roundings.
        off = 2 * (200 + 2 * 64 + 2 * 64 + 24) * 2.0**-24
        for a, b in zip(leaves[sums:], theirs[sums:], strict=True):
            assert abs(a - b) <= off * a


def test_the_merged_gram_matrix_is_the_exact_one(found):
    tokens = torch.cat(ranks.BATCHES).flatten(0, 1).double()
    for each in found:
        assert torch.equal(each["gram"].double(), tokens.T @ tokens)


@pytest.mark.parametrize("name", ["gptq", "awq", "stages"])
def test_the_first_layer_is_that_of_one_process(found, name):
    model = ranks.calibrated(name, ranks.share(0, 1))
    ranks.qz.finish(model)
    mine = ranks.solutions(model)
    assert found[0][name]["solutions"].keys() == mine.keys()
    # The sums over its inputs are exact; later layers read what float matmuls of other shapes gave.
    for a, b in zip(mine["first"], found[0][name]["solutions"]["first"], strict=True):
        assert torch.equal(a, b)


def test_what_differs_is_refused_on_every_rank(found):
    for each in found:
        told = each["errors"]
        assert "rank 1: layer 'first', 32x32" in told["weights"]
        assert "as on rank 0" in told["weights"]
        assert "rank 1: layer 'first', 32x32 in torch.float32, awq" in told["config"]
        assert "layer 'first': 0 batches seen" in told["no batch"]
        assert (
            "rank 1: 0 of 1 sessions layer by layer; accepted: as on rank 0: 1 of 1 sessions layer by layer"
            in told["mode"]
        )
        assert "layer 'blocks.1.up': rank" in told["broken"]
        assert "RuntimeError: out of memory" in told["broken"]
        assert "model: every process quantized its layers alone; accepted: a larger batch_num" in told["alone"]
        assert "rank 0: has quantized its layers alone" in told["one alone"]
        assert "layer 'head': a weight with NaN or inf" in told["weight"]
        assert "out of memory" in told["replay"]
