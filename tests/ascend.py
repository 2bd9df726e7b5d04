"""The Ascend operators without a device: the vendor's own checks, the documented rules, and an emulator in NumPy.

Without Ascend's libraries torch_npu cannot be imported, and where it is installed all the same, torch and transformers
fail to import too. But its meta registrations are plain Python: they are taken out of the wheel of the tested version,
which pip downloads once, and run with a stub in the place of torch_npu. The emulator follows the documented formulas.
On a machine with a device nothing here is registered, and the tests run on the operators themselves.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
import types
import zipfile
from unittest import mock

import numpy as np
import torch
import torch.fx

OPERATORS = {
    "npu_weight_quant_batchmatmul": "(Tensor x, Tensor weight, Tensor antiquant_scale, Tensor? antiquant_offset=None, "
    "Tensor? quant_scale=None, Tensor? quant_offset=None, Tensor? bias=None, int antiquant_group_size=0, "
    "int inner_precise=0, int? weight_dtype=None) -> Tensor",
    "npu_convert_weight_to_int4pack": "(Tensor weight, int inner_k_tiles=0) -> Tensor",
    "npu_quantize": "(Tensor input, Tensor scales, Tensor? zero_points, int dtype, int axis=1, bool div_mode=True) "
    "-> Tensor",
    "npu_dynamic_quant": "(Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None, int? dst_type=None, "
    'str quant_mode="pertoken", float dst_type_max=0.0) -> (Tensor, Tensor)',
    "npu_quant_matmul": "(Tensor x1, Tensor x2, Tensor scale, *, Tensor? offset=None, Tensor? pertoken_scale=None, "
    "Tensor? bias=None, int? output_dtype=None, int? x1_dtype=None, int? x2_dtype=None, "
    "int? pertoken_scale_dtype=None, int? scale_dtype=None, int[]? group_sizes=None, Tensor? y_scale=None) -> Tensor",
}
VERSION = "2.13.0"
ON_A_DEVICE = "ASCEND_HOME_PATH" in os.environ
DEVICE = "npu" if ON_A_DEVICE else "cpu"
# How a dtype arrives at an operator: as its number.
_FLOAT16, _BFLOAT16, _QINT8 = 5, 15, 12


def vendor_file():
    """The meta registrations of torch_npu: those of the wheel, kept beside pytest's cache."""
    kept = pathlib.Path(__file__).parent.parent / ".pytest_cache" / f"torch_npu-{VERSION}" / "registrations.py"
    if kept.exists():
        return kept
    with tempfile.TemporaryDirectory() as directory:
        # For the one platform whose wheel is read, wherever this runs.
        where = ["--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--only-binary", ":all:"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *where, "--dest", directory]
        done = subprocess.run([*command, f"torch_npu=={VERSION}"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"torch_npu=={VERSION} cannot be downloaded, whose checks are run here: {done.stderr}")
        (wheel,) = pathlib.Path(directory).glob("*.whl")
        content = zipfile.ZipFile(wheel).read("torch_npu/op_plugin/meta/_meta_registrations.py")
    kept.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: others may be about to read it.
    temporary = kept.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(content)
    temporary.rename(kept)
    return kept


class Stub(types.ModuleType):
    """A module that has everything: dtypes of torch_npu, and names that other registrations ask for."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return f"torch_npu.{name}"


def vendor_registrations():
    """The functions that torch_npu registers for meta tensors, by operator, from the installed package."""
    file = vendor_file()
    registered = {}

    def impl(_library, name, *_rest):
        return lambda function: registered.setdefault(name, function)

    stubs = {}
    for name in ("torch_npu", "torch_npu.utils", "torch_npu.utils._error_code", "torch_npu.npu", "torch_npu.npu.utils",
                 "torch_npu.npu._backends"):  # fmt: skip
        stubs[name] = Stub(name)
    stubs["torch_npu.utils._error_code"].ops_error = lambda _code: ""
    stubs["torch_npu.utils._error_code"].ErrCode = Stub("ErrCode")
    spec = importlib.util.spec_from_file_location("vendor_meta_registrations", file)
    module = importlib.util.module_from_spec(spec)
    with (
        mock.patch.dict(sys.modules, stubs),
        mock.patch.object(torch.library, "impl", impl),
        mock.patch.object(torch.library, "Library", mock.MagicMock()),
        mock.patch.object(torch.fx.node, "has_side_effect", lambda operator: operator),
        mock.patch.object(torch.ops, "npu", mock.MagicMock(), create=True),
    ):
        spec.loader.exec_module(module)
    return registered


def require(condition, rule):
    if not condition:
        raise AssertionError(f"the documentation of the operator asks for: {rule}")


def check_weight_quant_batchmatmul(
    x, weight, antiquant_scale, antiquant_offset=None, quant_scale=None, quant_offset=None, bias=None,
    antiquant_group_size=0, inner_precise=0, weight_dtype=None,
):  # fmt: skip
    (_, k), n = x.shape, weight.shape[1] * (8 if weight.dtype == torch.int32 else 1)
    require(x.ndim == weight.ndim == 2 and x.numel() > 0, "matrices that are not empty")
    require(x.dtype in (torch.float16, torch.bfloat16), "float16 or bfloat16 inputs")
    require(weight.dtype in (torch.int8, torch.int32) and weight.shape[0] == k, "int8 or packed int4 (K, N)")
    require(weight.dtype == torch.int8 or weight.is_contiguous(), "packed int4 in rows of N / 8")
    require(weight.dtype == torch.int32 or weight.T.is_contiguous(), "int8 as a transposed view, which it recommends")
    require(1 <= k <= 65535 and 1 <= n <= 65535, "K and N up to 65535")
    groups = -(-k // antiquant_group_size) if antiquant_group_size else None
    shapes = [(groups, n)] if groups else [(1,), (1, 1), (n,), (1, n)]
    require(antiquant_group_size == 0 or (antiquant_group_size % 32 == 0 and 32 <= antiquant_group_size <= k - 1),
            "groups of a multiple of 32, below K")  # fmt: skip
    require(antiquant_scale.dtype == x.dtype and tuple(antiquant_scale.shape) in shapes, "scales in the inputs' dtype")
    if antiquant_offset is not None:
        require(antiquant_offset.dtype == x.dtype, "offsets in the dtype of the scales")
        require(antiquant_offset.shape == antiquant_scale.shape, "offsets in the shape of the scales")
    if bias is not None:
        wanted = torch.float32 if x.dtype == torch.bfloat16 else torch.float16
        require(bias.dtype == wanted and bias.is_contiguous(), "a bias in float32 for bfloat16, float16 for float16")
        require(tuple(bias.shape) in [(n,), (1, n)], "a bias of N")
    require(quant_scale is quant_offset is weight_dtype is None and inner_precise == 0, "nothing that is unused here")


def check_convert_weight_to_int4pack(weight, inner_k_tiles=0):
    require(weight.dtype == torch.int32 and weight.ndim == 2 and weight.is_contiguous(), "a contiguous int32 matrix")
    require(weight.shape[1] % 8 == 0 and inner_k_tiles == 0, "a multiple of 8 columns")


def check_quantize(x, scales, zero_points, dtype, axis=1, div_mode=True):
    require(not div_mode and dtype == _QINT8, "multiplication, to qint8")
    require(axis >= -2 and axis in (-1, x.ndim - 1), "the last axis")
    require(x.dtype in (torch.float32, torch.float16, torch.bfloat16) and x.numel() > 0, "float inputs")
    require(scales.dtype == x.dtype and scales.ndim == 1 and len(scales) in (1, x.shape[-1]), "scales of 1 or K")
    if zero_points is not None:
        require(zero_points.dtype == scales.dtype and zero_points.shape == scales.shape, "zero points like the scales")


def check_dynamic_quant(x, *, smooth_scales=None, group_index=None, dst_type=None, quant_mode="pertoken",
                        dst_type_max=0.0):  # fmt: skip
    require(x.dtype in (torch.float16, torch.bfloat16) and x.ndim >= 2 and x.numel() > 0, "16-bit inputs of 2 axes")
    if smooth_scales is not None:
        require(smooth_scales.dtype == x.dtype and smooth_scales.shape == x.shape[-1:], "smooth scales (K,) as x")
    require(group_index is dst_type is None and quant_mode == "pertoken" and dst_type_max == 0, "int8 tokens")


def check_quant_matmul(x1, x2, scale, *, offset=None, pertoken_scale=None, bias=None, output_dtype=None, x1_dtype=None,
                       x2_dtype=None, pertoken_scale_dtype=None, scale_dtype=None, group_sizes=None,
                       y_scale=None):  # fmt: skip
    (m, k), n = x1.shape[-2:], x2.shape[-1]
    require(x1.dtype == x2.dtype == torch.int8 and x2.ndim == 2 and x2.shape[0] == k, "int8 (M, K) and (K, N)")
    require(k <= 65535 and n <= 65535 and x1.numel() > 0, "last axes up to 65535")
    require(x2.T.is_contiguous(), "the weight as a transposed view")
    require(scale.ndim == 1 and len(scale) in (1, n), "scales of 1 or N")
    require(scale.dtype == torch.float32, "float32 scales")
    require(output_dtype in (_FLOAT16, _BFLOAT16), "a float output")
    if pertoken_scale is not None:
        require(pertoken_scale.dtype == torch.float32 and pertoken_scale.shape == (m,), "token scales (M,) in float32")
    if bias is not None:
        accepted = {torch.int32, torch.float32}
        accepted |= {torch.bfloat16} if output_dtype == _BFLOAT16 else set()
        accepted |= {torch.float16} if output_dtype == _FLOAT16 and pertoken_scale is not None else set()
        accepted -= {torch.float32} if output_dtype == _FLOAT16 and pertoken_scale is None else set()
        require(bias.dtype in accepted and bias.shape == (n,), "a bias (N,) of the documented combinations")
    unused = (offset, x1_dtype, x2_dtype, pertoken_scale_dtype, scale_dtype, group_sizes, y_scale)
    require(all(each is None for each in unused), "nothing that is unused here")


def array(tensor):
    """As NumPy has it; 16-bit floats widened."""
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def rounded(values, dtype):
    """To the nearest of ``dtype``, ties to even, still as float32."""
    values = np.asarray(values, np.float32)
    if dtype == torch.float16:
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32)


def tensor(values, dtype):
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype)


def nibbles(words):
    """int32 ``[k, n / 8]`` to int4 ``[k, n]``: element j of a word at bits 4j to 4j + 3."""
    words = words.view(np.uint32)
    parts = np.stack([(words >> np.uint32(4 * j)) & np.uint32(15) for j in range(8)], -1).astype(np.int32)
    return np.where(parts > 7, parts - 16, parts).reshape(len(words), -1)


def weight_quant_batchmatmul(x, weight, antiquant_scale, antiquant_offset=None, quant_scale=None, quant_offset=None,
                             bias=None, antiquant_group_size=0, inner_precise=0, weight_dtype=None):  # fmt: skip
    codes = nibbles(array(weight)) if weight.dtype == torch.int32 else array(weight)
    rows = np.arange(len(codes)) // antiquant_group_size if antiquant_group_size else np.zeros(len(codes), int)
    scale, offset = (None if t is None else np.atleast_2d(array(t))[rows] for t in (antiquant_scale, antiquant_offset))
    # The matrix unit takes weights in the dtype of the inputs, and sums in float32.
    dequantized = rounded((codes + (0 if offset is None else offset)) * scale, x.dtype)
    y = array(x).astype(np.float64) @ dequantized.astype(np.float64)
    y = y if bias is None else y + array(bias)
    return tensor(rounded(y, x.dtype), x.dtype)


def convert_weight_to_int4pack(weight, inner_k_tiles=0):
    values = (array(weight).astype(np.int64) & 15).reshape(len(weight), -1, 8)
    words = sum(values[..., j] << (4 * j) for j in range(8))
    return tensor(words.astype(np.uint32).view(np.int32), torch.int32)


def quantize(x, scales, zero_points, dtype, axis=1, div_mode=True):
    product = array(x) * array(scales) + (np.float32(0) if zero_points is None else array(zero_points))
    return tensor(np.clip(np.rint(product), -128, 127).astype(np.int8), torch.int8)


def dynamic_quant(x, *, smooth_scales=None, group_index=None, dst_type=None, quant_mode="pertoken", dst_type_max=0.0):
    smoothed = array(x) * (np.float32(1) if smooth_scales is None else array(smooth_scales))
    scale = np.abs(smoothed).max(-1, keepdims=True) / np.float32(127)
    with np.errstate(invalid="ignore"):
        codes = np.where(scale > 0, np.rint(smoothed / scale), 0)
    return tensor(codes.astype(np.int8), torch.int8), tensor(scale[..., 0], torch.float32)


def quant_matmul(x1, x2, scale, *, offset=None, pertoken_scale=None, bias=None, output_dtype=None, x1_dtype=None,
                 x2_dtype=None, pertoken_scale_dtype=None, scale_dtype=None, group_sizes=None,
                 y_scale=None):  # fmt: skip
    dtype = torch.float16 if output_dtype == _FLOAT16 else torch.bfloat16
    total, scale = array(x1).astype(np.int64) @ array(x2).astype(np.int64), array(scale)
    if dtype == torch.float16 and pertoken_scale is None:
        # Ten bits of mantissa are read.
        scale = (scale.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    if bias is not None and bias.dtype == torch.int32:
        total = total + array(bias)
        require(np.abs(total).max() < 2**31, "sums in int32")
    y = total.astype(np.float32) * scale
    y = y if pertoken_scale is None else y * array(pertoken_scale)[:, None]
    y = y + array(bias) if bias is not None and bias.dtype != torch.int32 else y
    return tensor(rounded(y, dtype), dtype)


def register():
    """Declare the operators, with vendor's registrations for meta tensors and the emulator for those of the CPU."""
    library = torch.library.Library("npu", "FRAGMENT")
    vendor = vendor_registrations()
    here = globals()
    for name, schema in OPERATORS.items():
        short = name.removeprefix("npu_")
        library.define(name + schema)
        library.impl(name, both(here[f"check_{short}"], here[short]), "CPU")
        if name in vendor:
            library.impl(name, both(here[f"check_{short}"], vendor[name]), "Meta")
    return library


def both(check, compute):
    def call(*args, **kwargs):
        check(*args, **kwargs)
        return compute(*args, **kwargs)

    return call


LIBRARY = None if ON_A_DEVICE else register()
