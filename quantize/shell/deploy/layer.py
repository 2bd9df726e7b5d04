"""The deployed layer. It holds integer codes in the form that its kernel needs, and no float weight."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from quantize.core import LayerSpec, Solution
from quantize.shell import offload
from quantize.shell.config import refusal
from quantize.shell.deploy import state as saved
from quantize.shell.deploy.kernels import KERNELS, Layout, choose, reference
from quantize.shell.report.rows import Row


class QuantizedLinear(nn.Module):
    """A linear layer that computes on integer codes: ``[..., c]`` to ``[..., n]`` in the dtype of its input.

    The buffers have the form of its :attr:`kernel`. A ``state_dict``, a copy and a pickle always have the form of the
    reference kernel: ``codes`` (int8 ``[n, c]``, or uint8 ``[n, ceil(c / 2)]`` with two int4 in a byte), ``scale``, and
    if the solution has them, ``zero_point``, ``smoothing``, ``input_scale``, ``input_zero_point``.

    Args:
        solved: the codes and parameters of the layer.
        bias: the bias of the float layer, ``[n]`` or None.
        row: the row of the layer in the report.
        dtype: the dtype of the float layer and of the inputs.
        kernel: the name of the preferred kernel, which is used if it can serve the layer; None: the fastest one.
        away: the storage of the buffers, if they are offloaded.

    >>> import quantize as qz
    >>> model = nn.Sequential(nn.Linear(8, 4))
    >>> weights = {"type": "int8", "symmetric": True, "strategy": "channel"}
    >>> qz.quantize(model, {"quant_cfg": {"weights": weights}, "algorithm": "minmax"})
    >>> qz.convert(model, kernel="reference")
    >>> model[0].weight.shape, model[0].codes.dtype
    (torch.Size([4, 8]), torch.int8)
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        solved: Solution,
        bias: nn.Parameter | None,
        row: Row,
        dtype: torch.dtype,
        kernel: str | None = None,
        away: offload.OffloadedStorage | None = None,
    ) -> None:
        super().__init__()
        self.row, self.wanted, self.away = row, kernel, away
        # The names of the kernel's buffers. Other buffers belong to the user.
        self._kept: tuple[str, ...] = ()
        # The description in the last state_dict, and the prefix of its key there.
        self._saved: tuple[weakref.ref[Tensor], str] | None = None
        self.register_parameter("bias", bias)
        self._hold(solved, dtype)

    def _hold(self, solved: Solution, dtype: torch.dtype) -> None:
        """Choose a kernel for ``solved``, and replace the buffers by the tensors that the kernel prepares."""
        if (away := self.away) is not None:
            solved = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(away.device), solved)
        self.kernel, self.reason = choose(solved, self.bias, dtype, self.wanted)
        self.out_features, self.in_features = n, c = solved.weight.codes.shape
        self.layout = Layout(LayerSpec(solved.weight.scheme, solved.inputs), n, c, dtype)
        with torch.no_grad():
            held = KERNELS[self.kernel].prepare(solved, dtype)
            held = held if away is None else away.put(held)
        for name in self._kept:
            delattr(self, name)
        for name, tensor in held.items():
            self.register_buffer(name, tensor, persistent=False)
        self._kept = tuple(held)

    @property
    def solution(self) -> Solution:
        """The codes and parameters of this layer, as a value of the core."""
        return reference.restore(self._held(), self.layout, KERNELS[self.kernel].unpack)

    @property
    def weight(self) -> Tensor:
        """The float weight ``[n, c]`` that the codes stand for, for owners that read it. Every access computes it."""
        return self.solution.effective_weight().to(self.layout.dtype)

    def _held(self) -> dict[str, Tensor]:
        held = {name: tensor for name in self._kept if (tensor := self._buffers[name]) is not None}
        return held if self.away is None else self.away.here(held)

    @offload.hooked
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear gives it
        """Compute with the kernel; see :func:`quantize.core.linear.quantized_linear`."""
        if not input.is_floating_point():
            raise refusal(f"layer {self.row.name!r}", f"inputs of {input.dtype}", "inputs in floating point")
        kind = input.device.type
        # Autocast would round the matmul of the codes, which is exact.
        casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if casts else nullcontext():
            if (input.requires_grad and torch.is_grad_enabled()) or _has_tangent(input):
                # Only the operators of the reference kernel have derivatives.
                return reference.compute(input, self.solution, self.bias)
            return KERNELS[self.kernel].forward(input, self._held(), self.layout, self.bias)

    def record(self) -> Row:
        """The row of this layer in the report."""
        return replace(self.row, kernel=self.kernel, kernel_reason=self.reason)

    def extra_repr(self) -> str:
        """Shape, format and kernel, as ``print(model)`` shows them."""
        spec = self.layout.spec
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, {spec.weight}, inputs {spec.inputs or 'float'}, kernel {self.kernel}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        held, solved = self._held(), self.solution
        dtype, device = self.layout.dtype, held["scale"].device
        # A cast of the model changes the dtype of the bias. Scales keep the precision in which they were computed.
        kept = {id(tensor) for tensor in pytree.tree_leaves((held, solved))}

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return tensor.to(new.device) if id(tensor) in kept and new.dtype != tensor.dtype else new

        probe = fn(torch.empty(0, dtype=dtype, device=device))
        stays = (probe.dtype, probe.device) == (dtype, device) and self.away is None
        solved = solved if stays else pytree.tree_map_only(Tensor, moved, solved)
        super()._apply(moved, recurse)  # type: ignore[no-untyped-call] # torch leaves it bare
        if not stays:
            self._hold(solved, probe.dtype)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # The form of a kernel may be specific to this processor.
        others = {name: buffer for name, buffer in self._buffers.items() if name not in self._kept}
        form = reference.prepare(self.solution)
        return {**self.__dict__, "_buffers": others | form, "_kept": tuple(form), "_saved": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call] # torch leaves it bare
        self._hold(reference.restore(self._held(), self.layout), self.layout.dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if isinstance(destination, saved.Outline):
            return
        mark, first = self._saved or (object, "")
        if destination.get(first + saved.EXTRA, self) is mark():
            # A second name gets the same tensors, so that savers that drop shared tensors drop all of them or none.
            own = {key: destination[first + key] for key in saved.KEYS if first + key in destination}
        else:
            own = {saved.EXTRA: saved.describe(self.row, self.layout.dtype), **saved.tensors(self.solution)}
            self._saved = weakref.ref(own[saved.EXTRA]), prefix
        destination.update({prefix + key: tensor for key, tensor in own.items()})

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        # Each module gets its own dict from torch, which would report these keys as unexpected.
        own = {key: state_dict.pop(prefix + key) for key in saved.KEYS if prefix + key in state_dict}
        if own:
            name = prefix.removesuffix(".")
            layout, row = saved.read(name, own.get(saved.EXTRA))
            if layout != self.layout:
                raise refusal(f"layer {name!r}", saved.text(layout), saved.text(self.layout))
            solved = saved.solution(name, own, layout)
            # As for parameters: the tensors are copied, unless assign=True.
            if not local_metadata.get("assign_to_params_buffers", False):
                device = self._held()["scale"].device
                solved = pytree.tree_map_only(Tensor, lambda t: t.to(device, copy=True), solved)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        if own:
            self.row = row
            self._hold(solved, layout.dtype)
        else:
            _, missing, *_ = rest
            missing += [prefix + key for key in (saved.EXTRA, *saved.tensors(self.solution))]


def _has_tangent(x: Tensor) -> bool:
    # Forward-mode derivatives do not show in requires_grad.
    if torch.compiler.is_compiling():
        return False
    return unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call] # torch leaves it bare
