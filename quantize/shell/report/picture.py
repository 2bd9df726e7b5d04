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
    """Where the picture goes; a place where it cannot go is refused, to be asked before the work that it shows."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise refusal("plot", str(path), f"a file name that ends in {', '.join(SUFFIXES)}")
    if path.is_dir() or not path.parent.is_dir():
        raise refusal("plot", str(path), "a file in a directory that exists")
    if importlib.util.find_spec("matplotlib") is None:
        raise refusal("plot", "matplotlib is not installed", "pip install 'torch-quantize-core[plot]' first")
    return path


def draw(groups: Sequence[tuple[str, Sequence[Any]]], skipped: Sequence[Any]) -> Figure:
    """The rows of a report in ``groups`` under their titles, of which at least one is solved, and what was skipped.

    One line a group, one panel a quantity: output errors before and after, their ratio, or the SQNR of the weight. A
    line for experts shows the worst of them. Of more lines than fit, the worst are drawn, and the others counted.
    """
    from matplotlib.figure import Figure

    layers, total = [min(group, key=_quality) for _, group in groups], sum(len(group) for _, group in groups)
    if all(row.weight_sqnr is None for _, group in groups for row in group):
        raise refusal("report", "no layer is solved yet", "a report after calibration")
    values = _quantities(layers)
    scores = excess(values[1, 1], values[2, 1])
    # The worst first and NaN last; then in the order of the model.
    chosen = np.sort(np.argsort(-scores, kind="stable")[:_MOST]).tolist()
    known, outliers = np.any(~np.isnan(values), axis=1), scores > 1
    panels = np.flatnonzero(known[:, chosen].any(1)).tolist() or [2]
    lines = [(groups[i][0], _OUTLIER["color"] if outliers[i] else "black",
              "" if known[:, i].any() else "not solved yet" if layers[i].weight_sqnr is None else "exact")
             for i in chosen]  # fmt: skip
    note = f"{total} layers, in the order of the model" + "; of experts the worst" * (len(groups) < total)
    if len(groups) + len(skipped) <= _MOST:
        lines += [(left.name or "the model", "0.4", shorten(f"floating point: {left.reason}", 56, placeholder=" ..."))
                  for left in skipped]  # fmt: skip
    else:
        others = total - sum(len(groups[i][1]) for i in chosen)
        note += f"; the worst are shown, {others} others and {len(skipped)} modules in floating point are not"
    if outliers.any():
        note += "\noutlier: worse than three quarters of the layers, by over 1.5 times the range of the middle half"

    figure = Figure((3.7 + 3.2 * len(panels), 0.24 * len(lines) + 1.75 + 0.15 * outliers.any()))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    axes: list[Axes] = list(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0])
    for ax, quantity in zip(axes, panels, strict=True):
        _panel(ax, quantity, values[quantity][:, chosen], outliers[chosen])
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


def _quality(row: Any) -> tuple[float, float]:
    return -(row.ratio or 0), np.inf if row.weight_sqnr is None else row.weight_sqnr


def _quantities(rows: Sequence[Any]) -> _Floats:
    """``[3, 2, rows]``: the errors of the outputs, their ratio, the SQNR; before, after. NaN: not known or shown."""
    keys = ("error", "baseline_error", "weight_sqnr", "ratio", "tokens")
    error, before, sqnr, ratio, tokens = (np.array([getattr(row, key) for row in rows], float) for key in keys)
    # The SQNR only where nothing else is known: what lowers the error of the outputs may well raise that of the weight.
    sqnr[~np.isnan(error + before) | np.isinf(sqnr)] = np.nan
    # Sums over tokens and outputs; a zero has no place on a logarithmic axis.
    error[(error == 0) | np.isnan(ratio)] = before[np.isnan(ratio)] = np.nan
    outputs = np.maximum(tokens, 1) * [row.shape[0] for row in rows]
    return np.array([[before / outputs, error / outputs], [before / before, ratio], [np.nan * sqnr, sqnr]])


def _panel(ax: Axes, quantity: int, values: _Floats, outliers: npt.NDArray[np.bool_]) -> None:
    (before, after), lines = values, np.arange(values.shape[1])
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
