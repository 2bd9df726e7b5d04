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
    left = {name: torch.tensor([number]) for number, name in enumerate(given)}
    marks: dict[str, Tensor] = {}
    for name, m in mixtures.items():
        ups = ("gate_proj", "up_proj") if m.has_gate else ("up_proj",)
        for fused, parts in (("gate_up_proj" if m.has_gate else "up_proj", ups), ("down_proj", ("down_proj",))):
            numbers = [torch.stack([left.pop(f"{name}.{e}.{part}") for part in parts]) for e in range(m.num_experts)]
            marks[f"{name}.{fused}"] = torch.stack(numbers)
    marks |= {f"{name}.weight": number for name, number in left.items()}
    names, kept = {name: name for name in given}, dict[str, Tensor]()
    own = {key: key.rpartition(".") for key in others if key.rpartition(".")[0] in floats}
    rest = {key: tensor for key, tensor in others.items() if key not in own}
    for key, tensor in revert(model, {**rest, **marks}).items():
        if tensor.dtype != torch.int64 or key in rest:
            kept[key] = tensor
        elif tensor.numel() > 1:
            told = f"{key!r} is one tensor in its checkpoints, which no format has in codes"
            raise refusal("model", told, "the experts in skip_layers")
        else:
            names[given[int(tensor)]] = key.removesuffix(".weight")
    return names, kept | {f"{names[owner]}.{last}": others[key] for key, (owner, _, last) in own.items()}
