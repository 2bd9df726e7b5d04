"""A scale that is moved from the inputs of layers into the module that makes them, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantize.shell.fold.producers import Group, width


@dataclass(frozen=True)
class Form:
    """How a module divides its output channels by ``s`` ``[c]``: its new weight, and the divisor that this comes to."""

    name: str
    divided: Callable[[Tensor, Tensor], Tensor]
    factor: Callable[[Tensor], Tensor]
    exact: bool = True


MULTIPLIES = Form("weight", lambda w, s: w / s, lambda w: w)
ONE_PLUS = Form("1 + weight", lambda w, s: (1 + w) / s - 1, lambda w: 1 + w, exact=False)
ROWS = Form("rows", lambda w, s: w / s[:, None], lambda w: w)


class Fold:
    """One group, its producer, and the form of that: applied, or taken back to the very same parameters.

    ``rows`` ``[c]``: which output channel of the producer each input of the layers is, where it is not the same one.
    """

    def __init__(self, group: Group, producer: nn.Module, form: Form) -> None:
        self.group, self.producer, self.form = group, producer, form
        self.rows: Tensor | None = None
        self._before: dict[str, nn.Parameter] = {}

    @property
    def copies(self) -> bool:
        """Whether every output channel of the producer would have to be several inputs."""
        return width(self.producer) != self.group.layers[0].in_features

    def apply(self, scale: Tensor) -> None:
        """Divide what the producer gives by ``scale`` ``[c]``; the layers multiply by what that comes to."""
        self.divide(scale if self.rows is None else scale.new_ones(width(self.producer)).scatter(0, self.rows, scale))
        if self.form is not ROWS:
            # The new weight is rounded to its dtype: the layers make up for what was really divided.
            before, after = self._before["weight"], self._weight()
            real = self.form.factor(before.detach().to(scale.dtype)) / self.form.factor(after.detach().to(scale.dtype))
            scale = torch.where(torch.isfinite(real) & (real > 0), real, scale)
        for layer in self.group.layers:
            layer.folded = scale

    def divide(self, scale: Tensor) -> None:
        """Divide the producer's own channels by ``scale``, whatever becomes of that."""
        for name in ("weight", "bias"):
            old = self.producer._parameters.get(name)
            if old is not None:
                form = self.form if name == "weight" else MULTIPLIES
                with torch.no_grad():
                    new = form.divided(old.to(scale.dtype), scale).to(old.dtype)
                self._before[name] = old
                self.producer._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)

    def undo(self) -> None:
        """As before."""
        self.producer._parameters.update(self._before)
        self._before = {}
        for layer in self.group.layers:
            layer.folded = None

    def _weight(self) -> nn.Parameter:
        weight = self.producer._parameters["weight"]
        assert weight is not None
        return weight
