"""Choose a format for every layer from its bytes and its error, under a limit of bytes."""

from __future__ import annotations

import glob
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from quantize.core import LayerSpec, affine, budget, metrics
from quantize.shell import offload
from quantize.shell.calibrate import hooks
from quantize.shell.calibrate.layer import CalibrationLinear, check_float
from quantize.shell.calibrate.session import KEY, Session
from quantize.shell.calibrate.units import siblings
from quantize.shell.config import MAX_BATCHES, parse, refusal, shown
from quantize.shell.modes import untracked
from quantize.shell.plan import plan, swap
from quantize.shell.progress import progress
from quantize.shell.report.rows import starred

_INT4 = {"type": "int4", "symmetric": True}
FORMATS: tuple[dict[str, Any], ...] = (
    {**_INT4, "strategy": "channel"},
    *({**_INT4, "strategy": "group", "group_size": size} for size in (128, 64, 32)),
    {**_INT4, "type": "int8", "strategy": "channel"},
)


def assign_formats(
    model: nn.Module,
    calibrate: Callable[[nn.Module], Any],
    limit: float,
    *,
    formats: Sequence[Mapping[str, Any]] = FORMATS,
    skip_layers: Any = None,
) -> dict[str, Any]:
    """A ``quant_cfg`` with a format for every layer: small errors, and weights that fit into ``limit``.

    One calibration measures the error that GPTQ makes in every output of every layer with every format.
    :func:`quantize.core.budget.assign` chooses. Layers that read the same tensor (q, k, v; gate, up) get one format,
    and so do the experts of a mixture, because servers require it. The model is left as it was.

    If ``calibrate`` returns losses, the squared error of an output is weighted by the mean square of the gradient of
    the loss with respect to it. This approximates the increase of the loss (diagonal of the Fisher information).
    Without losses, the error is relative to the power of the layer's outputs, which is less accurate.

    Args:
        model: a float model.
        calibrate: a function that runs any number of forward passes of the model. It may return losses: a scalar
            tensor, or a generator or list with one for each pass, such as
            ``lambda model: (model(input_ids=rows, labels=rows).loss for rows in batches)``.
        limit: bytes of codes, scales and zero points, relative to the bytes of the same weights in floating point.
            Scales count in the dtype of the weight, as in checkpoints.
        formats: the ``weights`` entries of ``quant_cfg`` to choose from.
        skip_layers: as in the config.

    Raises:
        QuantizeError: formats or a model that ``quantize`` would refuse, no forward pass, a loss without a gradient, or
            a limit that the smallest formats exceed; it says which limit they need.

    >>> chosen = assign_formats(nn.Sequential(nn.Linear(64, 8)), lambda model: model(torch.eye(64)), 0.3)
    >>> chosen["weights"]["type"]
    'int8'
    """
    check_float(model)
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 < limit < math.inf:
        raise refusal("limit", shown(limit), "a number above 0, such as 0.15")
    config = {"batch_num": MAX_BATCHES, "algorithm": {"gptq": {"sequential": False}}, "skip_layers": skip_layers}
    entries = [dict(weights) for weights in formats]
    parsed = [parse({**config, "quant_cfg": {"weights": weights}}) for weights in entries]
    specs = [spec for spec in (each.spec(("",)) for each in parsed) if spec is not None]
    if not specs:
        raise refusal("formats", shown(formats), "at least one weights entry of quant_cfg")
    # The plan uses the format with the smallest groups: a layer that it does not fit fits no other format.
    smallest = min(range(len(specs)), key=lambda place: specs[place].weight.group_size or 0)
    planned = plan(model, parsed[smallest])
    session = Session(parsed[smallest], planned)
    layers = {layer: CalibrationLinear(layer, names, session) for layer, names in planned.layers.items()}
    try:
        swap(model, planned.views)
        swap(model, layers)
        hooks.attach(model, session)
        powers = _gradients(model, [*layers.values()], calibrate)
        if not any(layer.tokens for layer in layers.values()):
            raise refusal("calibrate", "no forward pass reached a layer", "a function that runs the model")
        for layer in layers.values():
            # A layer that no token reached has no error, so it gets the smallest format.
            layer.statistics = layer.statistics or layer.initial()
        units = siblings([*layers.values()])
        table = []
        for unit in progress(units, "choose formats", unit="layer", size=len):
            with untracked(offload.device(unit[0])):
                table.append(_costs(unit, specs, powers))
    finally:
        hooks.detach(model)
        model.__dict__.pop(KEY, None)
        swap(model, {new: old for old, new in layers.items()})
        swap(model, {new: old for old, new in planned.views.items()})
    # All experts of a mixture are one row, so that they get one format.
    rows: dict[str, list[int]] = {}
    for place, unit in enumerate(units):
        name = starred(unit[0].names[0])
        rows.setdefault(name.partition("experts.*")[0] if "experts.*" in name else unit[0].names[0], []).append(place)
    errors, sizes = (torch.tensor([[sum(table[place][i][part] for place in places) for i in range(len(specs))]
                                   for places in rows.values()]) for part in (0, 1))  # fmt: skip
    whole = sum(8 * layer.weight.numel() * layer.weight.element_size() for layer in layers.values())
    try:
        chosen = budget.assign(errors, sizes.long(), int(limit * whole)).choice.tolist()
    except ValueError:
        least = sizes.amin(1).sum().item() / whole
        raise refusal("limit", shown(limit), f"at least {least:.4f}, which the smallest formats take") from None
    wanted = {layer.names: i for places, i in zip(rows.values(), chosen, strict=True)
              for place in places for layer in units[place]}  # fmt: skip
    usual = Counter(chosen).most_common(1)[0][0]
    return {"weights": entries[usual], **{key: entries[i] for key, i in _patterns(wanted, usual).items()}}


def _patterns(wanted: Mapping[tuple[str, ...], int], usual: int) -> dict[str, int]:
    """Patterns of ``quant_cfg`` for the layers, given by their names, whose ``wanted`` format is not the ``usual`` one.

    A pattern matches all names that end with it, and later patterns override earlier ones. Layers come in the order of
    their longest names, so no pattern matches an earlier layer.
    """
    found: dict[str, int] = {}
    for names in sorted(wanted, key=lambda names: max(map(len, names))):
        given = [i for ending, i in found.items() if any(name.endswith(ending) for name in names)]
        if [usual, *given][-1] != wanted[names]:
            found[max(names, key=len)] = wanted[names]
    return {f"*{glob.escape(name)}.weights": i for name, i in found.items()}


def _gradients(
    model: nn.Module, layers: list[CalibrationLinear], calibrate: Callable[[nn.Module], Any]
) -> dict[CalibrationLinear, Tensor] | None:
    """Calibrate, and return the squared gradients ``[n]`` of each layer's outputs, summed over tokens; or None."""
    outputs: list[tuple[CalibrationLinear, Tensor]] = []
    found: dict[CalibrationLinear, Tensor] = {}
    with ExitStack() as stack:
        # Only the outputs of the current pass are listed, because each keeps its graph alive.
        stack.callback(model.register_forward_pre_hook(lambda *_: outputs.clear()).remove)
        for layer in layers:
            stack.callback(layer.register_forward_hook(lambda own, _, y: outputs.append((own, y))).remove)
        losses = calibrate(model)
        losses = [losses] if isinstance(losses, Tensor) and not losses.ndim else losses
        if not isinstance(losses, (Iterator, list, tuple)):
            return None
        for loss in losses:
            made = [(layer, y) for layer, y in outputs if y.requires_grad]
            if not made or not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
                told = "scalars with gradients, of a model whose parameters have requires_grad; or no losses"
                raise refusal("calibrate", "a loss without a gradient", told)
            gradients = torch.autograd.grad(loss, [y for _, y in made], allow_unused=True)
            for (layer, _), gradient in zip(made, gradients, strict=True):
                if gradient is not None:
                    squares = gradient.to(affine.working_dtype(gradient)).square().flatten(0, -2).sum(0)
                    found[layer] = found[layer] + squares if layer in found else squares
    return found


def _costs(
    unit: list[CalibrationLinear], specs: list[LayerSpec], gradients: Mapping[CalibrationLinear, Tensor] | None
) -> list[tuple[float, int]]:
    """The error and the size in bits of each format, for layers that share their statistics."""
    statistic, weights = unit[0].statistic(), [layer.float_weight() for layer in unit]
    wide = [weight.to(affine.working_dtype(weight)) for weight in weights]
    powers = [metrics.output_error(weight, statistic.total) for weight in wide] if gradients is None else []
    found = []
    for spec in specs:
        # No file format has a place for a shorter last group.
        if unit[0].in_features % (spec.weight.group_size or 1) or spec.weight.group_size == unit[0].in_features:
            found.append((math.inf, 2**50))
            continue
        together = unit[0].session.config.algorithm(spec).together
        assert together is not None
        error, size = 0.0, 0
        for i, (layer, solution) in enumerate(zip(unit, together(weights, statistic), strict=True)):
            q = solution.weight
            rows = metrics.row_error(affine.dequantize(q) - wide[i], statistic.total)
            if gradients is None:
                power = powers[i]
                error += (rows.sum() / torch.where(power > 0, power, 1.0)).item()
            elif layer in gradients:
                error += (rows @ gradients[layer].to(rows.dtype)).item() / max(layer.tokens, 1)
            zero_points = 0 if q.zero_point is None else q.zero_point.numel() * q.scheme.bits
            size += q.codes.numel() * q.scheme.bits + q.scale.numel() * 8 * weights[i].element_size() + zero_points
        found.append((error, size))
    return found
