"""A solved layer as tensors: how it is written for a ``state_dict``, and read back with every check."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantize.core import LayerSpec, Solution
from quantize.shell.config import refusal, shown
from quantize.shell.deploy.kernels import Layout, reference
from quantize.shell.report.rows import Row, as_plain, from_plain

EXTRA = "_extra_state"
TENSORS = ("codes", "scale", "zero_point", "smoothing", "input_scale", "input_zero_point")
KEYS = (*TENSORS, EXTRA)
_MARK, _VERSION = "quantized_linear", 2
_NOTE = "note."
# Descriptions are padded to whole blocks, because loaders that read in place need one shape for all.
_BLOCK = 1024
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def describe(row: Row, dtype: torch.dtype) -> Tensor:
    """A layer on inputs of ``dtype``: JSON in a uint8 tensor ``[1024 k]``, filled up with spaces."""
    told = {_MARK: _VERSION, "dtype": str(dtype).removeprefix("torch."), "row": as_plain(row)}
    text = json.dumps(told).encode()
    padded = text.ljust(-(-len(text) // _BLOCK) * _BLOCK)
    return torch.tensor(list(padded), dtype=torch.uint8, device="cpu")


def described(extra: object) -> bool:
    """Whether ``extra`` is what :func:`describe` makes, in this version or another."""
    return _MARK in _told(extra)


def read(name: str, extra: object) -> tuple[Layout, Row]:
    """Undo :func:`describe` for the layer ``name``.

    Raises:
        QuantizeError: it is something else, or of another version.
    """
    where, told = f"layer {name!r}", _told(extra)
    if told.get(_MARK) != _VERSION:
        found = "no such state" if extra is None else f"version {told[_MARK]!r}" if told else shown(extra)
        raise refusal(where, found, f"the state of a converted layer, version {_VERSION}")
    try:
        row = from_plain(told["row"])
        return Layout(LayerSpec(row.weights, row.inputs), *row.shape, _DTYPES[told["dtype"]]), row
    except (KeyError, TypeError, ValueError) as error:
        found = f"a state that cannot be read ({type(error).__name__}: {error})"
        raise refusal(where, found, "what a converted layer saves") from error


def tensors(solved: Solution) -> dict[str, Tensor]:
    """All of ``solved`` by name: :data:`TENSORS`, scalars for its errors, and ``note.<name>`` for each note.

    Layers may share scales and smoothing, and savers drop shared tensors: those are copied. Codes are the layer's own.
    """
    scalars = {"error": solved.error, "baseline_error": solved.baseline_error}
    scalars |= {_NOTE + key: value for key, value in solved.notes.items()}
    parts = {**reference.prepare(solved), **scalars}
    return {key: t if key == "codes" else t.clone() for key, t in parts.items() if t is not None}


def solution(name: str, held: Mapping[str, Any], layout: Layout) -> Solution:
    """Undo :func:`tensors` for the layer ``name``; ``held`` may have other keys.

    Raises:
        QuantizeError: a tensor that is missing, has another shape or dtype than ``layout`` says, or does not belong
            to that format.
    """
    where, forms = f"layer {name!r}", _forms(layout, held)
    for key in (key for key in TENSORS if key in held and key not in forms):
        raise refusal(where, f"{key!r} in the state", f"{', '.join(forms)} with {text(layout)}")
    for key, (shape, dtypes) in forms.items():
        tensor = held.get(key)
        accepted = f"{key!r}, {' or '.join(map(str, dtypes))} {list(shape)}"
        if not isinstance(tensor, Tensor):
            raise refusal(where, f"no {key!r} in the state", accepted)
        if tensor.shape != shape or tensor.dtype not in dtypes:
            raise refusal(where, f"{key!r}, {tensor.dtype} {list(tensor.shape)}", accepted)
    solved = reference.restore({key: held[key] for key in forms}, layout)
    notes = {key.removeprefix(_NOTE): value for key, value in held.items() if key.startswith(_NOTE)}
    return replace(solved, error=held.get("error"), baseline_error=held.get("baseline_error"), notes=notes)


def text(layout: Layout) -> str:
    """Shape and format, as errors show them."""
    spec = layout.spec
    return f"{layout.n}x{layout.c}, weights {spec.weight}, inputs {spec.inputs or 'float'}, {layout.dtype}"


def _told(extra: object) -> Mapping[str, Any]:
    """The content of a description; empty for anything else."""
    if isinstance(extra, Tensor) and extra.dtype == torch.uint8 and extra.ndim == 1 and not extra.is_meta:
        try:
            extra = json.loads(bytes(extra.tolist()))
        except ValueError:
            return {}
    # Version 1 was a dict.
    return extra if isinstance(extra, Mapping) and _MARK in extra else {}


def _forms(layout: Layout, held: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """Shape and accepted dtypes of each tensor."""
    scheme, inputs = layout.spec.weight, layout.spec.inputs
    n, c = layout.n, layout.c
    g = scheme.grid_shape(n, c)
    floats = (torch.float32, torch.float64)
    # Narrow codes are kept two to a byte.
    per_byte, integers = (2, (torch.uint8,)) if reference.narrow(scheme) else (1, (torch.int8,))
    forms: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "codes": ((n, -(-c // per_byte)), integers),
        "scale": (g, floats),
    }
    if not scheme.symmetric:
        forms["zero_point"] = ((g[0], -(-g[1] // per_byte)), integers)
    if "smoothing" in held:
        forms["smoothing"] = ((c,), floats)
    if inputs is not None and inputs.strategy == "tensor":
        forms["input_scale"] = ((1, 1), floats)
        if not inputs.symmetric:
            forms["input_zero_point"] = ((1, 1), (torch.int8,))
    return forms
