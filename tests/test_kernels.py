"""The kernels: which serves what, that each agrees with the reference, and what a layer keeps."""

import copy
import os
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
from torch import nn

import quantize as qz
from quantize.core import QParams, Scheme, Solution, linear, round_to_nearest
from quantize.shell.deploy.kernels import KERNELS, OWN, cpu, integers, operators, reference
from quantize.shell.report.rows import Row
from tests import bounds
from tests.models import TENSOR, TOKEN, WEIGHTS, config, filled, mlp, randn, rounding_bound

INT4 = {"type": "int4", "symmetric": True, "strategy": "group", "group_size": 64}
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
TOKENWISE = Scheme(strategy="token")
STATIC = {symmetric: Scheme(8, symmetric, "tensor") for symmetric in (True, False)}


def scheme_id(value):
    return str(value) if isinstance(value, Scheme) else None


def solved(scheme, inputs=None, *, n=1024, c=256, smoothed=False, seed=0):
    """A solution with every extreme: rows of very different sizes, codes at both ends."""
    weight = randn(n, c, seed=seed) * torch.logspace(-3, 1, n)[:, None]
    smoothing = torch.logspace(-1, 1, c) if smoothed else None
    weight = weight if smoothing is None else weight * smoothing
    static = None
    if inputs is not None and inputs.strategy == "tensor":
        zero_point = None if inputs.symmetric else torch.full((1, 1), 37, dtype=torch.int8)
        static = QParams(torch.full((1, 1), 0.03), zero_point)
    return Solution(round_to_nearest(weight, scheme), inputs, smoothing, static)


def layer(solution, dtype, *, kernel=None, bias=True):
    n, c = solution.weight.codes.shape
    held = nn.Parameter(randn(n, seed=9).to(dtype)) if bias else None
    row = Row(("layer",), (n, c), solution.weight.scheme, solution.inputs, "minmax", "converted", 0)
    return qz.QuantizedLinear(solution, held, row, dtype, kernel)


def same(a, b):
    return [str(s) for s in (a.weight.scheme, a.inputs)] == [str(s) for s in (b.weight.scheme, b.inputs)] and all(
        torch.equal(x, y) and x.dtype == y.dtype
        for x, y in zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b), strict=True)
    )


def exact_int_mm(a, b):
    """The sums of the kernel on every processor: float64 holds each."""
    return (a.double() @ b.double().T).to(torch.int32)


def fixed_point(x, weight):
    return integers.fixed_point_linear(x, reference.parameters(Solution(weight)) | integers.prepare(weight), None)


CASES = [
    (Scheme(), None, FLOATS),
    (Scheme(symmetric=False), None, FLOATS),
    (Scheme(strategy="tensor"), None, FLOATS),
    (Scheme(symmetric=False, strategy="tensor"), None, FLOATS),
    (Scheme(4, True, "group", 32), None, [torch.bfloat16]),
    (Scheme(4, False, "group", 64), None, [torch.bfloat16]),
    (Scheme(4, True, "group", 128), None, [torch.bfloat16]),
    (Scheme(4, False, "channel"), None, [torch.bfloat16]),
    (Scheme(4, True, "tensor"), None, [torch.bfloat16]),
    (Scheme(), TOKENWISE, FLOATS),
    (Scheme(strategy="tensor"), TOKENWISE, FLOATS),
    (Scheme(), Scheme(8, False, "token"), FLOATS),
    (Scheme(), STATIC[True], FLOATS),
    (Scheme(strategy="tensor"), STATIC[False], FLOATS),
    (Scheme(4), TOKENWISE, FLOATS),
    (Scheme(4, False), STATIC[False], FLOATS),
    (Scheme(8, False), TOKENWISE, FLOATS),
    (Scheme(8, False, "tensor"), Scheme(8, False, "token"), FLOATS),
]


@pytest.fixture(params=[1, cpu._CODES], ids=["integers", "floats"])
def int8(request, monkeypatch):
    """int8 weights alone, in float32 and float16: by integer matmuls as large ones, or with the codes as numbers."""
    monkeypatch.setattr(cpu, "_CODES", request.param)


@pytest.mark.usefixtures("int8")
@pytest.mark.parametrize("smoothed", [False, True], ids=["", "smoothed"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("scheme", "inputs", "dtypes"), CASES, ids=scheme_id)
def test_the_cpu_kernel_serves_as_the_reference_does(scheme, inputs, dtypes, bias, smoothed):
    solution = solved(scheme, inputs, smoothed=smoothed)
    for dtype in dtypes:
        reason = KERNELS["cpu"].obstacle(solution, None, dtype)
        fast, plain = (layer(solution, dtype, kernel=kernel, bias=bias) for kernel in (None, "reference"))
        if reason is None:
            assert (fast.kernel, fast.reason, plain.kernel) == ("cpu", None, "reference")
        else:
            # An operator of this processor is not what it should be: the reference serves, and tells.
            assert "processor" in reason
            assert (fast.kernel, fast.reason, plain.kernel) == ("reference", f"cpu: {reason}", "reference")
        assert same(fast.solution, solution)
        for t in (1, 2, 7, 40, 130):
            x = randn(t, 256, seed=t).to(dtype)
            with torch.no_grad():
                y, expected = fast(x), plain(x)
            assert y.dtype == dtype
            if inputs is not None:
                assert torch.equal(y, expected)
            else:
                assert ((y.double() - expected.double()).abs() <= rounding_bound(fast, x)).all(), (dtype, t)


@pytest.mark.usefixtures("int8")
@pytest.mark.parametrize(("n", "c"), [(1, 1), (1, 31), (7, 3), (7, 33), (1, 1024), (321, 577)])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("inputs", [None, TOKENWISE, STATIC[False]], ids=scheme_id)
def test_int8_takes_any_shape(n, c, dtype, inputs):
    solution = solved(Scheme(), inputs, n=n, c=c)
    fast, plain = layer(solution, dtype), layer(solution, dtype, kernel="reference")
    assert fast.kernel == "cpu" or "processor" in fast.reason or "single input" in fast.reason
    for shape in ((3,), (1, 1), (2, 5), (0,)):
        x = randn(*shape, c).to(dtype)
        with torch.no_grad():
            y, expected = fast(x), plain(x)
        assert y.shape == (*shape, n) == expected.shape
        assert y.is_contiguous()
        if inputs is not None:
            assert torch.equal(y, expected)
        elif x.numel():
            assert ((y.double() - expected.double()).abs().flatten(0, -2) <= rounding_bound(fast, x)).all()
    with torch.no_grad():
        assert fast(randn(c).to(dtype)).shape == (n,)


@pytest.mark.parametrize(
    ("scheme", "dtype", "size", "reason"),
    [
        (Scheme(4, True, "group", 64), torch.float32, (64, 256), "fast in bfloat16 only, not in torch.float32"),
        (Scheme(4, True, "group", 64), torch.bfloat16, (64, 100), "of 100 inputs is not in whole groups"),
        (Scheme(4, True, "group", 96), torch.bfloat16, (64, 192), "is not in whole groups of 32, 64, 128 or 256"),
        (Scheme(4, True, "group", 64), torch.bfloat16, (48, 256), "48 outputs are not a multiple of"),
        (Scheme(8, True, "group", 64), torch.bfloat16, (64, 256), "no matmul takes int8 groups"),
        (Scheme(), torch.float64, (64, 256), "torch.float64 is none of float32, float16, bfloat16"),
        (Scheme(3), torch.bfloat16, (64, 256), "no matmul takes int3 weights and float inputs"),
    ],
    ids=scheme_id,
)
def test_what_no_matmul_takes_is_served_by_the_reference_and_the_reason_told(scheme, dtype, size, reason):
    solution = solved(scheme, n=size[0], c=size[1])
    served = layer(solution, dtype)
    assert served.kernel == "reference"
    assert reason in served.reason or "processor" in served.reason
    assert same(served.solution, solution)
    x = randn(3, size[1]).to(dtype)
    assert torch.equal(served(x), layer(solution, dtype, kernel="reference")(x))


def test_the_integer_matmul_is_exact_at_the_extremes():
    if not operators.exact_int_mm():
        pytest.skip("not exact on this processor")
    sizes = ((1, 1, 2), (4, 1, 64), (1, 8, 4096), (3, 65, 1030), (64, 32, 2048), (2, 1 << 10, 1 << 10), (7, 7, 31))
    for t, n, c in sizes:
        for a, b in ((0, -128), (255, -128), (255, 127), (128, -1)):
            left = torch.full((t, c), a, dtype=torch.uint8)
            right = operators.spaced(torch.full((n, c), b, dtype=torch.int8))
            assert (operators.int_mm(left, right) == a * b * c).all()
    # One row that repeats itself: its stride is 0.
    numbers = torch.arange(100, dtype=torch.uint8)
    row = numbers.as_strided((1, 100), (0, 1))
    total = (row.int() ** 2).sum(1, keepdim=True).int()
    assert torch.equal(operators.int_mm(row, numbers.to(torch.int8)[None]), total)


def test_a_processor_that_saturates_is_found_out(monkeypatch):
    def saturating(a, b):
        pairs = (a.int()[:, :, None] * b.int()).split(2, 1)
        return sum(pair.sum(1).clamp(-(2**15), 2**15 - 1) for pair in pairs).to(torch.int32)

    operators.exact_int_mm.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", saturating)
    try:
        assert not operators.exact_int_mm()
        served = layer(solved(Scheme(), TOKENWISE), torch.float32)
        assert (served.kernel, served.reason) == ("reference", "cpu: torch._int_mm is not exact on this processor")
        # Large weights alone are then multiplied as numbers.
        monkeypatch.setattr(cpu, "_CODES", 1)
        assert "sums" not in dict(layer(solved(Scheme()), torch.float32).named_buffers())
    finally:
        operators.exact_int_mm.cache_clear()


def test_a_processor_without_the_matmul_is_found_out(monkeypatch):
    def refusing(_a, _b):
        raise RuntimeError("expected int8")

    def warning(a, b):
        warnings.warn("int_mm failed, switching to gemm", UserWarning, stacklevel=1)
        return exact_int_mm(a.view(torch.int8), b.T)

    for matmul in (refusing, warning):
        operators.exact_int_mm.cache_clear()
        monkeypatch.setattr(torch, "_int_mm", matmul)
        try:
            assert layer(solved(Scheme(), TOKENWISE), torch.float32).kernel == "reference"
        finally:
            operators.exact_int_mm.cache_clear()


def test_fixed_point_tokens_meet_their_bound_where_steps_are_tiny(monkeypatch):
    monkeypatch.setattr(operators, "int_mm", exact_int_mm)
    # A step times a scale is below the smallest normal number; a result is far above it.
    x, weight = 1e-30 * randn(50, 96), round_to_nearest(1e-3 * randn(20, 96), Scheme())
    expected = x.double() @ (weight.codes.double() * weight.scale).T
    assert ((fixed_point(x, weight).double() - expected).abs() <= bounds.fixed_point_bound(x, weight)).all()


def test_fixed_point_tokens_meet_their_bound(monkeypatch):
    # With sums that are exact on every processor: where torch's are not, the kernel is not chosen.
    monkeypatch.setattr(operators, "int_mm", exact_int_mm)
    for seed, outlier in ((0, 1.0), (1, 1e4), (2, 1e-4), (3, 1e35)):
        x = randn(50, 96, seed=seed)
        x[:, 3] *= outlier
        weight = round_to_nearest(randn(20, 96, seed=seed), Scheme(symmetric=seed == 1))
        zero_point = 0 if weight.zero_point is None else weight.zero_point
        exact = x.double() @ ((weight.codes.double() - zero_point) * weight.scale).T
        bound = bounds.fixed_point_bound(x, weight)
        error = (fixed_point(x, weight).double() - exact).abs()
        assert (error <= bound).all()
        # Rounding to steps is what is left: far below, the bound would say nothing.
        assert (error > bound / 100).any()


@pytest.mark.usefixtures("int8")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("t", [2, 10, 130])
def test_a_token_that_is_not_finite_spoils_its_own_output_only(dtype, value, t):
    served = layer(solved(Scheme()), dtype)
    x = randn(t, 256).to(dtype)
    with torch.no_grad():
        clean = served(x)
        x[1, 5] = value
        y = served(x)
    assert not torch.isfinite(y[1]).any()
    assert torch.equal(y[0], clean[0])


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(4, True, "group", 64)], ids=scheme_id)
def test_gradients_reach_the_inputs(scheme):
    solution = solved(scheme)
    x = randn(5, 256).bfloat16().requires_grad_()
    layer(solution, torch.bfloat16)(x).sum().backward()
    weight = qz.core.dequantize(solution.weight).double()
    # The scale, the weight and the result are rounded to bfloat16, and the sum over the outputs in float32.
    bound = (3 * bounds.unit(torch.bfloat16) + len(weight) * bounds.V) * weight.abs().sum(0)
    assert ((x.grad.double() - weight.sum(0)).abs() <= bound).all()


def test_a_kernel_can_be_forced_and_is_refused_before_anything_changes():
    model = mlp().bfloat16()
    qz.quantize(model, config())
    with pytest.raises(
        qz.QuantizeError, match=r"kernel: 'fast'; accepted: None or one of 'reference', 'cpu', 'cpu-bf16', 'npu'"
    ):
        qz.convert(model, kernel="fast")
    with pytest.raises(qz.QuantizeError, match=r"layer '0': kernel 'npu'; accepted: .*its tensors are on 'cpu', not"):
        qz.convert(model, kernel="npu")
    assert [row.stage for row in qz.report(model).rows] == ["quantized"] * 2
    qz.convert(model, kernel="reference")
    assert [row.kernel for row in qz.report(model).rows] == ["reference"] * 2


def test_the_report_names_the_kernels_and_why_not_a_faster_one():
    model = filled(nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 40), nn.Linear(40, 48))).bfloat16()
    qz.quantize(model, config(weights={**INT4, "group_size": 32}))
    qz.convert(model)
    rows = qz.report(model).rows
    assert [row.kernel for row in rows[1:]] == ["reference"] * 2
    text = " ".join(str(qz.report(model)).split())
    assert "why not a faster kernel" in text
    assert all(row.kernel_reason in text for row in rows[1:])
    assert qz.report(model).as_dict()["layers"][1]["kernel_reason"] == rows[1].kernel_reason
    assert f"kernel {rows[0].kernel}" in str(model)


def test_another_dtype_chooses_again_from_the_same_codes():
    solution = solved(Scheme(4, False, "group", 64), smoothed=True)
    model = nn.Sequential(layer(solution, torch.float32))
    kernels = []
    for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16):
        model.to(dtype)
        kernels.append(model[0].kernel)
        assert same(model[0].solution, solution)
        assert model[0].bias.dtype == model(randn(2, 256).to(dtype)).dtype == model[0].weight.dtype == dtype
    assert kernels[1] == kernels[2] == "reference"
    assert kernels[0] == kernels[3]
    assert kernels[0] == "cpu" or "processor" in model[0].reason
    # Forced, it stays.
    forced = nn.Sequential(layer(solution, torch.float32, kernel="reference")).bfloat16()
    assert (forced[0].kernel, forced[0].reason) == ("reference", None)


def test_another_device_chooses_again(monkeypatch):
    solution = solved(Scheme())
    model = nn.Sequential(layer(solution, torch.bfloat16, kernel="cpu"))
    model.to("meta")
    assert model[0].kernel == "reference"
    assert "cpu: its tensors are on 'meta', not on 'cpu'" in model[0].reason
    assert model[0].bias.is_meta
    model.to_empty(device="cpu")
    assert model[0].kernel == "cpu"
    # Another kernel for the device: what the layer held must not reach it.
    model = nn.Sequential(layer(solution, torch.bfloat16))
    monkeypatch.delitem(OWN, "cpu")
    model.double()
    assert model[0].kernel == "reference"
    assert same(model[0].solution, solution)


def bytes_of(module):
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [INT4, {**INT4, "symmetric": False}, WEIGHTS], ids=str)
def test_a_converted_layer_is_small_and_the_float_weight_gone(weights, dtype):
    n, c = 128, 256
    model = filled(nn.Sequential(nn.Linear(c, n, bias=False))).to(dtype)
    weight = weakref.ref(model[0].weight)
    qz.quantize(model, config("gptq", weights=weights))
    model(randn(16, c).to(dtype))
    codes = weakref.ref(model[0].solution.weight.codes)
    qz.convert(model)
    bits, groups = (4, c // 64) if weights["type"] == "int4" else (8, 1)
    # A code an element; a scale of 4 bytes a group, and a zero point where there are any.
    held = n * c * bits // 8 + n * groups * (4 + (0 if weights["symmetric"] else bits / 8))
    # In bfloat16 the packed matmuls have rounded scales of their own, int4 with a zero beside each.
    packed = n * groups * (4 if bits == 4 else 2) * (dtype == torch.bfloat16 and model[0].kernel == "cpu")
    assert bytes_of(model) == held + packed
    assert weight() is None
    # The solution held a byte for each code of int4.
    assert bits == 8 or codes() is None


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_beside_quantized_inputs_is_a_byte_in_memory_and_half_of_one_in_a_state(symmetric, dtype):
    n, c = 64, 256
    scheme = Scheme(4, symmetric)
    served = layer(solved(scheme, TOKENWISE, n=n, c=c), dtype, bias=False)
    assert served.kernel == "cpu" or "processor" in served.reason
    state = served.state_dict()
    # A zero point has a byte of its own: two in a byte are two of one row.
    rest = n * 4 + (0 if symmetric else n)
    # The kernel keeps the sum of every row as well.
    assert bytes_of(served) == (n * c + n * 4 if served.kernel == "cpu" else n * c // 2) + rest
    assert (state["codes"].dtype, state["codes"].shape) == (torch.uint8, (n, c // 2))
    plain = layer(solved(scheme, TOKENWISE, n=n, c=c), dtype, kernel="reference", bias=False)
    assert bytes_of(plain) == n * c // 2 + rest
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())
    again = layer(solved(scheme, TOKENWISE, n=n, c=c, seed=1), dtype, bias=False)
    again.load_state_dict(state)
    assert same(again.solution, served.solution)


class Steps(nn.Module):
    """What every layer of ``model`` gives, so that each can be judged on the inputs that it had."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        found = [x]
        for layer in self.model:
            found.append(layer(found[-1]))
        return found


def assert_agree(model, found):
    """Every converted layer gave to its input what it gives alone: integer sums to the last bit."""
    for layer, x, y in zip(model, found, found[1:], strict=False):
        if not isinstance(layer, qz.QuantizedLinear):
            continue
        if layer.solution.inputs is None:
            assert ((y - layer(x)).double().abs() <= bounds.matmul_bound(layer, x)).all()
        else:
            assert torch.equal(y, layer(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # the compiler's own
@pytest.mark.parametrize("given", [config(weights=INT4), config(), config(inputs=TOKEN), config(inputs=TENSOR)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compile_and_export(given, dtype):
    torch._dynamo.reset()
    model = filled(nn.Sequential(nn.GELU(), nn.Linear(256, 64))).to(dtype)
    qz.quantize(model, given)
    model(randn(5, 256).to(dtype))
    qz.convert(model)
    steps, x = Steps(model), randn(7, 256).to(dtype)
    # The compiler may leave out roundings between a layer and the next, whose codes would move: not here.
    with torch.no_grad(), torch._inductor.config.patch(emulate_precision_casts=True):
        exported = torch.export.export(steps, (x,), dynamic_shapes=({0: torch.export.Dim("t")},)).module()
        compiled = torch.compile(steps, fullgraph=True, dynamic=True)
        for t in (7, 1):
            for other in (exported, compiled):
                found = other(x[:t])
                assert len(found) == 3
                assert_agree(model, found)


INT4_SCHEMES = [scheme for scheme, inputs, dtypes in CASES if dtypes == [torch.bfloat16]]


@pytest.mark.skipif(not cpu.block_rows(), reason="torch packs int4 for this processor in an order that is unknown")
@pytest.mark.parametrize("smoothed", [False, True], ids=["", "smoothed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scheme", INT4_SCHEMES, ids=scheme_id)
def test_int4_through_bfloat16_meets_its_bound(scheme, dtype, smoothed):
    solution = solved(scheme, n=64, smoothed=smoothed)
    served = layer(solution, dtype, kernel="cpu-bf16")
    assert (served.kernel, served.reason) == ("cpu-bf16", None)
    assert same(served.solution, solution)
    weight, bias = qz.core.dequantize(solution.weight).double(), served.bias.double()
    u, r = bounds.unit(torch.bfloat16), bounds.unit(dtype)
    for shape in ((1,), (2, 3), (130,), (0,)):
        x = randn(*shape, 256).to(dtype)
        tokens = linear.smooth(x.double(), solution.smoothing)
        exact = tokens @ weight.T
        m = tokens.abs() @ bounds.reach(solution.weight).T
        bound = (5 * u + 11 * u**2 + 260 * bounds.V) * m + 2 * r * (exact.abs() + bias.abs())
        with torch.no_grad():
            y = served(x)
        assert (y.dtype, y.shape) == (dtype, (*shape, 64))
        assert ((y.double() - exact - bias).abs() <= bound).all()


@pytest.mark.skipif(not cpu.block_rows(), reason="torch packs int4 for this processor in an order that is unknown")
def test_int4_through_bfloat16_is_for_who_asks_and_leaves_the_rest(tmp_path):
    plain = filled(nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 40)))
    qz.quantize(plain, config(weights=INT4))
    qz.convert(plain)
    assert [row.kernel for row in qz.report(plain).rows] == ["reference"] * 2
    model = filled(nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 40)))
    qz.convert(model, from_state=plain.state_dict(), kernel="cpu-bf16")
    assert [row.kernel for row in qz.report(model).rows] == ["cpu-bf16", "reference"]
    assert "cpu-bf16: 40 outputs are not a multiple of" in qz.report(model).rows[1].kernel_reason
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    x = randn(3, 256)
    with torch.no_grad():
        expected = model(x)
        torch.save(model, tmp_path / "model.pt")
        for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
            assert other[0].kernel == "cpu-bf16"
            assert torch.equal(other(x), expected)
    model.bfloat16()
    assert (model[0].kernel, model[0].reason) == ("cpu", "cpu-bf16: torch.bfloat16 is neither float32 nor float16")


def test_int4_through_bfloat16_is_refused_where_it_serves_nothing():
    model = mlp()
    qz.quantize(model, config())
    with pytest.raises(
        qz.QuantizeError, match=r"layer '0': kernel 'cpu-bf16'; accepted: .*int4 weights and float inputs"
    ):
        qz.convert(model, kernel="cpu-bf16")
    assert [row.stage for row in qz.report(model).rows] == ["quantized"] * 2


@pytest.mark.parametrize(
    "environment",
    [{"ATEN_CPU_CAPABILITY": "avx2"}, {"ATEN_CPU_CAPABILITY": "default"}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}],
    ids=lambda e: "=".join(*e.items()),
)
def test_older_processors_agree_too(environment):
    selected = ["-k", "serves and smoothed and bias or any_shape", "-n0", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", __file__, *selected]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_packed_codes_come_back_in_both_known_orders():
    codes = torch.randint(-8, 8, (128, 64), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    for block in (64, 32):
        # Row d of a block below, row d + block / 2 above, column by column.
        rows = (codes + 8).to(torch.uint8).view(-1, 2, block // 2, 64)
        words = (rows[:, 0] | rows[:, 1] << 4).transpose(1, 2).contiguous()
        assert torch.equal(cpu.rows(words), codes)


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(4, True, "group", 64)], ids=scheme_id)
@pytest.mark.parametrize("dtype", FLOATS)
def test_inputs_of_another_dtype_are_for_the_reference(scheme, dtype):
    served = layer(solved(scheme), dtype, kernel="cpu-bf16")
    for other in {torch.float64, *FLOATS} - {dtype}:
        x = randn(3, 256).to(other)
        with torch.no_grad():
            expected = linear.quantized_linear(x, served.solution.weight, served.bias)
            assert torch.equal(served(x), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_zero_tokens_give_the_bias(dtype):
    served = layer(solved(Scheme(symmetric=False)), dtype)
    with torch.no_grad():
        assert torch.equal(served(torch.zeros(2, 256, dtype=dtype)), served.bias.expand(2, -1))


def test_large_sums_cancel_without_a_trace(monkeypatch):
    # With sums that are exact on every processor: where torch's are not, the kernel is not chosen.
    monkeypatch.setattr(operators, "int_mm", exact_int_mm)
    # Codes at the zero point, -128, are weights of 0: what a token adds to the sum must go again to the last unit.
    weight = torch.zeros(1024, 256)
    weight[:, 0] = 1.0
    weight = round_to_nearest(weight, Scheme(symmetric=False))
    assert (weight.zero_point == -128).all()
    x = torch.rand(20, 256, generator=torch.Generator().manual_seed(0)) + 0.5
    assert torch.equal(weight.codes[:, :1].int() - weight.zero_point, torch.full((1024, 1), 255, dtype=torch.int32))
    found = fixed_point(x, weight)
    exact = x[:, :1].double() * (255 * weight.scale.double().T)
    assert ((found.double() - exact).abs() <= bounds.fixed_point_bound(x, weight)).all()
