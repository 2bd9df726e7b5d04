"""The deployed layer: codes and parameters in, no float weight left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantize.core import QParams, QTensor, Scheme, Solution
from quantize.shell.kernels import reference
from quantize.shell.report import Row


def tensors(solution: Solution) -> dict[str, Tensor | None]:
    """The tensors that a kernel reads, by the names that they have in a ``state_dict``."""
    static = solution.static or (None, None)
    return {
        "codes": solution.weight.codes,
        "scale": solution.weight.scale,
        "zero_point": solution.weight.zero_point,
        "smoothing": solution.smoothing,
        "input_scale": static[0],
        "input_zero_point": static[1],
    }


def solution(held: Mapping[str, Any], weights: Scheme, inputs: Scheme | None) -> Solution:
    """Undo :func:`tensors`."""
    static = None if held["input_scale"] is None else QParams(held["input_scale"], held["input_zero_point"])
    weight = QTensor(held["codes"], held["scale"], held["zero_point"], weights)
    return Solution(weight, inputs, held["smoothing"], static)


def adopt(new: nn.Module, old: nn.Module) -> None:
    """Give ``new`` what users attach to a module: its hooks, the very same dicts, and the training flag."""
    new.__dict__.update({key: value for key, value in old.__dict__.items() if "_hook" in key})
    new.training = old.training


class QuantizedLinear(nn.Module):
    """A linear layer on integer codes: ``[..., c]`` to ``[..., n]`` in the dtype of its input.

    Buffers: ``codes`` int8 ``[n, c]``, ``scale``, and where the solution has them ``zero_point``, ``smoothing``,
    ``input_scale``, ``input_zero_point``. The parameter ``bias`` is the original's.
    """

    bias: nn.Parameter | None

    def __init__(self, solved: Solution, bias: nn.Parameter | None, record: Row, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.out_features, self.in_features = solved.weight.codes.shape
        self.weights, self.inputs = solved.weight.scheme, solved.inputs
        self.record = record
        for name, tensor in tensors(solved).items():
            self.register_buffer(name, tensor)
        self.register_parameter("bias", bias)

    @property
    def solution(self) -> Solution:
        """The tensors of this layer as the core's value."""
        return solution(self._buffers, self.weights, self.inputs)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear gives it
        """Compute with the kernel; see :func:`quantize.core.linear.quantized_linear`."""
        held = self.solution
        # Autocast would round the matmul of the codes, which is exact as it stands.
        with torch.autocast(input.device.type, enabled=False):
            return reference.linear(
                input, held.weight, self.bias, inputs=held.inputs, smoothing=held.smoothing, static=held.static
            )

    @property
    def weight(self) -> Tensor:
        """The weight ``[n, c]`` that the codes stand for, made on every access: for owners that read it directly."""
        return self.solution.effective_weight().to(self.dtype)

    def extra_repr(self) -> str:
        """Shape and format, as ``print(model)`` shows them."""
        inputs = self.inputs or "float"
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.weights}, inputs {inputs}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # A cast of the model moves the bias; scales keep the precision in which they were computed.
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call] # torch leaves it bare
        for name, tensor in before.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self
