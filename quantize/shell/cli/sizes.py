"""The bytes of a model in its files, before and after. They are the same for all processors and kernels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from quantize.shell.deploy import state
from quantize.shell.deploy.kernels import Layout
from quantize.shell.deploy.layer import QuantizedLinear

# Bytes of the quantized layers with their biases, and of the whole model.
Bytes = tuple[int, int]


def before(model: nn.Module, layers: Iterable[nn.Module]) -> Bytes:
    """The bytes of a model in which ``layers`` are still in floating point."""
    return _held(layers), _held(model.modules())


def after(model: nn.Module, layers: Mapping[nn.Module, int]) -> Bytes:
    """The bytes of ``model`` if each of ``layers`` takes the given bytes, and those of its bias."""
    biases = (layer.bias for layer in layers)
    own = sum(layers.values()) + sum(bias.nbytes for bias in biases if isinstance(bias, Tensor))
    return own, own + _held(module for module in model.modules() if module not in layers)


def converted(model: nn.Module) -> Bytes:
    """The bytes of a model after ``convert``."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    return after(model, {each: packed(each.layout, smoothed=hasattr(each, "smoothing")) for each in layers})


def packed(layout: Layout, *, smoothed: bool) -> int:
    """The bytes of a layer: codes, scales, zero points, and parameters of its inputs."""
    return sum(tensor.nbytes for tensor in state.example(layout, smoothed=smoothed).values())


def told(first: Bytes, then: Bytes) -> list[str]:
    """Both bytes as lines of text."""
    return [f"{what}: {b:,} bytes before, {a:,} after ({a / b:.3f} x)"
            for what, b, a in zip(("quantized layers", "whole model"), first, then, strict=True)]  # fmt: skip


def plain(first: Bytes, then: Bytes) -> dict[str, dict[str, int]]:
    """Both bytes as plain values for JSON."""
    return {what: {"before": b, "after": a}
            for what, b, a in zip(("quantized_layers", "whole_model"), first, then, strict=True)}  # fmt: skip


def _held(modules: Iterable[nn.Module]) -> int:
    """The bytes of the own parameters and buffers of ``modules``; shared tensors count once."""
    found = {tensor for module in modules
             for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))}  # fmt: skip
    return sum(tensor.nbytes for tensor in found)
