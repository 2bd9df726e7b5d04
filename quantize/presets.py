"""Configs that are ready to use: ``quantize(model, presets.INT8_SMOOTHQUANT_CFG)``."""

from typing import Any


def _config(weights: str, algorithm: str | dict[str, Any], **quant_cfg: Any) -> dict[str, Any]:
    quant_cfg = {"weights": {"type": weights, "symmetric": True, "strategy": "channel"}, **quant_cfg}
    given = {algorithm} if isinstance(algorithm, str) else algorithm
    return {"batch_num": 1, "quant_cfg": quant_cfg, "algorithm": given, "skip_layers": {"lm_head"}}


INT8_MINMAX_WEIGHT_QUANT_CFG = _config("int8", "minmax")
INT4_AWQ_WEIGHT_QUANT_CFG = _config("int4", "awq")
INT4_GPTQ_WEIGHT_QUANT_CFG = _config("int4", "gptq")
INT8_SMOOTHQUANT_CFG = _config(
    "int8", {"smoothquant": {"smooth_strength": 0.5}}, inputs={"type": "int8", "symmetric": True, "strategy": "tensor"}
)
