"""The layer that watches, and the session that counts batches and solves."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn import functional

from quantize.core import LayerSpec, Scheme, Solution, affine, linear, metrics, minmax
from quantize.shell import deployment
from quantize.shell.config import Config, QuantizeWarning, refusal
from quantize.shell.plan import Plan, check_weight
from quantize.shell.report import Row


class CalibrationLinear(nn.Module):
    """A linear layer under calibration: the original's parameters, and what was learned of its inputs.

    Computes in floating point until :attr:`active`, then as the quantized layer will. All of the state is on the
    layer (``seen`` batches, ``tokens``, ``statistics``, ``solution``), so that it copies, pickles, moves and enters a
    ``state_dict`` with the model.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, original: nn.Linear, names: tuple[str, ...], config: Config, statistics: Any) -> None:
        super().__init__()
        self.names, self.config = names, config
        self.out_features, self.in_features = original.weight.shape
        # The very same objects: ties to other modules, gradients and optimizers stay.
        self._parameters.update(original._parameters)
        deployment.adopt(self, original)
        self.seen, self.tokens = 0, 0
        self.statistics = statistics
        self.solution: Solution | None = None
        self.active = False
        self.recorder: Recorder | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[..., c]`` to ``[..., n]``: float, or fake-quantized once the model is solved."""
        if self.recorder is not None:
            self.recorder.observe(self, x)
        if not self.active or self.solution is None:
            return functional.linear(x, self.weight, self.bias)
        s = self.solution
        return linear.fake_quantized_linear(
            x, s.weight, self.bias, inputs=s.inputs, smoothing=s.smoothing, static=s.static
        )

    def solve(self) -> None:
        """Compute the solution from the statistics, which are dropped; without tokens, fall back to minmax.

        The fallback knows no range of the inputs: static inputs become dynamic, one scale a token.
        """
        algorithm, statistic = self.config.algorithm, None
        if self.fell_back:
            inputs = self.config.spec.inputs
            dynamic = None if inputs is None else Scheme(inputs.bits, inputs.symmetric, "token")
            algorithm = minmax.algorithm(LayerSpec(self.config.spec.weight, dynamic))
        elif not algorithm.data_free:
            statistic = algorithm.observer.finalize(self.statistics)
        self.solution = algorithm.solve(self.weight.detach(), statistic)
        self.statistics = None

    def deployed(self) -> deployment.QuantizedLinear:
        """The layer to put in the place of this one, once it is solved."""
        if self.solution is None:
            raise refusal(f"layer {self.names[0]!r}", "not solved", "a layer with a solution")
        layer = deployment.QuantizedLinear(self.solution, self.bias, replace(self.record(), stage="converted"))
        deployment.adopt(layer, self)
        return layer

    @property
    def fell_back(self) -> bool:
        """Whether no token reached a layer whose algorithm needs them."""
        return not self.tokens and not self.config.algorithm.data_free

    def record(self) -> Row:
        """The row of this layer in the report."""
        spec, s = self.config.spec, self.solution
        inputs = spec.inputs if s is None else s.inputs
        known: dict[str, Any] = {}
        if s is not None:
            # The weight as the inputs meet it: without the factor that they are divided by.
            reached = affine.dequantize(s.weight) / (1 if s.smoothing is None else s.smoothing)
            known = {
                "weight_sqnr": metrics.sqnr(self.weight.detach().to(reached.dtype), reached).item(),
                "error": None if s.error is None else s.error.item(),
                "baseline_error": None if s.baseline_error is None else s.baseline_error.item(),
                "notes": {name: value.item() for name, value in s.notes.items()},
            }
        return Row(
            self.names,
            (self.out_features, self.in_features),
            weights=str(spec.weight),
            inputs=None if inputs is None else str(inputs),
            algorithm="minmax (no tokens)" if s is not None and self.fell_back else self.config.name,
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
                "tensors": deployment.tensors(s),
                "dynamic": s.static is None,
                "error": s.error,
                "baseline_error": s.baseline_error,
                "notes": dict(s.notes),
            }
        leaves = pytree.tree_leaves(self.statistics)
        return {"format": self._format(), "seen": self.seen, "tokens": self.tokens, "active": self.active,
                "statistics": leaves, "solution": solved}  # fmt: skip

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Continue where the saved layer was.

        Raises:
            QuantizeError: the saved layer was quantized with another config.
        """
        if state["format"] != self._format():
            raise refusal(f"layer {self.names[0]!r}", state["format"], f"a state of {self._format()}")
        self.seen, self.tokens, self.active = state["seen"], state["tokens"], state["active"]
        self.statistics, self.solution = None, None
        if state["solution"] is None:
            structure = pytree.tree_structure(self.config.algorithm.observer.init(0))
            self.statistics = pytree.tree_unflatten(state["statistics"], structure)
        else:
            saved, inputs = state["solution"], self.config.spec.inputs
            if inputs is not None and saved["dynamic"]:
                inputs = Scheme(inputs.bits, inputs.symmetric, "token")
            tensors = deployment.solution(saved["tensors"], self.config.spec.weight, inputs)
            self.solution = replace(tensors, **{k: saved[k] for k in ("error", "baseline_error", "notes")})
        self._follow_weight()

    def _format(self) -> str:
        return f"{self.config.name}, weights {self.config.spec.weight}, inputs {self.config.spec.inputs or 'float'}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CalibrationLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call] # torch leaves it bare
        self._follow_weight()
        return self

    def _follow_weight(self) -> None:
        # Statistics and solution follow the device of the weight, never its dtype.
        device = self.weight.device
        self.statistics, self.solution = pytree.tree_map_only(
            Tensor, lambda tensor: tensor.to(device), (self.statistics, self.solution)
        )

    def __getstate__(self) -> dict[str, Any]:
        # An unfinished batch is no part of a copy, and weak references do not pickle.
        return {**self.__dict__, "recorder": None}


class Recorder:
    """The statistics of one forward pass, apart from the layers until the pass has succeeded."""

    def __init__(self) -> None:
        self.pending: dict[CalibrationLinear, tuple[Any, int]] = {}
        self._shared: dict[tuple[int, ...], tuple[weakref.ref[Tensor], Any, Any]] = {}

    def observe(self, layer: CalibrationLinear, x: Tensor) -> None:
        """Add the inputs ``x`` ``[..., c]`` of a call of ``layer``."""
        state, tokens = self.pending.get(layer, (layer.statistics, layer.tokens))
        with untracked(x.device):
            self.pending[layer] = self._update(layer, state, x), tokens + x.numel() // layer.in_features

    def _update(self, layer: CalibrationLinear, state: Any, x: Tensor) -> Any:
        """``update(state, x)``, computed once for all layers that share the state and read the same tensor.

        Layers start from one initial state, so those that always read the same tensor share one state to the end;
        the first difference parts them. Inference tensors do not tell whether they were written to in between, so
        they are not shared.
        """
        update = layer.config.algorithm.observer.update
        if x.is_inference():
            return update(state, x)
        key = (id(x), x._version, *(id(leaf) for leaf in pytree.tree_leaves(state)))
        if key in self._shared:
            reference, _, new = self._shared[key]
            # An id may come back with another tensor: the weak reference tells.
            if reference() is x:
                return new
        new = update(state, x)
        self._shared[key] = weakref.ref(x), state, new
        return new


class Session:
    """What belongs to one call of ``quantize``: the config, what was left out, and the hooks on the model.

    Kept on the model under :data:`SESSION`; it holds no module, so that copies of the model have sessions of their
    own.
    """

    def __init__(self, config: Config, plan: Plan) -> None:
        self.config, self.skipped, self.unmatched = config, plan.skipped, plan.unmatched

    def begin(self, root: nn.Module, _args: Any) -> None:
        """Before a forward pass: start a new recorder; what an unfinished pass left is forgotten."""
        layers = unsolved(root)
        recorder = Recorder() if layers and layers[0].seen < self.config.batch_num else None
        for layer in layers:
            layer.recorder = recorder

    def end(self, root: nn.Module, _args: Any, _output: Any) -> None:
        """After a forward pass that succeeded: commit the statistics, count the batch, solve after the last.

        Raises:
            QuantizeError: NaN or inf among the inputs of a layer; the batch counts for nothing.
        """
        layers = unsolved(root)
        recorder = layers[0].recorder if layers else None
        for layer in layers:
            layer.recorder = None
        if recorder is None:
            return
        for layer, (state, tokens) in recorder.pending.items():
            leaves = [leaf for leaf in pytree.tree_leaves(state) if leaf.is_floating_point()]
            if tokens and not all(bool(torch.isfinite(leaf).all()) for leaf in leaves):
                where = f"layer {layer.names[0]!r}"
                raise refusal(where, f"NaN or inf in batch {layer.seen + 1}", "finite inputs; the batch is not counted")
        for layer in layers:
            layer.statistics, layer.tokens = recorder.pending.get(layer, (layer.statistics, layer.tokens))
            layer.seen += 1
        if layers[0].seen == self.config.batch_num:
            solve(root)


SESSION = "_quantization"


def attach(model: nn.Module, config: Config, plan: Plan) -> None:
    """Put the session and its hooks on ``model``."""
    session = Session(config, plan)
    model.__dict__[SESSION] = session
    model.register_forward_pre_hook(session.begin)
    model.register_forward_hook(session.end)


def detach(model: nn.Module) -> None:
    """Remove the hooks of all sessions in ``model``; what they know stays for the report."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Session)]:
                del hooks[key]


def calibrated(model: nn.Module) -> list[CalibrationLinear]:
    """All layers under calibration or fake-quantized, each once."""
    return [module for module in model.modules() if isinstance(module, CalibrationLinear)]


def unsolved(model: nn.Module) -> list[CalibrationLinear]:
    """The layers that still compute in floating point."""
    return [layer for layer in calibrated(model) if not layer.active]


def solve(model: nn.Module) -> None:
    """Solve every layer, then let all compute as quantized; layers solved before an interruption are kept.

    Raises:
        QuantizeError: a weight became NaN or inf since ``quantize``.
    """
    layers = unsolved(model)
    for layer in layers:
        check_weight(layer.names[0], layer.weight)
    with untracked(layers[0].weight.device):
        for layer in _progress([layer for layer in layers if layer.solution is None]):
            layer.solve()
    for layer in layers:
        layer.active = True
    detach(model)
    idle = [layer.names[0] for layer in layers if layer.fell_back]
    if idle:
        warnings.warn(
            f"no token reached {len(idle)} of {len(layers)} layers, which fall back to minmax: {', '.join(idle)}",
            QuantizeWarning,
            stacklevel=2,
        )


@contextmanager
def untracked(device: torch.device) -> Iterator[None]:
    """No gradients, no inference tensors and no autocast, whatever the caller has switched on."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _progress(layers: list[CalibrationLinear]) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return layers
    # Quick work shows nothing; without a terminal neither.
    return tqdm(layers, desc="quantize", unit="layer", leave=False, delay=1, disable=None)
