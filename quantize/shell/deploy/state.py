"""What a ``state_dict`` holds of a converted layer: how it is described, and checked before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from quantize.core import LayerSpec, Scheme, Solution
from quantize.shell.config import refusal, shown
from quantize.shell.deploy.kernels import Layout, reference
from quantize.shell.report.rows import Row, as_plain, from_plain

EXTRA = "_extra_state"
TENSORS = ("codes", "scale", "zero_point", "smoothing", "input_scale", "input_zero_point")
# Shape, and the dtypes that are accepted.
_Form = tuple[tuple[int, ...], tuple[torch.dtype, ...]]
_MARK, _VERSION = "quantized_linear", 1
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def describe(layout: Layout, row: Row) -> dict[str, Any]:
    """Format and report of a layer, as plain containers, so that ``torch.load`` reads them with ``weights_only``."""
    inputs = layout.spec.inputs
    return {
        _MARK: _VERSION,
        "weights": asdict(layout.spec.weight),
        "inputs": None if inputs is None else asdict(inputs),
        "shape": [layout.n, layout.c],
        "dtype": str(layout.dtype).removeprefix("torch."),
        "row": as_plain(row),
    }


def described(extra: object) -> bool:
    """Whether ``extra`` is what :func:`describe` makes."""
    return isinstance(extra, Mapping) and _MARK in extra


def row(extra: Mapping[str, Any]) -> Row:
    """The row of the report in what :func:`describe` makes."""
    return from_plain(extra["row"])


def layout(name: str, extra: object) -> Layout:
    """The format in what :func:`describe` makes.

    Raises:
        QuantizeError: it is something else, or of another version.
    """
    if not isinstance(extra, Mapping) or extra.get(_MARK) != _VERSION:
        found = "no such state" if extra is None else shown(extra)
        raise refusal(f"layer {name!r}", found, f"the state of a converted layer, version {_VERSION}")
    try:
        row(extra)
        inputs = extra["inputs"]
        spec = LayerSpec(Scheme(**extra["weights"]), None if inputs is None else Scheme(**inputs))
        n, c = extra["shape"]
        return Layout(spec, n, c, _DTYPES[extra["dtype"]])
    except (KeyError, TypeError, ValueError) as error:
        told = f"a state that cannot be read ({type(error).__name__}: {error})"
        raise refusal(f"layer {name!r}", told, "what a converted layer saves") from error


def solution(name: str, held: Mapping[str, Any], expected: Layout) -> Solution:
    """The solved layer in ``held``, the part of a ``state_dict`` that belongs to the layer ``name``.

    Raises:
        QuantizeError: another format, shape or dtype than ``expected``, a key that is missing, or a tensor that does
            not belong to the format.
    """
    where, found = f"layer {name!r}", layout(name, held.get(EXTRA))
    if found != expected:
        raise refusal(where, _told(found), _told(expected))
    forms = _forms(found, held)
    for key in (key for key in TENSORS if key in held and key not in forms):
        raise refusal(where, f"{key!r} in the state", f"{', '.join(forms)} with {_told(found)}")
    for key, (shape, dtypes) in forms.items():
        tensor = held.get(key)
        accepted = f"{' or '.join(map(str, dtypes))} {list(shape)}"
        if not isinstance(tensor, Tensor):
            raise refusal(where, f"no {key!r} in the state", f"{key!r}, {accepted}")
        if tensor.shape != shape or tensor.dtype not in dtypes:
            raise refusal(where, f"{key!r}, {tensor.dtype} {list(tensor.shape)}", f"{key!r}, {accepted}")
    return reference.restore({key: held[key] for key in TENSORS if key in held}, found)


def _forms(layout: Layout, held: Mapping[str, Any]) -> dict[str, _Form]:
    scheme, inputs = layout.spec.weight, layout.spec.inputs
    n, c = layout.n, layout.c
    g = scheme.grid_shape(n, c)
    floats = (torch.float32, torch.float64)
    # Narrow codes are kept two to a byte.
    per_byte, integers = (2, (torch.uint8,)) if reference.narrow(scheme) else (1, (torch.int8,))
    forms: dict[str, _Form] = {"codes": ((n, -(-c // per_byte)), integers), "scale": (g, floats)}
    if not scheme.symmetric:
        forms["zero_point"] = ((g[0], -(-g[1] // per_byte)), integers)
    if "smoothing" in held:
        forms["smoothing"] = ((c,), floats)
    if inputs is not None and inputs.strategy == "tensor":
        forms["input_scale"] = ((1, 1), floats)
        if not inputs.symmetric:
            forms["input_zero_point"] = ((1, 1), (torch.int8,))
    return forms


def _told(layout: Layout) -> str:
    shape = f"{layout.n}x{layout.c}"
    return f"{shape}, weights {layout.spec.weight}, inputs {layout.spec.inputs or 'float'}, {layout.dtype}"
