"""The names that tensors have in checkpoints, where transformers gives them others in memory."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantize.shell.config import refusal
from quantize.shell.views import Experts


def of_checkpoint(
    model: nn.Module, layers: Iterable[str], others: Mapping[str, Tensor]
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The names of ``layers``, by those in memory; and ``others`` as a checkpoint holds them, some of them taken apart.

    transformers finds the names itself: for every layer it is given a number in place of the weight. An expert's are
    those of its part of the 3-D parameter that the model was made with.

    Raises:
        QuantizeError: experts that checkpoints of the model keep in one tensor.
    """
    loading: Any = sys.modules.get("transformers.core_model_loading")
    revert = getattr(loading, "revert_weight_conversion", None)
    if revert is None or not hasattr(model, "save_pretrained"):
        return {name: name for name in layers}, dict(others)
    numbers = {name: number for number, name in enumerate(layers)}
    state: dict[str, Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Experts):
            state |= _parts(name, module, numbers)
    inside = {int(number) for part in state.values() for number in part.flatten()}
    state |= {f"{name}.weight": torch.tensor([number]) for name, number in numbers.items() if number not in inside}
    fused = {key for key, part in state.items() if part.numel() > 1}
    found: dict[str, Tensor] = revert(model, {**others, **state})
    given = list(numbers)
    names = {name: name for name in given}
    kept: dict[str, Tensor] = {}
    for key, tensor in found.items():
        mark = tensor.dtype == torch.int64 and key.endswith((".weight", *fused)) and key not in others
        if not mark:
            kept[key] = tensor
        elif tensor.numel() > 1:
            told = f"{key!r} is one tensor in its checkpoints, which no format has in codes"
            raise refusal("model", told, "the experts in skip_layers")
        elif tensor.item() >= 0:
            names[given[int(tensor)]] = key.removesuffix(".weight")
    return names, kept


def _parts(name: str, module: Experts, numbers: Mapping[str, int]) -> dict[str, Tensor]:
    """The 3-D parameters of ``module`` with the number of a layer for each of its matrices; -1 for none."""

    def number(expert: int, key: str) -> int:
        return numbers.get(f"{name}.{expert}.{key}", -1)

    ups = ("gate_proj", "up_proj") if module.has_gate else ("up_proj",)
    fused = "gate_up_proj" if module.has_gate else "up_proj"
    return {
        f"{name}.{key}": torch.tensor([[[number(e, part)] for part in parts] for e in range(module.num_experts)])
        for key, parts in ((fused, ups), ("down_proj", ("down_proj",)))
    }
