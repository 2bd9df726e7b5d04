"""A report as a picture: the errors of all layers, and which layers stand out."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from textwrap import fill, shorten
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from quantize.shell.config import refusal
from quantize.shell.report.rows import Row, Skipped, folded, reasons, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".pdf", ".png", ".svg")
# Up to _MOST lines are all drawn. Of more, the _WORST worst are drawn.
_MOST, _WORST = 56, 30
# The most characters of a name, and the height of a line in inches.
_ROOM, _LINE = 44, 0.24
# Okabe and Ito's colours. The markers also differ, so that colours are not needed.
_BEFORE: dict[str, Any] = {"color": "#E69F00", "marker": "o", "fillstyle": "none", "label": "plain rounding"}
_AFTER: dict[str, Any] = {"color": "#0072B2", "marker": "o", "label": "as quantized"}
_OUTLIER: dict[str, Any] = {"color": "#D55E00", "marker": "D", "label": "as quantized, an outlier"}
_RATIO, _SQNR = 0, 2
_TITLES = {
    True: "Error of each layer's outputs after quantization, relative to plain rounding: below 1 is better",
    False: "Signal to noise ratio of each layer's weight after quantization: more is better",
}
_LABELS = (
    "error vs minmax: squared error of the outputs,\ndivided by that of plain rounding",
    "mean squared error of an output value\n(each layer has its own unit: compare within a row)",
    "SQNR of the weight in dB\n(layers whose output error is not known)",
)
_Floats = npt.NDArray[np.float64]


def check(path: str | Path) -> Path:
    """The path of the picture. A bad path is refused; callers check it before long work."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise refusal("plot", str(path), f"a file name that ends in {', '.join(SUFFIXES)}")
    if path.is_dir() or not path.parent.is_dir():
        raise refusal("plot", str(path), "a file in a directory that exists")
    if importlib.util.find_spec("matplotlib") is None:
        raise refusal("plot", "matplotlib is not installed", "pip install 'torch-quantize-core[plot]' first")
    return path


def draw(rows: Sequence[Row], skipped: Sequence[Skipped]) -> Figure:
    """A picture with a line for each of ``rows`` and ``skipped``. At least one row has to be solved.

    Each quantity has a panel: the error divided by that of plain rounding, both errors, and the SQNR of the weight. A
    line for several experts shows the worst of them. If not all lines fit, the worst are drawn, below an overview with
    a point for each layer.
    """
    from matplotlib.figure import Figure

    if all(row.weight_sqnr is None for row in rows):
        raise refusal("report", "no layer is solved yet", "a report after calibration")
    groups = folded(rows)
    layers = [min(group, key=attrgetter("rank")) for _, group in groups]
    values = _quantities(layers)
    scores = excess(values[_RATIO, 1], values[_SQNR, 1])
    few = len(groups) <= _MOST
    # The worst come first, and NaN last. If all lines fit, they are in the order of the model.
    chosen = np.argsort(-scores, kind="stable")[:_WORST].tolist()
    chosen = [*range(len(groups))] if few else sorted(chosen, key=lambda i: layers[i].rank)
    known, outliers = np.any(~np.isnan(values), axis=1), scores > 1
    panels = np.flatnonzero(known[:, chosen].any(1)).tolist() or [_SQNR]
    names, prefix = shortened([groups[i][0] for i in chosen], _ROOM)
    lines = [(name, _OUTLIER["color"] if outliers[i] else "black",
              "" if known[:, i].any() else "not solved yet" if layers[i].weight_sqnr is None else "exact")
             for i, name in zip(chosen, names, strict=True)]  # fmt: skip
    order = "in the order of the model" if few else f"the {len(chosen)} worst of {len(groups)} lines, the worst first"
    notes = [f"{len(rows)} layers, {order}" + "; for experts the worst" * (len(groups) < len(rows))
             + f"; .. stands for {prefix}" * bool(prefix)]  # fmt: skip
    left = [(name, "0.4", shorten(f"floating point: {why}", 56, placeholder=" ...")) for name, why in reasons(skipped)]
    if len(lines) + len(left) <= _MOST:
        lines += left
    else:
        notes.append(f"{len(skipped)} modules in floating point are not shown")
    if outliers.any():
        notes.append("outlier: worse than three quarters of the layers, by over 1.5 times the range of the middle half")

    width, height = 3.7 + 3.2 * len(panels), _LINE * len(lines) + 2.2
    figure = Figure((width, height if few else height + 2.4))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    ratios = [height] if few else [2.2, height]
    *above, below = figure.subfigures(len(ratios), 1, squeeze=False, height_ratios=ratios)[:, 0]
    axes: list[Axes] = list(below.subplots(1, len(panels), sharey=True, squeeze=False)[0])
    for ax, quantity in zip(axes, panels, strict=True):
        _panel(ax, quantity, values[quantity][:, chosen], outliers[chosen])
        ax.axhspan(len(chosen) - 0.5, len(lines) - 0.5, color="0.93", linewidth=0)
    _names(axes[0], lines)
    for part in above:
        places = {id(row): i for i, row in enumerate(rows)}
        marked = np.isin(np.arange(len(rows)), [places[id(layers[i])] for i in np.flatnonzero(outliers)])
        _overview(part.subplots(), panels[0], _quantities(rows)[panels[0], 1], marked)
    worst = min(rows, key=attrgetter("rank"))
    value = f"{worst.weight_sqnr:.1f} dB" if worst.ratio is None else f"{worst.ratio:.3f}"
    title = [_TITLES[worst.ratio is not None], f"worst: {worst.name} ({value})"]
    # About 12 characters of the title fit in an inch, and 15 of the notes.
    figure.suptitle("\n".join(fill(line, int(12 * width)) for line in title), fontsize=10, parse_math=False)
    note = "\n".join(fill(line, int(15 * width)) for line in notes)
    series = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    legend = figure.legend(series.values(), series, loc="outside lower center", ncols=3, frameon=False, fontsize=8,
                           title=note, title_fontsize=7.5)  # fmt: skip
    legend.get_title().set_multialignment("center")
    return figure


def excess(ratios: _Floats, sqnr: _Floats) -> _Floats:
    """How much worse each layer is than most. Above 1 are outliers by Tukey's fences, or by a least distance."""
    scores = np.full(len(ratios), np.nan)
    for values, trifle in ((ratios, 0.05), (-sqnr, 1.0)):
        held = np.flatnonzero(~np.isnan(values))
        if len(held):
            # Up to three layers have no outlier: the worst has the score 0.
            low, high = np.quantile(values[held], [0.25, 0.75] if len(held) > 3 else [1, 1])
            scores[held] = (values[held] - high) / max(1.5 * (high - low), trifle)
    return scores


def _quantities(rows: Sequence[Row]) -> _Floats:
    """``[3, 2, rows]``: ratio of the errors, errors of the outputs, SQNR; each before and after. NaN is not drawn."""
    keys = ("error", "baseline_error", "weight_sqnr", "ratio", "tokens")
    error, before, sqnr, ratio, tokens = (np.array([getattr(row, key) for row in rows], float) for key in keys)
    # The SQNR is drawn if nothing else is known, because a lower error of the outputs may come with a lower SQNR.
    sqnr[~np.isnan(error + before) | np.isinf(sqnr)] = np.nan
    # The errors are sums over tokens and outputs. Zeros cannot be drawn on a logarithmic axis.
    error[(error == 0) | np.isnan(ratio)] = before[np.isnan(ratio)] = np.nan
    outputs = np.maximum(tokens, 1) * [row.shape[0] for row in rows]
    return np.array([[before / before, ratio], [before / outputs, error / outputs], [np.nan * sqnr, sqnr]])


def _names(ax: Axes, lines: Sequence[tuple[str, str, str]]) -> None:
    """Write the name of each of ``lines`` in its colour, and the words that replace a point."""
    beside: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "va": "center", "parse_math": False}
    for i, (name, color, told) in enumerate(lines):
        short = name if len(name) <= _ROOM else f"...{name[3 - _ROOM :]}"
        weight = "bold" if color == _OUTLIER["color"] else "normal"
        ax.text(-0.03, i, short, ha="right", fontsize=7.5, color=color, weight=weight, **beside)
        ax.text(0.01, i, told, fontsize=7, color="0.4", **beside)
    ax.set(ylim=(len(lines) - 0.4, -0.6), yticks=[])


def _panel(ax: Axes, quantity: int, values: _Floats, outliers: npt.NDArray[np.bool_]) -> None:
    (before, after), lines = values, np.arange(values.shape[1])
    ax.hlines(lines, before, after, "0.65", linewidth=1.1)
    for style, x, chosen in (
        (_BEFORE, before, quantity != _SQNR),
        (_AFTER, after, ~outliers),
        (_OUTLIER, after, outliers),
    ):
        if np.any(chosen):
            ax.plot(np.where(chosen, x, np.nan), lines, linestyle="none", markersize=5.5, **style)
    _scale(ax, quantity, values, "x")
    ax.set_xlabel(_LABELS[quantity], fontsize=8)


def _overview(ax: Axes, quantity: int, after: _Floats, outliers: npt.NDArray[np.bool_]) -> None:
    """Draw all layers, from left to right."""
    for style, chosen, size in ((_AFTER, ~outliers, 2.5), (_OUTLIER, outliers, 4.5)):
        ax.plot(np.where(chosen, after, np.nan), linestyle="none", markersize=size, markeredgewidth=0, **style)
    _scale(ax, quantity, after, "y")
    ax.set_ylabel("SQNR in dB" if quantity == _SQNR else "error vs minmax", fontsize=8)
    ax.set_xlabel("layer, by its place in the model", fontsize=8)
    ax.set_xlim(-0.01 * len(after), 1.01 * len(after))


def _scale(ax: Axes, quantity: int, values: _Floats, axis: Literal["x", "y"]) -> None:
    """Set scale and grid of the ``axis`` that shows ``values``."""
    if quantity != _SQNR:
        positive = values[values > 0]
        wide = len(positive) and positive.max() > 30 * positive.min()
        ax.set(**{f"{axis}scale": "log"} if wide else {f"{axis}lim": (0, None)})
    if quantity == _RATIO:
        (ax.axvline if axis == "x" else ax.axhline)(1, color="0.3", linewidth=0.9)
    ax.tick_params(labelsize=7.5)
    ax.grid(axis=axis, color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
