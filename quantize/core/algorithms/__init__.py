"""The registry of algorithms: a new one is a new file here and a line below."""

from quantize.core.algorithms import awq, gptq, minmax, smoothquant
from quantize.core.algorithms.contract import Algorithm, AlgorithmModule, LayerSpec, Solution

ALGORITHMS: dict[str, AlgorithmModule] = {
    "minmax": minmax,
    "gptq": gptq,
    "awq": awq,
    "smoothquant": smoothquant,
}

__all__ = ["ALGORITHMS", "Algorithm", "AlgorithmModule", "LayerSpec", "Solution"]
