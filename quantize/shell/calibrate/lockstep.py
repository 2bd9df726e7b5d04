"""Calibration in lock step: all batches go through the model side by side, one unit of layers after the other.

A *walk* is one run of the model's forward on one batch, in a greenlet that pauses at layers which are not solved. When
all walks have paused, the first unit that any of them waits for is solved from the inputs of all walks, and they
continue through the quantized layers. So every batch runs once, and no outputs are stored. Algorithms that also need
the float model have a second walk for each batch, through the float weights. A layer that is called several times is
observed at all calls in floating point. Once it is solved, the walks that passed through it start again.

Walks share the attributes of the model, so batches could disturb each other. So every float walk is compared with the
user's own pass, by fingerprints and up to rounding (in bfloat16, 3 % of another batch are noticed). Two float walks run
for this check if the algorithm needs none. If a walk differs or cannot pause, :attr:`Walks.trouble` gives the reason,
and every batch has to run alone.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from quantize.shell import offload
from quantize.shell.calibrate.layer import CalibrationLinear
from quantize.shell.calibrate.replay import Batch
from quantize.shell.calibrate.units import Inputs, Reading, Unit
from quantize.shell.calibrate.watching import TensorCache, fingerprint, same_tokens
from quantize.shell.modes import snapshot, unrestorable
from quantize.shell.values import kept


class Unwound(BaseException):
    """Ends a paused walk, so that the ``finally`` blocks of the model run."""


class Walk:
    """One run of one batch, through the float weights or the quantized ones."""

    def __init__(self, walks: Walks, number: int, *, floating: bool) -> None:
        self.number, self.floating, self._walks, self._batch = number, floating, walks, walks.batches[number]
        # Units that need no more inputs from this walk.
        self.served = {unit for unit in walks.order if unit.solved}
        self.begin()

    def begin(self) -> None:
        """Start at the root, without any recorded inputs."""
        # The unit that is observed now. ``parked``: the walk waits until it is solved. ``skipped``: the walk has passed
        # other units meanwhile, because this one is called again.
        self.unit: Unit | None = None
        self.parked, self.skipped, self._place = False, False, 0
        # By unit: the inputs [..., c] of its calls, until it is solved; and the identities of these tensors.
        self.tokens: dict[Unit, list[Tensor]] = {}
        self._read: dict[Unit, list[object]] = {}
        self._known, self._calls = TensorCache(), Counter[CalibrationLinear]()
        self.greenlet = greenlet(partial(self._batch.run, self._walks.root))
        # Each walk has its own values of the model's context variables.
        self.greenlet.gr_context = contextvars.copy_context()
        self._restore, self._unwinding = self._walks.restore, False

    @property
    def ended(self) -> bool:
        """Whether the model has returned, or the walk was unwound."""
        return self._unwinding or bool(self.greenlet.dead)

    def go_on(self) -> None:
        """Continue to the next layer that is not solved, or to the end."""
        if self.ended or self._walks.trouble:
            return
        try:
            self._switch(self.greenlet.switch)
        except Exception as error:
            # The model or another batch may be the cause; a pass of this batch alone will show it.
            self._walks.tell(f"{type(error).__name__} when batches run side by side: {error}")

    def unwind(self) -> None:
        """End the walk where it is paused."""
        self._unwinding = True
        if self.parked:
            # The model may turn it into another error, which does not matter.
            with contextlib.suppress(Unwound, Exception):
                self._switch(partial(self.greenlet.throw, Unwound))

    def _switch(self, to: Callable[[], Any]) -> None:
        self._restore()
        self._walks.current = self
        try:
            to()
        finally:
            self._walks.current = None
            self._restore = snapshot(self._walks.devices)
            self._walks.restore()

    def arrive(self, layer: CalibrationLinear, unit: Unit, x: Tensor) -> None:
        """Record a call of ``layer`` with ``x``; pause until the layer is solved, if necessary."""
        if self._unwinding:
            raise Unwound
        call, place, tell = self._calls[layer], self._walks.order[unit], self._walks.tell
        self._calls[layer] += 1
        if unit in self.served and unit not in self._read:
            return
        if self.unit not in (None, unit):
            # The observed unit comes first and is called again; after it is solved, this walk starts again.
            self.skipped = True
            return
        tensor, before = self._known.get(x, object), self._read.setdefault(unit, [])
        if call < len(before):
            if before[call] is not tensor:
                tell(f"layer {layer.names[0]!r} reads another tensor than the layers that had the same inputs")
            return
        if unit.solved or place < self._place:
            tell(f"layer {layer.names[0]!r} is called at another point of the pass than in floating point")
            return
        numbers = self._batch.reads.get(layer.names[0], [])
        last = call + 1 >= len(numbers)
        self.unit, self._place = unit, place
        before.append(tensor)
        # Copied if the walk continues, which may write to it.
        self.tokens.setdefault(unit, []).append(x if last else kept(x))
        seen = self._batch.prints[numbers[call]] if self.floating and call < len(numbers) else None
        if seen is not None and not same_tokens(seen, fingerprint(x, self._batch.mask).tolist()):
            tell(f"layer {layer.names[0]!r} reads other inputs when batches run side by side")
        elif last and unrestorable() != self._walks.unrestorable:
            tell(f"layer {layer.names[0]!r} is called inside a mode of torch that cannot be restored")
        elif last:
            self.parked = True
            try:
                self.greenlet.parent.switch()
            finally:
                self.parked = False

    def solved(self, unit: Unit) -> None:
        """Drop the inputs of ``unit``. A walk that passed through its unsolved layers starts again."""
        calls, parked = len(self.tokens.pop(unit, ())), self.parked and self.unit is unit
        if calls:
            self.served.add(unit)
        if self.unit is unit:
            self.unit = None
        if self.skipped or (calls > parked and not self.floating):
            self.unwind()
            self.begin()


class Walks:
    """The walks of all batches. Layers call this object while a walk runs."""

    def __init__(self, root: nn.Module, units: list[Unit], batches: list[Batch], *, floats: int) -> None:
        self.root, self.batches, self.devices = root, batches, offload.devices(root)
        self.restore, self.unrestorable = snapshot(self.devices), unrestorable()
        self.trouble: str | None = None
        # The place of the first unsolved unit that a quantized walk has read.
        self.first: int | None = None
        self.order = {unit: place for place, unit in enumerate(units)}
        self._unit_of = {layer: unit for unit in units for layer in unit.layers}
        # Float walks come first, so that they reach a layer before the quantized walks.
        ways = [(number, True) for number in range(floats)] + [(number, False) for number in range(len(batches))]
        self._walks = [Walk(self, number, floating=way) for number, way in ways]
        self.current: Walk | None = None

    def __call__(self, layer: CalibrationLinear, x: Tensor) -> bool:
        """Record a call of ``layer`` with ``x`` ``[..., c]``; returns whether the layer computes as quantized."""
        walk, unit = self.current, self._unit_of[layer]
        # The call comes from another thread, or from a greenlet of the model.
        if walk is None or getcurrent() is not walk.greenlet:
            self.tell(f"layer {layer.names[0]!r} is called from another thread")
            return unit.solved
        walk.arrive(layer, unit, x)
        return unit.solved and not walk.floating

    def tell(self, trouble: str) -> None:
        """Set the reason why lock step is impossible; the first one stays."""
        self.trouble = self.trouble or trouble

    def advance(self) -> None:
        """Run every walk to the next layer that is not solved, or to its end."""
        ready = [walk for walk in self._walks if walk.unit is None]
        while ready and not self.trouble:
            for walk in ready:
                walk.unit = None
                walk.go_on()
            read = (self.order[walk.unit] for walk in self._walks if not walk.floating and walk.unit is not None)
            self.first = min(read, default=None)
            # A float walk does not wait at a unit that the quantized walks do not call.
            ready = [walk for walk in self._walks if walk.floating and walk.parked and walk.unit is not None
                     and self.first is not None and self.order[walk.unit] < self.first]  # fmt: skip

    def read(self, unit: Unit) -> list[Reading]:
        """The inputs of the layers of ``unit``, from all walks."""
        found = [Inputs(batch.mask, [], []) for batch in self.batches]
        for walk in self._walks:
            _, arriving, originals = found[walk.number]
            (originals if walk.floating else arriving).extend(walk.tokens.get(unit, ()))
        return [(unit.layers, found)]

    def solved(self, unit: Unit) -> None:
        """Tell all walks that ``unit`` is solved, see :meth:`Walk.solved`."""
        for walk in self._walks:
            walk.solved(unit)

    def close(self) -> None:
        """End all walks."""
        with contextlib.ExitStack() as stack:
            # Every walk is unwound, even if another one fails.
            for walk in self._walks:
                stack.callback(walk.unwind)
        # Greenlets and walks form cycles; clearing them frees the layers without the garbage collector.
        for each in (*self._walks, self):
            vars(each).clear()
