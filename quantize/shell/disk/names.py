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
    """The names of ``layers`` and of float experts by those in memory; and ``others`` as checkpoints have them.

    transformers finds the names itself: for every layer it is given a number in place of the weight. An expert's are
    those of its part of the 3-D parameter that the model was made with.

    Raises:
        QuantizeError: experts that checkpoints of the model keep in one tensor.
    """
    loading: Any = sys.modules.get("transformers.core_model_loading")
    revert = getattr(loading, "revert_weight_conversion", None)
    if revert is None or not hasattr(model, "save_pretrained"):
        return {name: name for name in layers}, dict(others)
    mixtures = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, Experts)}
    # Experts that stay in floating point have such names, too.
    floats = [f"{name}.{inner}" for name, mixture in mixtures.items() for inner, module in mixture.named_modules()
              if isinstance(module, nn.Linear)]  # fmt: skip
    given = [*layers, *floats]
    numbers = {name: number for number, name in enumerate(given)}
    marks = {key: part for name, mixture in mixtures.items() for key, part in _parts(name, mixture, numbers).items()}
    inside = {int(number) for part in marks.values() for number in part.flatten()}
    marks |= {f"{name}.weight": torch.tensor([number]) for name, number in numbers.items() if number not in inside}
    own = {key: tensor for key, tensor in others.items() if key.rpartition(".")[0] in floats}
    rest = {key: tensor for key, tensor in others.items() if key not in own}
    names, kept = {name: name for name in given}, dict[str, Tensor]()
    for key, tensor in revert(model, {**rest, **marks}).items():
        if tensor.dtype != torch.int64 or key in rest:
            kept[key] = tensor
        elif tensor.numel() > 1:
            told = f"{key!r} is one tensor in its checkpoints, which no format has in codes"
            raise refusal("model", told, "the experts in skip_layers")
        else:
            names[given[int(tensor)]] = key.removesuffix(".weight")
    for key, tensor in own.items():
        owner, _, last = key.rpartition(".")
        kept[f"{names[owner]}.{last}"] = tensor
    return names, kept


def _parts(name: str, module: Experts, numbers: Mapping[str, int]) -> dict[str, Tensor]:
    """The 3-D parameters of ``module`` with the number of a layer for each of its matrices."""
    ups = ("gate_proj", "up_proj") if module.has_gate else ("up_proj",)
    fused = "gate_up_proj" if module.has_gate else "up_proj"
    return {
        f"{name}.{key}": torch.tensor(
            [[[numbers[f"{name}.{e}.{part}"]] for part in parts] for e in range(module.num_experts)]
        )
        for key, parts in ((fused, ups), ("down_proj", ("down_proj",)))
    }
