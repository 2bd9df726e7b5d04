"""The state of one call of ``quantize``. The model holds it, and all of its layers refer to it."""

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
# Called for every call of a layer with its inputs [..., c]; returns whether the layer computes as quantized.
Watching = Callable[[Any, Tensor], bool]


class Session:
    """The config, the skipped modules, and the progress of calibration. It holds no module, so models can be copied.

    - ``specs``: the format of every layer, by its first name.
    - ``paired``: whether any layer uses its inputs in the float model.
    - ``seen``: the number of counted forward passes.
    - ``batches``: the passes that will run again: all with ``sequential``, the first one with ``fold``.
    - ``remarks``: deviations from the config.
    - ``watching``: the current observer of the layers. ``solving``: whether the current passes are the library's own.
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
        """Add deviations from the config to the report, and issue one warning."""
        self.remarks = tuple(dict.fromkeys((*self.remarks, *told)))
        if told:
            warnings.warn(prefix + "; ".join(told), QuantizeWarning, stacklevel=3)

    def state(self) -> dict[str, Any]:
        """The state in plain containers of tensors and numbers, which ``torch.load`` reads with ``weights_only``."""
        batches = [vars(batch) for batch in self.batches]
        return {"seen": self.seen, "sequential": self.sequential, "remarks": list(self.remarks), "batches": batches}

    def restore(self, state: dict[str, Any]) -> None:
        """Set the ``state`` that :meth:`state` returned."""
        self.seen, self.sequential, self.remarks = state["seen"], state["sequential"], tuple(state["remarks"])
        self.batches = [Batch(**batch) for batch in state["batches"]]

    def __getstate__(self) -> dict[str, Any]:
        # A copy does not continue an unfinished pass.
        return {**self.__dict__, "watching": None, "solving": False}
