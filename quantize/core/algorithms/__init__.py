"""The registry of algorithms: a new one is a new file here and a line below."""

from quantize.core.algorithms import minmax
from quantize.core.algorithms.base import Algorithm, AlgorithmModule, LayerSpec, Solution

ALGORITHMS: dict[str, AlgorithmModule] = {
    "minmax": minmax,
}

__all__ = ["ALGORITHMS", "Algorithm", "AlgorithmModule", "LayerSpec", "Solution"]
