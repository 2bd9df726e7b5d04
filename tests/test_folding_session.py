"""Folding as a part of calibration: interrupted or failing, the runs that it takes, and what it leaves alone."""

import io
import warnings

import pytest
import torch

import quantize as qz
from quantize.core import awq, smoothquant
from tests.folds import ALL, AWQ, INT4, SMOOTHQUANT, folded, run
from tests.models import config, hooks
from tests.zoo.folding import TOKENS, Decoder, decoder


def failing(monkeypatch, module, name, error, place):
    """Let a function of an algorithm raise ``error`` at its call number ``place``, counted from 0, and at no other."""
    function, calls = getattr(module, name), []

    def call_or_fail(*arguments):
        calls.append(1)
        if len(calls) - 1 == place:
            raise error
        return function(*arguments)

    monkeypatch.setattr(module, name, call_or_fail)


def calibrate(model, given):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", qz.QuantizeWarning)
        qz.quantize(model, {**given, "batch_num": 1})
        return model(TOKENS)


def test_an_error_of_the_search_leaves_nothing_folded(monkeypatch):
    model, whole, plain = decoder(), decoder(), decoder()
    run(whole, SMOOTHQUANT)
    parameters = list(model.parameters())
    failing(monkeypatch, smoothquant, "smoothing_scale", MemoryError, 2)
    with pytest.raises(MemoryError):
        calibrate(model, SMOOTHQUANT)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    with torch.no_grad():
        assert torch.equal(model(TOKENS), plain(TOKENS))
    qz.finish(model)
    assert folded(model) == ALL
    with torch.no_grad():
        assert torch.equal(model(TOKENS), whole(TOKENS))


def test_an_interrupted_solve_goes_on_with_what_is_folded(monkeypatch):
    model, whole = decoder(), decoder()
    run(whole, AWQ)
    with monkeypatch.context() as patch:
        failing(patch, awq, "solve", RuntimeError("out of memory"), 5)
        with pytest.raises(RuntimeError, match="out of memory"):
            calibrate(model, AWQ)
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), decoder().parameters(), strict=True))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = decoder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qz.QuantizeWarning)
        qz.quantize(again, {**AWQ, "batch_num": 1})
    again.load_state_dict(torch.load(file, weights_only=True))
    for each in (model, again):
        qz.finish(each)
        assert folded(each) == ALL
        with torch.no_grad():
            assert torch.equal(each(TOKENS), whole(TOKENS))


def test_calibration_is_left_alone():
    class Counting(Decoder):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))

        def forward(self, tokens):
            self.count += 1
            return super().forward(tokens) * (1 + torch.rand(1))

    # Random numbers, buffers and hooks as without folding.
    numbers, states = [], []
    for fold in (True, False):
        torch.manual_seed(0)
        model = Counting()
        model.blocks[0].first.register_forward_hook(lambda *_: None)
        own = hooks(model)
        model.train()
        torch.manual_seed(5)
        calibrate(model, config({"awq": {"fold": fold, "grids_num": 4, "clip": False}}, weights=INT4))
        states.append(torch.get_rng_state())
        assert model.training
        assert model.count == 1
        assert folded(model) == (ALL if fold else set())
        # Its own, and those of the session: as many as without folding.
        numbers.append(len(hooks(model)))
        qz.convert(model)
        assert hooks(model) == own
    assert torch.equal(*states)
    assert numbers[0] == numbers[1]


def test_the_options_are_checked():
    with pytest.raises(qz.QuantizeError, match="fold: True with sequential"):
        qz.quantize(decoder(), config({"awq": {"fold": True, "sequential": True}}, weights=INT4))


@pytest.mark.parametrize("depth", [1, 3])
def test_blocks_that_are_alike_are_tried_at_once(depth):
    model, runs = decoder(depth=depth), []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    run(model, AWQ)
    assert len(folded(model)) == 7 * depth + 1
    # The user's, one that looks, and the last with all scales. Between them the norms of a block, values to outputs, up
    # to down, the last norm: a run each, however many blocks.
    assert len(runs) == 2 + 5 + 1
