"""Any valid config runs to the end on a small model; any other is refused with the one kind of error."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import quantize as qz
from quantize.core import ALGORITHMS
from tests.models import assert_converts_by_rounding_only, assert_same_snapshot, mlp, randn, snapshot

symmetric = st.booleans()
group = st.fixed_dictionaries(
    {"type": st.sampled_from(["int8", "int4"]), "symmetric": symmetric, "strategy": st.just("group")}
    | {"group_size": st.sampled_from([32, 64, 96])}
)
plain = st.fixed_dictionaries(
    {
        "type": st.sampled_from(["int8", "int4"]),
        "symmetric": symmetric,
        "strategy": st.sampled_from(["tensor", "channel"]),
    }
)
options = {
    "minmax": st.just({}),
    "gptq": st.fixed_dictionaries({}, optional={"act_order": st.booleans(), "damp": st.floats(0, 1)}),
    "awq": st.fixed_dictionaries({}, optional={"grids_num": st.integers(1, 4)}),
    "smoothquant": st.fixed_dictionaries(
        {}, optional={"smooth_strength": st.floats(0, 1, exclude_min=True, exclude_max=True)}
    ),
}
input_formats = st.fixed_dictionaries(
    {"type": st.just("int8"), "symmetric": symmetric, "strategy": st.sampled_from(["tensor", "token"])}
)


def algorithms(names):
    def spellings(name):
        bare = st.sampled_from([name, {name}, [name], (name,), {name: None}])
        return bare | options[name].map(lambda given: {name: given})

    return st.sampled_from(names).flatmap(spellings)


@st.composite
def valid_configs(draw):
    with_inputs = draw(st.booleans())
    weights = draw(group | plain)
    quant_cfg = {"weights": weights}
    if with_inputs:
        strategy = draw(st.sampled_from(["tensor", "channel"]))
        quant_cfg = {
            "weights": {"type": "int8", "symmetric": True, "strategy": strategy},
            "inputs": draw(input_formats),
        }
    names = [name for name, module in ALGORITHMS.items() if with_inputs in module.QUANTIZES_INPUTS]
    config = {"quant_cfg": quant_cfg, "algorithm": draw(algorithms(names))}
    return config | draw(
        st.fixed_dictionaries(
            {},
            optional={
                "batch_num": st.integers(1, 2),
                "skip_layers": st.sampled_from([None, "2", ["2"], {"2"}, ("nothing",)]),
            },
        )
    )


@pytest.mark.filterwarnings("ignore::quantize.QuantizeWarning")
@given(valid_configs())
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_every_valid_config_runs_to_the_end(config):
    model, x = mlp(c=128), randn(5, 128)
    before = model(x)
    qz.quantize(model, config)
    for _ in range(config.get("batch_num", 1)):
        model(x)
    solved = model(x)
    assert solved.shape == before.shape
    assert torch.isfinite(solved).all()
    assert_converts_by_rounding_only(model, x)
    assert all(row.stage == "converted" for row in qz.report(model).rows)
    assert all(row.name in str(qz.report(model)) for row in qz.report(model).rows)


junk = st.sampled_from(
    [None, True, 0, -1, 33, 2**32, 1.5, "", "int3", "tensr", (), {"a": 1}, {"x", "y"}, object(), b"b"]
)


def paths(config, prefix=()):
    for key, value in config.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from paths(value, (*prefix, key))


@pytest.mark.filterwarnings("ignore::quantize.QuantizeWarning")
@given(valid_configs(), st.data())
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_a_mutated_config_runs_or_is_refused(config, data):
    config = copy.deepcopy(config)
    *parents, key = data.draw(st.sampled_from(sorted(paths(config))))
    place = config
    for parent in parents:
        place = place[parent]
    mutation = data.draw(st.sampled_from(["replace", "delete", "rename", "add"]))
    value = place[key]
    if mutation in ("delete", "rename"):
        del place[key]
    if mutation == "rename":
        place[key + "s"] = value
    if mutation == "add":
        place[data.draw(st.sampled_from(["bits", "x", 3]))] = data.draw(junk)
    if mutation == "replace":
        place[key] = data.draw(junk)
    model, x = mlp(c=128), randn(5, 128)
    before = snapshot(model)
    refused = None
    try:
        qz.quantize(model, config)
    except qz.QuantizeError as error:
        refused = str(error)
    if refused is not None:
        assert "accepted: " in refused
        assert_same_snapshot(before, snapshot(model))
        return
    # Accepted: it runs as any other config.
    model(x)
    if qz.report(model).rows[0].stage == "calibrating":
        qz.finish(model)
    qz.convert(model)
    assert torch.isfinite(model(x)).all()
    assert all(row.stage == "converted" for row in qz.report(model).rows)
