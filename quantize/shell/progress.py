"""One progress bar for everything that takes long."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
# Of every bar: it appears after two seconds, and vanishes at the end.
BAR: dict[str, Any] = {"delay": 2, "leave": False}


def on_terminal() -> bool:
    """Whether stderr is a terminal: a pipe or a log file cannot move a cursor back."""
    return sys.stderr is not None and sys.stderr.isatty()


def progress(
    items: Iterable[T], what: str, *, unit: str, total: int | None = None, size: Callable[[T], int] | None = None
) -> Iterable[T]:
    """``items`` behind a bar on stderr with the time left; as they are without tqdm or without a terminal.

    ``total``: how many there are, where ``items`` has no length. ``size``: how many units an item of a list is, if not
    one.
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
