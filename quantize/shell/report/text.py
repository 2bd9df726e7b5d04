"""A report as text, at most 100 columns wide: a summary, or a table of all layers."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from operator import attrgetter, itemgetter
from statistics import median_low
from textwrap import wrap
from unicodedata import east_asian_width

from quantize.shell.report.rows import Row, Skipped, folded, gathered, listed, reasons, share, shortened, span

# Columns of a terminal.
WIDTH = 100
# Up to _FEW lines of layers are all printed. Of more, the _WORST worst are printed.
_FEW, _WORST = 20, 10
_ERROR, _SQNR, _TOKENS = "error vs minmax", "SQNR dB", "tokens"
_MEANINGS = {
    _ERROR: "squared error of the outputs, divided by that of plain rounding; below 1 is better",
    _SQNR: "signal to noise ratio of the weight; more is better",
    _TOKENS: "input vectors seen in calibration; for experts least/median/most",
    "fell back": "layers with too few tokens, quantized by minmax instead",
    "shape": "outputs x inputs",
    "damp": "damping that gptq needed",
    "dead_channels": "inputs that were always zero",
    "kept_rounding": "outputs for which plain rounding was better",
    "corrected": "relative change of the weight that compensates errors of earlier layers",
    "folded": "1: the smoothing of the inputs is folded into the module before",
    "static_loss": "fraction of the outputs' power lost by rounding inputs with one scale for all tokens",
    "token_loss": "the fraction that would be lost with a scale for each token",
}
# Static inputs that lose less than this fraction of the outputs' power need no scale for each token.
_COSTLY = 0.01
# Loaders compute these as one, so they need one format.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_format = attrgetter("weights", "inputs", "algorithm", "stage", "kernel")
# The cells of a line, by column. Only the last one may be long.
_Cells = dict[str, str]


def summary(
    rows: Sequence[Row], skipped: Sequence[Skipped], unmatched: Sequence[str], remarks: Sequence[str], elements: int
) -> str:
    """The formats, the layers (the worst if there are many), the ranges of values, and what was not done as asked."""
    groups, hint = folded(rows), "print(report(model).table()) lists all"
    if len(groups) <= _FEW:
        layers = _layers(groups, rows)
        noted = [f"{hint}, with notes"] * any(row.notes for row in rows)
        parts = [
            _heading(rows),
            _grid(layers),
            _grid(_spans(rows)),
            [*_legend([*_columns(layers), *_noted(rows)]), *noted],
        ]
    else:
        worst = sorted(groups, key=lambda group: min(row.rank for row in group[1]))[:_WORST]
        told = _wrapped(f"{_chosen(rows)}; {hint}, and what the words mean", "", "  ")
        parts = [_heading(rows), [*told, *_grid(_layers(worst, rows))], _grid(_spans(rows))]
    slower: dict[str, list[str]] = {}
    for title, (row, *_) in groups:
        if row.kernel_reason:
            slower.setdefault(row.kernel_reason, []).append(title)
    left, mends = share(sum(each.elements for each in skipped), elements), _mends(rows)
    for heading, count, entries in (
        ("not as asked", len(remarks), [line for line, _ in gathered(remarks)]),
        ("static inputs that cost most; what to add to quant_cfg", len(mends), _first(mends)),
        (
            "why not a faster kernel",
            len(slower),
            _first([f"{why}: {', '.join(listed(slower[why]))}" for why in slower]),
        ),
        (f"{left} stay in floating point", len(skipped), [*map(": ".join, reasons(skipped))]),
        ("entries of skip_layers and quant_cfg that matched nothing", len(unmatched), [*map(repr, unmatched)]),
    ):
        if entries:
            parts.append([f"{heading} ({count})", *(line for each in entries for line in _wrapped(each, "  ", "    "))])
    return _joined(parts)


def table(rows: Sequence[Row]) -> str:
    """All layers in the order of the model, then the notes of each. Similar experts share a line."""
    groups = folded(rows)
    layers, notes = _layers(groups, rows), list[str]()
    for title, group in groups:
        spans = [f"{key} {span(row.notes[key] for row in group if key in row.notes)}" for key in _noted(group)]
        notes += _wrapped(f"{title}: {', '.join(spans)}", "", "  ") if spans else []
    return _joined([_heading(rows), _grid(layers), notes, _legend([*_columns(layers), *_noted(rows)])])


def _first(entries: list[str]) -> list[str]:
    left = len(entries) - _WORST
    return entries if left <= 0 else [*entries[:_WORST], f"{left} more, see report(model).as_dict()"]


def _joined(parts: Iterable[Sequence[str]]) -> str:
    return "\n\n".join("\n".join(part) for part in parts if part)


def _heading(rows: Sequence[Row]) -> list[str]:
    """The number of layers of each format. Several formats are numbered, one in each line."""
    lines = list[_Cells]()
    for key, alike in _formats(rows).items():
        weights, inputs, algorithm, stage, kernel = key
        fallen = sum(row.fell_back for row in alike)
        told = f"{weights} weights, {inputs or 'float'} inputs, {algorithm}"
        told += f" ({fallen} fell back to minmax)" * bool(fallen) + f", {stage}" + f", kernel {kernel}" * bool(kernel)
        lines.append({"format": str(len(lines) + 1), "layers": str(len(alike)), "how": told})
    count = f"{len(rows)} layer" + "s" * (len(rows) > 1)
    if len(lines) == 1:
        return _wrapped(f"{count}: {lines[0]['how']}", "", "  ")
    return [f"{count} in {len(lines)} formats", "", *_grid(lines)]


def _formats(rows: Iterable[Row]) -> dict[tuple[object, ...], list[Row]]:
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(_format(row), []).append(row)
    return found


def _chosen(rows: Sequence[Row]) -> str:
    """Which layers are shown if not all are."""
    if all(row.weight_sqnr is None for row in rows):
        return f"The first {_WORST}"
    known = [row.ratio is not None for row in rows]
    return f"The {_WORST} worst by {_ERROR if any(known) else 'SQNR'}" + ", then by SQNR" * (any(known) > all(known))


def _layers(groups: Iterable[tuple[str, list[Row]]], rows: Sequence[Row]) -> list[_Cells]:
    """A line for each group. Experts show the least, median and most tokens, and the worst of the other values."""
    numbers, reached = {key: str(i) for i, key in enumerate(_formats(rows), 1)}, any(row.tokens for row in rows)
    lines = []
    for title, group in groups:
        ratios = [row.ratio for row in group if row.ratio is not None]
        sqnrs = [row.weight_sqnr for row in group if row.weight_sqnr is not None]
        tokens = sorted(row.tokens for row in group)
        spread = (tokens[0], median_low(tokens), tokens[-1]) if len(group) > 1 else tokens
        cells = {
            _ERROR: _number(_ERROR, max(ratios)) if ratios else "",
            _SQNR: _number(_SQNR, min(sqnrs)) if sqnrs else "",
            _TOKENS: "/".join(map(str, spread)) if reached else "",
            "fell back": str(sum(row.fell_back for row in group) or ""),
            "shape": "x".join(map(str, group[0].shape)),
            "format": numbers[_format(group[0])] if len(numbers) > 1 else "",
            "layer": title,
        }
        lines.append(cells)
    return lines


def _spans(rows: Sequence[Row]) -> list[_Cells]:
    """A line for each quantity: how many layers have it; its least, median and most; the worst layer."""
    reached, lines = any(row.tokens for row in rows), list[_Cells]()
    known: dict[str, list[float | None]] = {
        _ERROR: [row.ratio for row in rows],
        _SQNR: [row.weight_sqnr for row in rows],
        _TOKENS: [row.tokens if reached else None for row in rows],
        **{key: [row.notes.get(key) for row in rows] for key in _noted(rows)},
    }
    for key, values in known.items():
        held = [(value, row.name) for value, row in zip(values, rows, strict=True) if value is not None]
        if held:
            (least, first), (most, last) = (end(held, key=itemgetter(0)) for end in (min, max))
            cells = {"": key, "layers": str(len(held)), "least": _number(key, least)}
            cells |= {"median": _number(key, median_low(value for value, _ in held)), "most": _number(key, most)}
            worst = first if key in (_SQNR, _TOKENS) else last
            lines.append({**cells, "worst layer": worst if least < most else ""})
    return lines


def _number(quantity: str, value: float) -> str:
    if quantity in (_ERROR, _SQNR) and abs(value) < 1e9:
        return f"{value:.3f}" if quantity == _ERROR else f"{value:.1f}"
    return f"{value:.0f}" if abs(value) < 1e9 and value == int(value) else f"{value:.3g}"


def _noted(rows: Iterable[Row]) -> list[str]:
    return [*dict.fromkeys(key for row in rows for key in row.notes)]


def _legend(words: Iterable[str]) -> list[str]:
    """The meanings of columns and notes."""
    told = [f"{word}: {_MEANINGS[word]}" for word in words if word in _MEANINGS]
    return [line for each in told for line in _wrapped(each, "", "  ")]


def _mends(rows: Iterable[Row]) -> list[str]:
    """Entries of ``quant_cfg`` that give each token a scale, for layers where static inputs cost most; worst first."""
    losses: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        static, token = row.notes.get("static_loss", 0.0), row.notes.get("token_loss", 0.0)
        if static > max(_COSTLY, 4 * token):
            last = row.name.rpartition(".")[2]
            # A pattern with only a number would also match other names.
            losses.setdefault(row.name if last.isdigit() else last, []).append((static, token))
    mends = []
    for name, found in sorted(losses.items(), key=lambda item: -max(item[1])[0]):
        keys = next((group for group in _TOGETHER if name in group), (name,))
        form = "{'type': 'int8', 'symmetric': True, 'strategy': 'token'}"
        entries = ", ".join(f"'*{glob.escape(key)}.inputs': {form}" for key in keys)
        told = f"layers like {name!r} ({len(found)}): the worst loses {max(found)[0]:.1%} of its outputs' power"
        mends.append(f"{told}, with a scale for each token {max(found)[1]:.1%}: {entries}")
    return mends


def _columns(lines: Sequence[_Cells]) -> list[str]:
    return [key for key in lines[0] if any(line[key] for line in lines)]


def _grid(lines: Sequence[_Cells]) -> list[str]:
    """A header and ``lines`` as a table without empty columns. If names would not fit, they lose a common prefix."""
    if not lines:
        return []
    last, starts = [*lines[0]][-1], [""] * (1 + len(lines))
    for column in _columns(lines):
        if column != last:
            cells = [column, *(line[column] for line in lines)]
            width = max(map(len, cells))
            # Words are aligned to the left, and numbers to the right.
            starts = [start + (cell.rjust(width) if column else cell.ljust(width)) + "  "
                      for start, cell in zip(starts, cells, strict=True)]  # fmt: skip
    names, prefix = shortened([line[last] for line in lines], WIDTH - len(starts[0]))
    grid = [line for start, name in zip(starts, [last, *names], strict=True)
            for line in _wrapped(name, start, " " * len(start))]  # fmt: skip
    return grid + _wrapped(prefix, "..: ", "    ") * bool(prefix)


def _wrapped(text: str, start: str, rest: str) -> list[str]:
    """``text`` in lines of at most 100 columns. The first begins with ``start``, and the others with ``rest``."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    # A NUL before each wide character makes lengths count columns. Where a line breaks, it may be one column wider.
    wide = "".join("\0" * (east_asian_width(c) in "WF") + c for c in plain)
    lines = wrap(wide, WIDTH - 1, initial_indent=start, subsequent_indent=rest, break_on_hyphens=False)
    return [line.replace("\0", "").rstrip() for line in lines or [start]]
