"""A summary of a model's outputs, to compare those of two runs."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import pickle
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

# How many numbers of a tensor are compared if its bits may change.
_SAMPLES = 4096


class Outputs(pickle.Pickler):
    """A summary of outputs that can be pickled: ``bits`` identifies all of them, ``numbers`` samples every tensor.

    ``refused``: why they cannot be compared; empty if they can.
    """

    def __init__(self, value: Any) -> None:
        super().__init__(file := io.BytesIO())
        self.numbers: list[Tensor] = []
        try:
            self.dump(value)
            floats = any(each.is_floating_point() for each in self.numbers)
            self.refused = "" if floats else "the model's outputs are no tensors in floating point"
        except Exception as error:
            self.refused = f"the model's outputs cannot be compared ({error})"
        self.bits = file.getvalue()

    def persistent_id(self, value: Any) -> str | None:
        """The text that replaces ``value``: a digest of a tensor, the name of a class or function; None for others."""
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return value.__qualname__ if isinstance(value, (type, FunctionType)) else None
        flat = value.detach().resolve_conj().resolve_neg().contiguous().flatten()
        # A step that is coprime to the length samples every channel.
        steps = itertools.count(max(1, len(flat) // _SAMPLES))
        self.numbers.append(flat[:: next(step for step in steps if math.gcd(step, len(flat)) == 1)].clone())
        digest = hashlib.sha256(flat.cpu().view(torch.uint8).numpy().data).hexdigest()
        return f"{value.shape} {value.dtype} {digest}"

    def near(self, other: Outputs | None, layers: int) -> bool:
        """Whether ``other`` differs by no more than the independent rounding errors of this many ``layers``."""
        if other is None or [each.shape for each in self.numbers] != [each.shape for each in other.numbers]:
            return False
        for old, new in zip(self.numbers, other.numbers, strict=True):
            finite = torch.isfinite(old)
            a, b = old[finite].double(), new[finite].double()
            allowed = 8 * torch.finfo(old.dtype).eps * layers**0.5 * a.norm() if old.is_floating_point() else torch.inf
            if not torch.equal(finite, torch.isfinite(new)) or (a - b).norm() > allowed:
                return False
        return True
