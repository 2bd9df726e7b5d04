"""Which numbers of a report tell how well a layer fared, and which layers fared worse than the others."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from quantize.shell.report.rows import Row

# One pair a row, before and after; None where there is none.
Values = Sequence[tuple[float, float] | None]


def quantities(row: Row) -> Values:
    """Before and after: the errors of the outputs, their ratio, the SQNR; None for what is not known or not shown."""
    if row.error is None or row.baseline_error is None:
        # Shown only here: what lowers the error of the outputs may well raise that of the weight.
        known = row.weight_sqnr is not None and math.isfinite(row.weight_sqnr)
        return None, None, (math.nan, row.weight_sqnr or 0.0) if known else None
    if row.baseline_error == 0:
        return None, None, None
    # Sums over tokens and outputs; a zero has no place on a logarithmic axis.
    before, after = (error / max(row.tokens, 1) / row.shape[0] for error in (row.baseline_error, row.error))
    return (before, after or math.nan), (1.0, row.error / row.baseline_error), None


def ranked(ratios: Values, sqnr: Values) -> tuple[list[int], list[int]]:
    """All rows with a number, the worst first, and the outliers among them: Tukey's fences, but for trifles."""
    scores: dict[int, float] = {}
    for values, sign, trifle in ((ratios, 1, 0.05), (sqnr, -1, 1.0)):
        held = {i: sign * value[1] for i, value in enumerate(values) if value is not None}
        # Of three none stands out: the worst has the score 0.
        few = [max(held.values(), default=0.0)] * 3
        low, _, high = statistics.quantiles(held.values(), n=4, method="inclusive") if len(held) > 3 else few
        scores |= {i: (value - high) / max(1.5 * (high - low), trifle) for i, value in held.items()}
    worst = sorted(scores, key=lambda i: -scores[i])
    return worst, [i for i in worst if scores[i] > 1]
