"""What a model gives, kept small, so that the outputs of two runs can be compared."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from quantize.shell.values import keepable

# How many numbers of a tensor are compared where bits may change.
_NUMBERS = 4096


def visible(value: Any, seen: dict[int, Any] | None = None) -> Iterator[Any]:
    """Tensors, plain values, and what cannot be looked into, in containers and in the attributes of objects."""
    # Objects are kept, so that no new one takes the id of another.
    seen = {} if seen is None else seen
    for leaf in pytree.tree_leaves(value):
        if keepable(leaf) or isinstance(leaf, Tensor) or not hasattr(leaf, "__dict__"):
            yield leaf
        elif id(leaf) not in seen:
            seen[id(leaf)] = leaf
            items = leaf.values() if isinstance(leaf, dict) else leaf if isinstance(leaf, (list, tuple, set)) else ()
            yield from visible([*vars(leaf).values(), *items], seen)


@dataclass(frozen=True)
class Outputs:
    """What a model gave: a digest of all its bits, by which outputs are equal, and some numbers of every tensor."""

    bits: bytes
    numbers: list[Tensor] = field(compare=False)

    @classmethod
    def of(cls, leaves: Sequence[Any]) -> Outputs:
        """Of what :func:`visible` finds."""
        digest, numbers = hashlib.sha256(), []
        for leaf in leaves:
            digest.update(repr((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf).encode())
            if isinstance(leaf, Tensor):
                flat = leaf.detach().resolve_conj().resolve_neg().contiguous().flatten()
                digest.update(flat.cpu().view(torch.uint8).numpy().data)
                # A step without a divisor in common with the shape leaves no channel out.
                steps = itertools.count(max(1, len(flat) // _NUMBERS))
                numbers.append(flat[:: next(step for step in steps if math.gcd(step, len(flat)) == 1)].clone())
        return cls(digest.digest(), numbers)

    def near(self, other: Outputs | None, layers: int) -> bool:
        """Whether ``other`` differs by no more than independent roundings of so many layers would make it."""
        if other is None or [each.shape for each in self.numbers] != [each.shape for each in other.numbers]:
            return False
        for old, new in zip(self.numbers, other.numbers, strict=True):
            finite = torch.isfinite(old)
            a, b = old[finite].double(), new[finite].double()
            allowed = 8 * torch.finfo(old.dtype).eps * layers**0.5 * a.norm() if old.is_floating_point() else torch.inf
            if not torch.equal(finite, torch.isfinite(new)) or (a - b).norm() > allowed:
                return False
        return True
