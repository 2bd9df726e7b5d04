"""The public calls: everything is checked first, and the model touched last."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from quantize.presets import INT8_MINMAX_WEIGHT_QUANT_CFG
from quantize.shell.calibrate import hooks, solving
from quantize.shell.calibrate.layer import CalibrationLinear, calibrated
from quantize.shell.calibrate.ranks import Ranks
from quantize.shell.calibrate.session import KEY, Session
from quantize.shell.config import QuantizeWarning, parse, refusal, shown
from quantize.shell.deploy import loading
from quantize.shell.deploy.layer import QuantizedLinear
from quantize.shell.offload import keeper
from quantize.shell.plan import Plan, plan, swap
from quantize.shell.report.rows import share
from quantize.shell.report.text import Report
from quantize.shell.views import release


def quantize(model: nn.Module, config: object = None) -> None:
    """Turn ``model`` into a calibration model, in place.

    Run ``batch_num`` forward passes next: they compute in floating point and are observed. After the last one the
    parameters are solved, and from then on the model computes as the quantized model would. Weight-only minmax
    needs no batch and is solved here.

    Args:
        model: any module that contains ``nn.Linear`` layers, in float16, bfloat16, float32 or float64; also one
            that accelerate has dispatched or offloads.
        config: a dict as in the README; None means ``presets.INT8_MINMAX_WEIGHT_QUANT_CFG``.

    Raises:
        QuantizeError: a config or model that is not accepted; the model is left exactly as it was.

    Warns:
        QuantizeWarning: once, with all modules left in floating point that the config did not ask to skip.
    """
    parsed = parse(INT8_MINMAX_WEIGHT_QUANT_CFG if config is None else config)
    _check_model(model)
    for name, module in model.named_modules():
        if isinstance(module, (CalibrationLinear, QuantizedLinear)):
            raise refusal("model", f"layer {name!r} is quantized already", "a model in floating point")
    planned = plan(model, parsed)
    _warn(planned)
    session = Session(parsed, planned)
    layers: dict[nn.Module, CalibrationLinear] = {
        layer: CalibrationLinear(layer, names, session) for layer, names in planned.layers.items()
    }
    try:
        swap(model, planned.views)
        swap(model, layers)
        hooks.attach(model, session)
        if parsed.algorithm.data_free:
            solving.solve_all(model, [*layers.values()])
    except BaseException:
        hooks.detach(model)
        model.__dict__.pop(KEY, None)
        swap(model, {new: old for old, new in layers.items()})
        swap(model, {new: old for old, new in planned.views.items()})
        raise


def finish(model: nn.Module, *, process_group: Any = None) -> None:
    """Solve now, with the batches seen so far; afterwards the model computes as the quantized model would.

    Also continues after an interrupted solve. A model that is solved already stays as it is.

    Args:
        model: a model under calibration.
        process_group: a group of ``torch.distributed``, for example ``torch.distributed.group.WORLD``, whose processes
            hold the same model and all call this: what they have seen is merged, each solves a part of the layers, and
            all end with the same bits. They may have seen different numbers of batches, none too. Sums are those of
            one process up to their rounding, ranges the very same.

    Raises:
        QuantizeError: a model that is not under calibration, no batch seen, or processes whose models or configs
            differ.
    """
    _check_model(model)
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
        model: a model that is calibrated to the end; with ``from_state``, one in floating point, also on the meta
            device.
        kernel: ``'reference'``, ``'cpu'`` or ``'npu'`` for all layers; None chooses for each, by format and device.
        from_state: the ``state_dict`` of a converted model of the same architecture; it needs neither float weights
            nor calibration. Tensors go to the devices of the model, and from the meta device to their own.
        offload: for layers whose float weights accelerate offloads. False puts their codes, which are 4 to 8 times
            smaller than float32, on the device that computes; True keeps them where the weights were, in host memory
            or in the offload folder, and moves them to the device for every call.

    Raises:
        QuantizeError: a model that is not calibrated to the end, a kernel that cannot serve a layer, or a state that
            does not fit; it names the layer and what is missing. The model is left as it was.
    """
    _check_model(model)
    loading.check_kernel(kernel)
    kept = from_state is None and any(keeper(layer) is not None for layer in calibrated(model))
    if offload not in ((True, False) if kept else (False,)):
        raise refusal("offload", shown(offload), "False, or True for a calibrated model that accelerate offloads")
    if from_state is not None:
        loading.convert(model, from_state, kernel)
        return
    layers = _deployed(model, kernel, offload)
    loading.check_served(layers.values(), kernel)
    swap(model, layers)
    release(model)
    hooks.detach(model)
    loading.carry_hidden(model)


def _deployed(model: nn.Module, kernel: str | None, kept: bool) -> dict[nn.Module, QuantizedLinear]:
    layers = calibrated(model)
    if not layers:
        raise refusal("model", "not calibrated", "a model after quantize(model, config) and its forward passes")
    for layer in layers:
        seen, wanted = layer.session.seen, layer.session.config.batch_num
        where = f"layer {layer.names[0]!r}"
        if not layer.active and seen < wanted:
            told = f"{seen} of {wanted} batches seen"
            raise refusal(where, told, f"{wanted - seen} more forward passes of the whole model, or finish(model)")
        if not layer.active:
            raise refusal(where, "solving was interrupted", "a model after finish(model)")
    if model in layers:
        raise refusal("model", "the layer itself: nothing holds it", "a model that contains the layer")
    return {layer: layer.deployed(kernel, kept=kept) for layer in layers}


def report(model: nn.Module) -> Report:
    """What was done to every layer of ``model``, and what was left out: a value that prints as a table.

    Raises:
        QuantizeError: a model without any quantized layer.
    """
    _check_model(model)
    rows = [module.record() for module in model.modules() if isinstance(module, (CalibrationLinear, QuantizedLinear))]
    if not rows:
        raise refusal("model", "not quantized", "a model after quantize(model, config)")
    found = [module.__dict__[KEY] for module in model.modules() if KEY in module.__dict__]
    return Report(
        tuple(rows),
        tuple(skipped for each in found for skipped in each.skipped),
        tuple(word for each in found for word in each.unmatched),
        tuple(remark for each in found for remark in each.remarks),
        sum(each.elements for each in found),
    )


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise refusal("model", shown(model), "a torch.nn.Module")


def _warn(planned: Plan) -> None:
    left = [f"{skipped.name!r} ({skipped.reason})" for skipped in planned.skipped if not skipped.asked]
    left += [f"skip_layers entry {word!r} matched nothing" for word in planned.unmatched]
    if left:
        told = share(sum(skipped.elements for skipped in planned.skipped), planned.elements)
        message = f"{told} stay in floating point, see report(model): {'; '.join(left)}"
        warnings.warn(message, QuantizeWarning, stacklevel=3)
