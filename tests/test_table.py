"""Every combination of weights, inputs and algorithm: served from config to file and back, or refused by a sentence."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

import quantize as qz
from quantize.core import ALGORITHMS, Scheme
from quantize.shell.deploy.kernels import KERNELS
from tests.models import assert_same_snapshot, config, filled, randn, rounding_bound, snapshot, solutions

C = 64
BITS = {"int8": 8, "int4": 4}
WEIGHTS = [
    {"type": width, "symmetric": symmetric, "strategy": strategy} | ({"group_size": 32} if strategy == "group" else {})
    for width, symmetric, strategy in itertools.product(BITS, (True, False), ("tensor", "channel", "group"))
]
INPUTS = [None] + [
    {"type": "int8", "symmetric": symmetric, "strategy": strategy}
    for symmetric, strategy in itertools.product((True, False), ("tensor", "token"))
]
NAMES = [*ALGORITHMS, {"smoothquant": {"rounding": "gptq"}}]
TABLE = list(itertools.product(WEIGHTS, INPUTS, NAMES))


def scheme(given):
    fields = ("symmetric", "strategy", "group_size")
    return given and Scheme(BITS[given["type"]], *(given.get(field) for field in fields))


def refused(weights, inputs, algorithm):
    """What a config is told that asks for a combination which no layer can have; None for all others."""
    if inputs and weights["strategy"] == "group":
        # Scales inside of a row do not leave an integer sum.
        return "quant_cfg.weights.strategy: 'group'; accepted: 'tensor', 'channel' with quant_cfg.inputs"
    if "smoothquant" in algorithm and not inputs:
        # It balances the errors of inputs and weights.
        accepted = "quantized inputs, or one of 'minmax', 'gptq', 'awq'"
        return f"algorithm: 'smoothquant' with float inputs; accepted: {accepted}"
    return None


def told(value):
    return str(value) if isinstance(value, str) else str(scheme(value)) if value and "type" in value else str(value)


def cells(cell):
    return pytest.mark.parametrize(("weights", "inputs", "algorithm"), cell, ids=told)


def made():
    """Both layers are served by the packed matmuls as well, and no row of a weight is as long on both sides of 0."""
    model = filled(nn.Sequential(nn.Linear(C, C), nn.GELU(), nn.Linear(C, C, bias=False)))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight += 0.1
    return model


@cells([cell for cell in TABLE if refused(*cell)])
def test_what_no_layer_can_have_is_refused(weights, inputs, algorithm):
    model = made()
    before = snapshot(model)
    with pytest.raises(qz.QuantizeError) as error:
        qz.quantize(model, config(algorithm, weights=weights, inputs=inputs))
    assert str(error.value) == refused(weights, inputs, algorithm)
    assert_same_snapshot(before, snapshot(model))


def kernel(weights, inputs):
    """The kernel that serves on the CPU, with weights alone in bfloat16."""
    return "reference" if weights["type"] == "int8" and weights["strategy"] == "group" else "cpu"


def npu_obstacle(weights, inputs):
    """Why the operators of Ascend do not serve, in bfloat16."""
    if inputs and inputs["strategy"] == "token" and not inputs["symmetric"]:
        return "npu_dynamic_quant is symmetric"
    if inputs and weights["type"] == "int8" and not weights["symmetric"]:
        return "codes of the weight minus their zero point do not fit the int8 of npu_quant_matmul"
    return None


@cells([cell for cell in TABLE if not refused(*cell)])
def test_what_is_accepted_is_served(weights, inputs, algorithm, tmp_path):
    dtype = torch.float32 if inputs else torch.bfloat16
    model, x = made().to(dtype), randn(40, C, seed=7).to(dtype)
    qz.quantize(model, config(algorithm, weights=weights, inputs=inputs))
    model(x)
    found = solutions(model)
    for each in found.values():
        assert (each.weight.scheme, each.inputs) == (scheme(weights), scheme(inputs))
        assert (each.weight.zero_point is None) == weights["symmetric"]
        assert (each.static is not None) == (inputs is not None and inputs["strategy"] == "tensor")
        assert KERNELS["npu"].obstacle(each, None, torch.bfloat16) == npu_obstacle(weights, inputs)
    fake = {name: model.get_submodule(name)(x) for name in found}
    for wanted, converted in (("reference", copy.deepcopy(model)), (None, model)):
        qz.convert(converted, kernel=wanted)
        for name in found:
            layer = converted.get_submodule(name)
            assert layer.kernel == (wanted or kernel(weights, inputs)) or "processor" in layer.reason
            with torch.no_grad():
                assert ((layer(x) - fake[name]).double().abs() <= rounding_bound(layer, x)).all()
    with torch.no_grad():
        expected = model(x)
    qz.save(model, tmp_path / "model")
    loaded, again = made().to(dtype), made().to(dtype)
    qz.load(loaded, tmp_path / "model")
    qz.convert(again, from_state=model.state_dict())
    for other in (loaded, again):
        for name, solution in solutions(other).items():
            leaves, solved = (pytree.tree_leaves(replace(s, error=None, baseline_error=None, notes={}))
                              for s in (solution, found[name]))  # fmt: skip
            assert all(torch.equal(a, b) for a, b in zip(leaves, solved, strict=True))
            row = other.get_submodule(name).record()
            assert (row.weights, row.inputs) == (scheme(weights), scheme(inputs))
        with torch.no_grad():
            assert torch.equal(other(x), expected)
