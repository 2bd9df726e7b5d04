"""The picture of a report, for few and many layers, with and without errors."""

import itertools
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

import quantize as qz
from quantize.core import Scheme
from quantize.shell.report import picture
from quantize.shell.report.report import Report
from quantize.shell.report.rows import Row, Skipped
from tests.models import config, mlp, randn

SKIPPED = (Skipped("lm_head", "skip_layers: 'lm_head'", asked=True), Skipped("wte", "Embedding is not an nn.Linear"))

BEFORE, AFTER, OUTLIER = "plain rounding", "as quantized", "as quantized, an outlier"


def draw(given):
    return picture.draw(given.rows, given.skipped)


def row(i, ratio=0.5, **rest):
    error = 10.0 * (i + 1)
    numbers = {"weight_sqnr": 20.0, "error": ratio * error, "baseline_error": error}
    row = Row((f"model.layers.{i}.down_proj",), (8, 64), Scheme(4), None, "gptq", "converted", 100)
    return replace(row, **{**numbers, **rest})


def plain(i, sqnr):
    return row(i, weight_sqnr=sqnr, error=None, baseline_error=None)


def report(n, skipped=SKIPPED, worst=()):
    return Report(tuple(row(i, 0.97 if i in worst else 0.4 + 0.001 * (i % 7)) for i in range(n)), skipped, ())


def drawn(given):
    """The figure with everything in its place, not yet painted; and what knows how large words are."""
    figure = draw(given)
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    return figure, canvas.get_renderer()


def words(figure):
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def note(figure):
    (legend,) = figure.legends
    return legend.get_title().get_text()


def points(ax):
    """What is drawn on the axes, by label of the series: the values ``x``, each at its line ``y``; NaN is not drawn."""
    drawn = {line.get_label(): zip(line.get_ydata(), line.get_xdata(), strict=True) for line in ax.lines}
    return {label: {y: x for y, x in pairs if not math.isnan(x)} for label, pairs in drawn.items()}


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_a_report_is_drawn_into_a_file(tmp_path, suffix):
    model = mlp()
    qz.quantize(model, config("gptq", weights={"type": "int4", "symmetric": True, "strategy": "channel"}))
    model(randn(64, 64))
    qz.report(model).plot(tmp_path / f"layers{suffix}")
    start = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}[suffix]
    assert (tmp_path / f"layers{suffix}").read_bytes().startswith(start)


@pytest.mark.parametrize("n", [1, 3, 6, 54, 55, 210])
def test_no_two_names_overlap_and_none_is_cut_off(n):
    # The worst lie side by side, at either end and in the middle.
    worst = {i for i in (0, 1, 2, 3, n // 2, n // 2 + 1, n - 3, n - 2, n - 1) if n > 40}
    figure, renderer = drawn(report(n, worst=worst))
    texts = [text for ax in figure.axes for text in ax.texts]
    names = [text for text in texts if text.get_text().startswith("model.")]
    assert len(names) == (n if n <= 56 else 30)
    boxes = [text.get_window_extent(renderer) for text in [*texts, *figure.texts] if text.get_text()]
    inside = figure.bbox
    for box in boxes:
        assert inside.x0 <= box.x0
        assert box.x1 <= inside.x1
        assert inside.y0 <= box.y0
        assert box.y1 <= inside.y1
    # The legend is below the axes, the title above, and no name reaches to them.
    boxes += [legend.get_window_extent(renderer) for legend in figure.legends]
    assert len(boxes) >= 2 + len(names)
    for a, b in itertools.combinations(boxes, 2):
        assert not a.overlaps(b)
    # However many: no higher than the highest picture of every layer.
    assert figure.get_figheight() <= draw(report(54, worst={0})).get_figheight()
    for i in worst:
        (text,) = [text for text in names if text.get_text() == f"model.layers.{i}.down_proj"]
        assert (text.get_color(), text.get_weight()) == ("#D55E00", "bold")


def test_errors_are_those_of_an_output_value_and_stand_beside_their_ratio():
    figure = draw(report(6))
    ratios, errors = map(points, figure.axes)
    for i, each in enumerate(report(6).rows):
        assert errors[BEFORE][i] == each.baseline_error / (100 * 8)
        assert errors[AFTER][i] == each.error / (100 * 8)
        assert ratios[AFTER][i] == each.error / each.baseline_error
        assert ratios[BEFORE][i] == 1
    assert figure.axes[1].get_xscale() == "linear"
    assert figure.axes[1].get_xlim()[0] == 0
    figure = draw(report(40))
    assert figure.axes[1].get_xscale() == "log"


def test_layers_without_errors_have_an_axis_of_their_own():
    rows = (row(0), plain(1, 30.0), plain(2, math.inf), plain(3, None), row(4, error=0.0, baseline_error=0.0))
    figure = draw(Report(rows, SKIPPED, ()))
    _, errors, sqnr = map(points, figure.axes)
    assert set(errors[BEFORE]) == {0}
    assert sqnr[AFTER] == {1: 30.0}
    assert "dB" in figure.axes[2].get_xlabel()
    said = words(figure)
    assert said.count("exact") == 2
    assert said.count("not solved yet") == 1
    figure = draw(Report(tuple(plain(i, 30.0) for i in range(5)), (), ()))
    assert ["dB" in ax.get_xlabel() for ax in figure.axes] == [True]


def test_skipped_layers_are_there_with_their_reasons_or_counted():
    figure = draw(report(6))
    assert {"lm_head", "wte", "floating point: skip_layers: 'lm_head'"} <= set(words(figure))
    # Of many, experts share a line.
    idle = tuple(Skipped(f"experts.{i}", "idle") for i in range(60))
    assert {"experts.* (60)", "floating point: idle"} <= set(words(draw(report(6, idle))))
    figure = draw(report(54, tuple(Skipped(f"norm_{i}", f"reason {i}") for i in range(3))))
    assert "\n3 modules in floating point are not shown" in note(figure)
    assert not any("reason" in word or "norm" in word for word in words(figure))


def test_of_many_layers_all_are_points_and_the_worst_have_lines():
    rows = [row(i, 0.4 + 0.001 * (i * 37 % 101) + 0.4 * (i == 7)) for i in range(100)]
    rows += [plain(100, math.inf), plain(101, None)]
    figure = draw(Report(tuple(rows), (), ()))
    worst = sorted(range(100), key=lambda i: -rows[i].ratio)[:30]
    assert [word for word in words(figure) if word] == [rows[i].name for i in worst]
    ratios, errors, every = map(points, figure.axes)
    assert ratios[AFTER] | ratios[OUTLIER] == {k: rows[i].ratio for k, i in enumerate(worst)}
    assert set(errors[BEFORE]) == set(range(30))
    # From left to right: what is drawn is the other coordinate.
    every = {label: {i: y for y, i in found.items() if not math.isnan(y)} for label, found in every.items()}
    assert every[OUTLIER] == {7: rows[7].ratio}
    assert every[AFTER] == {i: each.ratio for i, each in enumerate(rows[:100]) if i != 7}
    assert figure.axes[2].get_xlim()[0] < 0 < 101 < figure.axes[2].get_xlim()[1]
    assert note(figure).startswith("102 layers, the 30 worst of 102 lines, the worst first\noutlier: ")


@pytest.mark.parametrize("n", [7, 200])
def test_the_title_says_what_it_shows_and_names_the_worst(n):
    title = draw(report(n, worst={3})).get_suptitle()
    assert title.endswith("relative to plain rounding: below 1 is better\nworst: model.layers.3.down_proj (0.970)")
    rows = tuple(plain(i, 30.0 + (i - 4) ** 2) for i in range(n))
    title = draw(Report(rows, (), ())).get_suptitle()
    assert title.endswith("more is better\nworst: model.layers.4.down_proj (30.0 dB)")


def test_series_differ_without_colours():
    figure = draw(report(20, worst={3}))
    shapes = [(line.get_marker(), line.get_fillstyle()) for line in figure.axes[0].lines if line.get_marker() != "None"]
    assert len(set(shapes)) == len(shapes) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [BEFORE, AFTER, OUTLIER]


def test_names_that_are_too_long_say_what_they_leave_out():
    long = "language_model.model.transformer.layers"
    rows = tuple(replace(row(i), names=(f"{long}.{i}.attention.output",)) for i in range(6))
    figure = draw(Report(rows, (), ()))
    assert [word for word in words(figure) if word] == [f"..{i}.attention.output" for i in range(6)]
    assert f".. stands for {long}." in note(figure)
    # A dollar would begin a formula.
    figure, _ = drawn(Report((replace(row(0), names=("a$_b$",)),), (), ()))
    assert "a$_b$" in words(figure)


def test_experts_have_one_line_with_the_worst_of_them():
    rows = [
        row(i, 0.3 + 0.1 * (i == 5), names=(f"mlp.experts.{i}.up",), shape=(8, 64 + 64 * (i > 6))) for i in range(9)
    ]
    figure = draw(Report((row(0), *rows, plain(1, 30.0)), (), ()))
    assert [word for word in words(figure) if word] == [
        "model.layers.0.down_proj", "mlp.experts.*.up (7)", "mlp.experts.*.up (2)", "model.layers.1.down_proj"
    ]  # fmt: skip
    assert points(figure.axes[0])[AFTER] == {0: 0.5, 1: rows[5].ratio, 2: rows[7].ratio}
    assert note(figure) == "11 layers, in the order of the model; for experts the worst"
    # Without errors, it is the one with the lowest ratio of signal to noise.
    rows = [plain(i, 30.0 - i % 3) for i in range(9)]
    rows = tuple(replace(each, names=(f"experts.{i}",)) for i, each in enumerate(rows))
    assert points(draw(Report(rows, (), ())).axes[0])[AFTER] == {0: 28.0}


def test_a_zero_after_a_large_error_is_drawn_as_a_ratio():
    figure = draw(Report((row(0, error=0.0), row(1), row(2)), (), ()))
    assert points(figure.axes[0])[AFTER][0] == 0
    assert set(points(figure.axes[1])[AFTER]) == {1, 2}
    assert set(points(figure.axes[1])[BEFORE]) == {0, 1, 2}


def test_outliers_are_far_from_the_others_and_no_trifles():
    def ranked(ratios, sqnr):
        scores = picture.excess(np.array(ratios), np.array(sqnr))
        worst = [i for i in np.argsort(-scores, kind="stable").tolist() if not math.isnan(scores[i])]
        return worst, [i for i in worst if scores[i] > 1]

    def by_ratio(*ratios):
        return ranked(ratios, [math.nan] * len(ratios))

    def by_sqnr(*sqnr):
        return ranked([math.nan] * len(sqnr), sqnr)

    assert by_ratio(0.5, 0.51, 0.97, 0.49, 0.5, 0.52) == ([2, 5, 1, 0, 4, 3], [2])
    assert by_ratio(0.5, 0.5, 0.54, 0.5, 0.5, 0.5, 0.5, 0.5)[1] == []
    assert by_sqnr(30.0, 31.0, 29.5, 30.5, 20.0, 45.0)[1] == [4]
    assert by_ratio(0.1, 0.9, 0.2) == ([1, 2, 0], [])
    assert by_ratio() == ([], [])
    # Layers with an error and layers without are compared among themselves.
    assert ranked([0.5] * 4 + [0.9] + [math.nan] * 6, [math.nan] * 5 + [30.0] * 5 + [20.0])[1] == [10, 4]
    assert by_ratio(math.nan, math.nan) == ([], [])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("layers.jpeg", r"plot: .*layers\.jpeg; accepted: a file name that ends in \.pdf, \.png, \.svg"),
        ("layers", r"plot: .*layers; accepted: a file name that ends in"),
        ("nowhere/layers.png", r"plot: .*nowhere/layers\.png; accepted: a file in a directory that exists"),
        ("taken.png", r"plot: .*taken\.png; accepted: a file in a directory that exists"),
    ],
)
def test_a_place_that_does_not_do_is_refused(tmp_path, name, told):
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(qz.QuantizeError, match=told):
        report(6).plot(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.png"]


def test_nothing_to_draw_is_refused(tmp_path):
    unsolved = replace(report(1), rows=(plain(0, None),))
    with pytest.raises(qz.QuantizeError, match="report: no layer is solved yet; accepted: a report after calibration"):
        unsolved.plot(tmp_path / "layers.png")


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(qz.QuantizeError, match=r"pip install 'torch-quantize-core\[plot\]'"):
        report(6).plot(tmp_path / "layers.png")
