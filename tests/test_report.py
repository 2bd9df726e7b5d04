"""The text of a report: short, at most 100 columns wide, and nothing of what matters left out."""

import copy
import math
import re
import statistics
import unicodedata
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import quantize as qz
from quantize.core import Scheme
from quantize.shell.report.report import Report
from quantize.shell.report.rows import Row, Skipped, folded, gathered, listed, shortened
from tests.models import config

ERROR, SQNR, WIDTH = "error vs minmax", "SQNR dB", 100


def row(*names, tokens=100, ratio=0.5, sqnr=20.0, **rest):
    known = {"weight_sqnr": sqnr, "error": ratio, "baseline_error": 1.0, "notes": {"damp": 0.01}}
    return Row(names, (8, 64), Scheme(4), None, "gptq", "converted", tokens, **{**known, "kernel": "cpu", **rest})


def plain(name, sqnr, **rest):
    return row(name, sqnr=sqnr, **{"error": None, "baseline_error": None, "notes": {}, **rest})


def experts(n, name="layers.3.mlp.experts.{}.up", **rest):
    return [row(name.format(i), **rest) for i in range(n)]


def report(rows, skipped=(), unmatched=(), remarks=()):
    return Report(tuple(rows), tuple(skipped), tuple(unmatched), tuple(remarks))


def cells(text, last):
    """The lines of the table whose last column is ``last``, as dicts. The other columns end where their header ends."""
    lines = iter(text.splitlines())
    header = next(line for line in lines if line.split("  ")[-1] == last)
    keys, ends = zip(*((match[0], match.end()) for match in re.finditer(r"\S+(?: \S+)*", header)), strict=True)
    found = []
    for line in iter(lambda: next(lines, ""), ""):
        if not line[: ends[-2]].strip():
            found[-1][last] += " " + line.strip()
        elif not line.startswith("..: "):
            parts = zip((0, *ends[:-1]), (*ends[:-1], None), strict=True)
            found.append(dict(zip(keys, (line[start:end].strip() for start, end in parts), strict=True)))
    return found


def spans(text):
    """What is told of each quantity: layers, least, median, most, and the worst layer or ''."""
    lines = iter(text.splitlines())
    while not next(lines).endswith("  worst layer"):
        pass
    split = [re.split("  +", line) for line in iter(lambda: next(lines), "")]
    return {key: (int(layers), *map(float, values[:3]), *(values[3:] or [""])) for key, layers, *values in split}


def columns(line):
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)


def dense(text):
    """``text`` without spaces, as it is found in ``joined`` lines; what cannot be printed as in a Python string."""
    told = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return joined("".join(told))


def joined(text):
    """The lines of ``text`` without spaces: lines may break anywhere."""
    return "".join(text.split())


# Names as models have them, and names that nobody would think of.
WORDS = st.sampled_from(["model", "layers", "experts", "0", "1", "17", "down_proj", "lm_head", "层", "ab\ncd"])
NAMES = st.lists(WORDS | st.text(min_size=1, max_size=50).filter(lambda word: "." not in word), min_size=1, max_size=6)
NAMES = NAMES.map(".".join)
NUMBERS = st.floats(1e-3, 1e3)
NOTES = st.dictionaries(
    st.sampled_from(["damp", "folded", "static_loss", "token_loss"]) | st.from_regex("[a-z_]{1,24}", fullmatch=True),
    st.floats(0, 1) | st.integers(0, 10**6),
    max_size=4,
)
SCHEMES = st.sampled_from([Scheme(4), Scheme(8), Scheme(4, True, "group", 64), Scheme(8, False, "token")])
REASONS = st.sampled_from(["idle", "Embedding is not an nn.Linear"]) | st.text(max_size=200).filter(str.strip)


@st.composite
def drawn_rows(draw):
    names = draw(st.lists(NAMES, min_size=1, max_size=6, unique=True))
    rows = []
    for name in names:
        kind = draw(st.sampled_from(["errors", "sqnr", "nothing"]))
        errors = {"error": draw(NUMBERS), "baseline_error": draw(NUMBERS)} if kind == "errors" else {}
        sqnr = None if kind == "nothing" else draw(st.floats(-50, 200) | st.just(math.inf))
        row = Row(
            (name, *draw(st.lists(NAMES, max_size=1))),
            draw(st.sampled_from([(8, 64), (1, 1), (10**6, 10**6)])),
            draw(SCHEMES),
            draw(st.none() | SCHEMES),
            "gptq",
            "converted",
            draw(st.integers(0, 10**9)),
            weight_sqnr=sqnr,
            notes=draw(NOTES),
            kernel=draw(st.sampled_from([None, "cpu", "reference"])),
            kernel_reason=draw(st.none() | REASONS),
            fell_back=draw(st.booleans()),
            **errors,
        )
        rows.append(row)
    # More than are printed at once.
    copies = [replace(rows[0], names=(f"model.layers.{i}.mlp.{rows[0].name}",)) for i in range(50)]
    return rows + copies * draw(st.booleans())


SKIPPED = st.lists(st.builds(Skipped, NAMES, REASONS), max_size=12)
REPORTS = st.builds(report, drawn_rows(), SKIPPED, st.lists(NAMES, max_size=5), st.lists(REASONS, max_size=8))


def test_a_huge_ratio_is_no_wider_than_a_terminal():
    # Plain rounding may be exact but for the last bit.
    held = report([row(f"layers.{i}.up", ratio=ratio) for i, ratio in enumerate((1e300, float("inf"), float("nan")))])
    assert max(map(len, (*str(held).split("\n"), *held.table().split("\n")))) <= WIDTH


@given(REPORTS)
def test_no_line_is_wider_than_a_terminal_and_nothing_is_lost(given):
    text, table = str(given), given.table()
    assert max(map(columns, (*text.split("\n"), *table.split("\n")))) <= WIDTH
    # No name or reason ends a line.
    assert text.splitlines() == text.split("\n")
    assert table.splitlines() == table.split("\n")
    found = joined(text)
    for left in given.skipped:
        assert dense(f": {left.reason}") in found
    for told in (*map(repr, given.unmatched), *given.remarks):
        assert dense(told) in found
    (lines,) = (joined(part) for part in table.split("\n\n") if part.splitlines()[0].endswith("  layer"))
    for title, _ in folded(given.rows):
        # In full, or without a beginning that is told.
        cuts = [match.end() for match in re.finditer(r"\.", title)]
        cuts = [cut for cut in cuts if dense(f"..: {title[:cut]}") in lines]
        assert dense(title) in lines or any(dense(f"..{title[cut:]}") in lines for cut in cuts)
    # The text is made of the values alone.
    again = copy.deepcopy(given)
    assert (str(again), again.table()) == (text, table)


@pytest.mark.parametrize("before", range(4))
@pytest.mark.parametrize("tokens", [1, 10**6, 10**7])
def test_wide_characters_count_twice(before, tokens):
    # Lines break within the name, after an even and an odd number of columns.
    given = report([row("a" * before + "层" * 150, tokens=tokens)])
    for line in (*str(given).splitlines(), *given.table().splitlines()):
        assert columns(line) <= WIDTH
    assert joined(str(given)).count("层") == 150


@given(st.lists(NAMES, max_size=60))
@example([f"model.layers.3.mlp.experts.{i}" for i in range(60)])
@example([f"model.layers.{i}.mlp.experts.{j}" for i in range(11) for j in range(3)])
@example(list("abcdefghijklm"))
def test_names_in_a_list_are_all_counted(names):
    lines = gathered(names)
    assert sum(count for _, count in lines) == len(names)
    # Ten or fewer are told one by one.
    if len(names) <= 10:
        assert lines == [(name, 1) for name in names]
    # A star stands for a number.
    patterns = [re.escape(line.removesuffix(f" ({count})" * (count > 1))) for line, count in lines]
    patterns = [re.compile(pattern.replace(r"\*", r"([0-9]+|\*)")) for pattern in patterns]
    assert all(any(pattern.fullmatch(name) for pattern in patterns) for name in names)
    short = listed(names)
    assert short[:10] == [line for line, _ in lines[:10]]
    assert short[10:] == ([f"{sum(count for _, count in lines[10:])} more"] if len(lines) > 10 else [])


def test_long_lists_fold_experts_before_layers():
    idle = [f"model.layers.3.mlp.experts.{i}" for i in range(60)]
    assert gathered(idle) == [("model.layers.3.mlp.experts.* (60)", 60)]
    assert gathered([*idle[:10], "lm_head"]) == [("model.layers.3.mlp.experts.* (10)", 10), ("lm_head", 1)]
    many = [f"model.layers.{i}.mlp.experts.{j}" for i in range(11) for j in range(2)]
    assert gathered(many) == [("model.layers.*.mlp.experts.* (22)", 22)]
    # Remarks begin with names.
    remarks = [f"blocks.{i}.up, blocks.{i}.gate: scale at run time, a norm" for i in range(11)]
    assert gathered(remarks) == [("blocks.*.up, blocks.*.gate: scale at run time, a norm (11)", 11)]
    assert [line for line, _ in gathered(remarks[:10])] == remarks[:10]


@given(st.lists(NAMES, min_size=1, max_size=30), st.integers(1, 80))
@example(["..b", "ab.b", "ab.c"], 1)
@example([f"model.layers.{i}.up" for i in range(3)], 12)
def test_shortened_names_are_the_same_names(names, room):
    short, prefix = shortened(names, room)
    if prefix:
        assert max(map(len, names)) > room
        assert [prefix + name[2:] if name.startswith("..") else name for name in short] == names
        assert sum(map(len, short)) < sum(map(len, names))
    else:
        assert short == names


@given(st.permutations(range(60)), st.sampled_from([0, 5, 30, 60]))
def test_of_many_layers_the_ten_worst_are_named(order, known):
    rows = [row(f"layers.{i}.up", ratio=0.1 + place / 100, sqnr=10.0 + i) if i < known
            else plain(f"layers.{i}.up", 10.0 + place) for i, place in enumerate(order)]  # fmt: skip
    worst = [
        *sorted(rows[:known], key=lambda each: -each.error),
        *sorted(rows[known:], key=lambda each: each.weight_sqnr),
    ]
    text = str(report(rows))
    found = cells(text, "layer")
    assert [line["layer"] for line in found] == [each.name for each in worst[:10]]
    for line, each in zip(found, worst, strict=False):
        assert line.get(ERROR, "") == (f"{each.error:.3f}" if each.error else "")
        assert line[SQNR] == f"{each.weight_sqnr:.1f}"
    told = {0: "by SQNR;", 60: f"by {ERROR};"}.get(known, f"by {ERROR}, then by SQNR;")
    assert f"The 10 worst {told} print(report(model).table()) lists all" in text
    # What is short stays short: the heading, the ten, and what is least and most.
    assert len(text.splitlines()) < 30
    assert [line["layer"] for line in cells(report(rows).table(), "layer")] == [each.name for each in rows]


def test_twenty_lines_are_printed_at_once_and_more_are_not():
    rows = [row(f"layers.{i}.up") for i in range(20)]
    assert [line["layer"] for line in cells(str(report(rows)), "layer")] == [each.name for each in rows]
    assert len(cells(str(report([*rows, row("head")])), "layer")) == 10
    # Experts count as the line that they share.
    assert len(cells(str(report([*rows[:19], *experts(100)])), "layer")) == 20
    # Before calibration nothing is known, and there is no worst.
    assert str(report([plain("a", None, tokens=0, kernel=None)])).splitlines() == [
        "1 layer: int4 channel symmetric weights, float inputs, gptq, converted",
        "",
        "shape  layer",
        " 8x64  a",
        "",
        "shape: outputs x inputs",
    ]
    unsolved = [plain(f"layers.{i}.up", None) for i in range(41)]
    assert "The first 10;" in str(report(unsolved))
    assert [line["layer"] for line in cells(str(report(unsolved)), "layer")] == [f"layers.{i}.up" for i in range(10)]


@given(st.lists(st.tuples(NUMBERS, st.floats(-50, 200), st.integers(1, 10**6), st.none() | st.integers(0, 99)),
                min_size=1, max_size=50))  # fmt: skip
def test_what_is_least_and_most_is_that_of_all_layers(drawn):
    rows = [row(f"{i}.up", ratio=ratio, sqnr=sqnr, tokens=tokens, notes={} if dead is None else {"dead": dead})
            for i, (ratio, sqnr, tokens, dead) in enumerate(drawn)]  # fmt: skip
    found = spans(str(report(rows)))
    wanted = {ERROR: [each.ratio for each in rows], SQNR: [each.weight_sqnr for each in rows],
              "tokens": [each.tokens for each in rows], "dead": [each.notes.get("dead") for each in rows]}  # fmt: skip
    for key, values in wanted.items():
        held = [value for value in values if value is not None]
        if not held:
            assert key not in found
            continue
        layers, least, median, most, *worst = found.pop(key)
        assert layers == len(held)
        # Half of the last decimal, or of the third digit.
        off = {ERROR: 0.0005, SQNR: 0.05}.get(key, 0) + 1e-9
        assert abs(least - min(held)) <= off
        assert abs(median - statistics.median_low(held)) <= off
        assert abs(most - max(held)) <= off
        bad = min(held) if key in (SQNR, "tokens") else max(held)
        assert worst == [f"{values.index(bad)}.up" if min(held) < max(held) else ""]
    assert not found


def test_formats_are_in_the_heading_and_counted():
    rows = [row("a"), row("b")]
    assert str(report(rows)).splitlines()[0] == (
        "2 layers: int4 channel symmetric weights, float inputs, gptq, converted, kernel cpu"
    )
    assert not {"format", "stage", "weights", "fell back"} & cells(str(report(rows)), "layer")[0].keys()
    given = {"weights": Scheme(4), "inputs": None, "algorithm": "gptq", "stage": "converted", "kernel": "cpu"}
    kinds = [{}, {"weights": Scheme(8)}, {"inputs": Scheme(8, True, "token")}, {"algorithm": "awq"},
             {"stage": "quantized"}, {"kernel": "reference"}]  # fmt: skip
    rows = [Row((f"{i}.up",), (8, 64), **{**given, **kinds[i % 6]}, tokens=1, fell_back=i % 6 == 5) for i in range(20)]
    text = str(report(rows))
    assert text.splitlines()[0] == "20 layers in 6 formats"
    found = cells(text, "how")
    assert [line["format"] for line in found] == list("123456")
    assert [int(line["layers"]) for line in found] == [4, 4, 3, 3, 3, 3]
    assert [line["how"].startswith("int8 channel symmetric weights, float") for line in found] == [
        i == 1 for i in range(6)
    ]
    assert "int8 token symmetric inputs" in found[2]["how"]
    assert "awq" in found[3]["how"]
    assert "quantized, kernel cpu" in found[4]["how"]
    assert "gptq (3 fell back to minmax), converted, kernel reference" in found[5]["how"]
    lines = cells(text, "layer")
    assert [line["format"] for line in lines] == [str(1 + i % 6) for i in range(20)]
    assert [line["fell back"] for line in lines] == ["1" if i % 6 == 5 else "" for i in range(20)]


def test_experts_are_one_line_with_the_worst_of_them():
    few = {"tokens": 0, "fell_back": True, "error": None, "baseline_error": None, "notes": {}}
    rows = [row("a"), row("e.experts.0", tokens=7, ratio=0.25, sqnr=31.0), row("e.experts.1", sqnr=15.0, **few),
            row("e.experts.2", tokens=9, ratio=0.75, notes={"damp": 0.04, "dead": 1}),
            row("e.experts.3", sqnr=None, **few), row("b", **few)]  # fmt: skip
    table = report(rows).table()
    assert [[*line.values()] for line in cells(table, "layer")] == [
        ["0.500", "20.0", "100", "", "8x64", "a"],
        ["0.750", "15.0", "0/0/9", "2", "8x64", "e.experts.* (4)"],
        ["", "20.0", "0", "1", "8x64", "b"],
    ]
    assert {"a: damp 0.01", "e.experts.* (4): damp 0.01..0.04, dead 1"} <= {*table.splitlines()}
    assert spans(str(report(rows)))["damp"] == (3, 0.01, 0.01, 0.04, "e.experts.2")


def test_every_column_and_note_is_explained():
    notes = dict.fromkeys(("damp", "dead_channels", "kept_rounding", "corrected", "folded", "static_loss"), 0.0)
    rows = [row("a", notes={**notes, "token_loss": 0.0, "own": 1.0}), row("b", fell_back=True)]
    for text in (str(report(rows)), report(rows).table()):
        legend = {line.partition(": ")[0] for line in text.split("\n\n")[-1].splitlines()}
        assert {*cells(text, "layer")[0], *notes, "token_loss"} - {"layer"} <= legend
    assert "notes" not in str(report([plain("a", 20.0)]))


def test_long_names_are_shortened_by_what_they_share():
    long = "language_model.model.transformer.encoder.layers"
    rows = [row(f"{long}.{i}.self_attention.output_projection") for i in range(5)] + [row("head")]
    text = str(report(rows))
    assert [line["layer"] for line in cells(text, "layer")] == [
        *(f"..{i}.self_attention.output_projection" for i in range(5)),
        "head",
    ]
    assert f"..: {long}." in text.splitlines()


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
    text = str(report(rows))
    _, _, told = text.partition("static inputs that cost most; what to add to quant_cfg (2)\n")
    form = "{'type': 'int8', 'symmetric': True, 'strategy': 'token'}"
    worst = "the worst loses {} of its outputs' power, with a scale for each token {}: "
    # Loaders compute gate and up as one.
    up = f"layers like 'up_proj' (1): {worst.format('60.0%', '10.0%')}"
    up += f"'*gate_proj.inputs': {form}, '*up_proj.inputs': {form}"
    down = f"layers like 'down_proj' (2): {worst.format('50.0%', '0.2%')}'*down_proj.inputs': {form}"
    assert joined(told) == joined(up + down)
    assert "static inputs" not in str(Report(rows[3:], (), ()))
    # A number is no name of a kind: it would match others that end in it.
    assert "'*a.0.inputs': " in str(Report((loses("a.0", 0.5, 0.0),), (), ()))


def test_a_mixture_prints_few_lines_and_keeps_all_rows():
    rows = experts(128) + experts(128, "layers.4.mlp.experts.{}.up", kernel_reason="slow here")
    given = report(rows, [Skipped(f"layers.5.mlp.experts.{i}", "idle") for i in range(60)])
    lines = str(given).splitlines()
    assert len(lines) < 30
    assert "  slow here: layers.4.mlp.experts.*.up (128)" in lines
    assert "  layers.5.mlp.experts.* (60): idle" in lines
    assert [layer["names"] for layer in given.as_dict()["layers"]] == [[each.name] for each in rows]
    assert len(given.as_dict()["skipped"]) == 60


def test_of_many_reasons_of_kernels_and_static_inputs_some_are_told_and_the_others_counted():
    lost = {"static_loss": 0.5, "token_loss": 0.0}
    rows = [row(f"{i}", kernel_reason=f"scales of {i}", notes=lost) for i in range(30)]
    text = str(report(rows))
    for heading in ("why not a faster kernel", "static inputs that cost most; what to add to quant_cfg"):
        _, found, rest = text.partition(f"\n{heading} (30)\n")
        assert found
        lines = [line for line in rest.split("\n\n")[0].splitlines() if not line.startswith("    ")]
        assert len(lines) == 11
        assert lines[-1] == "  20 more, see report(model).as_dict()"
    assert [each["kernel_reason"] for each in report(rows).as_dict()["layers"]] == [f"scales of {i}" for i in range(30)]


def test_an_exact_weight_is_printed_as_such():
    for rows in ([row("a", sqnr=math.inf)], experts(2, sqnr=math.inf)):
        assert [line[SQNR] for line in cells(str(report(rows)), "layer")] == ["inf"]


def test_the_warning_tells_experts_in_one_line():
    model = nn.ModuleDict({"head": nn.Linear(8, 8), "embed": nn.Embedding(8, 8),
                           "experts": nn.ModuleList(nn.Embedding(8, 8) for _ in range(11))})  # fmt: skip
    with pytest.warns(qz.QuantizeWarning) as warned:
        qz.quantize(model, config())
    reason = "Embedding is not an nn.Linear"
    share, names = str(warned[0].message).split(", see report(model): ")
    assert share == f"{100 * 12 / 13:.1f} % of the model's weights stay in floating point"
    assert names == f"'embed' ({reason}); 'experts.* (11)' ({reason})"
    assert f"  experts.* (11): {reason}" in str(qz.report(model)).splitlines()
