import copy
import math

import numpy as np
import pytest
from torch import nn

import quantize as qz
from quantize import core
from quantize.core import ALGORITHMS, LayerSpec, Scheme
from quantize.shell.calibrate.layer import calibrated
from quantize.shell.config import Schedule, parse
from tests.models import TENSOR, TOKEN, WEIGHTS, assert_same_snapshot, config, mlp, snapshot

GROUP = {**WEIGHTS, "strategy": "group", "group_size": 32}
INT4 = {**WEIGHTS, "type": "int4"}


@pytest.mark.parametrize("algorithm", ["minmax", {"minmax"}, ["minmax"], ("minmax",), frozenset({"minmax"})])
def test_a_name_alone_means_the_defaults(algorithm):
    assert parse(config(algorithm)) == parse(config({"minmax": None})) == parse(config({"minmax": {}}))


def test_what_a_config_becomes():
    parsed = parse(config(weights=GROUP, batch_num=7, skip_layers=["head", "embed", "head"]))
    assert parsed.batch_num == 7
    assert parsed.spec(["any"]) == LayerSpec(Scheme(8, True, "group", 32))
    assert parsed.options == ALGORITHMS["minmax"].Options()
    assert parsed.skip_layers == ("embed", "head")
    assert parse(config()).batch_num == 1
    assert parse(config(inputs=TOKEN)).spec(["any"]).inputs == Scheme(8, True, "token")
    assert parse(config(inputs={"enable_quant": False})).spec(["any"]) == parse(config()).spec(["any"])
    assert parse(config(inputs={**TOKEN, "enable_quant": True})) == parse(config(inputs=TOKEN))
    assert parse(config(inputs={**TOKEN, "enable_quant": False})) == parse(config(inputs={"enable_quant": False}))


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
    model = mlp()
    qz.quantize(model, config({"gptq": given}))
    assert [layer.observer for layer in calibrated(model)] == [observer] * 2


def test_a_bare_string_is_one_pattern():
    assert parse(config(skip_layers="lm_head")).skip_layers == ("lm_head",)


def test_the_config_is_only_read():
    given = config({"minmax"}, weights=dict(GROUP), skip_layers={"a"})
    kept = copy.deepcopy(given)
    parse(given)
    assert given == kept


def by_pattern(algorithm="minmax", **entries):
    """A config whose ``quant_cfg`` has just these entries, in this order."""
    return {"quant_cfg": entries, "algorithm": algorithm}


BATCHES = "accepted: an int from 1 to 4294967295"
GROUP_SIZE = "accepted: an int, a multiple of 32, below the layer's in_features"
SKIP = "accepted: None, a non-empty string, or a collection of non-empty strings"
KEYS = "accepted: 'weights', 'inputs'"
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
    (
        config(weights={**WEIGHTS, "group_size": 32}),
        "quant_cfg.weights.group_size: 32 with strategy 'channel'; accepted: strategy 'group'",
    ),
    (config(weights={**WEIGHTS, "bits": 8}), "quant_cfg.weights: unknown key 'bits'; accepted: 'type', 'symmetric'"),
    (config(inputs={**TOKEN, "type": "int4"}), "quant_cfg.inputs.type: 'int4'; accepted: 'int8'"),
    (config(inputs={**TOKEN, "symmetric": None}), "quant_cfg.inputs.symmetric: None; accepted: True or False"),
    (
        config(inputs={**TOKEN, "strategy": "channel"}),
        "quant_cfg.inputs.strategy: 'channel'; accepted: 'tensor', 'token'",
    ),
    (config(inputs={**TOKEN, "group_size": 32}), "quant_cfg.inputs: unknown key 'group_size'; accepted: 'type'"),
    (config(inputs={"type": "int8", "symmetric": True}), "quant_cfg.inputs.strategy: missing"),
    (
        config(weights=GROUP, inputs=TOKEN),
        "quant_cfg.weights.strategy: 'group'; accepted: 'tensor', 'channel' with quant_cfg.inputs",
    ),
    (by_pattern(weights=WEIGHTS, **{"down.weights": WEIGHTS}), f"quant_cfg: unknown key 'down.weights'; {KEYS}"),
    (by_pattern(weights=WEIGHTS, **{"*down": WEIGHTS}), f"quant_cfg: unknown key '*down'; {KEYS}"),
    (by_pattern(weights=WEIGHTS, **{"*down.bias": WEIGHTS}), f"quant_cfg: unknown key '*down.bias'; {KEYS}"),
    (by_pattern(**{"*down.weights.": WEIGHTS}), "quant_cfg: unknown key '*down.weights.'; accepted: "),
    (by_pattern(**{"*down.inputs": TOKEN}), "quant_cfg.weights: missing; accepted: a dict with 'weights', 'inputs', "),
    (by_pattern(**{"*down.inputs": TOKEN}), "and keys with a '*' that end in '.weights' or '.inputs'"),
    (by_pattern(weights=None, **{"*down.inputs": TOKEN}), "quant_cfg.weights: None; accepted: a dict with 'type', "),
    (
        by_pattern(weights=WEIGHTS, **{"*x.weights": {**WEIGHTS, "type": "int2"}}),
        "quant_cfg.'*x.weights'.type: 'int2'; accepted: 'int8', 'int4'",
    ),
    (
        by_pattern(weights=WEIGHTS, **{"*x.weights": {**GROUP, "group_size": 33}}),
        f"quant_cfg.'*x.weights'.group_size: 33; {GROUP_SIZE}",
    ),
    (by_pattern(weights=WEIGHTS, **{"*x.weights": None}), "quant_cfg.'*x.weights': None; accepted: a dict with 'type'"),
    (by_pattern(weights=WEIGHTS, **{"*x.inputs": None}), "quant_cfg.'*x.inputs': None; accepted: a dict with 'type'"),
    (
        by_pattern(weights=WEIGHTS, **{"*x.weights": {"enable_quant": False}}),
        "quant_cfg.'*x.weights': unknown key 'enable_quant'; accepted: 'type', ",
    ),
    (
        by_pattern(weights=WEIGHTS, **{"*x.inputs": {"enable_quant": True}}),
        "quant_cfg.'*x.inputs'.type: missing; accepted: a dict with 'type', 'symmetric', 'strategy'",
    ),
    (
        by_pattern(weights=WEIGHTS, **{"*x.inputs": {"enable_quant": 0}}),
        "quant_cfg.'*x.inputs'.enable_quant: 0; accepted: True or False",
    ),
    (
        by_pattern(weights=WEIGHTS, **{"*x.inputs": {**TOKEN, "strategy": "channel"}}),
        "quant_cfg.'*x.inputs'.strategy: 'channel'; accepted: 'tensor', 'token'",
    ),
    # Layers of the model, by their names, where entries for others meet.
    (
        by_pattern(weights=WEIGHTS, inputs=TOKEN, **{"*2.weights": GROUP}),
        "layer '2', quant_cfg.weights.strategy: 'group'; accepted: 'tensor', 'channel' with quant_cfg.inputs",
    ),
    (
        by_pattern("smoothquant", weights=WEIGHTS, inputs=TOKEN, **{"*2.inputs": {"enable_quant": False}}),
        "layer '2', algorithm: 'smoothquant' with float inputs; accepted: quantized inputs, the layer in skip",
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


def formats(given, *names):
    """The formats of a layer with these names, as text."""
    spec = parse(given).spec(names)
    return None if spec is None else (str(spec.weight), str(spec.inputs or "float"))


def test_a_later_key_wins_and_the_global_ones_come_first():
    usual, other = "int8 channel symmetric", "int4 channel symmetric"
    entries = {"*down.weights": INT4, "weights": WEIGHTS, "*.7.*.weights": WEIGHTS, "*.inputs": TOKEN,
               "inputs": TENSOR, "*.7.down.inputs": {"enable_quant": False}}  # fmt: skip
    given = by_pattern(**entries)
    token, tensor = "int8 token symmetric", "int8 tensor symmetric"
    # Wherever the global entries stand, the patterns are above them.
    assert formats(given, "down") == (other, token)
    assert formats(given, "blocks.3.down") == (other, token)
    assert formats(given, "blocks.7.down") == (usual, "float")
    assert formats(given, "blocks.7.up") == (usual, token)
    last = entries.pop("*down.weights")
    assert formats(by_pattern(**entries, **{"*down.weights": last}), "blocks.7.down") == (other, "float")
    del entries["*.inputs"], entries["*.7.down.inputs"]
    assert formats(by_pattern(**entries), "blocks.7.down") == (usual, tensor)


def test_any_of_the_names_of_a_layer_may_match():
    given = by_pattern(weights=WEIGHTS, **{"tied*.weights": INT4})
    assert formats(given, "head", "tied_head") == ("int4 channel symmetric", "float")
    assert formats(given, "head", "Tied_head") == ("int8 channel symmetric", "float")
    # The whole of a name.
    assert formats(given, "a.tied_head") == ("int8 channel symmetric", "float")


def test_without_global_weights_only_what_matches_has_a_format():
    for entries in ({}, {"weights": None}, {"inputs": None}):
        given = by_pattern(**entries, **{"*down.weights": WEIGHTS, "*.inputs": TOKEN})
        assert formats(given, "a.down") == ("int8 channel symmetric", "int8 token symmetric")
        assert formats(given, "a.up") is None


def test_each_layer_has_the_algorithm_for_its_format():
    parsed = parse(by_pattern("awq", weights=WEIGHTS, **{"*down.weights": INT4, "*down.inputs": TENSOR}))
    weight = mlp()[0].weight.detach()
    for name, statistics in (("up", 2), ("down", 3)):
        spec = parsed.spec([name])
        algorithm = parsed.algorithm(spec)
        # AWQ asks for the ranges of the inputs where they are quantized.
        assert len(algorithm.observer.init(64)) == statistics
        observed = algorithm.observer.update(algorithm.observer.init(64), weight)
        solved = algorithm.solve(weight, algorithm.observer.finalize(observed))
        assert (solved.weight.scheme, solved.inputs) == (spec.weight, spec.inputs)


@pytest.mark.parametrize(("entries", "needs_no_batch"), [
    ({"weights": WEIGHTS}, True),
    ({"weights": WEIGHTS, "*x.weights": INT4}, True),
    ({"weights": WEIGHTS, "*x.inputs": TOKEN}, False),
    ({"weights": WEIGHTS, "*x.inputs": {"enable_quant": False}}, True),
    ({"weights": WEIGHTS, "inputs": TOKEN, "*x.inputs": {"enable_quant": False}}, False),
])  # fmt: skip
def test_whether_batches_are_needed_at_all(entries, needs_no_batch):
    assert parse(by_pattern(**entries)).data_free is needs_no_batch
    assert not parse(by_pattern("gptq", **entries)).data_free


@pytest.mark.parametrize("preset", [name for name in dir(qz.presets) if name.endswith("_CFG")])
def test_presets_are_accepted(preset):
    given = getattr(qz.presets, preset)
    parsed = parse(given)
    assert parsed.batch_num == 1
    assert parsed.skip_layers == ("lm_head",)
    spec = parsed.spec(["any"])
    assert spec.weight == Scheme(4 if "INT4" in preset else 8, True, "channel")
    assert spec.inputs == (Scheme(8, True, "tensor") if "SMOOTH" in preset else None)
    assert parsed.name in preset.lower()


def test_a_model_that_is_no_module_is_refused():
    with pytest.raises(qz.QuantizeError, match=r"accepted: a torch\.nn\.Module"):
        qz.quantize([nn.Linear(2, 2)], config())


def test_numbers_that_compare_strangely_are_refused():
    with pytest.raises(qz.QuantizeError, match="batch_num: nan"):
        parse(config(batch_num=math.nan))
