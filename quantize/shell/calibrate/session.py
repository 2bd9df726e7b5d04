"""The session of a model under calibration: it watches forward passes, counts them, and solves after the last."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import nn

from quantize.shell.calibrate.batches import Batch, attention_mask
from quantize.shell.calibrate.observing import Calls, Recorder
from quantize.shell.calibrate.solving import KEY, carrier, solve, unsolved
from quantize.shell.config import Config, QuantizeWarning, refusal
from quantize.shell.plan import Plan
from quantize.shell.values import keepable


class Session:
    """What belongs to one call of ``quantize``: the config, what was left out, and the hooks on the model.

    Kept on the model under :data:`KEY`; it holds no module, so that copies of the model have sessions of their
    own.
    """

    def __init__(self, config: Config, plan: Plan) -> None:
        self.config, self.skipped, self.unmatched = config, plan.skipped, plan.unmatched
        self.remarks: tuple[str, ...] = ()
        self.replaying = False

    def begin(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward pass: start a new recorder; what an unfinished pass left is forgotten."""
        if self.replaying:
            return
        layers = unsolved(root)
        recorder = None
        if layers and layers[0].seen < self.config.batch_num:
            recorder = self._recorder(root, args, kwargs)
        for layer in layers:
            layer.recorder = recorder

    def end(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
        """After a forward pass that succeeded: commit the statistics, count the batch, solve after the last.

        Raises:
            QuantizeError: NaN or inf among the inputs of a layer; the batch counts for nothing.
        """
        layers = [] if self.replaying else unsolved(root)
        recorder = layers[0].recorder if layers else None
        for layer in layers:
            layer.recorder = None
        if recorder is None:
            return
        if isinstance(recorder, Recorder):
            recorder.commit(layers[0].seen + 1)
            if recorder.batch is not None:
                carrier(root).first = recorder.batch
        elif isinstance(recorder, Calls):
            recorder.close(layers[0].seen + 1)
            kept = carrier(root).batches
            assert kept is not None
            recorder.batch.stateful = not kept and recorder.batch.changed(root)
            kept.append(recorder.batch)
        for layer in layers:
            layer.seen += 1
        if layers[0].seen == self.config.batch_num:
            # The compiler cannot follow a pass that stops half-way; where it was never imported, nothing is compiled.
            compiling = "torch._dynamo" in sys.modules
            (torch.compiler.disable(solve) if compiling else solve)(root)  # type: ignore[no-untyped-call] # torch leaves it bare

    def _recorder(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recorder | Calls:
        kept = carrier(root).batches
        odd = [each for each in (*args, *kwargs.values()) if not keepable(each)]
        if kept is None or not odd:
            mask = attention_mask(root, args, kwargs)
            first = dict(root.named_buffers()) if kept == [] else {}
            if kept is not None:
                return Calls(Batch.of(args, kwargs, mask, first))
            recorder = Recorder(mask)
            if self.config.schedule.fold and carrier(root).first is None and not odd:
                recorder.batch = Batch.of(args, kwargs, mask, {})
            return recorder
        told = f"an argument of type {type(odd[0]).__name__}, which may not be given twice"
        if kept:
            raise refusal("model", told, "arguments like those of the batches before: tensors and plain values")
        remark = f"calibrated in one pass, not layer by layer: the model was called with {told}"
        self.remarks += (remark,)
        carrier(root).batches = None
        warnings.warn(remark, QuantizeWarning, stacklevel=2)
        return Recorder(attention_mask(root, args, kwargs))


def attach(model: nn.Module, config: Config, plan: Plan) -> None:
    """Put the session and its hooks on ``model``."""
    session = Session(config, plan)
    model.__dict__[KEY] = session
    if config.schedule.sequential:
        carrier(model).batches = []
    # First of all: what is kept is what the caller gave, not what other hooks make of it.
    model.register_forward_pre_hook(session.begin, with_kwargs=True, prepend=True)
    model.register_forward_hook(session.end, with_kwargs=True)


def detach(model: nn.Module) -> None:
    """Remove the hooks of all sessions in ``model``; what they know stays for the report."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Session)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_with_kwargs.pop(key, None)
