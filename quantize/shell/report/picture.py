"""A report as a picture: what was done to every layer, and which layers stand out."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.shell.config import refusal
from quantize.shell.report.outliers import Values, quantities, ranked
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


def save(rows: Sequence[Row], skipped: Sequence[Skipped], path: str | Path) -> None:
    """Draw the ``rows`` of a report, and what was ``skipped``, into the file ``path``.

    Raises:
        QuantizeError: as :func:`check` and :func:`draw`, and a file that cannot be written.
    """
    path = check(path)
    figure = draw(rows, skipped)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise refusal("plot", f"{path} ({error})", "a file that can be written") from None


def draw(rows: Sequence[Row], skipped: Sequence[Skipped]) -> Figure:
    """One line a layer, one panel a quantity: output errors before and after, their ratio, or the SQNR of the weight.

    Raises:
        QuantizeError: no layer is solved yet.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D

    if all(row.weight_sqnr is None and row.error is None for row in rows):
        raise refusal("report", "no layer is solved yet", "a report after calibration")
    values: list[Values] = list(zip(*map(quantities, rows), strict=True))
    worst, outliers = ranked(values[1], values[2])
    shown = len(rows) + len(skipped) <= _NAMED
    lines = len(rows) + len(skipped) * shown
    inches = 0.24 if shown else max(0.02, min(0.055, 14 / lines))
    panels = [i for i in range(3) if any(values[i])] or [2]
    names = {i: (row.name, "black") for i, row in enumerate(rows) if shown or i in worst[:_WORST]}
    says = {i: "not solved yet" if row.weight_sqnr is None else "exact"
            for i, row in enumerate(rows) if not any(quantity[i] for quantity in values)}  # fmt: skip
    note = [f"{len(rows)} layers, in the order of the model"]
    note += ["outlier: worse than three quarters of the layers, by over 1.5 times the range of the middle half"] * bool(
        outliers
    )
    if shown:
        for i, left in enumerate(skipped, len(rows)):
            names[i] = left.name or "the model", "0.4"
            says[i] = textwrap.shorten(f"floating point: {left.reason}", 56, placeholder=" ...")
    else:
        note[0] += "; the worst are named"
        note += [f"{text}: {list(says.values()).count(text)}" for text in dict.fromkeys(says.values())]
        listed = textwrap.shorten(", ".join(left.name for left in skipped), 240, placeholder=" ...")
        note += textwrap.wrap(f"left in floating point ({len(skipped)}): {listed}", 120) * bool(skipped)
    size = (3.7 + 3.2 * len(panels), inches * lines + 1.6 + 0.15 * len(note))
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    axes: list[Axes] = list(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0])
    for ax, i in zip(axes, panels, strict=True):
        _panel(ax, i, values[i], outliers, 5.5 if shown else 3.0)
        ax.axhspan(len(rows) - 0.5, lines - 0.5, color="0.93", linewidth=0)
    for i, text in says.items() if shown else ():
        axes[0].annotate(text, (0.01, i), xycoords=("axes fraction", "data"), va="center", fontsize=7, color="0.4")
    places = _spread(sorted(names), 1 if shown else 0.13 / inches, lines - 1)
    for (i, (name, color)), place in zip(sorted(names.items()), places, strict=True):
        axes[0].annotate(name if len(name) <= 44 else f"{name[:16]}...{name[-25:]}", (0, i), (-14, place),
                         xycoords=("axes fraction", "data"), textcoords=("offset points", "data"), ha="right",
                         va="center", fontsize=7.5, color=_OUTLIER["color"] if i in outliers else color,
                         annotation_clip=False, arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6,
                                                            "shrinkA": 1, "shrinkB": 0})  # fmt: skip
    axes[0].set(ylim=(lines - 0.4, -0.6), yticks=[])
    used = [_BEFORE] * any(values[0]) + [_AFTER] + [_OUTLIER] * bool(outliers)
    handles = [Line2D([], [], linestyle="none", **style) for style in used]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(used), frameon=False, fontsize=8)
    figure.supxlabel("\n".join(note), fontsize=7.5, color="0.25")
    return figure


def _panel(ax: Axes, quantity: int, values: Values, outliers: Sequence[int], size: float) -> None:
    held = {i: value for i, value in enumerate(values) if value is not None}
    positive = [v for value in held.values() for v in value if v > 0]
    ax.grid(axis="x", color="0.9", linewidth=0.6)
    ax.hlines(list(held), [v[0] for v in held.values()], [v[1] for v in held.values()], "0.65", linewidth=size / 5)
    for style, place, chosen in (
        (_AFTER, 1, [i for i in held if i not in outliers]),
        (_OUTLIER, 1, [i for i in held if i in outliers]),
        (_BEFORE, 0, list(held) * (quantity == 0)),
    ):
        ax.plot([held[i][place] for i in chosen], chosen, linestyle="none", markersize=size, **style)
    if quantity == 1:
        ax.axvline(1, color="0.3", linewidth=0.9)
    if quantity < 2 and max(positive) > 30 * min(positive):
        ax.set_xscale("log")
    elif quantity < 2:
        ax.set_xlim(left=0)
    ax.set_xlabel(_LABELS[quantity], fontsize=8)
    ax.tick_params(labelsize=7.5)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _spread(lines: list[int], gap: float, last: float) -> list[float]:
    """Places near ``lines``, at least ``gap`` apart, none beyond ``last``: ``lines`` themselves where that is so."""
    down = list(accumulate(map(float, lines), lambda above, line: max(line, above + gap)))
    up = accumulate(reversed(down[:-1]), lambda below, line: min(line, below - gap), initial=min(down[-1], last))
    return list(up)[::-1]
