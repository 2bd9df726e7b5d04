"""Calibration in lock step: all batches go through the model side by side, one unit of layers after the other.

A *walk* is one run of the model's forward on one batch, in a greenlet that stops at layers which are not solved. When
all walks have stopped, the first unit that any of them waits for is solved with what they brought, and they go on
through the quantized layers. So every batch runs once, and nothing is remembered or replayed. For algorithms that look
at the float model as well, each batch has a second walk through the float weights. Where a layer is called several
times, it is observed at all calls in floating point; once it is solved, the walks that came through it begin again.

Walks share the model's attributes. So each float walk has to see what the user's own pass saw, by fingerprint and up to
roundings (in bfloat16, 3 % of another batch are noticed); two are run for that where the algorithm does not ask for
any. Where something else is seen, or a walk cannot stop, :attr:`Walks.trouble` says why, and :mod:`.passes` are needed.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from quantize.shell import offload
from quantize.shell.calibrate.batches import Batch
from quantize.shell.calibrate.layer import CalibrationLinear
from quantize.shell.calibrate.observing import fingerprint, near
from quantize.shell.calibrate.units import Unit
from quantize.shell.modes import Modes, fixed
from quantize.shell.values import kept


class Unwound(BaseException):
    """Ends a walk where it stands, so that the model can tidy up."""


class _Read:
    """One call of a unit: the tokens ``[..., c]`` that it read, and which tensor they were."""

    def __init__(self, x: Tensor, tokens: Tensor) -> None:
        self.tokens: Tensor | None = tokens
        self._reference, self._version = weakref.ref(x), None if x.is_inference() else x._version

    def same(self, x: Tensor) -> bool:
        return self._reference() is x and (self._version is None or x._version == self._version)


class Walk:
    """One run of one batch, through the float weights or the quantized ones."""

    def __init__(self, walks: Walks, number: int, *, floating: bool) -> None:
        self.number, self.floating, self._walks, self._batch = number, floating, walks, walks.batches[number]
        # Groups that need nothing of it any more.
        self.served = {unit for unit in walks.units if unit.solved}
        self.begin()

    def begin(self) -> None:
        """Be at the root, and know nothing."""
        self.reads: dict[Unit, list[_Read]] = {}
        self.unsolved: set[Unit] = set()
        self.parked: Unit | None = None
        self._calls: Counter[CalibrationLinear] = Counter()
        # The unit that is being observed and will be called again; whether another one was passed meanwhile.
        self._open: Unit | None = None
        self.skipped = False
        self._place = 0
        self.greenlet = greenlet(self._run)
        # What a model keeps in context variables belongs to its walk.
        self.greenlet.gr_context = contextvars.copy_context()
        self._modes: Modes | None = None
        self._unwinding = False

    @property
    def ended(self) -> bool:
        """Whether the model has returned, or nobody waits for it."""
        return self._unwinding or bool(self.greenlet.dead)

    def _run(self) -> None:
        with contextlib.suppress(Unwound):
            self._batch.run(self._walks.root)

    def go_on(self) -> None:
        """Run to the next layer that is not solved, or to the end."""
        self._switch(self.greenlet.switch)

    def unwind(self) -> None:
        """End where it stands."""
        self._unwinding = True
        if self.parked is not None:
            # A model may make another error of it: that is none of anybody's.
            with contextlib.suppress(Exception):
                self._switch(functools.partial(self.greenlet.throw, Unwound))

    def _switch(self, to: Callable[[], Any]) -> None:
        if self._modes is not None:
            self._modes.restore()
        try:
            to()
        finally:
            self._modes = Modes.now(self._walks.devices)
            self._walks.modes.restore()

    def arrive(self, layer: CalibrationLinear, unit: Unit, x: Tensor) -> None:
        """A call of ``layer``; stops until it is solved, if it has to be."""
        if self._unwinding:
            raise Unwound
        call = self._calls[layer]
        self._calls[layer] += 1
        if unit in self.served and unit not in self.reads:
            return
        if self._open not in (None, unit):
            # That one comes first, and is called again: then this walk begins anew.
            self.skipped = True
            return
        reads, place = self.reads.setdefault(unit, []), self._walks.order[unit]
        if call < len(reads):
            if not reads[call].same(x):
                self._walks.tell(f"layer {layer.names[0]!r} read another tensor than the layers that it shares with")
            return
        if unit.solved or place < self._place:
            self._walks.tell(f"layer {layer.names[0]!r} is called where it was not called in floating point")
            return
        self._place = place
        last = call + 1 >= len(self._batch.reads.get(layer.names[0], ()))
        self._open = None if last else unit
        self.unsolved.add(unit)
        # What runs on may write to it.
        reads.append(_Read(x, x if last else kept(x)))
        if self.floating and not self._as_before(layer, call, x):
            self._walks.tell(f"layer {layer.names[0]!r} reads something else where batches run side by side")
        elif last:
            self._park(layer, unit)

    def _as_before(self, layer: CalibrationLinear, call: int, x: Tensor) -> bool:
        numbers = self._batch.reads.get(layer.names[0], [])
        if call >= len(numbers):
            return True
        return near(self._batch.prints[numbers[call]], fingerprint(x, self._batch.mask).tolist())

    def _park(self, layer: CalibrationLinear, unit: Unit) -> None:
        if fixed() != self._walks.fixed:
            self._walks.tell(f"layer {layer.names[0]!r} is called inside of a mode of torch that cannot be put back")
            return
        self.parked = unit
        try:
            self.greenlet.parent.switch()
        finally:
            self.parked = None


class Walks:
    """The walks of all batches, and what the layers ask while one runs."""

    def __init__(self, root: nn.Module, units: list[Unit], batches: list[Batch], *, floats: int) -> None:
        self.root, self.units, self.batches = root, units, batches
        self.devices = offload.devices(root)
        self.modes, self.fixed = Modes.now(self.devices), fixed()
        self.trouble: str | None = None
        # The place of the first unit that a quantized walk has read and that is not solved.
        self.first: int | None = None
        self.order = {unit: place for place, unit in enumerate(units)}
        self._of = {layer: unit for unit in units for layer in unit.layers}
        # The float walk of a batch comes first: it hands its inputs over.
        ways = [(number, True) for number in range(floats)] + [(number, False) for number in range(len(batches))]
        self._walks = [Walk(self, number, floating=way) for number, way in ways]
        self._current: Walk | None = None

    def observe(self, layer: CalibrationLinear, x: Tensor) -> bool:
        """A call of ``layer`` with ``x`` ``[..., c]``: whether it is to compute as quantized."""
        walk, unit = self._current, self._of[layer]
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
        for walk in self._walks:
            if walk.parked is None or walk.parked.solved:
                self._go_on(walk)
        while True:
            read = (unit for walk in self._walks if not walk.floating for unit in walk.unsolved)
            self.first = min(map(self.order.__getitem__, read), default=None)
            # Where the quantized model takes another way, the float one does not wait for it.
            behind = [walk for walk in self._walks if walk.floating and walk.parked is not None
                      and self.first is not None and self.order[walk.parked] < self.first]  # fmt: skip
            if not behind or self.trouble:
                return
            for walk in behind:
                self._go_on(walk)

    def _go_on(self, walk: Walk) -> None:
        if walk.ended or self.trouble:
            return
        self._current = walk
        try:
            walk.go_on()
        except Exception as error:
            # Its own, or because of another batch: a pass of its own will tell.
            self.tell(f"{type(error).__name__} where batches run side by side: {error}")
        finally:
            self._current = None

    def read(self, unit: Unit) -> list[tuple[Tensor | None, list[Tensor], list[Tensor]]]:
        """By batch: which tokens count, and what the calls of ``unit`` read, quantized and in floating point."""
        found: dict[bool, list[list[Tensor]]] = {way: [[] for _ in self.batches] for way in (False, True)}
        for walk in self._walks:
            reads = walk.reads.get(unit, ())
            found[walk.floating][walk.number] += [read.tokens for read in reads if read.tokens is not None]
        return list(zip((batch.mask for batch in self.batches), found[False], found[True], strict=True))

    def solved(self, unit: Unit) -> None:
        """``unit`` is solved: its inputs are dropped, and walks that came through it in floating point begin again."""
        unit.solved = True
        for walk in self._walks:
            walk.unsolved.discard(unit)
            if unit in walk.reads:
                walk.served.add(unit)
            for read in walk.reads.get(unit, ()):
                read.tokens = None
            passed = len(walk.reads.get(unit, ())) > (walk.parked is unit)
            if walk.skipped or (passed and not walk.floating):
                self._end(walk)
                walk.begin()

    def close(self) -> None:
        """End all walks."""
        with contextlib.ExitStack() as stack:
            # One after the other, whatever happens.
            for walk in self._walks:
                stack.callback(self._end, walk)
        # Greenlets and walks refer to each other: the layers must not wait for the garbage collector.
        for each in (*self._walks, self):
            vars(each).clear()

    def _end(self, walk: Walk) -> None:
        self._current = walk
        try:
            walk.unwind()
        finally:
            self._current = None
