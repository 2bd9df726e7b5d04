"""Configs that are ready to use: ``quantize(model, presets.INT8_SMOOTHQUANT_CFG)``.

All have one batch, symmetric weights with one scale for each output channel, and skip layers named ``lm_head``.

- ``INT8_MINMAX_WEIGHT_QUANT_CFG``: int8 weights, rounded to nearest; needs no data.
- ``INT4_AWQ_WEIGHT_QUANT_CFG``: int4 weights by awq.
- ``INT4_GPTQ_WEIGHT_QUANT_CFG``: int4 weights by gptq.
- ``INT8_SMOOTHQUANT_CFG``: int8 weights, and int8 inputs with one static scale, by smoothquant.

>>> sorted(INT4_GPTQ_WEIGHT_QUANT_CFG)
['algorithm', 'batch_num', 'quant_cfg', 'skip_layers']
"""

from typing import Any


def _config(weights: str, algorithm: str | dict[str, Any], **quant_cfg: Any) -> dict[str, Any]:
    quant_cfg = {"weights": {"type": weights, "symmetric": True, "strategy": "channel"}, **quant_cfg}
    given = {algorithm} if isinstance(algorithm, str) else algorithm
    return {"batch_num": 1, "quant_cfg": quant_cfg, "algorithm": given, "skip_layers": {"lm_head"}}


INT8_MINMAX_WEIGHT_QUANT_CFG = _config("int8", "minmax")
INT4_AWQ_WEIGHT_QUANT_CFG = _config("int4", {"awq": {"grids_num": 20}})
INT4_GPTQ_WEIGHT_QUANT_CFG = _config("int4", "gptq")
INT8_SMOOTHQUANT_CFG = _config(
    "int8", {"smoothquant": {"smooth_strength": 0.5}}, inputs={"type": "int8", "symmetric": True, "strategy": "tensor"}
)
