"""A report as a picture: what was done to every layer, and which layers stand out."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from quantize.shell.config import refusal
from quantize.shell.report.rows import Row, Skipped, folded

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".pdf", ".png", ".svg")
_MOST = 56
# Okabe and Ito's colours, each with a shape of its own: told apart without colours too.
_BEFORE: dict[str, Any] = {"color": "#E69F00", "marker": "o", "fillstyle": "none", "label": "before: plain rounding"}
_AFTER: dict[str, Any] = {"color": "#0072B2", "marker": "o", "label": "after: as quantized"}
_OUTLIER: dict[str, Any] = {"color": "#D55E00", "marker": "D", "label": "after, an outlier"}
_LABELS = (
    "mean squared error of an output value\n(each layer in a unit of its own: compare within a row)",
    "error relative to plain rounding\n(1: no gain)",
    "SQNR of the weight, dB: more is better\n(layers whose output error is not known)",
)
_Floats = npt.NDArray[np.float64]


def check(path: str | Path) -> Path:
    """Where the picture goes, if it can go there: to be asked before the work that it shows.

    Raises:
        QuantizeError: another suffix than ``.png``, ``.pdf`` or ``.svg``, no such directory, or no matplotlib.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise refusal("plot", str(path), f"a file name that ends in {', '.join(SUFFIXES)}")
    if path.is_dir() or not path.parent.is_dir():
        raise refusal("plot", str(path), "a file in a directory that exists")
    if importlib.util.find_spec("matplotlib") is None:
        raise refusal("plot", "matplotlib is not installed", "pip install 'torch-quantize-core[plot]' first")
    return path


def draw(rows: Sequence[Row], skipped: Sequence[Skipped]) -> Figure:
    """One line a layer, one panel a quantity: output errors before and after, their ratio, or the SQNR of the weight.

    A line for experts shows the worst of them. Of more lines than fit, the worst are drawn, and the others counted.

    Raises:
        QuantizeError: no layer is solved yet.
    """
    from matplotlib.figure import Figure

    if all(row.weight_sqnr is None for row in rows):
        raise refusal("report", "no layer is solved yet", "a report after calibration")
    groups = folded(rows)
    layers = [min(group, key=_quality) for _, group in groups]
    values = np.array([_quantities(row) for row in layers])
    scores = excess(values[:, 1, 1], values[:, 2, 1])
    # The worst first and NaN last; then in the order of the model.
    chosen = np.sort(np.argsort(-scores, kind="stable")[:_MOST]).tolist()
    known, outliers = ~np.isnan(values).all(2), scores > 1
    panels = np.flatnonzero(known[chosen].any(0)).tolist() or [2]
    lines = [(groups[i][0], _OUTLIER["color"] if outliers[i] else "black",
              "" if known[i].any() else "not solved yet" if layers[i].weight_sqnr is None else "exact")
             for i in chosen]  # fmt: skip
    note = f"{len(rows)} layers, in the order of the model" + "; of experts the worst" * (len(groups) < len(rows))
    if len(groups) + len(skipped) <= _MOST:
        lines += [(left.name or "the model", "0.4", shorten(f"floating point: {left.reason}", 56, placeholder=" ..."))
                  for left in skipped]  # fmt: skip
    else:
        others = len(rows) - sum(len(groups[i][1]) for i in chosen)
        note += f"; the worst are shown, {others} others and {len(skipped)} modules in floating point are not"
    if outliers.any():
        note += "\noutlier: worse than three quarters of the layers, by over 1.5 times the range of the middle half"

    figure = Figure((3.7 + 3.2 * len(panels), 0.24 * len(lines) + 1.75 + 0.15 * outliers.any()))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    axes: list[Axes] = list(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0])
    for ax, quantity in zip(axes, panels, strict=True):
        _panel(ax, quantity, values[chosen, quantity], outliers[chosen])
        ax.axhspan(len(chosen) - 0.5, len(lines) - 0.5, color="0.93", linewidth=0)
    beside: dict[str, Any] = {"transform": axes[0].get_yaxis_transform(), "va": "center"}
    for i, (title, color, told) in enumerate(lines):
        short = title if len(title) <= 44 else f"...{title[-41:]}"
        axes[0].text(-0.03, i, short, ha="right", fontsize=7.5, color=color, **beside)
        axes[0].text(0.01, i, told, fontsize=7, color="0.4", **beside)
    axes[0].set(ylim=(len(lines) - 0.4, -0.6), yticks=[])
    legend = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(legend.values(), legend, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    figure.supxlabel(note, fontsize=7.5, color="0.25")
    return figure


def excess(ratios: _Floats, sqnr: _Floats) -> _Floats:
    """How much worse than most a layer is; above 1 are the outliers of Tukey's fences, but for trifles. May be NaN."""
    scores = np.full(len(ratios), np.nan)
    for values, trifle in ((ratios, 0.05), (-sqnr, 1.0)):
        held = np.flatnonzero(~np.isnan(values))
        if len(held):
            # Of three none stands out: the worst has the score 0.
            low, high = np.quantile(values[held], [0.25, 0.75] if len(held) > 3 else [1, 1])
            scores[held] = (values[held] - high) / max(1.5 * (high - low), trifle)
    return scores


def _quality(row: Row) -> tuple[float, float]:
    """The less, the worse: by the ratio of the errors where that is known."""
    return -(row.ratio or 0), np.inf if row.weight_sqnr is None else row.weight_sqnr


def _quantities(row: Row) -> _Floats:
    """Before and after of the errors of the outputs, of their ratio, and of the SQNR: NaN where not known or shown."""
    found = np.full((3, 2), np.nan)
    if row.error is None or row.baseline_error is None:
        # Shown only here: what lowers the error of the outputs may well raise that of the weight.
        found[2, 1] = row.weight_sqnr if row.weight_sqnr not in (None, np.inf) else np.nan
    elif row.baseline_error:
        # Sums over tokens and outputs; a zero has no place on a logarithmic axis.
        outputs = max(row.tokens, 1) * row.shape[0]
        found[:2] = (row.baseline_error / outputs, row.error / outputs or np.nan), (1, row.ratio)
    return found


def _panel(ax: Axes, quantity: int, values: _Floats, outliers: npt.NDArray[np.bool_]) -> None:
    (before, after), lines = values.T, np.arange(len(values))
    ax.hlines(lines, before, after, "0.65", linewidth=1.1)
    for style, x, chosen in ((_BEFORE, before, quantity == 0), (_AFTER, after, ~outliers), (_OUTLIER, after, outliers)):
        if np.any(chosen):
            ax.plot(np.where(chosen, x, np.nan), lines, linestyle="none", markersize=5.5, **style)
    if quantity == 1:
        ax.axvline(1, color="0.3", linewidth=0.9)
    if quantity < 2:
        positive = values[values > 0]
        ax.set(xscale="log") if positive.max() > 30 * positive.min() else ax.set(xlim=(0, None))
    ax.set_xlabel(_LABELS[quantity], fontsize=8)
    ax.tick_params(labelsize=7.5)
    ax.grid(axis="x", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
