"""The kernel that runs everywhere and defines the result. A ``state_dict`` holds the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.core import LayerSpec, QParams, QTensor, Scheme, Solution, linear, packing


@dataclass(frozen=True)
class Layout:
    """The properties of a deployed layer besides its tensors.

    ``n`` outputs and ``c`` inputs, in the format ``spec``; ``dtype`` is that of the float layer, and of its inputs.
    """

    spec: LayerSpec
    n: int
    c: int
    dtype: torch.dtype


def obstacle(_solved: Solution, _bias: Tensor | None, _dtype: torch.dtype) -> None:
    """None: this kernel serves every layer."""


def prepare(solved: Solution, _dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The codes, two to a byte if they have at most 4 bits, and :func:`parameters`."""
    return {"codes": _packed(solved.weight.codes, solved.weight.scheme), **parameters(solved)}


def unpack(held: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """See :class:`.Kernel`."""
    return _unpacked(held["codes"], layout.c)


def parameters(solved: Solution) -> dict[str, Tensor]:
    """All tensors except the codes. Zero points of at most 4 bits are packed two to a byte."""
    weight, static = solved.weight, solved.static
    kept = {
        "scale": weight.scale,
        "zero_point": None if weight.zero_point is None else _packed(weight.zero_point, weight.scheme),
        "smoothing": solved.smoothing,
        "input_scale": None if static is None else static.scale,
        "input_zero_point": None if static is None else static.zero_point,
    }
    return {name: tensor.contiguous() for name, tensor in kept.items() if tensor is not None}


def restore(held: Mapping[str, Tensor], layout: Layout, unpack: Callable[..., Tensor] = unpack) -> Solution:
    """The solution in ``held``, the tensors that a kernel has prepared; ``unpack`` belongs to that kernel."""
    static = QParams(held["input_scale"], held.get("input_zero_point")) if "input_scale" in held else None
    weight = QTensor(unpack(held, layout), held["scale"], zero_point(held), layout.spec.weight)
    return Solution(weight, layout.spec.inputs, held.get("smoothing"), static)


def zero_point(held: Mapping[str, Tensor]) -> Tensor | None:
    """The zero points of :func:`parameters`, unpacked to the shape of the scales; None if there are none."""
    return _unpacked(held["zero_point"], held["scale"].shape[1]) if "zero_point" in held else None


def forward(x: Tensor, held: Mapping[str, Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
    """See :func:`compute`."""
    return compute(x, restore(held, layout), bias)


def compute(x: Tensor, s: Solution, bias: Tensor | None) -> Tensor:
    """:func:`quantize.core.linear.quantized_linear` with the solution ``s``."""
    return linear.quantized_linear(x, s.weight, bias, inputs=s.inputs, smoothing=s.smoothing, static=s.static)


def narrow(scheme: Scheme) -> bool:
    """Whether codes of ``scheme`` are packed two to a byte."""
    return scheme.bits <= 4


def _packed(codes: Tensor, scheme: Scheme) -> Tensor:
    return packing.pack_int4(codes) if narrow(scheme) else codes.contiguous()


def _unpacked(codes: Tensor, length: int) -> Tensor:
    return codes if codes.dtype == torch.int8 else packing.unpack_int4(codes, length)
