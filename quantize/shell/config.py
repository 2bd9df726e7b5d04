"""The config: from a plain dict to frozen values, with an error for everything else."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from quantize.core.algorithms import ALGORITHMS, Algorithm, LayerSpec
from quantize.core.scheme import Scheme

MAX_BATCHES = 2**32 - 1
_BITS = {"int8": 8, "int4": 4}


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
class Config:
    """A config that passed every check."""

    batch_num: int
    spec: LayerSpec
    name: str
    options: Any
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
    top = _mapping("config", config, required=("quant_cfg", "algorithm"), optional=("batch_num", "skip_layers"))
    quant_cfg = _mapping("quant_cfg", top["quant_cfg"], required=("weights",), optional=("inputs",))
    weights = _weights(quant_cfg["weights"])
    inputs = None if quant_cfg.get("inputs") is None else _inputs(quant_cfg["inputs"])
    name, options = _algorithm(top["algorithm"])
    spec = LayerSpec(weights, inputs)
    _check_combination(spec, name)
    return Config(_batch_num(top.get("batch_num", 1)), spec, name, options, _skip_layers(top.get("skip_layers")))


def _mapping(where: str, value: object, *, required: tuple[str, ...], optional: tuple[str, ...]) -> Mapping[str, Any]:
    known = required + optional
    accepted = f"a dict with {_listed(known) or 'no keys'}"
    if not isinstance(value, Mapping):
        raise refusal(where, shown(value), accepted)
    for key in value:
        _known(where, "key", key, known)
    for key in required:
        if key not in value:
            raise refusal(f"{where}.{key}" if where != "config" else key, "missing", accepted)
    return value


def _known(where: str, what: str, name: object, known: Collection[str]) -> None:
    if isinstance(name, str) and name in known:
        return
    close = difflib.get_close_matches(name, known, n=1) if isinstance(name, str) else []
    hint = f"; did you mean {close[0]!r}?" if close else ""
    accepted = _listed(known) or "none"
    raise QuantizeError(f"{where}: unknown {what} {shown(name)}; accepted: {accepted}{hint}")


def _listed(words: Iterable[str]) -> str:
    return ", ".join(repr(word) for word in words)


def _one_of(where: str, value: object, words: tuple[str, ...], when: str = "") -> str:
    if not (isinstance(value, str) and value in words):
        raise refusal(where, shown(value), _listed(words) + when)
    return value


def _integer(where: str, value: object, accepted: str, low: int, high: int | None = None, multiple: int = 1) -> int:
    # bool is an int to Python, and never meant as one here.
    if type(value) is not int or value < low or (high is not None and value > high) or value % multiple:
        raise refusal(where, shown(value), accepted)
    return value


def _symmetric(where: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise refusal(where, shown(value), "True or False")
    return value


def _weights(value: object) -> Scheme:
    where = "quant_cfg.weights"
    given = _mapping(where, value, required=("type", "symmetric", "strategy"), optional=("group_size",))
    bits = _BITS[_one_of(f"{where}.type", given["type"], ("int8", "int4"))]
    symmetric = _symmetric(f"{where}.symmetric", given["symmetric"])
    strategy = _one_of(f"{where}.strategy", given["strategy"], ("tensor", "channel", "group"))
    accepted = "an int, a multiple of 32, at least 32 and below the layer's in_features, with strategy 'group' only"
    if strategy == "group":
        size = _integer(f"{where}.group_size", given.get("group_size"), accepted, low=32, multiple=32)
        return Scheme(bits, symmetric, "group", size)
    if given.get("group_size") is not None:
        raise refusal(f"{where}.group_size", shown(given["group_size"]), accepted)
    return Scheme(bits, symmetric, "tensor" if strategy == "tensor" else "channel")


def _inputs(value: object) -> Scheme:
    where = "quant_cfg.inputs"
    given = _mapping(where, value, required=("type", "symmetric", "strategy"), optional=())
    bits = _BITS[_one_of(f"{where}.type", given["type"], ("int8",))]
    symmetric = _symmetric(f"{where}.symmetric", given["symmetric"])
    strategy = _one_of(f"{where}.strategy", given["strategy"], ("tensor", "token"))
    return Scheme(bits, symmetric, "tensor" if strategy == "tensor" else "token")


def _algorithm(value: object) -> tuple[str, Any]:
    accepted = f"one of {_listed(ALGORITHMS)}, as a name, a collection of one name, or a dict of one name to options"
    given: object = None
    if isinstance(value, Mapping):
        if len(value) != 1:
            raise refusal("algorithm", shown(value), accepted)
        ((name, given),) = value.items()
    elif isinstance(value, (set, frozenset, list, tuple)):
        if len(value) != 1:
            raise refusal("algorithm", shown(value), accepted)
        (name,) = value
    else:
        name = value
    if not isinstance(name, str):
        raise refusal("algorithm", shown(value), accepted)
    _known("algorithm", "name", name, ALGORITHMS)
    where, options = f"algorithm.{name}", ALGORITHMS[name].Options
    keys = tuple(f.name for f in fields(options))
    arguments = _mapping(where, {} if given is None else given, required=(), optional=keys)
    try:
        return name, options(**arguments)
    except ValueError as error:
        raise QuantizeError(f"{where}.{error}") from None


def _check_combination(spec: LayerSpec, name: str) -> None:
    with_inputs = spec.inputs is not None
    fitting = [other for other, module in ALGORITHMS.items() if with_inputs in module.QUANTIZES_INPUTS]
    if name not in fitting:
        raise refusal(
            "algorithm", shown(name), f"{_listed(fitting)} {'with' if with_inputs else 'without'} quant_cfg.inputs"
        )
    if spec.inputs is None:
        return
    # int8 x int8 is what the matmuls of this library accumulate; a scale or zero point inside the sum would not
    # leave it.
    if spec.weight.bits != 8:
        raise refusal("quant_cfg.weights.type", f"'int{spec.weight.bits}'", "'int8' with quant_cfg.inputs")
    if spec.weight.strategy == "group":
        raise refusal("quant_cfg.weights.strategy", "'group'", "'tensor', 'channel' with quant_cfg.inputs")
    if not spec.weight.symmetric:
        raise refusal("quant_cfg.weights.symmetric", "False", "True with quant_cfg.inputs")


def _batch_num(value: object) -> int:
    return _integer("batch_num", value, f"an int from 1 to {MAX_BATCHES}", low=1, high=MAX_BATCHES)


def _skip_layers(value: object) -> tuple[str, ...]:
    accepted = "None, a non-empty string, or a collection of non-empty strings"
    if value is None:
        return ()
    words = (value,) if isinstance(value, str) else value
    if isinstance(words, (Mapping, bytes)) or not isinstance(words, Collection):
        raise refusal("skip_layers", shown(value), accepted)
    try:
        words = tuple(words)
    except TypeError:
        raise refusal("skip_layers", shown(value), accepted) from None
    for word in words:
        if not isinstance(word, str) or not word:
            raise refusal("skip_layers", shown(value), accepted)
    return tuple(sorted(set(words)))
