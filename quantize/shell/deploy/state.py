"""A solved layer as the tensors of a ``state_dict``: writing them, and reading them back with checks."""

from __future__ import annotations

import functools
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantize.core import LayerSpec, Solution, round_to_nearest
from quantize.shell.config import refusal, shown
from quantize.shell.deploy.kernels import Layout, reference
from quantize.shell.report.rows import Row, as_plain, from_plain

EXTRA = "_extra_state"
TENSORS = ("codes", "scale", "zero_point", "smoothing", "input_scale", "input_zero_point")
KEYS = (*TENSORS, EXTRA)
_ERRORS = ("error", "baseline_error")
_NOTE = "note."
_MARK, _VERSION = "quantized_linear", 2
# Descriptions are padded to whole blocks, because loaders that read in place need the same shape for all.
_BLOCK = 1024
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
_FLOATS = (torch.float32, torch.float64)


class Outline(OrderedDict[str, Any]):
    """A ``state_dict`` to fill. Quantized layers leave out their solutions and descriptions."""

    def __init__(self) -> None:
        super().__init__()
        self._metadata = OrderedDict[str, dict[str, Any]]()


def describe(row: Row, dtype: torch.dtype) -> Tensor:
    """The description of a layer with inputs of ``dtype``: JSON in a uint8 tensor ``[1024 k]``, padded with spaces."""
    told = {_MARK: _VERSION, "dtype": str(dtype).removeprefix("torch."), "row": as_plain(row)}
    text = json.dumps(told).encode()
    padded = text.ljust(-(-len(text) // _BLOCK) * _BLOCK)
    return torch.tensor(list(padded), dtype=torch.uint8, device="cpu")


def described(extra: object) -> Mapping[str, Any]:
    """The content of a description by :func:`describe`, of any version; empty for anything else."""
    if isinstance(extra, Tensor) and extra.dtype == torch.uint8 and extra.ndim == 1 and not extra.is_meta:
        try:
            extra = json.loads(bytes(extra.tolist()))
        except ValueError:
            return {}
    # In version 1, the description was a dict.
    return extra if isinstance(extra, Mapping) and _MARK in extra else {}


def read(name: str, extra: object) -> tuple[Layout, Row]:
    """Undo :func:`describe` for the layer ``name``; a QuantizeError for anything else, or another version."""
    where, told = f"layer {name!r}", described(extra)
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
    """The tensors of ``solved`` by name: :data:`TENSORS`, scalars for its errors, and ``note.<name>`` for each note.

    All but the codes are copied, because layers may share scales and smoothing, and savers drop shared tensors.
    """
    scalars = {key: getattr(solved, key) for key in _ERRORS}
    scalars |= {_NOTE + key: value for key, value in solved.notes.items()}
    parts = {**reference.prepare(solved), **scalars}
    return {key: t if key == "codes" else t.clone() for key, t in parts.items() if t is not None}


def solution(name: str, held: Mapping[str, Any], layout: Layout) -> Solution:
    """Undo :func:`tensors` for the layer ``name``.

    Raises:
        QuantizeError: a tensor that is missing, has another shape or dtype than ``layout`` says, or does not belong
            to that format.
    """
    notes = {key.removeprefix(_NOTE): value for key, value in held.items() if key.startswith(_NOTE)}
    found = {key: held[key] for key in held if key not in (*_ERRORS, EXTRA) and not key.startswith(_NOTE)}
    like = example(layout, smoothed="smoothing" in held)
    check(f"layer {name!r}", found, like, f"{', '.join(like)} with {text(layout)}", floats=_FLOATS)
    solved = reference.restore(found, layout)
    return replace(solved, error=held.get("error"), baseline_error=held.get("baseline_error"), notes=notes)


def check(
    where: str, found: Mapping[str, Any], like: Mapping[str, Any], keys: str, *, floats: tuple[torch.dtype, ...] = ()
) -> None:
    """Refuse ``found`` unless it has exactly the keys of ``like``, which errors describe by ``keys``.

    Tensors need the shapes and dtypes of those in ``like``. Floating-point tensors may have any dtype of ``floats``.
    """
    for key in found.keys() - like.keys():
        raise refusal(where, f"{key!r} in the state", keys)
    for key, wanted in like.items():
        value, told = found.get(key), f"no {key!r} in the state"
        fits, accepted = key in found, repr(key)
        if isinstance(wanted, Tensor):
            dtypes = floats if floats and wanted.is_floating_point() else (wanted.dtype,)
            fits, accepted = False, f"{key!r}, {' or '.join(map(str, dtypes))} {list(wanted.shape)}"
            if isinstance(value, Tensor):
                fits = value.shape == wanted.shape and value.dtype in dtypes
                told = f"{key!r}, {value.dtype} {list(value.shape)}"
        if not fits:
            raise refusal(where, told, accepted)


def text(layout: Layout) -> str:
    """Shape, formats and dtype, as errors show them."""
    spec = layout.spec
    return f"{layout.n}x{layout.c}, weights {spec.weight}, inputs {spec.inputs or 'float'}, {layout.dtype}"


@functools.cache
def example(layout: Layout, *, smoothed: bool) -> Mapping[str, Tensor]:
    """Meta tensors with the shapes and dtypes that :func:`reference.prepare` gives for such a layer."""
    weights, inputs = layout.spec.weight, layout.spec.inputs
    with torch.device("meta"):
        weight, smoothing = torch.empty(layout.n, layout.c), torch.empty(layout.c) if smoothed else None
        static = inputs if inputs is not None and inputs.strategy == "tensor" else None
        params = None if static is None else round_to_nearest(torch.empty(1, 1), static).params
        return reference.prepare(Solution(round_to_nearest(weight, weights), inputs, smoothing, params))
