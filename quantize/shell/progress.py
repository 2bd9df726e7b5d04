"""The progress bar of all slow steps."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], what: str, *, unit: str, total: int | None = None, delay: float = 0) -> Iterable[T]:
    """``items`` with a progress bar on stderr, which vanishes at the end; no bar without tqdm or without a terminal.

    ``total``: the number of ``items``, if they have no length. ``delay``: seconds until the bar appears.
    """
    # A bar would fill a pipe or a log file with lines.
    if sys.stderr is None or not sys.stderr.isatty():
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    bar: Iterable[T] = tqdm(items, desc=what, unit=unit, total=total, leave=False, delay=delay)
    return bar


# The bar over layers that are being quantized.
layers_progress = partial(progress, what="quantize", unit="layer", delay=1)
