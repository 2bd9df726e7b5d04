import copy
import math

import numpy as np
import pytest
from torch import nn

import quantize as qz
from quantize import core
from quantize.core import ALGORITHMS, LayerSpec, Scheme
from quantize.shell.calibrate.session import Session
from quantize.shell.config import Schedule, parse
from quantize.shell.plan import Plan
from tests.models import TENSOR, TOKEN, WEIGHTS, assert_same_snapshot, config, mlp, snapshot

GROUP = {**WEIGHTS, "strategy": "group", "group_size": 32}
ASYMMETRIC = {**WEIGHTS, "symmetric": False}
INT4 = {**WEIGHTS, "type": "int4"}


@pytest.mark.parametrize("algorithm", ["minmax", {"minmax"}, ["minmax"], ("minmax",), frozenset({"minmax"})])
def test_a_name_alone_means_the_defaults(algorithm):
    assert parse(config(algorithm)) == parse(config({"minmax": None})) == parse(config({"minmax": {}}))


def test_what_a_config_becomes():
    parsed = parse(config(weights=GROUP, batch_num=7, skip_layers=["head", "embed", "head"]))
    assert parsed.batch_num == 7
    assert parsed.spec == LayerSpec(Scheme(8, True, "group", 32))
    assert parsed.options == ALGORITHMS["minmax"].Options()
    assert parsed.skip_layers == ("embed", "head")
    assert parse(config()).batch_num == 1
    assert parse(config(inputs=TOKEN)).spec.inputs == Scheme(8, True, "token")


@pytest.mark.parametrize("skip", [None, (), [], set()])
def test_nothing_to_skip(skip):
    assert parse(config(skip_layers=skip)).skip_layers == ()


def test_a_schedule_is_given_with_the_options():
    assert parse(config("minmax")).schedule == parse(config("awq")).schedule == Schedule()
    assert parse(config({"awq": {"fold": True, "clip": False}})).schedule == Schedule(fold=True)
    assert parse(config({"awq": {"sequential": True}})).schedule == Schedule(sequential=True)
    assert parse(config({"awq": {"sequential": True}})).options == ALGORITHMS["awq"].Options()
    # Whoever makes use of the float model's inputs is fitted beside it.
    assert parse(config("gptq")).schedule == Schedule(sequential=True)
    assert parse(config({"gptq": {"asymmetric": 0.0}})).schedule == Schedule()
    assert parse(config({"gptq": {"asymmetric": 0.0, "sequential": True}})).schedule == Schedule(sequential=True)


@pytest.mark.parametrize(("given", "observer"), [
    ({}, core.paired_gram),
    ({"sequential": False}, core.gram),
    ({"asymmetric": 0.0}, core.gram),
    ({"asymmetric": 0.0, "sequential": True}, core.gram),
])  # fmt: skip
def test_the_schedule_decides_what_is_observed(given, observer):
    assert Session(parse(config({"gptq": given})), Plan({}, {}, {}, (), (), 0)).observer is observer


def test_a_bare_string_is_one_pattern():
    assert parse(config(skip_layers="lm_head")).skip_layers == ("lm_head",)


def test_the_config_is_only_read():
    given = config({"minmax"}, weights=dict(GROUP), skip_layers={"a"})
    kept = copy.deepcopy(given)
    parse(given)
    assert given == kept


BATCHES = "accepted: an int from 1 to 4294967295"
GROUP_SIZE = "accepted: an int, a multiple of 32, at least 32 and below the layer's in_features, with strategy 'group'"
SKIP = "accepted: None, a non-empty string, or a collection of non-empty strings"
ALGORITHM = "as a name, a collection of one name, or a dict of one name to options"
REFUSED = [
    (3, "config: 3; accepted: a dict with 'quant_cfg', 'algorithm', 'batch_num', 'skip_layers'"),
    ([], "config: []; accepted: a dict with"),
    ({"algorithm": "minmax"}, "quant_cfg: missing; accepted: a dict with"),
    ({"quant_cfg": {"weights": WEIGHTS}}, "algorithm: missing; accepted: a dict with"),
    ({**config(), "batchnum": 2}, "config: unknown key 'batchnum'"),
    ({**config(), "batchnum": 2}, "did you mean 'batch_num'?"),
    ({**config(), 5: 2}, "config: unknown key 5; accepted: "),
    (config(batch_num=0), f"batch_num: 0; {BATCHES}"),
    (config(batch_num=2**32), f"batch_num: 4294967296; {BATCHES}"),
    (config(batch_num=True), f"batch_num: True; {BATCHES}"),
    (config(batch_num=1.0), f"batch_num: 1.0; {BATCHES}"),
    (config(batch_num="1"), f"batch_num: '1'; {BATCHES}"),
    ({"quant_cfg": [], "algorithm": "minmax"}, "quant_cfg: []; accepted: a dict with 'weights', 'inputs'"),
    ({"quant_cfg": {}, "algorithm": "minmax"}, "quant_cfg.weights: missing; accepted: a dict with 'weights'"),
    (
        {"quant_cfg": {"weight": WEIGHTS}, "algorithm": "minmax"},
        "quant_cfg: unknown key 'weight'; accepted: 'weights', 'inputs'; did you mean 'weights'?",
    ),
    (config(weights=None), "quant_cfg.weights: None; accepted: a dict with 'type', 'symmetric', 'strategy'"),
    (config(weights={"type": "int8"}), "quant_cfg.weights.symmetric: missing; accepted: a dict with"),
    (config(weights={**WEIGHTS, "type": "int2"}), "quant_cfg.weights.type: 'int2'; accepted: 'int8', 'int4'"),
    (config(weights={**WEIGHTS, "type": 8}), "quant_cfg.weights.type: 8; accepted: 'int8', 'int4'"),
    (config(weights={**WEIGHTS, "symmetric": 1}), "quant_cfg.weights.symmetric: 1; accepted: True or False"),
    (config(weights={**WEIGHTS, "symmetric": "yes"}), "quant_cfg.weights.symmetric: 'yes'; accepted: True or False"),
    (
        config(weights={**WEIGHTS, "strategy": "token"}),
        "quant_cfg.weights.strategy: 'token'; accepted: 'tensor', 'channel', 'group'",
    ),
    (config(weights={**GROUP, "group_size": None}), f"quant_cfg.weights.group_size: None; {GROUP_SIZE}"),
    (config(weights={**WEIGHTS, "strategy": "group"}), f"quant_cfg.weights.group_size: None; {GROUP_SIZE}"),
    (config(weights={**GROUP, "group_size": 0}), f"quant_cfg.weights.group_size: 0; {GROUP_SIZE}"),
    (config(weights={**GROUP, "group_size": 16}), f"quant_cfg.weights.group_size: 16; {GROUP_SIZE}"),
    (config(weights={**GROUP, "group_size": 48}), f"quant_cfg.weights.group_size: 48; {GROUP_SIZE}"),
    (config(weights={**GROUP, "group_size": 32.0}), f"quant_cfg.weights.group_size: 32.0; {GROUP_SIZE}"),
    (config(weights={**WEIGHTS, "group_size": 32}), f"quant_cfg.weights.group_size: 32; {GROUP_SIZE}"),
    (config(weights={**WEIGHTS, "bits": 8}), "quant_cfg.weights: unknown key 'bits'; accepted: 'type', 'symmetric'"),
    (config(inputs={**TOKEN, "type": "int4"}), "quant_cfg.inputs.type: 'int4'; accepted: 'int8'"),
    (config(inputs={**TOKEN, "symmetric": None}), "quant_cfg.inputs.symmetric: None; accepted: True or False"),
    (
        config(inputs={**TOKEN, "strategy": "channel"}),
        "quant_cfg.inputs.strategy: 'channel'; accepted: 'tensor', 'token'",
    ),
    (config(inputs={**TOKEN, "group_size": 32}), "quant_cfg.inputs: unknown key 'group_size'; accepted: 'type'"),
    (config(inputs={"type": "int8", "symmetric": True}), "quant_cfg.inputs.strategy: missing"),
    (config(weights=INT4, inputs=TOKEN), "quant_cfg.weights.type: 'int4'; accepted: 'int8' with quant_cfg.inputs"),
    (
        config(weights=GROUP, inputs=TOKEN),
        "quant_cfg.weights.strategy: 'group'; accepted: 'tensor', 'channel' with quant_cfg.inputs",
    ),
    (
        config(weights=ASYMMETRIC, inputs=TENSOR),
        "quant_cfg.weights.symmetric: False; accepted: True with quant_cfg.inputs",
    ),
    (config("rtn"), "algorithm: unknown name 'rtn'; accepted: 'minmax'"),
    (config("min_max"), "did you mean 'minmax'?"),
    (config(None), f"algorithm: None; accepted: one of {', '.join(map(repr, ALGORITHMS))}, {ALGORITHM}"),
    (config(set()), "algorithm: set(); accepted: one of"),
    (config(["minmax", "minmax"]), "algorithm: ['minmax', 'minmax']; accepted: one of"),
    (config([["minmax"]]), "algorithm: [['minmax']]; accepted: one of"),
    (config({}), "algorithm: {}; accepted: one of"),
    (config({"minmax": {"alpha": 1}}), "algorithm.minmax: unknown key 'alpha'; accepted: none"),
    (config({"minmax": {"sequential": True}}), "algorithm.minmax: unknown key 'sequential'; accepted: none"),
    (config({"gptq": {"fold": True}}), "algorithm.gptq: unknown key 'fold'; accepted: 'act_order', "),
    (config({"gptq": {"sequential": 1}}), "algorithm.gptq.sequential: 1; accepted: True or False"),
    (config({"awq": {"fold": 1}}), "algorithm.awq.fold: 1; accepted: True or False; True without sequential"),
    (config({"minmax": 3}), "algorithm.minmax: 3; accepted: a dict with no keys"),
    (config(skip_layers=""), f"skip_layers: ''; {SKIP}"),
    (config(skip_layers=["head", ""]), f"skip_layers: ['head', '']; {SKIP}"),
    (config(skip_layers=[3]), f"skip_layers: [3]; {SKIP}"),
    (config(skip_layers=b"head"), f"skip_layers: b'head'; {SKIP}"),
    (config(skip_layers={"head": True}), f"skip_layers: {{'head': True}}; {SKIP}"),
    (config(skip_layers=3), f"skip_layers: 3; {SKIP}"),
    (config(skip_layers=np.array(3)), f"skip_layers: array(3); {SKIP}"),
    (config(batch_num=10**5000), f"batch_num: a int; {BATCHES}"),
    (config({"gptq": {"shrink": 10**400}}), "algorithm.gptq.shrink: "),
    (config({"gptq": {"shrink": math.inf}}), "algorithm.gptq.shrink: inf; accepted: a number from 0 to 1e6"),
]


@pytest.mark.parametrize(("given", "text"), REFUSED, ids=[text[:70] for _, text in REFUSED])
def test_what_the_rules_refuse(given, text):
    model = mlp()
    before = snapshot(model)
    with pytest.raises(qz.QuantizeError) as error:
        qz.quantize(model, given)
    assert text in str(error.value)
    assert_same_snapshot(before, snapshot(model))


@pytest.mark.parametrize("preset", [name for name in dir(qz.presets) if name.endswith("_CFG")])
def test_presets_are_accepted(preset):
    given = getattr(qz.presets, preset)
    parsed = parse(given)
    assert parsed.batch_num == 1
    assert parsed.skip_layers == ("lm_head",)
    assert parsed.spec.weight == Scheme(4 if "INT4" in preset else 8, True, "channel")
    assert parsed.spec.inputs == (Scheme(8, True, "tensor") if "SMOOTH" in preset else None)
    assert parsed.name in preset.lower()


def test_a_model_that_is_no_module_is_refused():
    with pytest.raises(qz.QuantizeError, match=r"accepted: a torch\.nn\.Module"):
        qz.quantize([nn.Linear(2, 2)], config())


def test_numbers_that_compare_strangely_are_refused():
    with pytest.raises(qz.QuantizeError, match="batch_num: nan"):
        parse(config(batch_num=math.nan))
