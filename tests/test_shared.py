"""The guard that every test runs under sees what it should see."""

import random

import numpy as np
import pytest
import torch

from tests.shared import modes, random_states, unchanged

SWITCHES = {
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "default device": lambda: torch.set_default_device("meta"),
    "grad mode": lambda: torch.set_grad_enabled(False),
    "autocast": lambda: torch.set_autocast_enabled("cpu", True),
    "autocast dtype": lambda: torch.set_autocast_dtype("cpu", torch.float16),
    "autocast cache": lambda: torch.set_autocast_cache_enabled(False),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "matmul precision": lambda: torch.set_float32_matmul_precision("medium"),
    "deterministic": lambda: torch.use_deterministic_algorithms(True),
    "denormal numbers": lambda: torch.set_flush_denormal(True),
    "mkldnn": lambda: setattr(torch.backends.mkldnn, "enabled", False),
    "random numbers of torch": lambda: torch.rand(1),
    "random numbers of Python": random.random,
    "random numbers of NumPy": lambda: np.random.rand(1),  # noqa: NPY002 - the generator that is watched
}


@pytest.fixture
def afterwards_as_before():
    random_numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002 - likewise
    numbers = torch.get_default_dtype(), torch.get_num_threads(), torch.get_float32_matmul_precision()
    autocast = torch.get_autocast_dtype("cpu")
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(numbers[0])
    torch.set_num_threads(numbers[1])
    torch.set_float32_matmul_precision(numbers[2])
    torch.set_grad_enabled(True)
    torch.set_autocast_enabled("cpu", False)
    torch.set_autocast_dtype("cpu", autocast)
    torch.set_autocast_cache_enabled(True)
    torch.use_deterministic_algorithms(False)
    torch.set_flush_denormal(False)
    torch.backends.mkldnn.enabled = True
    torch.set_rng_state(random_numbers[0])
    random.setstate(random_numbers[1])
    np.random.set_state(random_numbers[2])  # noqa: NPY002 - likewise


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES.keys())
def test_what_changes_is_seen(switch, afterwards_as_before):
    with pytest.raises(AssertionError, match="global state has changed"), unchanged(modes, random_states):
        switch()


def test_what_stays_is_let_through():
    with unchanged(modes, random_states):
        torch.rand(1, generator=torch.Generator().manual_seed(0))
