"""The public calls. Each checks everything before it changes the model."""

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
from quantize.shell.offload import offload_hook
from quantize.shell.plan import Plan, plan, swap
from quantize.shell.progress import progress
from quantize.shell.report.report import Report
from quantize.shell.report.rows import reasons, share
from quantize.shell.views import release


def quantize(model: nn.Module, config: object = None) -> None:
    """Turn ``model`` into a calibration model, in place.

    Run ``batch_num`` forward passes next: they compute in floating point, and their inputs are observed. After the last
    one the layers are quantized, and the model computes as the converted model will. Weight-only minmax needs no batch:
    its layers are quantized at once.

    Args:
        model: any module with ``nn.Linear`` layers of a float dtype; also one that accelerate dispatched or offloads.
        config: a dict as in the README; None means ``presets.INT8_MINMAX_WEIGHT_QUANT_CFG``.

    Raises:
        QuantizeError: the config or model is not accepted; the model is left exactly as it was.

    Warns:
        QuantizeWarning: modules stay in floating point that the config did not ask to skip; one warning names them all.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    >>> weights = {"type": "int4", "symmetric": True, "strategy": "channel"}
    >>> quantize(model, {"quant_cfg": {"weights": weights}, "algorithm": "gptq", "batch_num": 1})
    >>> output = model(torch.ones(16, 8))
    >>> report(model).rows[0].stage
    'quantized'
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
    """Quantize the layers now, with the batches seen so far; then the model computes as the converted model will.

    This also continues after an interruption. A model whose layers are all quantized stays as it is.

    Args:
        model: a model under calibration.
        process_group: a group of ``torch.distributed``, such as ``torch.distributed.group.WORLD``. All its processes
            hold the same model and call this. Their statistics, from any number of batches each, are merged. Each
            process quantizes a part of the layers, and all end with the same bits. Merged sums equal those of one
            process up to rounding; merged ranges are equal.

    Raises:
        QuantizeError: the model is not under calibration or saw no batch, or the models or configs of processes differ.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    >>> weights = {"type": "int4", "symmetric": True, "strategy": "channel"}
    >>> quantize(model, {"quant_cfg": {"weights": weights}, "algorithm": "gptq", "batch_num": 100})
    >>> output = model(torch.ones(16, 8))
    >>> finish(model)
    >>> report(model).rows[0].tokens
    16
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
    """Replace every calibrated layer by a :class:`QuantizedLinear`, in place: it holds codes and no float weight.

    The outputs change by rounding only: see :func:`quantize.core.linear.fake_quantized_linear` for the bound.

    Args:
        model: a model whose calibration is complete; with ``from_state``, a float model, also on the meta device.
        kernel: ``'reference'``, ``'cpu'`` or ``'npu'`` for all layers; None chooses for each, by format and device.
            ``'cpu-bf16'`` computes int4 weights of float32 and float16 models in bfloat16, with its speed and its
            errors; layers that it cannot serve get the kernel that None would choose.
        from_state: the ``state_dict`` of a converted model of the same architecture. Then the model needs neither float
            weights nor calibration. Tensors go to the devices of the model; for meta parameters they stay where they
            are.
        offload: for layers whose float weights accelerate offloads. False puts their codes, which are 4 to 8 times
            smaller than float32, on the device that computes. True keeps them where the weights were, in host memory
            or in the offload folder, and moves them to the device for every call.

    Raises:
        QuantizeError: calibration is not complete, a kernel cannot serve a layer, or the state does not fit. It names
            the layer and what is missing. The model is left as it was.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    >>> weights = {"type": "int8", "symmetric": True, "strategy": "channel"}
    >>> quantize(model, {"quant_cfg": {"weights": weights}, "algorithm": "minmax"})
    >>> convert(model, kernel="reference")
    >>> model[0].codes.dtype
    torch.int8
    """
    check_model(model)
    loading.check_kernel(kernel)
    layers = [] if from_state is not None else calibrated(model)
    if offload not in ((True, False) if any(map(offload_hook, layers)) else (False,)):
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
    deployed = {layer: layer.deployed(kernel, kept=offload) for layer in progress(layers, "convert", unit="layer")}
    loading.check_served(deployed.values(), kernel)
    swap(model, deployed)
    release(model)
    hooks.detach(model)
    loading.carry_hidden(model)


def report(model: nn.Module) -> Report:
    """What was done to every layer of ``model``, and what was left out: a value that prints as a summary.

    Raises:
        QuantizeError: the model has no quantized layer.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    >>> weights = {"type": "int8", "symmetric": True, "strategy": "channel"}
    >>> quantize(model, {"quant_cfg": {"weights": weights}, "algorithm": "minmax"})
    >>> str(report(model).rows[0].weights)
    'int8 channel symmetric'
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
    left = [f"{name!r} ({why})" for name, why in reasons(each for each in planned.skipped if not each.asked)]
    left += [f"{word!r} of skip_layers or quant_cfg matched nothing" for word in planned.unmatched]
    if left:
        told = share(sum(skipped.elements for skipped in planned.skipped), planned.elements)
        message = f"{told} stay in floating point, see report(model): {'; '.join(left)}"
        warnings.warn(message, QuantizeWarning, stacklevel=3)
