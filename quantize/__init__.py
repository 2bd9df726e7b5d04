"""Post-training quantization of PyTorch models: a pure functional core and a thin shell.

>>> import torch, quantize as qz
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
>>> qz.quantize(model, {"quant_cfg": {"weights": {"type": "int8", "symmetric": True, "strategy": "channel"}},
...                     "algorithm": "minmax"})
>>> qz.convert(model)
>>> model[0].codes.dtype
torch.int8
"""

from quantize import core, presets
from quantize.shell.api import convert, finish, quantize, report
from quantize.shell.budget import assign_formats
from quantize.shell.config import QuantizeError, QuantizeWarning
from quantize.shell.deploy.layer import QuantizedLinear
from quantize.shell.disk.export import export
from quantize.shell.disk.storage import load, load_calibration, save, save_calibration

__all__ = ["QuantizeError", "QuantizeWarning", "QuantizedLinear", "assign_formats", "convert", "core", "export",
           "finish", "load", "load_calibration", "presets", "quantize", "report", "save",
           "save_calibration"]  # fmt: skip
