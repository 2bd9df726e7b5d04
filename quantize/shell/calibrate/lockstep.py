"""Calibration in lock step: all batches go through the model side by side, one unit of layers after the other.

A *walk* is one run of the model's forward on one batch, in a greenlet that stops at layers which are not solved. When
all walks have stopped, the first unit that any of them waits for is solved with what they brought, and they go on
through the quantized layers. So every batch runs once, and nothing is remembered or replayed. For algorithms that look
at the float model as well, each batch has a second walk through the float weights. Where a layer is called several
times, it is observed at all calls in floating point; once it is solved, the walks that came through it begin again.

Walks share the model's attributes. So each float walk has to see what the user's own pass saw, by fingerprint and up to
roundings (in bfloat16, 3 % of another batch are noticed); two are run for that where the algorithm does not ask for
any. Where something else is seen, or a walk cannot stop, :attr:`Walks.trouble` says why: every batch has to run alone.
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
from quantize.shell.calibrate.watching import Known, fingerprint, near
from quantize.shell.modes import fixed, snapshot
from quantize.shell.values import kept


class Unwound(BaseException):
    """Ends a walk where it stands, so that the model can tidy up."""


class Walk:
    """One run of one batch, through the float weights or the quantized ones."""

    def __init__(self, walks: Walks, number: int, *, floating: bool) -> None:
        self.number, self.floating, self._walks, self._batch = number, floating, walks, walks.batches[number]
        # Units that need nothing of it any more.
        self.served = {unit for unit in walks.order if unit.solved}
        self.begin()

    def begin(self) -> None:
        """Be at the root, and know nothing."""
        # The unit that is observed now. Whether the walk waits until it is solved; and whether it has passed others
        # meanwhile, because that one is called again.
        self.unit: Unit | None = None
        self.parked, self.skipped, self._place = False, False, 0
        # By unit: the tokens [..., c] that its calls have read, until it is solved; and which tensors they were.
        self.tokens: dict[Unit, list[Tensor]] = {}
        self._read: dict[Unit, list[object]] = {}
        self._known, self._calls = Known(), Counter[CalibrationLinear]()
        self.greenlet = greenlet(partial(self._batch.run, self._walks.root))
        # What a model keeps in context variables belongs to its walk.
        self.greenlet.gr_context = contextvars.copy_context()
        self._restore, self._unwinding = self._walks.restore, False

    @property
    def ended(self) -> bool:
        """Whether the model has returned, or nobody waits for it."""
        return self._unwinding or bool(self.greenlet.dead)

    def go_on(self) -> None:
        """Run to the next layer that is not solved, or to the end."""
        if self.ended or self._walks.trouble:
            return
        try:
            self._switch(self.greenlet.switch)
        except Exception as error:
            # Its own, or because of another batch: a pass of its own will tell.
            self._walks.tell(f"{type(error).__name__} when batches run side by side: {error}")

    def unwind(self) -> None:
        """End where it stands."""
        self._unwinding = True
        if self.parked:
            # A model may make another error of it: that is none of anybody's.
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
        """A call of ``layer``; stops until it is solved, if it has to be."""
        if self._unwinding:
            raise Unwound
        call, place, tell = self._calls[layer], self._walks.order[unit], self._walks.tell
        self._calls[layer] += 1
        if unit in self.served and unit not in self._read:
            return
        if self.unit not in (None, unit):
            # That one comes first, and is called again: then this walk begins anew.
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
        # What runs on may write to it.
        self.tokens.setdefault(unit, []).append(x if last else kept(x))
        seen = self._batch.prints[numbers[call]] if self.floating and call < len(numbers) else None
        if seen is not None and not near(seen, fingerprint(x, self._batch.mask).tolist()):
            tell(f"layer {layer.names[0]!r} reads other inputs when batches run side by side")
        elif last and fixed() != self._walks.fixed:
            tell(f"layer {layer.names[0]!r} is called inside a mode of torch that cannot be restored")
        elif last:
            self.parked = True
            try:
                self.greenlet.parent.switch()
            finally:
                self.parked = False

    def solved(self, unit: Unit) -> None:
        """Drop what ``unit`` has read. A walk that came through unsolved layers, which differ now, begins again."""
        calls, parked = len(self.tokens.pop(unit, ())), self.parked and self.unit is unit
        if calls:
            self.served.add(unit)
        if self.unit is unit:
            self.unit = None
        if self.skipped or (calls > parked and not self.floating):
            self.unwind()
            self.begin()


class Walks:
    """The walks of all batches, and what the layers ask while one runs."""

    def __init__(self, root: nn.Module, units: list[Unit], batches: list[Batch], *, floats: int) -> None:
        self.root, self.batches, self.devices = root, batches, offload.devices(root)
        self.restore, self.fixed = snapshot(self.devices), fixed()
        self.trouble: str | None = None
        # The place of the first unit that a quantized walk has read and that is not solved.
        self.first: int | None = None
        self.order = {unit: place for place, unit in enumerate(units)}
        self._of = {layer: unit for unit in units for layer in unit.layers}
        # The float walk of a batch comes first: it hands its inputs over.
        ways = [(number, True) for number in range(floats)] + [(number, False) for number in range(len(batches))]
        self._walks = [Walk(self, number, floating=way) for number, way in ways]
        self.current: Walk | None = None

    def __call__(self, layer: CalibrationLinear, x: Tensor) -> bool:
        """A call of ``layer`` with ``x`` ``[..., c]``: whether it is to compute as quantized."""
        walk, unit = self.current, self._of[layer]
        # Another thread, or a greenlet of the model's own.
        if walk is None or getcurrent() is not walk.greenlet:
            self.tell(f"layer {layer.names[0]!r} is called from another thread")
            return unit.solved
        walk.arrive(layer, unit, x)
        return unit.solved and not walk.floating

    def tell(self, trouble: str) -> None:
        """What makes lock step impossible; the first is kept."""
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
            # Where the quantized model takes another way, the float one does not wait for it.
            ready = [walk for walk in self._walks if walk.floating and walk.parked and walk.unit is not None
                     and self.first is not None and self.order[walk.unit] < self.first]  # fmt: skip

    def read(self, unit: Unit) -> list[Reading]:
        """What the layers of ``unit`` have read."""
        found = [Inputs(batch.mask, [], []) for batch in self.batches]
        for walk in self._walks:
            _, arriving, originals = found[walk.number]
            (originals if walk.floating else arriving).extend(walk.tokens.get(unit, ()))
        return [(unit.layers, found)]

    def solved(self, unit: Unit) -> None:
        """``unit`` is solved: its inputs are dropped, and walks that came through it in floating point begin again."""
        for walk in self._walks:
            walk.solved(unit)

    def close(self) -> None:
        """End all walks."""
        with contextlib.ExitStack() as stack:
            # One after the other, whatever happens.
            for walk in self._walks:
                stack.callback(walk.unwind)
        # Greenlets and walks refer to each other: the layers must not wait for the garbage collector.
        for each in (*self._walks, self):
            vars(each).clear()
