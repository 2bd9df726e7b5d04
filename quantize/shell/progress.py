"""One progress bar for everything that takes long."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], what: str, *, unit: str, total: int | None = None, delay: float = 0) -> Iterable[T]:
    """``items`` behind a bar on stderr, which vanishes at the end; as they are without tqdm or without a terminal.

    ``total``: how many there are, where ``items`` has no length. ``delay``: seconds until the bar appears.
    """
    # A pipe or a log file cannot move a cursor back.
    if sys.stderr is None or not sys.stderr.isatty():
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    bar: Iterable[T] = tqdm(items, desc=what, unit=unit, total=total, leave=False, delay=delay)
    return bar


# Over what is solved.
layers_progress = partial(progress, what="quantize", unit="layer", delay=1)
