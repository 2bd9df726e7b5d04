"""The format of a quantized tensor, as a value without tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Strategy = Literal["tensor", "channel", "group", "token"]


@dataclass(frozen=True)
class Scheme:
    """The format of a quantized matrix: ``bits`` from 2 to 8, ``symmetric`` or with zero points, and a ``strategy``.

    The strategy says which elements share a scale:

    - ``tensor``: all elements, ``[1, 1]``.
    - ``channel`` (weights ``[n, c]``) and ``token`` (inputs ``[t, c]``): the elements of a row, ``[n, 1]``.
    - ``group``: ``group_size`` consecutive elements of a row, ``[n, g]``. The last group of a row is shorter where
      ``group_size`` does not divide ``c``.

    Raises:
        ValueError: a value that is not accepted, ``group_size`` without strategy ``group``, or the reverse.

    >>> Scheme(bits=4, strategy="group", group_size=32).grid_shape(8, 100)
    (8, 4)
    >>> Scheme(bits=4).qmin, Scheme(bits=4).qmax
    (-8, 7)
    """

    bits: int = 8
    symmetric: bool = True
    strategy: Strategy = "channel"
    group_size: int | None = None

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise ValueError(f"bits: {self.bits!r}; accepted: an int from 2 to 8")
        if self.strategy not in get_args(Strategy):
            raise ValueError(f"strategy: {self.strategy!r}; accepted: one of {', '.join(get_args(Strategy))}")
        if self.strategy == "group" and not (type(self.group_size) is int and self.group_size >= 1):
            raise ValueError(f"group_size: {self.group_size!r}; accepted: a positive int with strategy 'group'")
        if self.strategy != "group" and self.group_size is not None:
            raise ValueError(f"group_size: {self.group_size!r}; accepted: None with strategy {self.strategy!r}")

    @property
    def qmin(self) -> int:
        """The lowest code, ``-2^(bits-1)``."""
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """The highest code, ``2^(bits-1) - 1``."""
        return (1 << (self.bits - 1)) - 1

    def grid_shape(self, n: int, c: int) -> tuple[int, int]:
        """Shape of the scale of an ``[n, c]`` matrix."""
        if self.strategy == "tensor":
            return 1, 1
        if self.group_size is None:
            return n, 1
        return n, -(-c // self.group_size)

    def __str__(self) -> str:
        group = "" if self.group_size is None else f" {self.group_size}"
        return f"int{self.bits} {self.strategy}{group} {'symmetric' if self.symmetric else 'asymmetric'}"
