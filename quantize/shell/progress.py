"""The progress bar of all long operations."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
# Every bar appears after two seconds, and vanishes at the end.
BAR: dict[str, Any] = {"delay": 2, "leave": False}


def on_terminal() -> bool:
    """Whether stderr is a terminal. A bar needs one, because pipes and log files cannot move the cursor back."""
    return sys.stderr is not None and sys.stderr.isatty()


def progress(
    items: Iterable[T], what: str, *, unit: str, total: int | None = None, size: Callable[[T], int] | None = None
) -> Iterable[T]:
    """``items`` with a progress bar on stderr; without tqdm or a terminal, ``items`` unchanged.

    ``total``: the number of items, if ``items`` has no length. ``size``: the number of units that each item counts for,
    if not one; ``items`` is then a list.
    """
    if not on_terminal():
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    if size is None:
        bar: Iterable[T] = tqdm(items, desc=what, unit=unit, total=total, **BAR)
        return bar
    return _sized(items, size, tqdm(total=sum(map(size, items)), desc=what, unit=unit, **BAR))


def _sized(items: Iterable[T], size: Callable[[T], int], bar: Any) -> Iterator[T]:
    with bar:
        for item in items:
            yield item
            bar.update(size(item))
