import os

# torch would load torch_npu, which fails where Ascend's libraries are missing; before torch is imported.
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"

from tests.shared import unchanged_global_state

__all__ = ["unchanged_global_state"]
