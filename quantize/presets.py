"""Configs that are ready to use: ``quantize(model, presets.INT8_SMOOTHQUANT_CFG)``."""

from typing import Any


def _weight_only(kind: str, algorithm: str) -> dict[str, Any]:
    return {
        "batch_num": 1,
        "quant_cfg": {"weights": {"type": kind, "symmetric": True, "strategy": "channel"}},
        "algorithm": {algorithm},
        "skip_layers": {"lm_head"},
    }


INT8_MINMAX_WEIGHT_QUANT_CFG = _weight_only("int8", "minmax")
INT4_AWQ_WEIGHT_QUANT_CFG = _weight_only("int4", "awq")
INT4_GPTQ_WEIGHT_QUANT_CFG = _weight_only("int4", "gptq")
INT8_SMOOTHQUANT_CFG: dict[str, Any] = {
    "batch_num": 1,
    "quant_cfg": {
        "weights": {"type": "int8", "symmetric": True, "strategy": "channel"},
        "inputs": {"type": "int8", "symmetric": True, "strategy": "tensor"},
    },
    "algorithm": {"smoothquant": {"smooth_strength": 0.5}},
    "skip_layers": {"lm_head"},
}
