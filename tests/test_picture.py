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
from quantize.shell.report.rows import Report, Row, Skipped, folded
from tests.models import config, mlp, randn

SKIPPED = (Skipped("lm_head", "skip_layers: 'lm_head'", asked=True), Skipped("wte", "Embedding is not an nn.Linear"))


def draw(given):
    return picture.draw(folded(given.rows), given.skipped)


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
    names = [text for text in figure.axes[0].texts if "." in text.get_text() and "nn." not in text.get_text()]
    assert len(names) == min(n, 56)
    boxes = [text.get_window_extent(renderer) for text in [*figure.axes[0].texts, *figure.texts] if text.get_text()]
    inside = figure.bbox
    for box in boxes:
        assert inside.x0 <= box.x0
        assert box.x1 <= inside.x1
        assert inside.y0 <= box.y0
        assert box.y1 <= inside.y1
    # The legend is above the axes, and no name reaches up to it.
    boxes += [legend.get_window_extent(renderer) for legend in figure.legends]
    assert len(boxes) >= 2 + len(names)
    for a, b in itertools.combinations(boxes, 2):
        assert not a.overlaps(b)
    # However many: no higher than the highest picture of every layer.
    assert figure.get_figheight() <= draw(report(54, worst={0})).get_figheight()
    for i in worst:
        (text,) = [text for text in names if text.get_text() == f"model.layers.{i}.down_proj"]
        assert text.get_color() == "#D55E00"


def test_errors_are_those_of_an_output_value_and_stand_beside_their_ratio():
    figure = draw(report(6))
    errors, ratios = map(points, figure.axes)
    for i, each in enumerate(report(6).rows):
        assert errors["before: plain rounding"][i] == each.baseline_error / (100 * 8)
        assert errors["after: as quantized"][i] == each.error / (100 * 8)
        assert ratios["after: as quantized"][i] == each.error / each.baseline_error
    assert figure.axes[0].get_xscale() == "linear"
    assert figure.axes[0].get_xlim()[0] == 0
    figure = draw(report(40))
    assert figure.axes[0].get_xscale() == "log"


def test_layers_without_errors_have_an_axis_of_their_own():
    rows = (row(0), plain(1, 30.0), plain(2, math.inf), plain(3, None), row(4, error=0.0, baseline_error=0.0))
    figure = draw(Report(rows, SKIPPED, ()))
    errors, _, sqnr = map(points, figure.axes)
    assert set(errors["before: plain rounding"]) == {0}
    assert sqnr["after: as quantized"] == {1: 30.0}
    assert "dB" in figure.axes[2].get_xlabel()
    said = words(figure)
    assert said.count("exact") == 2
    assert said.count("not solved yet") == 1
    figure = draw(Report(tuple(plain(i, 30.0) for i in range(5)), (), ()))
    assert ["dB" in ax.get_xlabel() for ax in figure.axes] == [True]


def test_skipped_layers_are_there_with_their_reasons_or_counted():
    figure = draw(report(6))
    assert {"lm_head", "wte", "floating point: skip_layers: 'lm_head'"} <= set(words(figure))
    figure = draw(report(210))
    assert "the worst are shown, 154 others and 2 modules in floating point are not" in figure.get_supxlabel()
    assert not {"lm_head", "wte"} & set(words(figure))


def test_of_many_layers_the_worst_are_drawn_in_the_order_of_the_model():
    rows = [row(i, 0.4 + 0.001 * (i * 37 % 101)) for i in range(100)] + [plain(100, math.inf), plain(101, None)]
    figure = draw(Report(tuple(rows), (), ()))
    worst = sorted(range(100), key=lambda i: -rows[i].ratio)[:56]
    assert [word for word in words(figure) if word] == [rows[i].name for i in sorted(worst)]
    assert points(figure.axes[1])["after: as quantized"] == {k: rows[i].ratio for k, i in enumerate(sorted(worst))}
    assert "102 layers, in the order of the model; the worst are shown, 46 others" in figure.get_supxlabel()


def test_experts_have_one_line_with_the_worst_of_them():
    rows = [
        row(i, 0.3 + 0.1 * (i == 5), names=(f"mlp.experts.{i}.up",), shape=(8, 64 + 64 * (i > 6))) for i in range(9)
    ]
    figure = draw(Report((row(0), *rows, plain(1, 30.0)), (), ()))
    assert [word for word in words(figure) if word] == [
        "model.layers.0.down_proj", "mlp.experts.*.up (7)", "mlp.experts.*.up (2)", "model.layers.1.down_proj"
    ]  # fmt: skip
    assert points(figure.axes[1])["after: as quantized"] == {0: 0.5, 1: rows[5].ratio, 2: rows[7].ratio}
    assert figure.get_supxlabel().startswith("11 layers, in the order of the model; of experts the worst")
    # Without errors, it is the one with the lowest ratio of signal to noise.
    rows = [plain(i, 30.0 - i % 3) for i in range(9)]
    rows = tuple(replace(each, names=(f"experts.{i}",)) for i, each in enumerate(rows))
    assert points(draw(Report(rows, (), ())).axes[0])["after: as quantized"] == {0: 28.0}


def test_a_zero_after_a_large_error_is_drawn_as_a_ratio():
    figure = draw(Report((row(0, error=0.0), row(1), row(2)), (), ()))
    assert points(figure.axes[1])["after: as quantized"][0] == 0
    assert set(points(figure.axes[0])["after: as quantized"]) == {1, 2}
    assert set(points(figure.axes[0])["before: plain rounding"]) == {0, 1, 2}


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
