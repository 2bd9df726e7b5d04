"""The table of a report: a line for each layer, and one for experts that differ in their number."""

import math

import pytest

from quantize.core import Scheme
from quantize.shell.report.rows import Report, Row, Skipped, folded, table


def row(*names, tokens=100, ratio=0.5, sqnr=20.0, **rest):
    known = {"weight_sqnr": sqnr, "error": ratio, "baseline_error": 1.0, "notes": {"damp": 0.01}}
    return Row(names, (8, 64), Scheme(4), None, "gptq", "converted", tokens, **{**known, "kernel": "cpu", **rest})


def experts(n, name="layers.3.mlp.experts.{}.up", **rest):
    return [row(name.format(i), **rest) for i in range(n)]


def cells(line):
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_experts_are_one_line_with_the_worst_of_them():
    few = {"tokens": 0, "fell_back": True, "error": None, "baseline_error": None, "notes": {}}
    rows = [row("a"), row("e.experts.0", tokens=7, ratio=0.25, sqnr=31.0), row("e.experts.1", sqnr=15.0, **few),
            row("e.experts.2", tokens=9, ratio=0.75, notes={"damp": 0.04, "dead": 1}),
            row("e.experts.3", sqnr=None, **few), row("b", **few)]  # fmt: skip
    header, rule, *lines = table(rows)
    assert header.split()[:2] == ["layer", "shape"]
    assert set(rule) == {"-", " "}
    int4 = "int4 channel symmetric"
    folded_into = "gptq (2 fell back to minmax)"
    assert [cells(line) for line in lines] == [
        ["a", "8x64", int4, "float", "gptq", "converted", "cpu", "100", "20.0", "0.500"],
        ["e.experts.* (4)", "8x64", int4, "float", folded_into, "converted", "cpu", "0/0/9", "15.0", "0.750"],
        ["b", "8x64", int4, "float", "minmax (no tokens)", "converted", "cpu", "0", "20.0"],
        ["a: damp 0.01"],
        ["e.experts.* (4): damp 0.01..0.04, dead 1"],
    ]


@pytest.mark.parametrize(
    ("names", "titles"),
    [
        (["experts.0.up", "experts.1.up", "experts.0.down"], ["experts.*.up (2)", "experts.0.down"]),
        (["a.experts.0", "b.experts.0", "a.experts.1"], ["a.experts.* (2)", "b.experts.0"]),
        # No number of an expert: layers, another word, a name that only begins with a number.
        (["layers.0.up", "layers.1.up"], None),
        (["shared_experts.0", "shared_experts.1"], None),
        (["experts.0a", "experts.1a"], None),
        (["layers.0.experts.0", "layers.1.experts.1"], None),
        # Of two levels of experts the first counts.
        (["experts.0.experts.0", "experts.0.experts.1"], None),
        (["experts.0.experts.0", "experts.1.experts.0"], ["experts.*.experts.0 (2)"]),
    ],
)
def test_names_differ_in_the_number_of_an_expert_alone(names, titles):
    assert [title for title, _ in folded(row(name) for name in names)] == (names if titles is None else titles)


@pytest.mark.parametrize(
    "other", [{"shape": (8, 32)}, {"weights": Scheme(8)}, {"inputs": Scheme(8, True, "token")}, {"stage": "quantized"},
              {"kernel": "reference"}, {"kernel_reason": "not here"}, {"algorithm": "awq"}], ids=str
)  # fmt: skip
def test_experts_of_one_line_have_all_of_it_in_common(other):
    plain = {"shape": (8, 64), "weights": Scheme(4), "inputs": None, "algorithm": "gptq", "stage": "converted"}
    rows = [Row((f"experts.{i}",), **{**plain, **(other if i % 2 else {})}, tokens=1) for i in range(6)]
    assert folded(rows) == [("experts.* (3)", rows[::2]), ("experts.* (3)", rows[1::2])]


def test_a_layer_with_two_names_keeps_both():
    assert [title for title, _ in folded([row("a", "b")])] == ["a = b"]
    twice = [row(f"experts.{i}", f"same.experts.{i}") for i in range(2)]
    assert [title for title, _ in folded(twice)] == ["experts.* = same.experts.* (2)"]


def test_a_mixture_prints_few_lines_and_keeps_all_rows():
    rows = experts(128) + experts(128, "layers.4.mlp.experts.{}.up", kernel_reason="slow here")
    report = Report(tuple(rows), (), ())
    assert len(str(report).splitlines()) == 2 + 2 + 2 + 3
    assert "  slow here: layers.4.mlp.experts.*.up (128)" in str(report).splitlines()
    assert [layer["names"] for layer in report.as_dict()["layers"]] == [[each.name] for each in rows]


def test_an_exact_weight_is_printed_as_such():
    assert cells(table([row("a", sqnr=math.inf)])[2])[-2] == "inf"
    assert cells(table(experts(2, sqnr=math.inf))[2])[-2] == "inf"


def test_the_report_says_how_much_stays_in_floating_point():
    skipped = (Skipped("wte", "Embedding is not an nn.Linear", elements=123), Skipped("norm", "tied"))
    report = Report((row("a"),), skipped, (), elements=1000)
    assert "12.3 % of the model's weights stay in floating point (2)" in str(report).splitlines()
    assert report.as_dict()["elements"] == 1000
    assert [each["elements"] for each in report.as_dict()["skipped"]] == [123, 0]


def test_the_report_names_what_static_inputs_cost_and_what_would_mend_it():
    def loses(name, static, token):
        return row(name, notes={"static_loss": static, "token_loss": token})

    # The worst of a kind counts; 1 % is little; a scale for each token has to gain more than a factor of four.
    rows = (loses("0.down_proj", 0.02, 0.001), loses("1.down_proj", 0.5, 0.002), loses("0.up_proj", 0.6, 0.1),
            loses("0.k", 0.009, 0.0), loses("0.v", 0.04, 0.011), row("0.q"))  # fmt: skip
    lines = str(Report(rows, (), ())).splitlines()
    place = lines.index("static inputs that cost most; what to add to quant_cfg (2)")
    form = "{'type': 'int8', 'symmetric': True, 'strategy': 'token'}"
    worst = "the worst loses {} of its outputs' power, with a scale a token {}: "
    assert lines[place + 1 :] == [
        # Loaders compute gate and up as one.
        "  layers like 'up_proj' (1): "
        + worst.format("60.0%", "10.0%")
        + f"'*gate_proj.inputs': {form}, '*up_proj.inputs': {form}",
        "  layers like 'down_proj' (2): " + worst.format("50.0%", "0.2%") + f"'*down_proj.inputs': {form}",
    ]
    assert "static inputs" not in str(Report(rows[3:], (), ()))
    # A number is no name of a kind: it would match others that end in it.
    assert "'*a.0.inputs': " in str(Report((loses("a.0", 0.5, 0.0),), (), ()))
