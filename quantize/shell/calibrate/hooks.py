"""The hooks on a model under calibration: they observe and count its forward passes, and solve after the last one."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from quantize.shell.calibrate.layer import calibrated, check_states, unsolved
from quantize.shell.calibrate.replay import Batch, attention_mask
from quantize.shell.calibrate.session import KEY, Session
from quantize.shell.calibrate.solving import solve_all
from quantize.shell.calibrate.watching import Fingerprints, Statistics
from quantize.shell.config import refusal
from quantize.shell.values import keepable

# The attribute of a model that holds the handles of its hooks.
_HANDLES = f"{KEY}_hooks"


def attach(model: nn.Module, session: Session) -> None:
    """Put ``session`` and its hooks on ``model``."""
    model.__dict__[KEY] = session
    handles = model.__dict__[_HANDLES] = list[RemovableHandle]()
    # Before all other hooks, so that the arguments are kept as the caller passed them.
    handles.append(model.register_forward_pre_hook(_begin, with_kwargs=True, prepend=True))
    handles.append(model.register_forward_hook(_end, with_kwargs=True))
    handles.append(model.register_state_dict_post_hook(_saved))  # type: ignore[no-untyped-call] # torch leaves it bare
    handles.append(model.register_load_state_dict_pre_hook(_loaded))  # type: ignore[no-untyped-call] # as above


def detach(model: nn.Module) -> None:
    """Remove the hooks of all sessions in ``model``. The sessions stay, for the report."""
    for module in model.modules():
        for handle in module.__dict__.pop(_HANDLES, ()):
            handle.remove()


def _begin(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a forward pass: observe it, if it counts. The results of an unfinished pass are dropped."""
    session: Session = root.__dict__[KEY]
    if session.solving:
        return
    if not calibrated(root):
        detach(root)
    session.watching = None
    # An interrupt may have kept a batch that was not counted.
    del session.batches[session.seen :]
    if session.seen >= session.config.batch_num or not unsolved(root, session):
        return
    odd = [each for each in (*args, *kwargs.values()) if not keepable(each)]
    if odd and session.sequential:
        told = f"an argument of type {type(odd[0]).__name__}, which cannot be copied and passed again"
        if session.batches:
            raise refusal("model", told, "arguments like those of the batches before: tensors and plain values")
        session.sequential = False
        session.remark(f"calibrated in one pass, not layer by layer: the model was called with {told}")
    kept = session.sequential or (session.config.schedule.fold and not session.batches)
    if odd or not kept:
        session.watching = Statistics(attention_mask(root, args, kwargs))
        return
    batch = Batch.of(root, args, kwargs, first=session.sequential and not session.batches)
    session.watching = Fingerprints(batch) if session.sequential else Statistics(batch.mask, batch)


def _end(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
    """After a successful forward pass: keep its observations, count it, and solve after the last one.

    Raises:
        QuantizeError: NaN or inf among the inputs of a layer; the batch is not counted.
    """
    session: Session = root.__dict__[KEY]
    watching = session.watching
    if session.solving or not isinstance(watching, (Fingerprints, Statistics)):
        return
    session.watching = None
    watching.close(session.seen + 1)
    if watching.batch is not None:
        session.batches.append(watching.batch)
    session.seen += 1
    if session.seen == session.config.batch_num:
        # The compiler cannot trace a pass that pauses. If it was never imported, nothing is compiled.
        compiling = "torch._dynamo" in sys.modules
        solve = torch.compiler.disable(solve_all) if compiling else solve_all  # type: ignore[no-untyped-call] # bare
        solve(root, unsolved(root, session))


def _saved(root: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    # Nothing is left to save if all parts were converted one by one.
    if calibrated(root):
        state[prefix + KEY] = root.__dict__[KEY].state()


def _loaded(root: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if prefix + KEY in state:
        check_states(root, state, prefix)
        root.__dict__[KEY].restore(state.pop(prefix + KEY))
