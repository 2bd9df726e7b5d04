"""Calibration stage by stage: every part is fitted to inputs that have passed the quantized parts before it.

A stage is an element of the outermost ``ModuleList`` or ``Sequential`` around a layer, or the layer itself. While the
user runs the model only the arguments are kept. Then, for one stage after the other in the order of execution, every
batch runs again from the root: finished stages give the output that they gave before instead of computing, the stage in
question is observed, and the run ends there. So any control flow around the stages simply runs again, each stage
computes twice, and the memory is one stage's statistics and about one output a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from quantize.shell.calibration import CalibrationLinear
from quantize.shell.recording import Batch, Recorder, copied, keepable
from quantize.shell.watch import Event, Output, Watch


def stages(root: nn.Module, layers: list[CalibrationLinear]) -> dict[nn.Module, list[CalibrationLinear]]:
    """The layers of every stage of ``root``."""
    names = {module: name for name, module in root.named_modules()}
    found: dict[nn.Module, list[CalibrationLinear]] = {}
    for layer in layers:
        path = names[layer].split(".")
        owners = [root.get_submodule(".".join(path[:depth])) for depth in range(len(path))]
        lists = [depth for depth, owner in enumerate(owners) if isinstance(owner, (nn.ModuleList, nn.Sequential))]
        stage = root.get_submodule(".".join(path[: lists[0] + 1])) if lists else layer
        found.setdefault(stage, []).append(layer)
    return found


def ordered(
    grouped: dict[nn.Module, list[CalibrationLinear]], calls: list[str]
) -> list[tuple[nn.Module, list[CalibrationLinear]]]:
    """The stages in the order of the first ``calls`` of their layers; those that were never called come last."""
    first: dict[str, int] = {}
    for name in calls:
        first.setdefault(name, len(first))
    return sorted(grouped.items(), key=lambda item: min(first.get(layer.names[0], len(first)) for layer in item[1]))


class _Done(BaseException):
    """Ends a run: the stage in question has seen its last call."""


class Replay:
    """Runs of a model up to a stage, over batches that were kept.

    Where a run with remembered outputs goes another way than before, or fails, the batch forgets them, and runs again
    with every stage computing.
    """

    def __init__(self, root: nn.Module, modules: list[nn.Module], batches: list[Batch]) -> None:
        self._root, self._modules, self._batches = root, modules, batches
        self._memory: list[dict[Event, Output]] = [{} for _ in batches]
        self._ways: list[list[int]] = [[] for _ in batches]
        # Stages whose calls do more than give their output.
        self._computed: set[int] = set()
        # Batches that had to forget once: nothing of theirs is taken for unneeded again.
        self._keep: set[int] = set()
        self._run: _Run | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The forward of every stage goes through this object, and is its own again afterwards."""
        own = {module: module.__dict__.get("forward") for module in self._modules}
        try:
            for place, module in enumerate(self._modules):
                module.forward = partial(self._call, place, module.forward)
            yield
        finally:
            for module, forward in own.items():
                module.__dict__.pop("forward", None)
                if forward is not None:
                    module.forward = forward

    def run(
        self, number: int, place: int, expected: Mapping[CalibrationLinear, int], recorder: Callable[[], Recorder]
    ) -> Recorder:
        """Batch ``number`` until the stage at ``place`` has called its layers as often as ``expected``.

        ``recorder`` makes what watches a run, which is returned.
        """
        remembers = bool(self._memory[number])
        try:
            watching = recorder()
            if self._attempt(number, place, expected, watching):
                return watching
        except Exception:
            if not remembers:
                raise
        self._memory[number].clear()
        self._keep.add(number)
        watching = recorder()
        self._attempt(number, place, expected, watching)
        return watching

    def _attempt(self, number: int, place: int, expected: Mapping[CalibrationLinear, int], watching: Recorder) -> bool:
        batch = self._batches[number]
        device, enabled, dtype = batch.autocast
        run = _Run(place, self._memory[number], expected, watching, number in self._keep)
        self._run = run
        torch.set_rng_state(batch.random)
        try:
            with torch.no_grad(), torch.autocast(device, enabled=enabled, dtype=dtype), run.watch:
                self._root(*copied(batch.args), **copied(batch.kwargs))
        except _Done:
            pass
        finally:
            self._run = None
        before = self._ways[number]
        # Up to the stage before this one nothing has changed since the last run.
        common = before[: before.index(place - 1)] if place - 1 in before else []
        self._ways[number] = run.way
        return run.way[: len(common)] == common

    def _call(self, place: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        run = self._run
        if run is None or run.inside:
            return forward(*args, **kwargs)
        event = (place, run.way.count(place))
        if place == run.place and not event[1]:
            run.forget()
        run.way.append(place)
        given = run.watch.events((args, kwargs))
        remembered = run.memory.get(event)
        output = remembered.give() if remembered is not None else self._compute(run, event, forward, args, kwargs)
        # What is remembered does not depend on the arguments any more.
        if event in run.memory:
            run.given.add(event)
            given = frozenset({event})
        run.watch.mark(output, given)
        if place == run.place and run.complete():
            raise _Done
        return output

    def _compute(self, run: _Run, event: Event, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [tensor._version for tensor in given]
        run.inside = True
        # Inside of a stage there is nothing to watch.
        run.watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        try:
            output = forward(*args, **kwargs)
        finally:
            run.watch.__enter__()  # type: ignore[no-untyped-call]
            run.inside = False
        if event[0] < run.place:
            if versions != [tensor._version for tensor in given] or not keepable(output):
                self._computed.add(event[0])
            elif event[0] not in self._computed:
                run.memory[event] = Output(output)
        return output


class _Run:
    """One run of one batch."""

    def __init__(
        self,
        place: int,
        memory: dict[Event, Output],
        expected: Mapping[CalibrationLinear, int],
        watching: Recorder,
        keep: bool,
    ) -> None:
        self.place, self.memory, self.keep = place, memory, keep
        self._expected, self._watching = expected, watching
        self.way: list[int] = []
        self.given: set[Event] = set()
        self.inside = False
        self.watch = Watch()

    def complete(self) -> bool:
        """Whether the stage in question has been called as often as before."""
        calls = self._watching.calls
        return all(calls[layer] >= number for layer, number in self._expected.items())

    def forget(self) -> None:
        """Free the outputs that nothing can read any more."""
        needed = self.watch.needed()
        for event in self.given - needed:
            if not self.keep:
                self.memory[event].free()
