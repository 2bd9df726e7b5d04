"""The config: from a plain dict to frozen values, with an error for everything else."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from quantize.core.algorithms import ALGORITHMS, Algorithm, LayerSpec
from quantize.core.algorithms.base import BaseOptions, option
from quantize.core.scheme import Scheme

MAX_BATCHES = 2**32 - 1
_BITS = {"int8": 8, "int4": 4}
_FOLD = "True or False; True without sequential"


class QuantizeError(ValueError):
    """A call that was refused: ``<where>: <value>; accepted: <what>``. The model is as it was."""


class QuantizeWarning(UserWarning):
    """Something was left in floating point, or is not as the config asked; the report says the same."""


def refusal(where: str, found: str, accepted: str) -> QuantizeError:
    """The error for what was ``found`` at ``where``, in the one form that all errors have."""
    return QuantizeError(f"{where}: {found}; accepted: {accepted}")


def shown(value: object) -> str:
    """A value as an error shows it: its repr, shortened where it is long."""
    try:
        return reprlib.repr(value)
    except Exception:  # a value may refuse to be shown, and is refused all the same
        return f"a {type(value).__name__}"


@dataclass(frozen=True)
class Schedule(BaseOptions):
    """What calibration does around an algorithm; an algorithm does not know it.

    - ``sequential``: fit every layer to what the quantized layers before it give, not to the float model's inputs.
    - ``fold``: divide what produces the inputs of a layer, not the inputs, where nothing else changes.
    """

    sequential: bool = option(False, "True or False")
    fold: bool = option(False, _FOLD)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fold and self.sequential:
            raise ValueError(f"fold: True with sequential; accepted: {_FOLD}")


@dataclass(frozen=True)
class Config:
    """A config that passed every check."""

    batch_num: int
    spec: LayerSpec
    name: str
    options: Any
    schedule: Schedule
    skip_layers: tuple[str, ...]

    @property
    def algorithm(self) -> Algorithm:
        """The algorithm called ``name``, closed over format and options."""
        return ALGORITHMS[self.name].algorithm(self.spec, self.options)


class _Key(NamedTuple):
    """What a key of a dict accepts, as text and test; a key without a default is required."""

    accepted: str = ""
    fits: Callable[[Any], bool] = lambda value: True
    default: Any = ...


def _word(*words: str, when: str = "") -> _Key:
    return _Key(_listed(words) + when, lambda value: isinstance(value, str) and value in words)


def _listed(words: Iterable[str]) -> str:
    return ", ".join(repr(word) for word in words)


def _are_words(value: Any) -> bool:
    if isinstance(value, (Mapping, bytes)) or not isinstance(value, Collection):
        return value is None
    try:
        return value != "" and all(isinstance(word, str) and word for word in value)
    except TypeError:  # an array without dimensions
        return False


# bool is an int to Python, and never meant as one here.
_BATCH_NUM = _Key(f"an int from 1 to {MAX_BATCHES}", lambda v: type(v) is int and 1 <= v <= MAX_BATCHES, 1)
_SKIP_LAYERS = _Key("None, a non-empty string, or a collection of non-empty strings", _are_words, None)
_SYMMETRIC = _Key("True or False", lambda value: isinstance(value, bool))
_SIZE = "an int, a multiple of 32, at least 32 and below the layer's in_features, with strategy 'group' only"
_INPUTS = {"type": _word("int8"), "symmetric": _SYMMETRIC, "strategy": _word("tensor", "token")}
_WEIGHTS = {"type": _word("int8", "int4"), "symmetric": _SYMMETRIC, "strategy": _word("tensor", "channel", "group")}
# int8 x int8 is what the matmuls of this library accumulate; a scale or zero point inside the sum would not leave it.
_BESIDE_INPUTS = {
    "type": _word("int8", "int4"),
    "symmetric": _Key("True with quant_cfg.inputs", lambda value: value is True),
    "strategy": _word("tensor", "channel", when=" with quant_cfg.inputs"),
}


def parse(config: object) -> Config:
    """Check the whole of ``config`` against the table in the README.

    Raises:
        QuantizeError: for the first thing that is not accepted; it names the key, the value and what is accepted.
    """
    top = _read("config", config, quant_cfg=_Key(), algorithm=_Key(), batch_num=_BATCH_NUM, skip_layers=_SKIP_LAYERS)
    schemes = _read("quant_cfg", top["quant_cfg"], weights=_Key(), inputs=_Key(default=None))
    inputs = None if schemes["inputs"] is None else _scheme("quant_cfg.inputs", schemes["inputs"], **_INPUTS)
    keys = {**(_WEIGHTS if inputs is None else _BESIDE_INPUTS), "group_size": _Key(default=None)}
    spec = LayerSpec(_scheme("quant_cfg.weights", schemes["weights"], **keys), inputs)
    words = top["skip_layers"] or ()
    skip_layers = (words,) if isinstance(words, str) else tuple(sorted(set(words)))
    return Config(top["batch_num"], spec, *_algorithm(spec, top["algorithm"]), skip_layers)


def _read(where: str, value: object, **keys: _Key) -> dict[str, Any]:
    """The value of every key in the dict ``value``, checked."""
    accepted = f"a dict with {_listed(keys) or 'no keys'}"
    if not isinstance(value, Mapping):
        raise refusal(where, shown(value), accepted)
    for key in value:
        _known(where, "key", key, keys)
    found = {name: value.get(name, key.default) for name, key in keys.items()}
    for name, key in keys.items():
        place = name if where == "config" else f"{where}.{name}"
        if found[name] is ...:
            raise refusal(place, "missing", accepted)
        if not key.fits(found[name]):
            raise refusal(place, shown(found[name]), key.accepted)
    return found


def _known(where: str, what: str, name: object, known: Collection[str]) -> None:
    if isinstance(name, str) and name in known:
        return
    close = difflib.get_close_matches(name, known, n=1) if isinstance(name, str) else []
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise QuantizeError(f"{where}: unknown {what} {shown(name)}; accepted: {_listed(known) or 'none'}{hint}")


def _scheme(where: str, value: object, **keys: _Key) -> Scheme:
    given = _read(where, value, **keys)
    size = given.get("group_size")
    grouped = type(size) is int and size >= 32 and size % 32 == 0
    if not (grouped if given["strategy"] == "group" else size is None):
        raise refusal(f"{where}.group_size", shown(size), _SIZE)
    return Scheme(_BITS[given["type"]], given["symmetric"], given["strategy"], size)


def _algorithm(spec: LayerSpec, value: object) -> tuple[str, Any, Schedule]:
    names = list(value) if isinstance(value, (Mapping, set, frozenset, list, tuple)) else [value]
    if len(names) != 1 or not isinstance(names[0], str):
        accepted = "as a name, a collection of one name, or a dict of one name to options"
        raise refusal("algorithm", shown(value), f"one of {_listed(ALGORITHMS)}, {accepted}")
    (name,) = names
    _known("algorithm", "name", name, ALGORITHMS)
    fitting = [each for each, module in ALGORITHMS.items() if (spec.inputs is not None) in module.QUANTIZES_INPUTS]
    if name not in fitting:
        raise refusal(
            "algorithm", shown(name), f"{_listed(fitting)} {'with' if spec.inputs else 'without'} quant_cfg.inputs"
        )
    where, module = f"algorithm.{name}", ALGORITHMS[name]
    given = {} if not isinstance(value, Mapping) or value[name] is None else value[name]
    # Options and schedule are given in one dict; a schedule where it changes anything.
    own, usual = [f.name for f in fields(module.Options)], module.algorithm(spec, module.Options())
    shells = ["sequential"] * (not usual.data_free) + ["fold"] * (usual.scale is not None)
    _read(where, given, **dict.fromkeys([*own, *shells], _Key(default=None)))
    try:
        options = module.Options(**{key: given[key] for key in own if key in given})
        default = {"sequential": module.algorithm(spec, options).paired is not None}
        return name, options, Schedule(**default | {key: given[key] for key in shells if key in given})
    except ValueError as error:
        raise QuantizeError(f"{where}.{error}") from None
