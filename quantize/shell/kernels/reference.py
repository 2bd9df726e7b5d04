"""The kernel that runs everywhere and defines the result: the core's own quantized linear layer."""

from quantize.core.linear import quantized_linear as linear

__all__ = ["linear"]
