"""Which stages do no more than give their output, so that their calls can be left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quantize.shell.batches import keepable, random_state
from quantize.shell.calibration import CalibrationLinear
from quantize.shell.watch import Tags, storages_of


class Survey(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch leaves it bare
    """One run in which every stage computes: which of them do no more than give their output.

    A stage is :attr:`impure` if it writes to a tensor that it did not make, or if what it makes and does not give is
    read by anyone else: then its calls cannot be left out.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stage: int | None = None
        self.impure: set[int] = set()
        self.opaque = False
        self._made = Tags()

    def gave(self, output: Any) -> None:
        """The present stage returns ``output``: it may be read by all."""
        for storage in storages_of(output) or ():
            self._made.drop(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read, schema = storages_of((args, kwargs)), func._schema
        owners = {self._made.get(storage) for storage in read or ()}
        self.impure |= owners - {self.stage, None}
        if self.stage is not None and schema.is_mutable and not self._own(_written(schema, args, kwargs or {})):
            self.impure.add(self.stage)
        result = func(*args, **(kwargs or {}))
        storages = storages_of(result)
        if read is None or storages is None:
            # Sparse tensors cannot be followed.
            self.opaque = True
        before = {storage._cdata for storage in read or ()}
        for storage in storages or ():
            if self.stage is not None and storage._cdata not in before:
                self._made.set(storage, self.stage)
        return result

    def _own(self, written: Iterable[Any]) -> bool:
        storages = storages_of(list(written))
        return storages is not None and all(self._made.get(storage) == self.stage for storage in storages)


def _written(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    named = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    return [named.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]


class Surveyor:
    """What one run tells that calls each layer as often as ``expected``.

    It is asked by :class:`~quantize.shell.stages.Replay` at each call of a stage.
    """

    def __init__(self, mode: Survey, expected: Mapping[str, int]) -> None:
        self.mode, self._expected = mode, expected
        self._calls: Counter[str] = Counter()
        # Stages that call layers of others, or draw random numbers, or give what cannot be kept.
        self.foreign: set[int] = set()

    def watch_layer(self, place: int) -> _Watched:
        """What a layer of the stage at ``place`` reports its calls to."""
        return _Watched(self, place)

    def complete(self) -> bool:
        """Whether every layer has seen its last call."""
        return all(self._calls[name] >= number for name, number in self._expected.items())

    def called(self, layer: CalibrationLinear, place: int) -> None:
        """A call of a layer of the stage at ``place``: inside of another stage, that one cannot be left out."""
        self._calls[layer.names[0]] += 1
        if self.mode.stage is not None and self.mode.stage != place:
            self.foreign.add(self.mode.stage)

    def call(self, place: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of the stage at ``place``, which computes."""
        if self.mode.stage is not None:
            # A stage inside of a stage is a part of it.
            self.foreign |= {place, self.mode.stage}
            return forward(*args, **kwargs)
        before = random_state()
        taken = storages_of((args, kwargs))
        self.mode.stage = place
        try:
            output = forward(*args, **kwargs)
            self.mode.gave(output)
        finally:
            self.mode.stage = None
        given = storages_of(output)
        # Where storages cannot be told, they may be the same.
        aliased = taken is None or given is None or {s._cdata for s in taken} & {s._cdata for s in given}
        if aliased or not keepable(output) or random_state() != before:
            self.foreign.add(place)
        return output


class _Watched:
    def __init__(self, survey: Surveyor, place: int) -> None:
        self._survey, self._place = survey, place

    def observe(self, layer: CalibrationLinear, _x: Tensor) -> None:
        self._survey.called(layer, self._place)
