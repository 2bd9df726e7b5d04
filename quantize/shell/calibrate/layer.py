"""The layer that observes its inputs, and then computes as the quantized layer will."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn import functional

from quantize.core import Algorithm, LayerSpec, Observer, Scheme, Solution, affine, linear, metrics
from quantize.shell import offload
from quantize.shell.calibrate.session import Session
from quantize.shell.config import refusal, shown
from quantize.shell.deploy import layer as deployment
from quantize.shell.deploy import state as saved
from quantize.shell.deploy.kernels import Layout
from quantize.shell.fold.producers import Foldable
from quantize.shell.report.rows import Row
from quantize.shell.views import adopt


class CalibrationLinear(Foldable):
    """A linear layer under calibration: the parameters of the original, and statistics of its inputs.

    It computes in floating point until :attr:`active`, then as the quantized layer will. It holds its own ``tokens``,
    ``statistics`` and ``solution``, so these are copied, pickled, moved and saved with the model. The :attr:`session`
    holds everything else. ``statistics`` are empty until a pass has reached the layer.
    """

    def __init__(self, original: nn.Linear, names: tuple[str, ...], session: Session) -> None:
        # That of nn.Linear would make new parameters.
        nn.Module.__init__(self)
        self.names, self.session = names, session
        self.out_features, self.in_features = original.weight.shape
        # The same objects, so that ties to other modules, gradients and optimizers stay valid.
        self._parameters.update(original._parameters)
        self.tokens, self.active = 0, False
        self.statistics: Any = ()
        self.solution: Solution | None = None
        self.folded = None
        self.own = frozenset({*vars(self), "own"})
        adopt(self, original)

    @offload.hooked
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear gives it
        """Map ``input`` ``[..., c]`` to ``[..., n]``: in floating point, or fake-quantized once the model is solved."""
        watching = self.session.watching
        quantized = self.active if watching is None or self.active else watching(self, input)
        # Read the solution after the observer has run, which may wait until this layer is solved.
        s = self.solution
        if s is None or not quantized:
            x = input if self.folded is None else input * self.folded.to(input.dtype)
            return functional.linear(x, offload.weight(self, self.names[0]), offload.bias(self, self.names[0]))
        bias = offload.bias(self, self.names[0])
        with torch.autocast(input.device.type, enabled=False):
            return linear.fake_quantized_linear(
                input, s.weight, bias, inputs=s.inputs, smoothing=s.smoothing, static=s.static
            )

    def updated(self, statistics: Any, tokens: Tensor, *originals: Tensor) -> Any:
        """``statistics`` with ``tokens`` ``[..., c]`` added; ``originals`` are the inputs of the float model."""
        return self.observer.update(statistics or self.initial(), tokens, *originals)

    def initial(self) -> Any:
        """The statistics of no tokens."""
        dtype, device = affine.working_dtype(self.weight), offload.device(self)
        return self.observer.init(self.in_features, dtype=dtype, device=device)

    def float_weight(self) -> Tensor:
        """The weight ``[n, c]`` on the device where the layer computes, without gradients; read if it is offloaded."""
        return offload.weight(self, self.names[0]).detach()

    def statistic(self) -> Any:
        """The final statistic of the inputs, in the dtype in which the algorithm computes."""
        # The model may have been cast since; weight and statistic need one dtype.
        dtype, found = affine.working_dtype(self.weight), self.observer.finalize(self.statistics)
        return pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, found)

    def adopt(self, solution: Solution) -> None:
        """Set the ``solution``, and drop the statistics."""
        self.solution, self.statistics = solution, ()
        self._follow_weight()

    def deployed(self, kernel: str | None = None, *, kept: bool = False) -> deployment.QuantizedLinear:
        """The deployed layer that replaces this one; with ``kept``, its tensors are stored with the float weight."""
        assert self.solution is not None
        row = replace(self.record(), stage="converted")
        bias, away = offload.bias(self, self.names[0]), offload.away(self) if kept else None
        if bias is not None and bias is not self.bias:
            bias = nn.Parameter(bias.clone(), self.bias.requires_grad)
        layer = deployment.QuantizedLinear(self.solution, bias, row, self.weight.dtype, kernel, away)
        adopt(layer, self)
        return layer

    @property
    def spec(self) -> LayerSpec:
        """The format in which the layer is quantized."""
        return self.session.specs[self.names[0]]

    @property
    def algorithm(self) -> Algorithm:
        """The algorithm of the config, for that format."""
        return self.session.config.algorithm(self.spec)

    @property
    def observer(self) -> Observer:
        """The observer of the inputs: the paired one if the layers are fitted in the order of execution."""
        algorithm = self.algorithm
        return algorithm.observer if algorithm.paired is None or not self.session.sequential else algorithm.paired

    @property
    def fell_back(self) -> bool:
        """Whether too few tokens reached the layer for its algorithm, so that it uses minmax."""
        return self.tokens < self.algorithm.fewest and not self.algorithm.data_free

    def record(self) -> Row:
        """The row of this layer in the report."""
        config, s = self.session.config, self.solution
        known: dict[str, Any] = {}
        if s is not None:
            reached = s.effective_weight()
            weight = self.float_weight().to(reached.device, reached.dtype)
            known = {
                "weight_sqnr": metrics.sqnr(weight if self.folded is None else weight * self.folded, reached).item(),
                "error": None if s.error is None else s.error.item(),
                "baseline_error": None if s.baseline_error is None else s.baseline_error.item(),
                "notes": {name: value.item() for name, value in s.notes.items()},
            }
        return Row(
            self.names,
            (self.out_features, self.in_features),
            weights=self.spec.weight,
            inputs=self.spec.inputs if s is None else s.inputs,
            algorithm=config.name,
            fell_back=s is not None and self.fell_back,
            stage="quantized" if self.active else "calibrating",
            tokens=self.tokens,
            **known,
        )

    def extra_repr(self) -> str:
        """Shape, format and progress, as ``print(model)`` shows them."""
        config = self.session.config
        done = "quantized" if self.active else f"{self.session.seen} of {config.batch_num} batches"
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.spec.weight}, {done}"

    def get_extra_state(self) -> dict[str, Any]:
        """The state in plain containers of tensors and numbers, which ``torch.load`` reads with ``weights_only``."""
        return {
            "format": self.format(),
            "seen": self.session.seen,
            "tokens": self.tokens,
            "active": self.active,
            "statistics": pytree.tree_leaves(self.statistics),
            "solution": None if self.solution is None else saved.tensors(self.solution),
            "folded": self.folded,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Continue from the ``state`` of a saved layer.

        Raises:
            QuantizeError: the saved layer was quantized with another config.
        """
        self.check(state)
        # Each layer sets this, so that parts of a model can be loaded one by one.
        self.session.seen = state["seen"]
        self.tokens, self.active = state["tokens"], state["active"]
        self.statistics, self.solution, self.folded = (), None, state["folded"]
        leaves, held, spec = state["statistics"], state["solution"], self.spec
        if leaves:
            self.statistics = pytree.tree_unflatten(leaves, pytree.tree_structure(self.observer.init(0)))
        if held is not None:
            spec = spec if "input_scale" in held else replace(spec, inputs=dynamic(spec.inputs))
            layout = Layout(spec, self.out_features, self.in_features, self.weight.dtype)
            self.solution = saved.solution(self.names[0], held, layout)
        self._follow_weight()

    def check(self, state: object) -> None:
        """Refuse the ``state`` of a layer that was quantized with another config."""
        found = state.get("format") if isinstance(state, dict) else None
        if found != self.format():
            raise refusal(f"layer {self.names[0]!r}", str(found), f"a state of {self.format()}")

    def format(self) -> str:
        """The algorithm, schemes and options as text; a saved state must have the same."""
        config, (weight, inputs) = self.session.config, (self.spec.weight, self.spec.inputs or "float")
        return f"{config.name}, weights {weight}, inputs {inputs}, {config.options}, {config.schedule}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CalibrationLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call] # torch leaves it bare
        self._follow_weight()
        return self

    def _follow_weight(self) -> None:
        # Statistics and solution follow the device of the weight, never its dtype.
        device = offload.device(self)
        self.statistics, self.solution, self.folded = pytree.tree_map_only(
            Tensor, lambda tensor: tensor.to(device), (self.statistics, self.solution, self.folded)
        )


def check_states(model: nn.Module, state: Mapping[str, Any], prefix: str = "") -> None:
    """Check ``state``, in which ``model`` is at ``prefix``, before any of it is loaded.

    Raises:
        QuantizeError: :meth:`CalibrationLinear.check` refuses the state of a layer.
    """
    for name, module in model.named_modules():
        key = f"{prefix}{name}.{saved.EXTRA}"
        if isinstance(module, CalibrationLinear) and key in state:
            module.check(state[key])


QUANTIZED = (CalibrationLinear, deployment.QuantizedLinear)


def check_model(model: object) -> None:
    """Refuse a value that is not a module."""
    if not isinstance(model, nn.Module):
        raise refusal("model", shown(model), "a torch.nn.Module")


def check_float(model: object) -> None:
    """Refuse a value that is not a model in floating point."""
    check_model(model)
    for name, module in cast("nn.Module", model).named_modules():
        if isinstance(module, QUANTIZED):
            raise refusal("model", f"layer {name!r} is quantized already", "a model in floating point")


def calibrated(model: nn.Module) -> list[CalibrationLinear]:
    """All layers under calibration or fake-quantized, each once."""
    return [module for module in model.modules() if isinstance(module, CalibrationLinear)]


def unsolved(model: nn.Module, session: Session | None = None) -> list[CalibrationLinear]:
    """The layers that still compute in floating point: all, or those of ``session``."""
    return [layer for layer in calibrated(model) if not layer.active and session in (None, layer.session)]


def dynamic(inputs: Scheme | None) -> Scheme | None:
    """The format of inputs whose range is not known: one scale for each token."""
    return None if inputs is None else replace(inputs, strategy="token")
