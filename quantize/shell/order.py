"""In which order the layers of a model are fitted: its stages, and the groups of layers inside of a stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from quantize.shell.calibration import CalibrationLinear


def stages(root: nn.Module, layers: list[CalibrationLinear]) -> dict[nn.Module, list[CalibrationLinear]]:
    """The layers of every stage of ``root``."""
    names = {module: name for name, module in root.named_modules()}
    found: dict[nn.Module, list[CalibrationLinear]] = {}
    for layer in layers:
        path = names[layer].split(".")
        owners = [root.get_submodule(".".join(path[:depth])) for depth in range(len(path))]
        lists = [depth for depth, owner in enumerate(owners) if isinstance(owner, (nn.ModuleList, nn.Sequential))]
        stage = root.get_submodule(".".join(path[: lists[0] + 1])) if lists else layer
        found.setdefault(stage, []).append(layer)
    return found


def ordered(
    grouped: dict[nn.Module, list[CalibrationLinear]], calls: list[str]
) -> list[tuple[nn.Module, list[CalibrationLinear]]]:
    """The stages in the order of the first ``calls`` of their layers; those that were never called come last."""
    first: dict[str, int] = {}
    for name in calls:
        first.setdefault(name, len(first))
    return sorted(grouped.items(), key=lambda item: min(first.get(layer.names[0], len(first)) for layer in item[1]))


def groups(layers: list[CalibrationLinear], inputs: Mapping[str, Any]) -> list[list[CalibrationLinear]]:
    """The layers of a stage by the tensor that they read, in the order of ``inputs``: layer names and tensors."""
    place = {name: i for i, name in enumerate(inputs)}
    found: dict[Any, list[CalibrationLinear]] = {}
    for layer in sorted(layers, key=lambda layer: place.get(layer.names[0], len(place))):
        found.setdefault(inputs.get(layer.names[0]), []).append(layer)
    return list(found.values())
