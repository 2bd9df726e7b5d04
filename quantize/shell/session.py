"""The session of a model under calibration: it watches forward passes, counts them, and solves after the last."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from quantize.shell.calibration import CalibrationLinear
from quantize.shell.config import Config, QuantizeWarning, refusal
from quantize.shell.plan import Plan, check_weight


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
        # What nobody can ask for again must not keep its states alive.
        self._shared = {key: entry for key, entry in self._shared.items() if entry[0]() is not None}
        self._shared[key] = weakref.ref(x), state, new
        return new


class Session:
    """What belongs to one call of ``quantize``: the config, what was left out, and the hooks on the model.

    Kept on the model under :data:`KEY`; it holds no module, so that copies of the model have sessions of their
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


KEY = "_quantization"


def attach(model: nn.Module, config: Config, plan: Plan) -> None:
    """Put the session and its hooks on ``model``."""
    session = Session(config, plan)
    model.__dict__[KEY] = session
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
    idle = [layer.names[0] for layer in layers if layer.fell_back]
    if idle:
        warnings.warn(
            f"no token reached {len(idle)} of {len(layers)} layers, which fall back to minmax: {', '.join(idle)}",
            QuantizeWarning,
            stacklevel=2,
        )


def _progress(layers: list[CalibrationLinear]) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return layers
    # Quick work shows nothing; without a terminal neither.
    return tqdm(layers, desc="quantize", unit="layer", leave=False, delay=1, disable=None)


@contextmanager
def untracked(device: torch.device) -> Iterator[None]:
    """No gradients, no inference tensors and no autocast, whatever the caller has switched on."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
