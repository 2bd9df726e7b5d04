"""A report as a picture: what was done to every layer, and which layers stand out."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from textwrap import shorten, wrap
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from quantize.shell.config import refusal
from quantize.shell.report.rows import Row, Skipped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".pdf", ".png", ".svg")
# Up to so many lines each has its name, beyond it the worst.
_NAMED, _WORST = 56, 12
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

    Raises:
        QuantizeError: no layer is solved yet.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if all(row.weight_sqnr is None for row in rows):
        raise refusal("report", "no layer is solved yet", "a report after calibration")
    values = np.array([_quantities(row) for row in rows])
    known = ~np.isnan(values).all(2)
    worst, outliers = ranked(values[:, 1, 1], values[:, 2, 1])
    panels = np.flatnonzero(known.any(0)).tolist() or [2]
    shown = len(rows) + len(skipped) <= _NAMED
    names = {i: row.name for i, row in enumerate(rows) if shown or i in worst[:_WORST]}
    says = {i: "not solved yet" if row.weight_sqnr is None else "exact"
            for i, row in enumerate(rows) if not known[i].any()}  # fmt: skip
    note = [f"{len(rows)} layers, in the order of the model{'' if shown else '; the worst are named'}"]
    if outliers:
        note += ["outlier: worse than three quarters of the layers, by over 1.5 times the range of the middle half"]
    if shown:
        names |= {i: left.name or "the model" for i, left in enumerate(skipped, len(rows))}
        says |= {i: shorten(f"floating point: {left.reason}", 56, placeholder=" ...")
                 for i, left in enumerate(skipped, len(rows))}  # fmt: skip
    else:
        note += [f"{text}: {times}" for text, times in Counter(says.values()).items()]
        listed = shorten(", ".join(left.name for left in skipped), 240, placeholder=" ...")
        note += wrap(f"left in floating point ({len(skipped)}): {listed}", 120) * bool(skipped)

    lines = len(rows) + len(skipped) * shown
    inches = 0.24 if shown else max(0.02, min(0.055, 14 / lines))
    figure = Figure(figsize=(3.7 + 3.2 * len(panels), inches * lines + 1.6 + 0.15 * len(note)))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    axes: list[Axes] = list(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0])
    for ax, quantity in zip(axes, panels, strict=True):
        _panel(ax, quantity, values[:, quantity], outliers, 5.5 if shown else 3.0)
        ax.axhspan(len(rows) - 0.5, lines - 0.5, color="0.93", linewidth=0)
    for i, text in says.items() if shown else ():
        axes[0].annotate(text, (0.01, i), xycoords=("axes fraction", "data"), va="center", fontsize=7, color="0.4")
    places = _spread(sorted(names), 1 if shown else 0.13 / inches, lines - 1)
    for (i, name), place in zip(sorted(names.items()), places, strict=True):
        color = _OUTLIER["color"] if i in outliers else "black" if i < len(rows) else "0.4"
        axes[0].annotate(name if len(name) <= 44 else f"{name[:16]}...{name[-25:]}", (0, i), (-14, place),
                         xycoords=("axes fraction", "data"), textcoords=("offset points", "data"), ha="right",
                         va="center", fontsize=7.5, color=color, annotation_clip=False,
                         arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkA": 1,
                                     "shrinkB": 0})  # fmt: skip
    axes[0].set(ylim=(lines - 0.4, -0.6), yticks=[])
    used = [_BEFORE] * (0 in panels) + [_AFTER] + [_OUTLIER] * bool(outliers)
    handles = [Line2D([], [], linestyle="none", **style) for style in used]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(used), frameon=False, fontsize=8)
    figure.supxlabel("\n".join(note), fontsize=7.5, color="0.25")
    return figure


def ranked(ratios: _Floats, sqnr: _Floats) -> tuple[list[int], list[int]]:
    """All rows with a number, the worst first, and the outliers among them: Tukey's fences, but for trifles."""
    scores = np.full(len(ratios), np.nan)
    for values, trifle in ((ratios, 0.05), (-sqnr, 1.0)):
        held = np.flatnonzero(~np.isnan(values))
        if len(held):
            # Of three none stands out: the worst has the score 0.
            low, high = np.quantile(values[held], [0.25, 0.75]) if len(held) > 3 else [values[held].max()] * 2
            scores[held] = (values[held] - high) / max(1.5 * (high - low), trifle)
    worst = np.argsort(-scores, kind="stable")[: np.count_nonzero(~np.isnan(scores))].tolist()
    return worst, [i for i in worst if scores[i] > 1]


def _quantities(row: Row) -> _Floats:
    """Before and after of the errors of the outputs, of their ratio, and of the SQNR: NaN where not known or shown."""
    found = np.full((3, 2), np.nan)
    if row.error is None or row.baseline_error is None:
        # Shown only here: what lowers the error of the outputs may well raise that of the weight.
        if row.weight_sqnr is not None and np.isfinite(row.weight_sqnr):
            found[2, 1] = row.weight_sqnr
    elif row.baseline_error:
        # Sums over tokens and outputs; a zero has no place on a logarithmic axis.
        outputs = max(row.tokens, 1) * row.shape[0]
        found[0] = row.baseline_error / outputs, row.error / outputs or np.nan
        found[1] = 1, row.error / row.baseline_error
    return found


def _panel(ax: Axes, quantity: int, values: _Floats, outliers: Sequence[int], size: float) -> None:
    (before, after), lines = values.T, np.arange(len(values))
    outlying = np.isin(lines, outliers)
    ax.grid(axis="x", color="0.9", linewidth=0.6)
    ax.hlines(lines, before, after, "0.65", linewidth=size / 5)
    for style, x, chosen in ((_AFTER, after, ~outlying), (_OUTLIER, after, outlying), (_BEFORE, before, quantity == 0)):
        ax.plot(np.where(chosen, x, np.nan), lines, linestyle="none", markersize=size, **style)
    if quantity == 1:
        ax.axvline(1, color="0.3", linewidth=0.9)
    if quantity < 2:
        positive = values[values > 0]
        ax.set(xscale="log") if positive.max() > 30 * positive.min() else ax.set(xlim=(0, None))
    ax.set_xlabel(_LABELS[quantity], fontsize=8)
    ax.tick_params(labelsize=7.5)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _spread(lines: list[int], gap: float, last: float) -> list[float]:
    """Places near ``lines``, at least ``gap`` apart, none beyond ``last``: ``lines`` themselves where that is so."""
    down = list(accumulate(map(float, lines), lambda above, line: max(line, above + gap)))
    up = accumulate(reversed(down[:-1]), lambda below, line: min(line, below - gap), initial=min(down[-1], last))
    return list(up)[::-1]
