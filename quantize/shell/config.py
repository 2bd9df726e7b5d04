"""Turn the config, a plain dict, into frozen values; refuse everything that is not accepted."""

from __future__ import annotations

import difflib
import fnmatch
import re
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from quantize.core.algorithms import ALGORITHMS, Algorithm, LayerSpec
from quantize.core.algorithms.contract import BaseOptions, option
from quantize.core.scheme import Scheme

MAX_BATCHES = 2**32 - 1
_BITS = {"int8": 8, "int4": 4}
# The accepted values of a weights or an inputs entry, by key. group_size is checked apart.
_WEIGHTS = {"type": ("int8", "int4"), "symmetric": (True, False), "strategy": ("tensor", "channel", "group")}
_INPUTS = {"type": ("int8",), "symmetric": (True, False), "strategy": ("tensor", "token")}
_PATTERN = re.compile(r".*\*.*\.(weights|inputs)", re.DOTALL)
_PATTERNS = ", and keys with a '*' that end in '.weights' or '.inputs'"
_FOLD = "True or False; True without sequential"


class QuantizeError(ValueError):
    """A refused call: ``<where>: <value>; accepted: <what>``. The model is as it was.

    >>> raise refusal("batch_num", "0", "an int, at least 1")
    Traceback (most recent call last):
    quantize.shell.config.QuantizeError: batch_num: 0; accepted: an int, at least 1
    """


class QuantizeWarning(UserWarning):
    """Something stays in floating point, or differs from the config; the report says the same.

    >>> import warnings
    >>> warnings.simplefilter("ignore", QuantizeWarning)
    """


def refusal(where: str, found: str, accepted: str) -> QuantizeError:
    """The error that the value ``found`` at ``where`` is not ``accepted``; all errors have this form."""
    return QuantizeError(f"{where}: {found}; accepted: {accepted}")


def shown(value: object) -> str:
    """The repr of a value for an error, shortened if it is long."""
    try:
        return reprlib.repr(value)
    except Exception:  # the repr of a user's class may fail
        return f"a {type(value).__name__}"


@dataclass(frozen=True)
class Schedule(BaseOptions):
    """Options of calibration that an algorithm does not see.

    - ``sequential``: fit every layer to the outputs of the quantized layers before it, not to those of the float model.
    - ``fold``: move the divisor of a layer's inputs into the weights that produce them, where nothing else changes.
    """

    sequential: bool = option(False, "True or False")
    fold: bool = option(False, _FOLD)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fold and self.sequential:
            raise ValueError(f"fold: True with sequential; accepted: {_FOLD}")


class Format(NamedTuple):
    """An entry of ``quant_cfg``; no pattern: of all layers; no scheme: of inputs that stay in floating point."""

    part: str
    pattern: str | None
    scheme: Scheme | None

    def matches(self, names: Iterable[str]) -> bool:
        """Whether the pattern matches one of the ``names`` of a layer."""
        return self.pattern is None or any(fnmatch.fnmatchcase(name, self.pattern) for name in names)

    def __str__(self) -> str:
        return self.part if self.pattern is None else f"{self.pattern}.{self.part}"


@dataclass(frozen=True)
class Config:
    """A config that passed every check."""

    batch_num: int
    formats: tuple[Format, ...]
    name: str
    options: Any
    schedule: Schedule
    skip_layers: tuple[str, ...]

    def spec(self, names: Sequence[str]) -> LayerSpec | None:
        """The format of a layer with these ``names``, None without a weights entry; refuses impossible combinations."""
        spec = _spec(each for each in self.formats if each.matches(names))
        if spec is not None:
            _check(f"layer {names[0]!r}, ", self.name, spec)
        return spec

    def algorithm(self, spec: LayerSpec) -> Algorithm:
        """The algorithm ``name`` for the format ``spec``, with the options."""
        return ALGORITHMS[self.name].algorithm(spec, self.options)

    @property
    def data_free(self) -> bool:
        """Whether every layer can be solved without a batch, whichever entries match it."""
        inputs = {each.scheme for each in self.formats if each.part == "inputs"} or {None}
        return all(self.algorithm(LayerSpec(Scheme(), each)).data_free for each in inputs)


def _spec(formats: Iterable[Format]) -> LayerSpec | None:
    """The format of a layer from all ``formats`` that match it; later ones override earlier ones."""
    chosen = {each.part: each.scheme for each in formats}
    weight = chosen.get("weights")
    return None if weight is None else LayerSpec(weight, chosen.get("inputs"))


def parse(config: object) -> Config:
    """Check ``config`` against the table in the README; the first value that is not accepted is a QuantizeError."""
    top = _dict("config", config, "quant_cfg", "algorithm", optional=("batch_num", "skip_layers"))
    batch_num, words = top.get("batch_num", 1), top.get("skip_layers")
    if type(batch_num) is not int or not 1 <= batch_num <= MAX_BATCHES:  # isinstance would accept a bool
        raise refusal("batch_num", shown(batch_num), f"an int from 1 to {MAX_BATCHES}")
    if not _are_words(words):
        raise refusal("skip_layers", shown(words), "None, a non-empty string, or a collection of non-empty strings")
    formats = _formats(top["quant_cfg"])
    name, given = _named(top["algorithm"])
    # With patterns, the combination is checked for every layer.
    usual = None if any(each.pattern for each in formats) else _spec(formats)
    if usual is not None:
        _check("", name, usual)
    skip_layers = (words,) if isinstance(words, str) else tuple(sorted(set(words or ())))
    quantizes_inputs = any(each.part == "inputs" and each.scheme is not None for each in formats)
    return Config(batch_num, formats, name, *_options(name, given, quantizes_inputs), skip_layers)


def _formats(value: Any) -> tuple[Format, ...]:
    """The entries of ``quant_cfg``: the global ones first, then those with a pattern in the given order."""
    keys = value if isinstance(value, Mapping) else ()
    patterns = [key for key in keys if isinstance(key, str) and _PATTERN.fullmatch(key)]
    needed = [] if any(key.endswith(".weights") for key in patterns) else ["weights"]
    _dict("quant_cfg", value, *needed, optional=["weights", "inputs"][len(needed) :], patterns=patterns)
    found = []
    for key in ("weights", "inputs", *patterns):
        pattern, _, part = key.rpartition(".")
        entry = value.get(key)
        if entry is None and not pattern and key not in needed:
            continue
        where = f"quant_cfg.{key!r}" if pattern else f"quant_cfg.{key}"
        on = True
        if part == "inputs" and isinstance(entry, Mapping) and "enable_quant" in entry:
            on, entry = entry["enable_quant"], {word: entry[word] for word in entry if word != "enable_quant"}
            if type(on) is not bool:
                raise refusal(f"{where}.enable_quant", shown(on), "True or False")
        scheme = _scheme(where, entry, _INPUTS if part == "inputs" else _WEIGHTS) if on else None
        found.append(Format(part, pattern or None, scheme))
    return tuple(found)


def _dict(
    where: str, value: Any, *required: str, optional: Collection[str] = (), patterns: Collection[str] | None = None
) -> Mapping[str, Any]:
    """``value``, if it is a dict with the ``required`` keys and otherwise only ``optional`` ones and ``patterns``."""
    accepted = f"a dict with {_listed((*required, *optional)) or 'no keys'}" + _PATTERNS * (patterns is not None)
    if not isinstance(value, Mapping):
        raise refusal(where, shown(value), accepted)
    for key in value:
        if key not in (patterns or ()):
            _known(where, "key", key, (*required, *optional))
    for key in required:
        if key not in value:
            raise refusal(f"{where}.{key}".removeprefix("config."), "missing", accepted)
    return value


def _known(where: str, what: str, name: object, known: Collection[str]) -> None:
    if not isinstance(name, str) or name not in known:
        close = difflib.get_close_matches(name, known, n=1) if isinstance(name, str) else []
        accepted = (_listed(known) or "none") + "".join(f"; did you mean {each!r}?" for each in close)
        raise refusal(where, f"unknown {what} {shown(name)}", accepted)


def _listed(words: Iterable[object]) -> str:
    return ", ".join(map(repr, words))


def _are_words(value: Any) -> bool:
    if isinstance(value, (Mapping, bytes)) or not isinstance(value, Collection):
        return value is None
    try:
        return value != "" and all(isinstance(word, str) and word for word in value)
    except TypeError:  # NumPy arrays without dimensions cannot be iterated
        return False


def _scheme(where: str, value: object, accepted: Mapping[str, tuple[Any, ...]]) -> Scheme:
    """The format that the entry ``value``, at ``where`` in the config, asks for."""
    given = _dict(where, value, *accepted, optional=() if accepted is _INPUTS else ("group_size",))
    for key, words in accepted.items():
        if not (isinstance(given[key], type(words[0])) and given[key] in words):
            told = " or ".join(map(str, words)) if key == "symmetric" else _listed(words)
            raise refusal(f"{where}.{key}", shown(given[key]), told)
    size, grouped = given.get("group_size"), given["strategy"] == "group"
    if not grouped and size is not None:
        raise refusal(f"{where}.group_size", f"{shown(size)} with strategy {given['strategy']!r}", "strategy 'group'")
    if grouped and not (type(size) is int and size >= 32 and size % 32 == 0):
        raise refusal(f"{where}.group_size", shown(size), "an int, a multiple of 32, below the layer's in_features")
    return Scheme(_BITS[given["type"]], given["symmetric"], given["strategy"], size)


def _named(value: Any) -> tuple[str, Any]:
    """The name of the algorithm, and the value given for its options."""
    names = list(value) if isinstance(value, (Mapping, set, frozenset, list, tuple)) else [value]
    if len(names) != 1 or not isinstance(names[0], str):
        accepted = "as a name, a collection of one name, or a dict of one name to options"
        raise refusal("algorithm", shown(value), f"one of {_listed(ALGORITHMS)}, {accepted}")
    _known("algorithm", "name", names[0], ALGORITHMS)
    return names[0], {} if not isinstance(value, Mapping) or value[names[0]] is None else value[names[0]]


def _check(where: str, name: str, spec: LayerSpec) -> None:
    """Refuse formats and an algorithm that do not go together; errors begin with ``where``."""
    if spec.inputs is not None and spec.weight.strategy == "group":
        raise refusal(f"{where}quant_cfg.weights.strategy", "'group'", "'tensor', 'channel' with quant_cfg.inputs")
    fitting = [each for each, module in ALGORITHMS.items() if (spec.inputs is not None) in module.QUANTIZES_INPUTS]
    if name not in fitting:
        has, wants = ("quantized", "float") if spec.inputs else ("float", "quantized")
        wanted = f"{wants} inputs, {'the layer in skip_layers, ' * bool(where)}or one of {_listed(fitting)}"
        raise refusal(f"{where}algorithm", f"{shown(name)} with {has} inputs", wanted)


def _options(name: str, given: Any, quantizes_inputs: bool) -> tuple[Any, Schedule]:
    """Options and schedule from one dict; keys of the schedule are accepted only where they have an effect."""
    where, module = f"algorithm.{name}", ALGORITHMS[name]
    spec = LayerSpec(Scheme(), Scheme(strategy="tensor") if quantizes_inputs else None)
    own, usual = [f.name for f in fields(module.Options)], module.algorithm(spec, module.Options())
    _dict(where, given, optional=own + ["sequential"] * (not usual.data_free) + ["fold"] * (usual.scale is not None))
    try:
        options = module.Options(**{key: given[key] for key in given if key in own})
        default = {"sequential": module.algorithm(spec, options).paired is not None and not given.get("fold")}
        return options, Schedule(**default | {key: given[key] for key in given if key not in own})
    except ValueError as error:
        raise QuantizeError(f"{where}.{error}") from None
