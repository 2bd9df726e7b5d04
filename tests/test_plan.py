"""What is quantized, what is not, and that it is said."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import quantize as qz
from tests.models import (
    TENSOR,
    WEIGHTS,
    assert_converts_by_rounding_only,
    assert_same_snapshot,
    config,
    mlp,
    randn,
    snapshot,
)


class Special(nn.Linear):
    pass


def reasons(model, given):
    with pytest.warns(qz.QuantizeWarning) as warned:
        qz.quantize(model, given)
    assert len(warned) == 1
    skipped = {s.name: s.reason for s in qz.report(model).skipped}
    for name, reason in skipped.items():
        assert f"{name!r} ({reason})" in str(warned[0].message)
    return skipped


def test_everything_with_a_weight_matrix_is_accounted_for():
    model = nn.ModuleDict({"plain": nn.Linear(64, 4)})
    for name, module in {
        "special": Special(64, 4),
        "embed": nn.Embedding(5, 64),
        "conv": nn.Conv1d(4, 4, 3),
        "norm": nn.LayerNorm(64),
        "attention": nn.MultiheadAttention(64, 2),
        "block": nn.TransformerEncoderLayer(64, 2, dim_feedforward=32),
        "normed": nn.utils.parametrizations.weight_norm(nn.Linear(64, 4)),
        "meta": nn.Linear(64, 4, device="meta"),
        "complex": nn.Linear(64, 4, dtype=torch.complex64),
    }.items():
        model[name] = module
    patched = nn.Linear(64, 4)
    patched.forward = patched.forward
    model["patched"] = patched
    owner = "reads the weight without calling the layer"
    assert reasons(model, config()) == {
        "special": "Special is a subclass of nn.Linear: its forward may do something else",
        "embed": "Embedding is not an nn.Linear",
        "conv": "Conv1d is not an nn.Linear",
        "attention": "MultiheadAttention is not an nn.Linear",
        "attention.out_proj": f"its owner, MultiheadAttention, {owner}",
        "block.self_attn": "MultiheadAttention is not an nn.Linear",
        "block.self_attn.out_proj": f"its owner, MultiheadAttention, {owner}",
        "block.linear1": f"its owner, TransformerEncoderLayer, {owner}",
        "block.linear2": f"its owner, TransformerEncoderLayer, {owner}",
        "normed": "ParametrizedLinear is a subclass of nn.Linear: its forward may do something else",
        "normed.parametrizations.weight": "ParametrizationList is not an nn.Linear",
        "meta": "its weight is on the meta device, without data",
        "complex": "its weight is torch.complex64",
        "patched": "its forward is replaced on the instance",
    }
    assert [row.name for row in qz.report(model).rows] == ["plain"]


def test_an_empty_layer_is_left_alone():
    with pytest.warns(UserWarning, match="zero-element"):
        empty = nn.Linear(64, 0)
    assert reasons(nn.Sequential(nn.Linear(64, 4), empty), config()) == {"1": "it is empty"}


def test_pruned_layers_compute_their_weight_in_a_hook():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    prune.l1_unstructured(model[1], "weight", amount=0.5)
    assert reasons(model, config()) == {"1": "its weight is not a parameter: a hook computes it"}


def test_a_group_as_long_as_the_row_is_a_rule_of_each_layer():
    model = mlp(c=64, hidden=65)
    given = config(weights={**WEIGHTS, "strategy": "group", "group_size": 64})
    assert reasons(model, given) == {"0": "group_size 64 is not below in_features 64"}


class Experts(nn.Module):
    """Like those of a model's own code: two weights for each of four experts, stacked."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(randn(4, 16, 8)), nn.Parameter(randn(4, 8, 16))


def test_it_is_said_how_much_stays_in_floating_point():
    body = nn.Linear(8, 5)
    model = nn.ModuleDict({"embed": nn.Embedding(20, 8), "body": body, "experts": Experts(), "again": body,
                           "head": nn.Linear(8, 20), "norm": nn.LayerNorm(8)})  # fmt: skip
    model["head"].weight = model["embed"].weight
    model["shared"] = model["experts"]
    total = 20 * 8 + 8 * 5 + 2 * 4 * 16 * 8
    stacked = f"{100 * 1024 / total:.1f} % of the model's weights"
    told = f"Experts is not an nn.Linear: its 3-D parameters, such as those of experts, are {stacked}"
    with pytest.warns(qz.QuantizeWarning) as warned:
        qz.quantize(model, config(skip_layers="head"))
    report = qz.report(model)
    found = [(each.name, each.reason, each.elements) for each in report.skipped]
    # Each tensor once, where it is met first.
    assert found == [
        ("embed", "Embedding is not an nn.Linear", 160),
        ("experts", told, 1024),
        ("shared", told, 0),
        ("head", "skip_layers: 'head'", 0),
    ]
    assert report.elements == total
    share = f"{100 * (160 + 1024) / total:.1f} % of the model's weights stay in floating point"
    assert str(warned[0].message).startswith(f"{share}, see report(model): 'embed' (")
    assert f"'experts' ({told})" in str(warned[0].message)
    assert f"{share} (4)" in str(report).splitlines()


def test_a_tied_weight_that_one_of_two_modules_keeps_stays_in_floating_point():
    for names in (["head", "embed"], ["embed", "head"]):
        model = nn.ModuleDict({name: nn.Linear(8, 20) if name == "head" else nn.Embedding(20, 8) for name in names})
        model["head"].weight = model["embed"].weight
        model["body"] = nn.Linear(8, 12)
        with pytest.warns(qz.QuantizeWarning, match=f"^{100 * 160 / 256:.1f} % of the model's weights stay"):
            qz.quantize(model, config())
        assert [each.elements for each in qz.report(model).skipped] == [160]


def test_models_that_were_quantized_apart_are_counted_together():
    model = nn.ModuleDict(
        {"a": nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4)), "b": nn.Sequential(nn.Linear(4, 8))}
    )
    with pytest.warns(qz.QuantizeWarning, match="^50.0 % of the model's weights"):
        qz.quantize(model["a"], config())
    qz.quantize(model["b"], config())
    assert qz.report(model).elements == 64
    assert "25.0 % of the model's weights stay in floating point (1)" in str(qz.report(model)).splitlines()


@pytest.mark.parametrize("skip", ["lay", ["lay"], {"lay", "player"}])
def test_a_layer_is_skipped_when_its_name_contains_an_entry(skip):
    model = nn.ModuleDict({"layer": nn.Linear(4, 4), "player": nn.Linear(4, 4), "a": nn.Linear(4, 4)})
    qz.quantize(model, config(skip_layers=skip))
    report = qz.report(model)
    assert [row.name for row in report.rows] == ["a"]
    assert [s.name for s in report.skipped] == ["layer", "player"]
    assert all(s.asked and s.reason.startswith("skip_layers: ") for s in report.skipped)
    assert type(model["layer"]) is nn.Linear


def test_a_bare_string_is_not_read_by_character():
    model = nn.ModuleDict({"head": nn.Linear(4, 4), "h": nn.Linear(4, 4)})
    qz.quantize(model, config(skip_layers="head"))
    assert [row.name for row in qz.report(model).rows] == ["h"]


def test_an_entry_that_matches_nothing_is_reported_and_warned_of():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    # A norm has no weight matrix: to skip it is to skip nothing.
    for entry in ("lm_haed", "norm"):
        fresh = copy.deepcopy(model)
        with pytest.warns(qz.QuantizeWarning, match=f"'{entry}' of skip_layers or quant_cfg matched nothing"):
            qz.quantize(fresh, config(skip_layers=entry))
        assert qz.report(fresh).unmatched == (entry,)
        assert f"'{entry}'" in str(qz.report(fresh))


def test_without_weights_for_all_only_what_a_pattern_matches_is_quantized():
    model = nn.ModuleDict({"up": nn.Linear(4, 4), "down": nn.Linear(4, 4)})
    with warnings.catch_warnings():
        # The rest was not asked for.
        warnings.simplefilter("error")
        qz.quantize(model, {"quant_cfg": {"*down.weights": WEIGHTS}, "algorithm": "minmax"})
    report = qz.report(model)
    assert [row.name for row in report.rows] == ["down"]
    assert [(s.name, s.reason, s.asked) for s in report.skipped] == [
        ("up", "no weights entry of quant_cfg matches it", True)
    ]
    assert type(model["up"]) is nn.Linear


def test_a_pattern_that_matches_no_quantized_layer_is_reported_and_warned_of():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    entries = {"*bdoy.weights": WEIGHTS, "*norm.inputs": TENSOR, "*head.weights": WEIGHTS, "*body.weights": WEIGHTS}
    given = {"quant_cfg": {"weights": WEIGHTS, **entries}, "algorithm": "minmax", "skip_layers": "head"}
    with pytest.warns(qz.QuantizeWarning) as warned:
        qz.quantize(model, given)
    unmatched = ("*bdoy.weights", "*norm.inputs", "*head.weights")
    assert qz.report(model).unmatched == unmatched
    for pattern in unmatched:
        assert f"'{pattern}' of skip_layers or quant_cfg matched nothing" in str(warned[0].message)
        assert f"'{pattern}'" in str(qz.report(model))
    assert "*body.weights" not in str(warned[0].message)


def test_patterns_that_match_nothing_at_all_are_an_error():
    model = nn.ModuleDict({"body": nn.Linear(4, 4)})
    before = snapshot(model)
    with pytest.raises(qz.QuantizeError) as error:
        qz.quantize(model, {"quant_cfg": {"*bdoy.weights": WEIGHTS}, "algorithm": "minmax"})
    assert "nothing to quantize ('body': no weights entry of quant_cfg matches it)" in str(error.value)
    assert_same_snapshot(before, snapshot(model))


def test_a_group_size_of_a_pattern_is_a_rule_of_its_layers():
    model = mlp(c=64, hidden=96)
    group = {**WEIGHTS, "strategy": "group", "group_size": 64}
    given = {"quant_cfg": {"weights": WEIGHTS, "0*.weights": group}, "algorithm": "minmax"}
    assert reasons(model, given) == {"0": "group_size 64 is not below in_features 64"}
    assert [str(row.weights) for row in qz.report(model).rows] == ["int8 channel symmetric"]


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (nn.ReLU(), "nothing to quantize (no weight matrix)"),
        (nn.Linear(4, 4), "'Linear': the model is the layer itself"),
        (nn.ModuleDict({"a": nn.Embedding(3, 3)}), "'a': Embedding is not an nn.Linear"),
        (nn.Sequential(nn.Linear(3, 3)), "'0': skip_layers: '0'"),
    ],
)
def test_nothing_left_to_quantize_is_an_error(model, text):
    before = snapshot(model)
    with pytest.raises(qz.QuantizeError) as error:
        qz.quantize(model, config(skip_layers="0"))
    assert text in str(error.value)
    assert str(error.value).endswith("accepted: a model that contains an nn.Linear")
    assert_same_snapshot(before, snapshot(model))


@pytest.mark.filterwarnings("ignore::quantize.QuantizeWarning")
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_torch_own_transformer_runs_with_its_fast_path(mode):
    block = nn.TransformerEncoderLayer(64, 2, 32, dropout=0.0, batch_first=True)
    model = nn.ModuleDict({"block": block, "head": nn.Linear(64, 4)})

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x):
            return self.parts["head"](self.parts["block"](x))

    whole, x = getattr(Whole(), mode)(), randn(2, 5, 64)
    with torch.no_grad():
        expected = block(x)
        qz.quantize(whole, config(inputs=TENSOR))
        whole(x)
        assert_converts_by_rounding_only(whole, x)
        assert torch.equal(block(x), expected)
    assert [row.name for row in qz.report(whole).rows] == ["parts.head"]


def test_a_warning_made_an_error_leaves_the_model_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1))
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(qz.QuantizeWarning):
            qz.quantize(model, config())
    assert_same_snapshot(before, snapshot(model))
