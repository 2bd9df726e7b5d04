"""The layer that watches, and then computes as the quantized layer will."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn import functional

from quantize.core import LayerSpec, Scheme, Solution, affine, linear, metrics, minmax
from quantize.shell.calibrate.batches import Batch
from quantize.shell.config import Config, refusal
from quantize.shell.deploy import layer as deployment
from quantize.shell.deploy.kernels import Layout, reference
from quantize.shell.fold.producers import Foldable
from quantize.shell.report.rows import Row

if TYPE_CHECKING:
    from quantize.shell.calibrate.observing import Observing


class CalibrationLinear(Foldable):
    """A linear layer under calibration: the original's parameters, and what was learned of its inputs.

    Computes in floating point until :attr:`active`, then as the quantized layer will. All of the state is on the
    layer (``seen`` batches, ``tokens``, ``statistics``, ``solution``), so that it copies, pickles, moves and enters a
    ``state_dict`` with the model.
    """

    def __init__(self, original: nn.Linear, names: tuple[str, ...], config: Config) -> None:
        # Not that of nn.Linear, which would make new parameters.
        nn.Module.__init__(self)
        self.names, self.config = names, config
        self.out_features, self.in_features = original.weight.shape
        # The very same objects: ties to other modules, gradients and optimizers stay.
        self._parameters.update(original._parameters)
        deployment.adopt(self, original)
        self.seen, self.tokens = 0, 0
        self.statistics: Any = None
        self.solution: Solution | None = None
        self.active = False
        self.recorder: Observing | None = None
        # On the first layer of a session that is solved layer by layer: what the model was called with.
        self.batches: list[Batch] | None = None
        # On the first layer of a session that folds: what the model was called with first.
        self.first: Batch | None = None
        # What makes the inputs divides them by this already, [c].
        self.folded: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear gives it
        """``input`` ``[..., c]`` to ``[..., n]``: float, or fake-quantized once the model is solved."""
        quantized = self.active if self.recorder is None else self.recorder.observe(self, input)
        s = self.solution
        if s is None or not quantized:
            x = input if self.folded is None else input * self.folded.to(input.dtype)
            return functional.linear(x, self.weight, self.bias)
        with torch.autocast(input.device.type, enabled=False):
            return linear.fake_quantized_linear(
                input, s.weight, self.bias, inputs=s.inputs, smoothing=s.smoothing, static=s.static
            )

    def solve(self) -> None:
        """Compute the solution from the statistics, which are dropped; with too few tokens, fall back to minmax.

        The fallback knows no range of the inputs: static inputs become dynamic, one scale a token.
        """
        algorithm, weight = self.config.algorithm, self.weight.detach()
        if self.fell_back:
            spec = self.config.spec
            self.solution = minmax.algorithm(replace(spec, inputs=_dynamic(spec.inputs))).solve(weight, None)
        elif self.folded is None:
            self.solution = algorithm.solve(weight, None if algorithm.data_free else self.statistic())
        else:
            solved = algorithm.solve(weight, self.statistic(), self.folded)
            self.solution = replace(solved, smoothing=None, notes={**solved.notes, "folded": torch.ones(())})
        self.statistics = None

    def statistic(self) -> Any:
        """What the algorithm learns from the inputs, in the dtype that it computes in."""
        # The model may have been cast since: one dtype for weight and statistic.
        dtype, observer = affine.working_dtype(self.weight), self.config.algorithm.observer
        return pytree.tree_map_only(
            Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, observer.finalize(self.statistics)
        )

    def adopt(self, solution: Solution) -> None:
        """Take over a solution that was found elsewhere."""
        self.solution, self.statistics = solution, None
        self._follow_weight()

    def deployed(self, kernel: str | None = None) -> deployment.QuantizedLinear:
        """The layer to put in the place of this one, once it is solved."""
        if self.solution is None:
            raise refusal(f"layer {self.names[0]!r}", "not solved", "a layer with a solution")
        row = replace(self.record(), stage="converted")
        layer = deployment.QuantizedLinear(self.solution, self.bias, row, self.weight.dtype, kernel)
        deployment.adopt(layer, self)
        return layer

    @property
    def fell_back(self) -> bool:
        """Whether too few tokens reached a layer whose algorithm needs them."""
        algorithm = self.config.algorithm
        return self.tokens < algorithm.fewest and not algorithm.data_free

    def record(self) -> Row:
        """The row of this layer in the report."""
        spec, s = self.config.spec, self.solution
        known: dict[str, Any] = {}
        if s is not None:
            reached = s.effective_weight()
            weight = self.weight.detach().to(reached.dtype)
            known = {
                "weight_sqnr": metrics.sqnr(weight if self.folded is None else weight * self.folded, reached).item(),
                "error": None if s.error is None else s.error.item(),
                "baseline_error": None if s.baseline_error is None else s.baseline_error.item(),
                "notes": {name: value.item() for name, value in s.notes.items()},
            }
        return Row(
            self.names,
            (self.out_features, self.in_features),
            weights=spec.weight,
            inputs=spec.inputs if s is None else s.inputs,
            algorithm=self.config.name,
            fell_back=s is not None and self.fell_back,
            stage="quantized" if self.active else "calibrating",
            tokens=self.tokens,
            **known,
        )

    def extra_repr(self) -> str:
        """Shape, format and progress, as ``print(model)`` shows them."""
        done = "quantized" if self.active else f"{self.seen} of {self.config.batch_num} batches"
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.config.spec.weight}, {done}"

    def get_extra_state(self) -> dict[str, Any]:
        """Plain containers of tensors and numbers, so that ``torch.load`` reads them with ``weights_only``."""
        s = self.solution
        solved = None
        if s is not None:
            solved = {
                "tensors": reference.prepare(s),
                "dynamic": s.static is None,
                "error": s.error,
                "baseline_error": s.baseline_error,
                "notes": dict(s.notes),
            }
        leaves = pytree.tree_leaves(self.statistics)
        return {"format": self.format(), "seen": self.seen, "tokens": self.tokens, "active": self.active,
                "statistics": leaves, "solution": solved, "folded": self.folded,
                "first": None if self.first is None else vars(self.first),
                "batches": None if self.batches is None else [vars(batch) for batch in self.batches]}  # fmt: skip

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Continue where the saved layer was.

        Raises:
            QuantizeError: the saved layer was quantized with another config.
        """
        if state["format"] != self.format():
            raise refusal(f"layer {self.names[0]!r}", state["format"], f"a state of {self.format()}")
        self.seen, self.tokens, self.active = state["seen"], state["tokens"], state["active"]
        self.statistics, self.solution, self.folded = None, None, state.get("folded")
        self.first = Batch(**state["first"]) if state.get("first") else None
        self.batches = None if state["batches"] is None else [Batch(**batch) for batch in state["batches"]]
        if state["solution"] is None:
            structure = pytree.tree_structure(self.config.algorithm.observer.init(0))
            self.statistics = pytree.tree_unflatten(state["statistics"], structure)
        else:
            saved, inputs = state["solution"], self.config.spec.inputs
            if saved["dynamic"]:
                inputs = _dynamic(inputs)
            spec = LayerSpec(self.config.spec.weight, inputs)
            layout = Layout(spec, self.out_features, self.in_features, self.weight.dtype)
            solved = reference.restore(saved["tensors"], layout)
            self.solution = replace(solved, **{k: saved[k] for k in ("error", "baseline_error", "notes")})
        self._follow_weight()

    def format(self) -> str:
        """Algorithm, schemes and options: what a saved state must agree in."""
        config = self.config
        return f"{config.name}, weights {config.spec.weight}, inputs {config.spec.inputs or 'float'}, {config.options}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CalibrationLinear:
        before = self.weight.dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call] # torch leaves it bare
        self._follow_weight()
        if self.weight.dtype != before:
            for batch in self._kept():
                batch.cast(before, self.weight.dtype)
        return self

    def _kept(self) -> list[Batch]:
        return [*(self.batches or ()), *([self.first] if self.first else ())]

    def _follow_weight(self) -> None:
        # Statistics and solution follow the device of the weight, never its dtype.
        device = self.weight.device
        self.statistics, self.solution, self.folded = pytree.tree_map_only(
            Tensor, lambda tensor: tensor.to(device), (self.statistics, self.solution, self.folded)
        )
        for batch in self._kept():
            batch.move(device)

    def __getstate__(self) -> dict[str, Any]:
        # An unfinished batch is no part of a copy, and weak references do not pickle.
        return {**self.__dict__, "recorder": None}


def solve_together(layers: list[CalibrationLinear]) -> None:
    """Solve layers that share their statistics: at once, where the algorithm saves work by that."""
    first, together = layers[0], layers[0].config.algorithm.together
    if together is None or first.fell_back or len({layer.weight.dtype for layer in layers}) > 1:
        for layer in layers:
            layer.solve()
        return
    for layer, solution in zip(
        layers, together([layer.weight.detach() for layer in layers], first.statistic()), strict=True
    ):
        layer.solution, layer.statistics = solution, None


def siblings(layers: list[CalibrationLinear]) -> list[list[CalibrationLinear]]:
    """The layers by the statistics that they share, in their order."""
    found: dict[object, list[CalibrationLinear]] = {}
    for layer in layers:
        leaves = pytree.tree_leaves(layer.statistics)
        found.setdefault(id(leaves[0]) if leaves else layer, []).append(layer)
    return list(found.values())


@contextmanager
def observed(model: nn.Module, watching: Observing) -> Iterator[None]:
    """While this lasts, all layers of ``model`` ask ``watching``."""
    layers = calibrated(model)
    for layer in layers:
        layer.recorder = watching
    try:
        yield
    finally:
        for layer in layers:
            layer.recorder = None


def calibrated(model: nn.Module) -> list[CalibrationLinear]:
    """All layers under calibration or fake-quantized, each once."""
    return [module for module in model.modules() if isinstance(module, CalibrationLinear)]


def _dynamic(inputs: Scheme | None) -> Scheme | None:
    return None if inputs is None else replace(inputs, strategy="token")
