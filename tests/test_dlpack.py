"""The core on memory of other frameworks, and theirs on its results: nothing is copied on the way."""

import numpy as np
import pytest
import torch

from quantize import core

SCHEME = core.Scheme(bits=4, symmetric=False, strategy="group", group_size=32)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def to_numpy(tensor):
    return np.from_dlpack(tensor)


def jax_numpy():
    jax = pytest.importorskip("jax")
    return jax.numpy.asarray, jax.dlpack.from_dlpack


def framework(name):
    """What makes an array of it, and what takes a tensor."""
    return (np.asarray, to_numpy) if name == "numpy" else jax_numpy()


@pytest.mark.parametrize("name", ["numpy", "jax"])
def test_arrays_go_in_and_come_out(name):
    array, back = framework(name)
    weight = array(numbers(16, 64))
    q = core.round_to_nearest(torch.from_dlpack(weight), SCHEME)
    codes, scale, zero = (np.asarray(back(tensor)) for tensor in (q.codes, q.scale, q.zero_point))
    assert codes.dtype == np.int8
    values = (codes.reshape(16, 2, 32).astype(np.float32) - zero[..., None]) * scale[..., None]
    assert np.array_equal(values.reshape(16, 64), np.asarray(back(core.dequantize(q))))
    # To the nearest: half a step, and the division rounded once.
    error = np.abs(values - np.asarray(weight).reshape(16, 2, 32))
    assert (error <= scale[..., None] * (0.5 + 2.0**-20)).all()


@pytest.mark.parametrize("name", ["numpy", "jax"])
def test_a_whole_algorithm_runs_on_arrays(name):
    array, back = framework(name)
    weight, tokens = (torch.from_dlpack(array(numbers(*shape))) for shape in ((16, 64), (200, 64)))
    statistic = core.gram.update(core.gram.init(64), tokens)
    solution = core.gptq.solve(core.LayerSpec(SCHEME), core.gptq.Options(), weight, statistic)
    plain = core.gptq.solve(core.LayerSpec(SCHEME), core.gptq.Options(), weight.clone(), statistic)
    assert np.array_equal(np.asarray(back(solution.weight.codes)), plain.weight.codes.numpy())


def test_memory_is_shared():
    weight = numbers(8, 64)
    tensor = torch.from_dlpack(weight)
    assert tensor.data_ptr() == weight.ctypes.data
    q = core.round_to_nearest(tensor, SCHEME)
    assert to_numpy(q.codes).ctypes.data == q.codes.data_ptr()
