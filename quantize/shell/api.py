"""The public calls: everything is checked first, and the model touched last."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import chain
from typing import Any

from torch import nn

from quantize.presets import INT8_MINMAX_WEIGHT_QUANT_CFG
from quantize.shell.calibrate import hooks, solving
from quantize.shell.calibrate.layer import QUANTIZED, CalibrationLinear, calibrated, check_float, check_model
from quantize.shell.calibrate.ranks import Ranks
from quantize.shell.calibrate.session import KEY, Session
from quantize.shell.config import QuantizeWarning, parse, refusal, shown
from quantize.shell.deploy import loading
from quantize.shell.offload import keeper
from quantize.shell.plan import Plan, plan, swap
from quantize.shell.report.rows import Report, share
from quantize.shell.views import release


def quantize(model: nn.Module, config: object = None) -> None:
    """Turn ``model`` into a calibration model, in place.

    Run ``batch_num`` forward passes next: they compute in floating point and are observed. After the last one the
    parameters are solved, and from then on the model computes as the quantized model would. Weight-only minmax needs no
    batch and is solved here.

    Args:
        model: any module with ``nn.Linear`` layers of a float dtype; also one that accelerate dispatched or offloads.
        config: a dict as in the README; None means ``presets.INT8_MINMAX_WEIGHT_QUANT_CFG``.

    Raises:
        QuantizeError: a config or model that is not accepted; the model is left exactly as it was.

    Warns:
        QuantizeWarning: once, with all modules left in floating point that the config did not ask to skip.
    """
    parsed = parse(INT8_MINMAX_WEIGHT_QUANT_CFG if config is None else config)
    check_float(model)
    planned = plan(model, parsed)
    _warn(planned)
    session = Session(parsed, planned)
    layers = {layer: CalibrationLinear(layer, names, session) for layer, names in planned.layers.items()}
    if all(layer.algorithm.data_free for layer in layers.values()):
        session.sequential = False
        solving.solve_all(model, [*layers.values()])
    swap(model, planned.views)
    swap(model, layers)
    hooks.attach(model, session)


def finish(model: nn.Module, *, process_group: Any = None) -> None:
    """Solve now, with the batches seen so far; afterwards the model computes as the quantized model would.

    Also continues after an interrupted solve. A model that is solved already stays as it is.

    Args:
        model: a model under calibration.
        process_group: a group of ``torch.distributed``, such as ``torch.distributed.group.WORLD``, whose processes hold
            the same model and all call this: what they saw, in any number of batches, is merged, each solves a part of
            the layers, and all end with the same bits. Sums are those of one process up to rounding, ranges the same.

    Raises:
        QuantizeError: a model not under calibration, no batch seen, or processes whose models or configs differ.
    """
    check_model(model)
    if not calibrated(model) and process_group is None:
        raise refusal("model", "not under calibration", "a model after quantize(model, config)")
    solving.finish(model, Ranks(process_group))


def convert(
    model: nn.Module,
    *,
    kernel: str | None = None,
    from_state: Mapping[str, Any] | None = None,
    offload: bool = False,
) -> None:
    """Replace every calibrated layer by a :class:`QuantizedLinear`, in place: codes, and no float weight.

    The result changes by rounding only: see :func:`quantize.core.linear.fake_quantized_linear` for the bound.

    Args:
        model: one that is calibrated to the end; with ``from_state``, one in floating point, also on the meta device.
        kernel: ``'reference'``, ``'cpu'`` or ``'npu'`` for all layers; None chooses for each, by format and device.
            ``'cpu-bf16'``: int4 weights in float32 and float16 meet tokens rounded to bfloat16, as fast as in bfloat16
            and with its errors; None for the other layers.
        from_state: the ``state_dict`` of a converted model of the same architecture; it needs neither float weights
            nor calibration. Tensors go to the devices of the model, and from the meta device to their own.
        offload: for layers whose float weights accelerate offloads. False puts their codes, which are 4 to 8 times
            smaller than float32, on the device that computes; True keeps them where the weights were, in host memory
            or in the offload folder, and moves them to the device for every call.

    Raises:
        QuantizeError: a model that is not calibrated to the end, a kernel that cannot serve a layer, or a state that
            does not fit; it names the layer and what is missing. The model is left as it was.
    """
    check_model(model)
    loading.check_kernel(kernel)
    layers = [] if from_state is not None else calibrated(model)
    if offload not in ((True, False) if any(map(keeper, layers)) else (False,)):
        raise refusal("offload", shown(offload), "False, or True for a calibrated model that accelerate offloads")
    if from_state is not None:
        loading.convert(model, from_state, kernel)
        return
    if not layers:
        raise refusal("model", "not calibrated", "a model after quantize(model, config) and its forward passes")
    for layer in layers:
        missing = layer.session.config.batch_num - layer.session.seen
        if not layer.active:
            told, wanted = "solving was interrupted", "a model after finish(model)"
            if missing > 0:
                told = f"{layer.session.seen} of {layer.session.config.batch_num} batches seen"
                wanted = f"{missing} more forward passes of the whole model, or finish(model)"
            raise refusal(f"layer {layer.names[0]!r}", told, wanted)
    if model in layers:
        raise refusal("model", "the layer itself: nothing holds it", "a model that contains the layer")
    deployed = {layer: layer.deployed(kernel, kept=offload) for layer in layers}
    loading.check_served(deployed.values(), kernel)
    swap(model, deployed)
    release(model)
    hooks.detach(model)
    loading.carry_hidden(model)


def report(model: nn.Module) -> Report:
    """What was done to every layer of ``model``, and what was left out: a value that prints as a table.

    Raises:
        QuantizeError: a model without any quantized layer.
    """
    check_model(model)
    rows = tuple(module.record() for module in model.modules() if isinstance(module, QUANTIZED))
    if not rows:
        raise refusal("model", "not quantized", "a model after quantize(model, config)")
    found = [module.__dict__[KEY] for module in model.modules() if KEY in module.__dict__]
    told: dict[str, Any] = {key: tuple(chain(*(getattr(session, key) for session in found)))
                            for key in ("skipped", "unmatched", "remarks")}  # fmt: skip
    return Report(rows, **told, elements=sum(session.elements for session in found))


def _warn(planned: Plan) -> None:
    left = [f"{skipped.name!r} ({skipped.reason})" for skipped in planned.skipped if not skipped.asked]
    left += [f"{word!r} of skip_layers or quant_cfg matched nothing" for word in planned.unmatched]
    if left:
        told = share(sum(skipped.elements for skipped in planned.skipped), planned.elements)
        message = f"{told} stay in floating point, see report(model): {'; '.join(left)}"
        warnings.warn(message, QuantizeWarning, stacklevel=3)
