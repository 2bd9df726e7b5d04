"""Calibration stage by stage: every part is fitted to inputs that have passed the quantized parts before it.

A stage is an element of the outermost ``ModuleList`` or ``Sequential`` around a layer, or the layer itself. While the
user runs the model only the arguments are kept. Then, for one stage after the other in the order of execution, every
batch runs again from the root: finished stages give the output that they gave before instead of computing, the stage in
question is observed, and the run ends there. So any control flow around the stages simply runs again, each stage
computes twice, and the memory is one stage's statistics and about one output a batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from quantize.shell.batches import Batch, keepable, put
from quantize.shell.calibration import CalibrationLinear
from quantize.shell.recording import AnyWatching, Done, Watching
from quantize.shell.survey import Survey, Surveyor
from quantize.shell.watch import Escapes, Event, Output, Watch


class _Path:
    """What is remembered of every batch on its way through one model: the float one, or the one being quantized."""

    def __init__(self, batches: int) -> None:
        self.memory: list[dict[Event, Output]] = [{} for _ in range(batches)]
        self.ways: list[list[int]] = [[] for _ in range(batches)]


class Replay:
    """Runs of a model up to a stage, over batches that were kept.

    Before the first stage one batch runs to its last layer while a :class:`~quantize.shell.survey.Survey` looks at
    every stage: those that do more than give their output, draw random numbers, or call layers of another stage
    compute in every run. Where a run with remembered outputs goes another way than before, or fails, the batch forgets
    them, and runs again with every stage computing.
    """

    def __init__(
        self, root: nn.Module, order: list[tuple[nn.Module, list[CalibrationLinear]]], batches: list[Batch]
    ) -> None:
        self._root, self._order, self._batches = root, order, batches
        self._paths = {floating: _Path(len(batches)) for floating in (False, True)}
        # Stages that are never remembered; if any is called, nothing is taken for unneeded.
        self._computed: set[int] = set()
        # A model that writes to its buffers needs every batch to its end, in their order.
        self.stateful = bool(batches) and batches[0].stateful
        self._run: _Run | None = None
        self._survey: Surveyor | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The forward of every stage goes through this object, and is its own again afterwards."""
        own = {module: module.__dict__.get("forward") for module, _ in self._order}
        try:
            for place, (module, _) in enumerate(self._order):
                forward: Any = module.forward
                module.forward = functools.update_wrapper(functools.partial(self._call, place, forward), forward)
            yield
        finally:
            for module, forward in own.items():
                module.__dict__.pop("forward", None)
                if forward is not None:
                    module.forward = forward

    def survey(self) -> None:
        """Find out which stages may be remembered."""
        if not self._batches:
            return
        self.reset()
        survey = Surveyor(Survey(), self._batches[0].calls)
        for place, (_, members) in enumerate(self._order):
            for layer in members:
                layer.recorder = survey.watch_layer(place)  # type: ignore[assignment]
        self._survey = survey
        try:
            self._batches[0].run(self._root, survey.mode)
        except Done:
            pass
        finally:
            self._survey = None
            for _, members in self._order:
                for layer in members:
                    layer.recorder = None
        self._computed = set(range(len(self._order))) if survey.mode.opaque else survey.mode.impure | survey.foreign

    def reset(self) -> None:
        """The buffers as they were before the first batch."""
        buffers = dict(self._root.named_buffers())
        for name, value in (self._batches[0].buffers if self._batches else {}).items():
            if name in buffers and not torch.equal(buffers[name], value):
                owner, _, last = name.rpartition(".")
                put(self._root.get_submodule(owner), last, value)

    def run(
        self,
        number: int,
        place: int,
        expected: Mapping[CalibrationLinear, int],
        recorder: Callable[[], AnyWatching],
        *,
        floating: bool = False,
    ) -> AnyWatching:
        """Batch ``number`` until the stage at ``place`` has called its layers as often as ``expected``.

        ``recorder`` makes what watches a run, which is returned. With ``floating``, the run goes through the float
        model: what that gave stays right whatever is quantized.
        """
        path = self._paths[floating]
        remembers = bool(path.memory[number])
        try:
            watching = recorder()
            if self._attempt(number, place, expected, watching, floating):
                return watching
        except Exception:
            if not remembers:
                raise
        # Nothing of this batch is remembered again.
        path.memory[number].clear()
        path.ways[number] = []
        self._computed = set(range(len(self._order)))
        watching = recorder()
        self._attempt(number, place, expected, watching, floating)
        return watching

    def _attempt(
        self, number: int, place: int, expected: Mapping[CalibrationLinear, int], watching: Watching, floating: bool
    ) -> bool:
        path = self._paths[floating]
        self._run = run = _Run(place, path.memory[number], {} if self.stateful else expected, watching, floating)
        try:
            with _inactive(self._order) if floating else nullcontext():
                self._batches[number].run(self._root, run.watch, Escapes(run.watch))
        except Done:
            pass
        finally:
            self._run = None
            watching.closed = True
        before = path.ways[number]
        # Up to the stage before this one nothing has changed since the last run.
        common = before[: before.index(place - 1)] if place - 1 in before else []
        path.ways[number] = run.way
        return run.way[: len(common)] == common

    def _call(self, place: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._survey is not None:
            output = self._survey.call(place, forward, args, kwargs)
            # What comes after the last layer, such as the head of a language model, concerns no stage.
            if self._survey.complete():
                raise Done
            return output
        run = self._run
        if run is None or run.inside:
            return forward(*args, **kwargs)
        event = (place, run.way.count(place))
        if place == run.place and not event[1] and not self._computed:
            run.forget()
        run.way.append(place)
        given = run.watch.events((args, kwargs))
        # On the way of the float model this stage is remembered at once, and observed all the same.
        remembered = run.memory.get(event) if place != run.place else None
        output = remembered.give() if remembered is not None else self._compute(run, event, forward, args, kwargs)
        # What is remembered does not depend on the arguments any more.
        if event in run.memory:
            run.given.add(event)
            given = frozenset({event})
        run.watch.mark(output, given)
        if place == run.place and run.complete():
            raise Done
        return output

    def _compute(self, run: _Run, event: Event, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        run.inside = True
        # Inside of a stage there is nothing to watch.
        run.watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        try:
            output = forward(*args, **kwargs)
        finally:
            run.watch.__enter__()  # type: ignore[no-untyped-call]
            run.inside = False
        # What comes after the first call of the stage in question may depend on it, and that will change.
        early = event[0] <= run.place if run.floating else event[0] < run.place and run.place not in run.way
        if early and event[0] not in self._computed and keepable(output):
            run.memory[event] = Output(output)
        return output


class _Run:
    """One run of one batch."""

    def __init__(
        self,
        place: int,
        memory: dict[Event, Output],
        expected: Mapping[CalibrationLinear, int],
        watching: Watching,
        floating: bool,
    ) -> None:
        self.place, self.memory, self.floating = place, memory, floating
        self._expected, self._watching = expected, watching
        self.way: list[int] = []
        self.given: set[Event] = set()
        self.inside = False
        self.watch = Watch()

    def complete(self) -> bool:
        """Whether the stage in question has been called as often as before."""
        calls = self._watching.calls
        return bool(self._expected) and all(calls[layer] >= number for layer, number in self._expected.items())

    def forget(self) -> None:
        """Free the outputs that nothing can read any more."""
        for event in self.given - self.watch.needed():
            self.memory[event].free()


@contextmanager
def _inactive(order: list[tuple[nn.Module, list[CalibrationLinear]]]) -> Iterator[None]:
    """All layers compute in floating point."""
    active = [layer for _, members in order for layer in members if layer.active]
    for layer in active:
        layer.active = False
    try:
        yield
    finally:
        for layer in active:
            layer.active = True
