"""The config: from a plain dict to frozen values, with an error for everything else."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from quantize.core.algorithms import ALGORITHMS, Algorithm, LayerSpec
from quantize.core.algorithms.base import BaseOptions, option
from quantize.core.scheme import Scheme

MAX_BATCHES = 2**32 - 1
_BITS = {"int8": 8, "int4": 4}
# What is accepted in a weights or an inputs entry, by key. A group_size stands beside strategy 'group' alone.
_WEIGHTS = {"type": ("int8", "int4"), "symmetric": (True, False), "strategy": ("tensor", "channel", "group")}
_INPUTS = {"type": ("int8",), "symmetric": (True, False), "strategy": ("tensor", "token")}
# int8 x int8 is what the matmuls of this library accumulate; a scale or zero point inside the sum would not leave it.
_BESIDE_INPUTS = {"type": ("int8",), "symmetric": (True,), "strategy": ("tensor", "channel")}
_SIZE = "an int, a multiple of 32, at least 32 and below the layer's in_features, with strategy 'group' only"
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


def parse(config: object) -> Config:
    """Check the whole of ``config`` against the table in the README.

    Raises:
        QuantizeError: for the first thing that is not accepted; it names the key, the value and what is accepted.
    """
    top = _dict("config", config, "quant_cfg", "algorithm", optional=("batch_num", "skip_layers"))
    batch_num, words = top.get("batch_num", 1), top.get("skip_layers")
    # bool is an int to Python, and never meant as one here.
    if type(batch_num) is not int or not 1 <= batch_num <= MAX_BATCHES:
        raise refusal("batch_num", shown(batch_num), f"an int from 1 to {MAX_BATCHES}")
    if not _are_words(words):
        raise refusal("skip_layers", shown(words), "None, a non-empty string, or a collection of non-empty strings")
    cfg = _dict("quant_cfg", top["quant_cfg"], "weights", optional=("inputs",))
    inputs = None if cfg.get("inputs") is None else _scheme("quant_cfg.inputs", cfg["inputs"], _INPUTS)
    spec = LayerSpec(_scheme("quant_cfg.weights", cfg["weights"], _BESIDE_INPUTS if inputs else _WEIGHTS), inputs)
    skip_layers = (words,) if isinstance(words, str) else tuple(sorted(set(words or ())))
    return Config(batch_num, spec, *_algorithm(spec, top["algorithm"]), skip_layers)


def _dict(where: str, value: Any, *required: str, optional: Collection[str] = ()) -> Mapping[str, Any]:
    """``value``, a dict of the ``required`` keys and any of the ``optional`` ones."""
    accepted = f"a dict with {_listed((*required, *optional)) or 'no keys'}"
    if not isinstance(value, Mapping):
        raise refusal(where, shown(value), accepted)
    for key in value:
        _known(where, "key", key, (*required, *optional))
    for key in required:
        if key not in value:
            raise refusal(f"{where}.{key}".removeprefix("config."), "missing", accepted)
    return value


def _known(where: str, what: str, name: object, known: Collection[str]) -> None:
    if not isinstance(name, str) or name not in known:
        close = difflib.get_close_matches(name, known, n=1) if isinstance(name, str) else []
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise refusal(where, f"unknown {what} {shown(name)}", f"{_listed(known) or 'none'}{hint}")


def _listed(words: Iterable[object]) -> str:
    return ", ".join(map(repr, words))


def _are_words(value: Any) -> bool:
    if isinstance(value, (Mapping, bytes)) or not isinstance(value, Collection):
        return value is None
    try:
        return value != "" and all(isinstance(word, str) and word for word in value)
    except TypeError:  # an array without dimensions
        return False


def _scheme(where: str, value: object, accepted: Mapping[str, tuple[Any, ...]]) -> Scheme:
    """The format that the entry ``value``, at ``where`` in the config, asks for."""
    given = _dict(where, value, *accepted, optional=() if accepted is _INPUTS else ("group_size",))
    for key, words in accepted.items():
        if not (isinstance(given[key], type(words[0])) and given[key] in words):
            told = " or ".join(map(str, words)) if key == "symmetric" else _listed(words)
            beside = " with quant_cfg.inputs" * (accepted is _BESIDE_INPUTS)
            raise refusal(f"{where}.{key}", shown(given[key]), told + beside)
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
        beside = f"{'with' if spec.inputs else 'without'} quant_cfg.inputs"
        raise refusal("algorithm", shown(name), f"{_listed(fitting)} {beside}")
    where, module = f"algorithm.{name}", ALGORITHMS[name]
    given = {} if not isinstance(value, Mapping) or value[name] is None else value[name]
    # Options and schedule are given in one dict; a schedule where it changes anything.
    own, usual = [f.name for f in fields(module.Options)], module.algorithm(spec, module.Options())
    _dict(where, given, optional=own + ["sequential"] * (not usual.data_free) + ["fold"] * (usual.scale is not None))
    try:
        options = module.Options(**{key: given[key] for key in given if key in own})
        default = {"sequential": module.algorithm(spec, options).paired is not None}
        return name, options, Schedule(**default | {key: given[key] for key in given if key not in own})
    except ValueError as error:
        raise QuantizeError(f"{where}.{error}") from None
