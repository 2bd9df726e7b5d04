"""Sequential calibration that is interrupted, fails, or is saved in the middle, and goes on."""

import copy
import io

import pytest
import torch

import quantize as qz
from quantize.core import gptq
from tests.models import randn, solutions
from tests.zoo.sequential import TOKENS, C, Chain, batches, given, made


def started(number, batch_num=3):
    """A chain under calibration that has seen ``number`` batches."""
    model = made(Chain)
    qz.quantize(model, given(batch_num))
    for x in batches()[:number]:
        model(x)
    return model


def failing(monkeypatch, error, when):
    """Let the solver raise ``error`` at the first call for which ``when(call, weights)``; returns the calls so far."""
    solve, calls, failed = gptq.solve_together, [], []

    def solve_or_fail(spec, options, weights, statistic):
        calls.append(weights)
        if not failed and when(len(calls) - 1, weights):
            failed.append(1)
            raise error
        return solve(spec, options, weights, statistic)

    monkeypatch.setattr(gptq, "solve_together", solve_or_fail)
    return calls


def test_a_state_in_the_middle_continues_as_the_original_does():
    model = started(2)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = started(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    twin = copy.deepcopy(model)
    for each in (model, fresh, twin):
        each(batches()[2])
    wanted = solutions(started(3))
    for each in (model, fresh, twin):
        assert all(torch.equal(found.weight.codes, wanted[name].weight.codes)
                   for name, found in solutions(each).items())  # fmt: skip


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_an_interrupted_solve_is_continued(part, monkeypatch):
    with monkeypatch.context() as patch:
        calls = failing(patch, KeyboardInterrupt, lambda *_: False)
        whole = started(3)
    place = round(part * (len(calls) - 1))
    failing(monkeypatch, KeyboardInterrupt, lambda call, _: call == place)
    model, plain = started(2), made(Chain)
    with pytest.raises(KeyboardInterrupt):
        model(batches()[2])
    probe = randn(1, 3, C, seed=9)
    assert torch.equal(model(probe), plain(probe))
    assert not any("forward" in vars(module) for module in model.modules())
    with pytest.raises(qz.QuantizeError, match="interrupted"):
        qz.convert(model)
    qz.finish(model)
    assert torch.equal(model(probe), whole(probe))
    assert not torch.equal(model(probe), plain(probe))
    assert qz.report(model).rows[0].tokens == 3 * 2 * TOKENS


def test_a_failing_layer_is_named_and_the_others_stay(monkeypatch):
    plain = made(Chain)
    down = plain.blocks[0].down.weight
    failing(monkeypatch, RuntimeError("no convergence"), lambda _, weights: torch.equal(weights[0], down))
    model = started(0, batch_num=1)
    with pytest.raises(RuntimeError, match="no convergence") as error:
        model(batches()[0])
    assert any("while solving layer 'blocks.0.down'" in note for note in error.value.__notes__)
    assert torch.equal(model(batches()[0]), plain(batches()[0]))
    qz.finish(model)
    assert {row.stage for row in qz.report(model).rows} == {"quantized"}


def test_nan_is_refused_at_its_batch():
    model = started(1)
    with pytest.raises(qz.QuantizeError, match="layer 'first': NaN or inf in batch 2; accepted: finite inputs"):
        model(batches()[1] * torch.nan)
    for x in batches()[1:]:
        model(x)
    assert qz.report(model).rows[0].tokens == 3 * 2 * TOKENS
    wanted = solutions(started(3))
    assert all(torch.equal(found.weight.codes, wanted[name].weight.codes) for name, found in solutions(model).items())


def test_a_part_of_a_staged_model_is_not_finished_alone():
    model = started(1)
    with pytest.raises(qz.QuantizeError, match="a part of a model that is calibrated layer by layer"):
        qz.finish(model.blocks[1])
    for x in batches()[1:]:
        model(x)
    assert qz.report(model).rows[0].tokens == 3 * 2 * TOKENS
