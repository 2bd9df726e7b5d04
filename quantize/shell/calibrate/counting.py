"""The hooks on a model under calibration: they watch its forward passes, count them, and solve after the last."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from quantize.shell.calibrate.batches import Batch, attention_mask
from quantize.shell.calibrate.layer import CalibrationLinear, calibrated, check_states
from quantize.shell.calibrate.observing import Reads, Statistics, restart
from quantize.shell.calibrate.session import KEY, Session
from quantize.shell.calibrate.solving import solve
from quantize.shell.config import refusal
from quantize.shell.values import keepable


def attach(model: nn.Module, session: Session) -> None:
    """Put ``session`` and its hooks on ``model``."""
    model.__dict__[KEY] = session
    # First of all: what is kept is what the caller gave, not what other hooks make of it.
    model.register_forward_pre_hook(_begin, with_kwargs=True, prepend=True)
    model.register_forward_hook(_end, with_kwargs=True)
    model.register_state_dict_post_hook(_saved)  # type: ignore[no-untyped-call] # torch leaves it bare
    model.register_load_state_dict_pre_hook(_loaded)  # type: ignore[no-untyped-call] # likewise


def detach(model: nn.Module) -> None:
    """Remove the hooks of all sessions in ``model``; what they know stays for the report."""
    for module in model.modules():
        for hooks in (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._state_dict_hooks,
            module._load_state_dict_pre_hooks,
        ):
            for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) in _HOOKS]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_with_kwargs.pop(key, None)


def _begin(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a forward pass: watch it, if it counts. What an unfinished pass left is forgotten."""
    session: Session = root.__dict__[KEY]
    if session.solving:
        return
    layers = calibrated(root)
    if not layers:
        detach(root)
    session.watching, layers = None, _unsolved(session, layers)
    # An interrupt may have come between keeping a batch and counting it.
    del session.batches[session.seen :]
    if not layers or session.seen >= session.config.batch_num:
        return
    odd = [each for each in (*args, *kwargs.values()) if not keepable(each)]
    told = f"an argument of type {type(odd[0]).__name__}, which may not be given twice" if odd else ""
    if odd and session.sequential:
        if session.batches:
            raise refusal("model", told, "arguments like those of the batches before: tensors and plain values")
        session.sequential = False
        restart(layers)
        session.remark(f"calibrated in one pass, not layer by layer: the model was called with {told}")
    if session.sequential:
        session.watching = Reads(Batch.of(root, args, kwargs, first=not session.batches))
    else:
        kept = len(session.batches) < session.wanted and not odd
        batch = Batch.of(root, args, kwargs, first=False) if kept else None
        session.watching = Statistics(attention_mask(root, args, kwargs) if batch is None else batch.mask, batch)


def _end(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
    """After a forward pass that succeeded: hand over what it told, count it, and solve after the last.

    Raises:
        QuantizeError: NaN or inf among the inputs of a layer; the batch counts for nothing.
    """
    session: Session = root.__dict__[KEY]
    watching = session.watching
    if session.solving or not isinstance(watching, (Reads, Statistics)):
        return
    session.watching = None
    watching.close(session.seen + 1)
    if watching.batch is not None:
        watching.batch.close(root)
        session.batches.append(watching.batch)
    session.seen += 1
    if session.seen == session.config.batch_num:
        # The compiler cannot follow a pass that stops half-way; where it was never imported, nothing is compiled.
        compiling = "torch._dynamo" in sys.modules
        layers = _unsolved(session, calibrated(root))
        (torch.compiler.disable(solve) if compiling else solve)(root, layers)  # type: ignore[no-untyped-call] # torch leaves it bare


def _unsolved(session: Session, layers: list[CalibrationLinear]) -> list[CalibrationLinear]:
    return [layer for layer in layers if layer.session is session and not layer.active]


def _saved(root: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    # Its parts may have been converted one by one.
    if calibrated(root):
        state[prefix + KEY] = root.__dict__[KEY].state()


def _loaded(root: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if prefix + KEY not in state:
        return
    check_states(root, state, prefix)
    root.__dict__[KEY].restore(state.pop(prefix + KEY))


_HOOKS = (_begin, _end, _saved, _loaded)
