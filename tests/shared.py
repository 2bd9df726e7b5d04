"""What both test folders use: the settings of a test process, and the fixture that watches global state."""

import contextlib
import getpass
import os
import random
import tempfile

# One thread a process: the cores are shared out among the processes of pytest-xdist.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# With more of them, those that wait must not spin on the cores of the others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# torch would load torch_npu, which fails where Ascend's libraries are missing; before torch is imported.
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
# The compiler's cache takes kernels for one instruction set as kernels for any: a cache for each.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}_{os.environ.get('ATEN_CPU_CAPABILITY', 'native')}",
)

# Compilers of its own for each process would take longer to start than to compile.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import hypothesis
import numpy as np
import torch

hypothesis.settings.register_profile("dev", max_examples=25, deadline=None)
hypothesis.settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("quick", max_examples=15, deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("thorough", max_examples=2000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))


def modes():
    """Every switch of torch that changes what other code computes."""
    found = {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "autocast": [
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")
        ],
        "autocast cache": torch.is_autocast_cache_enabled(),
        "threads": torch.get_num_threads(),
        "threads between operators": torch.get_num_interop_threads(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "deterministic warnings": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "denormal": torch.ones(1, device="cpu").mul(2.0**-126).div(2).item(),
        "swap": torch.__future__.get_swap_module_params_on_conversion(),
        "warnings": torch.is_warn_always_enabled(),
    }
    for name, backend, flags in (
        ("cuda", torch.backends.cuda.matmul, ["allow_tf32", "allow_fp16_reduced_precision_reduction"]),
        ("cudnn", torch.backends.cudnn, ["enabled", "benchmark", "deterministic", "allow_tf32"]),
        ("mkldnn", torch.backends.mkldnn, ["enabled", "deterministic", "allow_tf32"]),
    ):
        found |= {f"{name}.{flag}": getattr(backend, flag) for flag in flags}
    return found


def random_states():
    """The states of all generators that torch, Python and NumPy keep for everybody."""
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "python": random.getstate(),
        "numpy": [part.tobytes() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
    }


@contextlib.contextmanager
def unchanged(*readings):
    """Global state, as ``readings`` give it, is afterwards as before; also where an error is raised."""
    before = [read() for read in readings]
    try:
        yield
    finally:
        for read, old in zip(readings, before, strict=True):
            new = read()
            assert not [name for name in old if new[name] != old[name]], "global state has changed"
