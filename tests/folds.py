"""What the tests of folding share: configs, a run, and how what is folded is seen from outside."""

import warnings

import pytest
import torch

import quantize as qz
from quantize.core import awq, smoothquant
from tests.models import TOKEN, config
from tests.zoo.folding import TOKENS

INT4 = {"type": "int4", "symmetric": True, "strategy": "channel"}
AWQ = config({"awq": {"fold": True, "grids_num": 4, "clip": False, "shrink": 0.0}}, weights=INT4)
SMOOTHQUANT = config({"smoothquant": {"fold": True}}, inputs=TOKEN)
STATIC = config({"smoothquant": {"fold": True, "grids_num": 5}},
                inputs={"type": "int8", "symmetric": False, "strategy": "tensor"})  # fmt: skip
CONFIGS = {"awq": AWQ, "smoothquant, token": SMOOTHQUANT, "smoothquant, tensor": STATIC}
every_config = pytest.mark.parametrize("given", CONFIGS.values(), ids=CONFIGS.keys())
ALL = {f"blocks.{i}.{name}" for i in range(2) for name in ("q", "k", "v", "o", "gate", "up", "down")} | {"head"}


def powers_of_two(monkeypatch):
    """Let the algorithms choose powers of two, from 1/8 to 8.

    Products with them are exact. So a model computes after folding what it computed before, bit for bit, in any dtype
    and on any processor, and nothing has to be allowed for rounding.
    """
    powers = torch.tensor([2.0**i for i in range(-3, 4)])
    for module in (awq, smoothquant):

        def rounded(*arguments, scale=module.common_scale, **named):
            # Away from 1: hardly any channel keeps its scale.
            exponents = scale(*arguments, **named).log2()
            exponents = exponents.sign() * exponents.abs().ceil().clamp(max=3)
            return powers[exponents.to(torch.int64) + 3]

        monkeypatch.setattr(module, "common_scale", rounded)


def run(model, given, told=()):
    """Quantize with one batch; returns what the model gave while it was observed, and the report."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", qz.QuantizeWarning)
        qz.quantize(model, {**given, "batch_num": 1})
        with torch.no_grad():
            output = model(TOKENS)
    report = qz.report(model)
    assert bool(told) == any("not folded" in str(each.message) for each in caught) == bool(report.remarks)
    for remark in told:
        assert any(remark in each for each in report.remarks), report.remarks
    return output, report


def folded(model):
    """The names of the solved layers whose inputs are divided by what makes them."""
    return {row.name for row in qz.report(model).rows if row.notes.get("folded")}


@torch.no_grad()
def float_again(model, call):
    """What ``call()`` gives while all layers compute in floating point, with the parameters as they are now."""
    layers = [model.get_submodule(row.name) for row in qz.report(model).rows]
    for layer in layers:
        layer.active = False
    try:
        return call()
    finally:
        for layer in layers:
            layer.active = True
