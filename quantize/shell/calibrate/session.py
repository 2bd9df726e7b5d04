"""What belongs to one call of ``quantize``: shared by the model, where it is kept, and by all of its layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from quantize.shell.calibrate.replay import Batch
from quantize.shell.config import Config, QuantizeWarning
from quantize.shell.plan import Plan

# The attribute of a model that holds its session, and the key of the session in a state_dict.
KEY = "_quantization"
# Who is told of every call of a layer with the inputs [..., c]; returns whether it is to compute as quantized.
Watching = Callable[[Any, Tensor], bool]


class Session:
    """The config, what was left out, and how far calibration is. It holds no module, so it copies with the model.

    - ``specs``: the format of every layer, by its first name.
    - ``paired``: whether a layer has a use for the inputs that it has in the float model.
    - ``seen``: forward passes that were counted.
    - ``batches``: what will run again was called with: all batches with ``sequential``, the first with ``fold``.
    - ``remarks``: what was not done as asked.
    - ``watching``: who observes the layers now. ``solving``: the passes that run now are not the user's.
    """

    def __init__(self, config: Config, plan: Plan) -> None:
        self.config, self.skipped, self.unmatched = config, plan.skipped, plan.unmatched
        self.specs, self.elements, self.sequential = plan.specs, plan.elements, config.schedule.sequential
        self.paired = any(config.algorithm(spec).paired is not None for spec in set(plan.specs.values()))
        self.seen, self.batches = 0, list[Batch]()
        self.remarks: tuple[str, ...] = ()
        self.watching: Watching | None = None
        self.solving = False

    def remark(self, *told: str, prefix: str = "") -> None:
        """Put what was not done as asked into the report and into one warning."""
        self.remarks = tuple(dict.fromkeys((*self.remarks, *told)))
        if told:
            warnings.warn(prefix + "; ".join(told), QuantizeWarning, stacklevel=3)

    def state(self) -> dict[str, Any]:
        """Plain containers of tensors and numbers, so that ``torch.load`` reads them with ``weights_only``."""
        batches = [vars(batch) for batch in self.batches]
        return {"seen": self.seen, "sequential": self.sequential, "remarks": list(self.remarks), "batches": batches}

    def restore(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state`."""
        self.seen, self.sequential, self.remarks = state["seen"], state["sequential"], tuple(state["remarks"])
        self.batches = [Batch(**batch) for batch in state["batches"]]

    def __getstate__(self) -> dict[str, Any]:
        # An unfinished pass is no part of a copy.
        return {**self.__dict__, "watching": None, "solving": False}
