"""The core on memory of other frameworks, and theirs on its results: nothing is copied on the way."""

import importlib.util

import numpy as np
import pytest
import torch

from quantize import core

SCHEME = core.Scheme(bits=4, symmetric=False, strategy="group", group_size=32)


def numbers(*shape, seed=0):
    """Normal numbers at an address like those of torch: the sums of a matmul may depend on it."""
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    memory = np.empty(values.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    aligned = memory[start : start + values.nbytes].view(np.float32).reshape(shape)
    aligned[...] = values
    return aligned


class Foreign:
    """An array of a framework that is unknown here: it shows its memory, and nothing else."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **how):
        return self._array.__dlpack__(**how)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


def jax_numpy():
    import jax

    return jax.numpy.asarray, lambda tensor: np.asarray(jax.dlpack.from_dlpack(tensor))


# What makes an array of NumPy one of the framework, and what takes a tensor and makes it one of NumPy's.
FRAMEWORKS = {"numpy": lambda: (np.asarray, np.from_dlpack), "protocol": lambda: (Foreign, np.from_dlpack)}
if importlib.util.find_spec("jax"):
    FRAMEWORKS["jax"] = jax_numpy
every_framework = pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=FRAMEWORKS.keys())


@every_framework
def test_arrays_go_in_and_come_out(framework):
    array, back = framework()
    weight = numbers(16, 64)
    q = core.round_to_nearest(torch.from_dlpack(array(weight)), SCHEME)
    codes, scale, zero = (back(tensor) for tensor in (q.codes, q.scale, q.zero_point))
    assert codes.dtype == np.int8
    values = (codes.reshape(16, 2, 32).astype(np.float32) - zero[..., None]) * scale[..., None]
    assert np.array_equal(values.reshape(16, 64), back(core.dequantize(q)))
    # Half a step. In steps a value is at most 15: its quotient, the zero point's, and the product are rounded.
    error = np.abs(values.astype(np.float64) - weight.reshape(16, 2, 32))
    assert (error <= scale[..., None] * (0.5 + 3 * 15 * 2.0**-24)).all()


@every_framework
def test_a_whole_algorithm_runs_on_arrays(framework):
    array, back = framework()
    given = numbers(16, 64), numbers(200, 64)
    weight, tokens = (torch.from_dlpack(array(each)) for each in given)
    statistic = core.gram.update(core.gram.init(64), tokens)
    solution = core.gptq.solve(core.LayerSpec(SCHEME), core.gptq.Options(), weight, statistic)
    own = [torch.tensor(each) for each in given]
    statistic = core.gram.update(core.gram.init(64), own[1])
    plain = core.gptq.solve(core.LayerSpec(SCHEME), core.gptq.Options(), own[0], statistic)
    assert np.array_equal(back(solution.weight.codes), plain.weight.codes.numpy())


def test_memory_is_shared():
    weight = numbers(8, 64)
    tensor = torch.from_dlpack(weight)
    assert tensor.data_ptr() == weight.ctypes.data
    q = core.round_to_nearest(tensor, SCHEME)
    assert np.from_dlpack(q.codes).ctypes.data == q.codes.data_ptr()
