"""A scale that is moved from the inputs of layers into the module that makes them, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from quantize.core import affine
from quantize.shell.fold.producers import Readers, width


@dataclass(eq=False)
class Fold:
    """One candidate: the scale of what ``readers`` read moves into the weight of ``producer``, one row a channel.

    ``one_plus``: the producer multiplies by 1 + weight, which is rounded. ``rows`` ``[c]``: the output channel of the
    producer that each input is a copy of, where that is not the channel with the same number.
    """

    readers: Readers
    producer: nn.Module
    one_plus: bool = False
    rows: Tensor | None = None

    def apply(self, scale: Tensor) -> Callable[[], None]:
        """Divide what the producer gives by ``scale`` ``[c]``; the readers multiply by it. Returns what undoes this."""
        parameters = self.producer._parameters
        before = {name: old for name in ("weight", "bias") if (old := parameters.get(name)) is not None}
        rows = scale if self.rows is None else scale.new_ones(width(self.producer)).scatter(0, self.rows, scale)
        after = {name: self._divided(name, old, rows) for name, old in before.items()}
        if before["weight"].ndim == 1:
            # The new weight is rounded to its dtype: the layers make up for what was really divided.
            old, new = (each["weight"].detach().to(scale.dtype) + self.one_plus for each in (before, after))
            real = old / new
            scale = torch.where(torch.isfinite(real) & (real > 0), real, scale)
        self._put(after, scale)
        return partial(self._put, before, None)

    def powers(self, exponents: Tensor) -> Tensor:
        """Two to the power of ``exponents``, as a scale."""
        weight = self.readers.layers[0].weight
        return torch.exp2(exponents.to(weight.device, affine.working_dtype(weight)))

    def probe(self) -> Tensor:
        """Small and large, in turn over the channels of the producer: no channel is left as it is.

        Far enough apart that a function which is linear in a part of its range only, such as relu6, gives itself away.
        In half precision, and where 1 is added to the weight, that is as far as it goes.
        """
        sample = self.readers.sample
        rows = torch.arange(sample.shape[1]) if self.rows is None else self.rows
        far = 1 if self.one_plus else 3 if sample.dtype == torch.float16 else 10
        return self.powers((rows % 2 * 2 - 1) * far)

    def _divided(self, name: str, old: nn.Parameter, rows: Tensor) -> nn.Parameter:
        wide, rows = old.detach().to(rows.dtype), rows if old.ndim == 1 else rows[:, None]
        new = (1 + wide) / rows - 1 if self.one_plus and name == "weight" else wide / rows
        return nn.Parameter(new.to(old.dtype), requires_grad=old.requires_grad)

    def _put(self, parameters: Mapping[str, nn.Parameter], scale: Tensor | None) -> None:
        self.producer._parameters.update(parameters)
        for layer in self.readers.layers:
            layer.folded = scale
