"""The npu kernel against the vendor's checks, the documented rules, and an emulator; on a device, against that."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

import quantize as qz
from quantize.core import LayerSpec, QParams, Scheme, Solution, dequantize, linear, packing, round_to_nearest
from quantize.shell.deploy.kernels import OWN, Layout, npu, reference
from tests import ascend
from tests.models import TENSOR, TOKEN, WEIGHTS, config, filled, randn

if ascend.ON_A_DEVICE:
    import torch_npu  # noqa: F401 - registers the device

pytestmark = pytest.mark.npu
N, C = 64, 96
HALVES = [torch.float16, torch.bfloat16]
TOKENWISE = Scheme(strategy="token")
STATIC = [Scheme(8, symmetric, "tensor") for symmetric in (True, False)]
WEIGHT_ONLY = [
    Scheme(bits, symmetric, strategy, 32 if strategy == "group" else None)
    for bits in (8, 4)
    for symmetric in (True, False)
    for strategy in ("tensor", "channel", "group")
]
MATRIX = [(scheme, None) for scheme in WEIGHT_ONLY] + [
    (Scheme(bits, symmetric, strategy), inputs)
    for bits, symmetric in ((8, True), (4, True), (4, False))
    for strategy in ("tensor", "channel")
    for inputs in (*STATIC, TOKENWISE)
]
every_cell = pytest.mark.parametrize(("scheme", "inputs"), MATRIX, ids=lambda s: str(s or "float"))
every_dtype = pytest.mark.parametrize("dtype", HALVES, ids=str)
with_bias = pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
SMOOTHING = 2.0 ** torch.linspace(-3, 3, C)
with_smoothing = pytest.mark.parametrize("smoothing", [None, SMOOTHING], ids=["", "smoothed"])


def solved(scheme, inputs, *, smoothing=None, n=N, c=C):
    weight = randn(n, c, seed=1) * torch.logspace(-1, 1, n)[:, None]
    weight = weight if smoothing is None else weight * smoothing
    static = None
    if inputs is not None and inputs.strategy == "tensor":
        zero_point = None if inputs.symmetric else torch.full((1, 1), -21, dtype=torch.int8)
        static = QParams(torch.full((1, 1), 0.031), zero_point)
    return Solution(round_to_nearest(weight, scheme), inputs, smoothing, static)


def on_device(tree, device=ascend.DEVICE):
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), tree)


def on_cpu(tree):
    return on_device(tree, "cpu")


def same(a, b):
    """Assert that two trees have one structure and the same bits."""
    assert pytree.tree_structure(a) == pytree.tree_structure(b)
    for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def made(scheme, inputs, dtype, *, bias, smoothing=None):
    """The kernel's tensors on the device, its layout and bias, and the solution that they come from."""
    solution = solved(scheme, inputs, smoothing=smoothing)
    held_bias = randn(N, seed=2).to(dtype) if bias else None
    assert npu.obstacle(solution, held_bias, dtype) is None
    held = npu.prepare(on_device(solution), dtype)
    return held, Layout(LayerSpec(scheme, inputs), N, C, dtype), held_bias, solution


def bound(x, s, bias, dtype):
    """How far kernel and reference may be apart, ``[t, n]``; ``u`` and ``v`` of the dtype and of float32.

    Both round the result to ``dtype`` and add the bias there or before (2 u each); c products are summed in float32.
    """
    u, v, c = torch.finfo(dtype).eps / 2, 2.0**-24, x.shape[-1]
    weight = dequantize(s.weight).double().abs()
    tokens = linear.smooth(x.flatten(0, -2) if x.ndim > 1 else x[None], s.smoothing).double()
    size = 0 if bias is None else bias.double().abs()
    if s.inputs is None:
        # Both round the smoothed inputs in one way; the reference rounds the weight (u), the operator its scale and
        # the weight (2 u).
        return (7 * u + (2 * c + 16) * v) * (tokens.abs() @ weight.T + size)
    if s.static is not None:
        step = s.static.scale.double()
        place = tokens / step
        # A quotient within rounding of a tie may fall to the other code.
        torn = ((place - place.floor()) - 0.5).abs() <= 8 * v * (place.abs() + 130)
        zero_point = 0 if s.static.zero_point is None else s.static.zero_point.item()
        entered = place.clamp(-128 - zero_point, 127 - zero_point) * step
        m = (entered.abs() + step / 2) @ weight.T + size
        scale = s.weight.scale.double() * step
        # The int32 bias is a multiple of the scale, which float16 outputs have to 2^-11.
        short = 2.0**-11 if dtype == torch.float16 else 0
        return torn.double() * step @ weight.T + (4 * u + 16 * v + short) * m + scale.T.expand(1, len(weight)) / 2
    amax = tokens.abs().amax(1, keepdim=True)
    # Each rounds to steps of its own: the reference to max / 127 or -min / 128, the operator to max / 127 of tokens
    # times a rounded 1 / smoothing.
    near = amax / 127 * (1 + 4 * u) + 2 * u * tokens.abs()
    return near @ weight.T + (4 * u + 16 * v) * ((tokens.abs() + near) @ weight.T + size)


@every_cell
@every_dtype
@with_bias
@with_smoothing
def test_the_kernel_agrees_with_the_reference(scheme, inputs, dtype, bias, smoothing):
    held, layout, held_bias, s = made(scheme, inputs, dtype, bias=bias, smoothing=smoothing)
    placed = on_device(held_bias)
    for shape in ((), (1,), (37,), (2, 3), (2, 1, 2, 2)):
        x = randn(*shape, C, seed=5).to(dtype)
        y = npu.forward(x.to(ascend.DEVICE), held, layout, placed).cpu()
        expected = reference.compute(x, s, held_bias)
        assert (y.shape, y.dtype) == (expected.shape, expected.dtype) == ((*shape, N), dtype)
        difference = (y.double() - expected.double()).abs().reshape(-1, N)
        assert (difference <= bound(x, s, held_bias, dtype)).all(), shape


@every_cell
@every_dtype
@pytest.mark.parametrize("smoothing", [None, torch.tensor([0.125, 0.5, 1.0, 8.0]).repeat(C // 4)], ids=["", "smoothed"])
def test_a_token_with_one_channel_reads_the_weight_to_the_last_bit(scheme, inputs, dtype, smoothing):
    held, layout, _, s = made(scheme, inputs, dtype, bias=False, smoothing=smoothing)
    # One product that is not 0, and powers of two: nothing is rounded but what the formula of the operator rounds.
    x = torch.eye(C) if smoothing is None else smoothing.diag()
    y = npu.forward(x.to(dtype).to(ascend.DEVICE), held, layout, None).cpu()
    codes, scale = s.weight.codes.float(), s.weight.scale
    if inputs is None:
        weight = dequantize(replace(s.weight, scale=scale.to(dtype).float()))
        assert torch.equal(y, weight.T.to(dtype))
        return
    codes = codes if s.weight.zero_point is None else codes - s.weight.zero_point
    if s.static is None:
        assert torch.equal(y, (codes * 127 * scale).T.mul(torch.ones(()) / 127).to(dtype))
    else:
        # What a unit of the sum is worth in 10 bits: see the test of the scales.
        unit = held["output_scale"].cpu() if dtype == torch.float16 else (scale * s.static.scale).flatten()
        assert torch.equal(y, (codes.T * torch.round(1 / s.static.scale) * unit).to(dtype))


@every_cell
@every_dtype
@with_smoothing
def test_the_codes_come_back(scheme, inputs, dtype, smoothing):
    held, layout, _, solution = made(scheme, inputs, dtype, bias=True, smoothing=smoothing)
    same(on_cpu(reference.restore(held, layout, npu.unpack)), solution)


@every_cell
@every_dtype
@with_bias
@with_smoothing
@pytest.mark.parametrize("shape", [(C,), (5, C), (2, 3, C), (2, 1, 2, C), (0, C)], ids=str)
def test_the_vendor_accepts_every_call(scheme, inputs, dtype, bias, smoothing, shape):
    held, layout, held_bias, _ = made(scheme, inputs, dtype, bias=bias, smoothing=smoothing)
    held = {name: tensor.to("meta") for name, tensor in held.items()}
    x = torch.empty(shape, dtype=dtype, device="meta")
    y = npu.forward(x, held, layout, None if held_bias is None else held_bias.to("meta"))
    assert (tuple(y.shape), y.dtype, y.is_meta) == ((*shape[:-1], N), dtype, True)


def test_every_operator_was_called(monkeypatch):
    called = set()
    for name in ascend.OPERATORS:
        operator = getattr(torch.ops.npu, name)

        def counted(*args, _name=name, _operator=operator, **kwargs):
            called.add(_name)
            return _operator(*args, **kwargs)

        monkeypatch.setattr(torch.ops.npu, name, counted)
    for scheme, inputs in MATRIX:
        held, layout, _, _ = made(scheme, inputs, torch.float16, bias=False, smoothing=SMOOTHING)
        npu.forward(randn(2, C).half().to(ascend.DEVICE), held, layout, None)
    assert called == ascend.OPERATORS.keys() - {"npu_convert_weight_to_int4pack"}


def test_packed_words_are_the_vendors():
    codes = torch.randint(-8, 8, (40, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    words = torch.ops.npu.npu_convert_weight_to_int4pack(codes.to(torch.int32).to(ascend.DEVICE)).cpu()
    assert torch.equal(packing.pack_int4(codes, torch.int32), words)
    assert np.array_equal(ascend.nibbles(words.numpy()), codes.numpy())


def test_a_float16_scale_loses_nothing_to_the_truncation():
    for seed in range(20):
        s = solved(Scheme(), STATIC[0])
        weight = s.weight.scale * (1 + torch.rand(N, 1, generator=torch.Generator().manual_seed(seed)))
        s = Solution(qz.core.QTensor(s.weight.codes, weight, None, Scheme()), s.inputs, None, s.static)
        exact = (weight.double() * s.static.scale.double()).flatten()
        kept = npu.prepare(s, torch.float16)["output_scale"]
        assert ((kept.view(torch.int32) & 0x1FFF) == 0).all()
        # Rounded to float32, and then to 10 bits after the first.
        assert ((kept.double() - exact).abs() <= exact * (2.0**-11 * (1 + 2.0**-24) + 2.0**-24)).all()
        full = npu.prepare(s, torch.bfloat16)["output_scale"]
        assert ((full.double() - exact).abs() <= exact * 2.0**-24).all()


@pytest.mark.parametrize(
    ("solution", "dtype", "bias", "reason"),
    [
        (solved(Scheme(), None), torch.float32, None, "torch.float32 is neither float16 nor bfloat16"),
        (solved(Scheme(4), None, n=20), torch.float16, None, "20 outputs are not a multiple of 8"),
        (
            solved(Scheme(8, True, "group", 40), None),
            torch.float16,
            None,
            "group_size 40 is not a multiple of 32 below 96",
        ),
        (
            solved(Scheme(8, True, "group", 96), None),
            torch.float16,
            None,
            "group_size 96 is not a multiple of 32 below 96",
        ),
        (solved(Scheme(6), None), torch.float16, None, "no operator takes int6 weights"),
        (
            solved(Scheme(8, False), TOKENWISE),
            torch.float16,
            None,
            "codes of the weight minus their zero point do not fit the int8 of npu_quant_matmul",
        ),
        (
            solved(Scheme(8, False, "tensor"), STATIC[1]),
            torch.bfloat16,
            None,
            "codes of the weight minus their zero point do not fit the int8 of npu_quant_matmul",
        ),
        (solved(Scheme(), Scheme(8, False, "token")), torch.float16, None, "npu_dynamic_quant is symmetric"),
        (solved(Scheme(), None, n=2, c=65536), torch.float16, None, "at most 65535 of each"),
        (solved(Scheme(), STATIC[0]), torch.bfloat16, torch.full((N,), 1e9), "do not fit the int32 bias"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_operator_takes_is_told(solution, dtype, bias, reason):
    assert reason in npu.obstacle(solution, bias, dtype)


def test_the_int32_bias_fits_to_the_last_unit():
    codes, scale = torch.ones(1, C, dtype=torch.int8), torch.full((1, 1), 2.0**-7)
    s = Solution(qz.core.QTensor(codes, scale, None, Scheme()), STATIC[0], None, QParams(torch.full((1, 1), 2.0**-5)))
    # A unit of the sum is 2^-12; products of C codes may come on top, at most 2^14 each.
    reach = (2**31 - C * 2**14) * 2.0**-12
    for sign, fits in ((1, False), (-1, True)):
        assert (npu.obstacle(s, torch.tensor([sign * reach]), torch.bfloat16) is None) is fits
    # The next numbers of float32.
    assert npu.obstacle(s, torch.tensor([reach - 2.0**-5]), torch.bfloat16) is None
    assert "do not fit" in npu.obstacle(s, torch.tensor([-reach - 2.0**-5]), torch.bfloat16)


@every_dtype
@pytest.mark.parametrize("inputs", [*STATIC, TOKENWISE], ids=str)
def test_int8_weights_whose_zero_point_leaves_them_room_are_served(inputs, dtype):
    codes = torch.randint(-128, 125, (N, C), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    zero_point = torch.full((N, 1), -3, dtype=torch.int8)
    codes[:, 0] = torch.where(torch.arange(N) % 2 == 0, 124, -128)
    weight = qz.core.QTensor(codes, torch.full((N, 1), 2.0**-6), zero_point, Scheme(8, False))
    s = replace(solved(Scheme(), inputs), weight=weight)
    assert npu.obstacle(s, None, dtype) is None
    held, layout = npu.prepare(on_device(s), dtype), Layout(LayerSpec(weight.scheme, inputs), N, C, dtype)
    same(on_cpu(reference.restore(held, layout, npu.unpack)), s)
    x = randn(5, C).to(dtype)
    y = npu.forward(x.to(ascend.DEVICE), held, layout, None).cpu().double()
    assert ((y - reference.compute(x, s, None).double()).abs() <= bound(x, s, None, dtype)).all()
    # One more, and the largest code leaves int8.
    over = replace(s, weight=replace(weight, zero_point=zero_point - 1))
    assert "do not fit the int8" in npu.obstacle(over, None, dtype)


def test_scales_that_the_dtype_would_lose_are_told():
    for size in (1e-6, 1e7):
        small = Solution(round_to_nearest(randn(N, C) * size, Scheme()))
        assert "do not fit torch.float16" in npu.obstacle(small, None, torch.float16)
        assert npu.obstacle(small, None, torch.bfloat16) is None
    smoothed = Solution(round_to_nearest(randn(N, C), Scheme()), TOKENWISE, torch.full((C,), 1e-6))
    assert "do not fit torch.float16" in npu.obstacle(smoothed, None, torch.float16)


@pytest.mark.skipif(ascend.ON_A_DEVICE, reason="the emulator is not in use")
def test_the_documented_rules_are_asserted():
    held, layout, _, _ = made(Scheme(), STATIC[1], torch.float16, bias=True, smoothing=SMOOTHING)
    x = randn(3, C).half()
    npu.forward(x, held, layout, None)
    for name, wrong in (
        ("output_scale", held["output_scale"].double()),
        ("output_offset", held["output_offset"].float()),
        ("input_offset", held["input_offset"][:1]),
        ("input_multiplier", held["input_multiplier"].half()),
        ("codes", held["codes"].to(torch.int32)),
        ("codes", held["codes"].T.contiguous().T),
    ):
        with pytest.raises(AssertionError, match="the documentation of the operator asks for"):
            npu.forward(x, {**held, name: wrong}, layout, None)
    held, layout, _, _ = made(Scheme(4, False, "group", 32), None, torch.bfloat16, bias=True)
    for name, wrong in (
        ("antiquant_scale", held["antiquant_scale"].float()),
        ("antiquant_offset", held["antiquant_offset"][:2]),
        ("codes", held["codes"].T.contiguous().T),
    ):
        with pytest.raises(AssertionError, match="the documentation of the operator asks for"):
            npu.forward(x.bfloat16(), {**held, name: wrong}, layout, None)


@pytest.mark.parametrize("inputs", [None, STATIC[1], TOKENWISE], ids=str)
def test_other_input_dtypes_are_for_the_reference(inputs):
    held, layout, bias, solution = made(Scheme(), inputs, torch.float16, bias=True, smoothing=SMOOTHING)
    x, bias, solution = on_device((randn(3, C) * 1e6, bias, solution))
    y = npu.forward(x, held, layout, bias)
    assert torch.isfinite(y).all()
    assert torch.equal(y, reference.compute(x, solution, bias))


@pytest.mark.parametrize("inputs", [None, STATIC[1], TOKENWISE], ids=str)
def test_a_bias_may_be_written_to(inputs):
    held, layout, bias, s = made(Scheme(), inputs, torch.bfloat16, bias=True)
    x, moved = randn(3, C).bfloat16(), bias + 64
    before, after = (
        npu.forward(*on_device((x, held)), layout, b.to(ascend.DEVICE)).cpu().double() for b in (bias, moved)
    )
    u, v = torch.finfo(torch.bfloat16).eps / 2, 2.0**-24
    # The sums of products are the same. Each bias is added in float32, and each result is rounded to bfloat16; static
    # inputs round each bias to half a unit of the integer sum, and multiply with one scale.
    unit = 0 if s.static is None else (s.weight.scale.double() * s.static.scale.double()).T
    allowed = (u + 4 * v) * (before.abs() + after.abs()) + unit
    assert ((after - before - (moved.double() - bias.double())).abs() <= allowed).all()


def test_an_input_scale_without_reciprocal_is_told():
    s = solved(Scheme(), STATIC[0])
    tiny = Solution(s.weight, s.inputs, torch.full((C,), 1e-9), QParams(torch.full((1, 1), 1e-30)))
    assert "whose reciprocal is too large for float32" in npu.obstacle(tiny, None, torch.bfloat16)


@pytest.mark.parametrize(
    "given",
    [
        config(),
        config("gptq", weights={"type": "int4", "symmetric": False, "strategy": "group", "group_size": 32}),
        config("awq", weights={**WEIGHTS, "symmetric": False}),
        config("smoothquant", inputs={**TENSOR, "symmetric": False}),
        config("smoothquant", inputs=TOKEN),
        config("gptq", weights={**WEIGHTS, "type": "int4", "symmetric": False}, inputs={**TENSOR, "symmetric": False}),
        config("awq", weights={**WEIGHTS, "type": "int4"}, inputs=TOKEN),
    ],
    ids=["minmax", "gptq", "awq", "static", "token", "int4 static", "int4 token"],
)
@every_dtype
def test_a_model_is_calibrated_converted_and_saved(given, dtype, monkeypatch):
    if not ascend.ON_A_DEVICE:
        # The tensors stay on the CPU; the choice is told otherwise.
        monkeypatch.setitem(OWN, "cpu", "npu")
    model = filled(nn.Sequential(nn.Linear(C, N), nn.GELU(), nn.Linear(N, 40))).to(dtype).to(ascend.DEVICE)
    x = randn(64, C).to(dtype).to(ascend.DEVICE)
    qz.quantize(model, given)
    model(x)
    found = [layer.solution for layer in model[::2]]
    qz.convert(model)
    assert [row.kernel for row in qz.report(model).rows] == ["npu", "npu"]
    calls = []
    for layer in model[::2]:
        layer.register_forward_hook(lambda _layer, args, y: calls.append((args[0].cpu(), y.cpu())))
    with torch.no_grad():
        result = model(x)
        for layer, was, (entered, y) in zip(model[::2], found, calls, strict=True):
            s, bias = on_cpu((layer.solution, layer.bias))
            same(s, on_cpu(Solution(was.weight, was.inputs, was.smoothing, was.static)))
            difference = (y.double() - reference.compute(entered, s, bias).double()).abs()
            assert (difference <= bound(entered, s, bias, dtype)).all()
    fresh = nn.Sequential(nn.Linear(C, N), nn.GELU(), nn.Linear(N, 40)).to(dtype)
    qz.convert(fresh, from_state={k: v.cpu() if torch.is_tensor(v) else v for k, v in model.state_dict().items()})
    for a, b in zip(model[::2], fresh[::2], strict=True):
        same(on_cpu(a.solution), b.solution)
    with torch.no_grad():
        assert torch.equal(fresh.to(ascend.DEVICE)(x), result)
