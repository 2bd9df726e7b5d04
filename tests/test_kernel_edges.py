"""What kernels must bear: addresses, strides, compilers, huge and tiny numbers, failures half-way."""

import copy
import pickle
import weakref

import pytest
import torch
from torch import nn

import quantize as qz
from quantize.core import LayerSpec, QParams, QTensor, Scheme, Solution, affine, dequantize, linear, round_to_nearest
from quantize.shell.deploy.kernels import Layout, cpu, integers, operators, reference
from tests import bounds
from tests.models import TENSOR, TOKEN, config, filled, randn, rounding_bound
from tests.test_kernels import FLOATS, INT4, TOKENWISE, exact_int_mm, fixed_point, layer, solved

SCHEMES = [Scheme(), Scheme(symmetric=False), Scheme(4, True, "group", 64)]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


@pytest.fixture
def large(monkeypatch):
    """int8 weights alone, in float32 and float16: by integer matmuls, as if they were large."""
    monkeypatch.setattr(cpu, "_CODES", 1)


@pytest.mark.usefixtures("large")
@every_scheme
@every_dtype
@pytest.mark.parametrize("t", [1, 3, 20, 130])
def test_addresses_and_strides_do_not_matter(scheme, dtype, t):
    served = layer(solved(scheme), dtype)
    x = randn(t, 256).to(dtype)
    shifted = torch.empty(t * 256 + 1, dtype=dtype)[1:].view(t, 256).copy_(x)
    padded = torch.empty(t, 257, dtype=dtype)[:, 1:].copy_(x)
    # The float matmul of torch orders its sums by strides: the dequantized weight, for the reference or many tokens.
    exact = "sums" in dict(served.named_buffers())
    bound = 0 if exact else bounds.matmul_bound(served, x)
    with torch.no_grad():
        expected = served(x)
        for other in (shifted, padded, x.T.contiguous().T, x[None].transpose(1, 2).contiguous().transpose(1, 2)[0]):
            assert ((served(other) - expected).double().abs() <= bound).all()
        row, repeated = served(x[:1].expand(3, 256)), served(x[:1].repeat(3, 1))
        assert ((row - repeated).double().abs() <= (0 if exact else bound[:1])).all()


def test_rows_apart_in_memory_are_the_kernels_own():
    model = nn.Sequential(layer(solved(Scheme(), TOKENWISE, n=16, c=1024), torch.float32))
    if model[0].kernel != "cpu":
        pytest.skip(model[0].reason)
    assert model[0].codes.stride() == (1024 + 64, 1)
    state, x = model.state_dict(), randn(3, 1024)
    assert state["0.codes"].untyped_storage().nbytes() == 16 * 1024
    fresh = nn.Sequential(layer(solved(Scheme(), TOKENWISE, n=16, c=1024, seed=1), torch.float32))
    fresh.load_state_dict(state)
    with torch.no_grad():
        expected = model(x)
        exported = torch.export.export(model, (x,)).module()
        others = (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), exported)
        for other in (*others, copy.deepcopy(model).share_memory(), copy.deepcopy(model).double().float()):
            assert torch.equal(other(x), expected)


def test_codes_at_odd_addresses_are_taken():
    solution = solved(Scheme())
    codes = torch.empty(1024 * 256 + 8, dtype=torch.int8)[8:].view(1024, 256).copy_(solution.weight.codes)
    odd = Solution(QTensor(codes, solution.weight.scale, None, Scheme()))
    with torch.no_grad():
        for t in (1, 8):
            x = randn(t, 256).bfloat16()
            assert torch.equal(layer(odd, torch.bfloat16)(x), layer(solution, torch.bfloat16)(x))


@pytest.mark.usefixtures("large")
def test_sums_that_may_leave_int32_are_not_made(monkeypatch):
    # With sums that are exact on every processor: where torch's are not, the kernel is not chosen.
    monkeypatch.setattr(operators, "int_mm", exact_int_mm)
    codes = torch.full((1, 1), 127, dtype=torch.int8).expand(2, (1 << 16) + 1)
    long = QTensor(codes, torch.ones(2, 1), None, Scheme())
    assert "sums may not fit int32" in cpu.obstacle(Solution(long, TOKENWISE), None, torch.float32)
    assert "sums" not in cpu.prepare(Solution(long), torch.float32)
    # One input less: the sums are as long as they can be.
    weight = QTensor(torch.full((1, 1 << 16), -128, dtype=torch.int8), torch.ones(1, 1), None, Scheme())
    x = torch.ones(1, 1 << 16)
    exact = -128.0 * (1 << 16)
    found = fixed_point(x, weight)
    assert ((found.double() - exact).abs() <= bounds.fixed_point_bound(x, weight)).all()


@pytest.mark.parametrize("inputs", [TOKENWISE, Scheme(8, False, "token"), Scheme(8, False, "tensor")], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("c", [2, 31, 1024, (1 << 15) + 1, 1 << 16])
def test_integer_sums_at_the_extremes_are_those_of_int64(c, symmetric, inputs, monkeypatch):
    # With sums that are exact on every processor: where torch's are not, the kernel is not chosen.
    if not operators.exact_int_mm():
        monkeypatch.setattr(operators, "int_mm", exact_int_mm)
    scheme = Scheme(8, symmetric, "tensor")
    signs = torch.randint(0, 2, (7, c), generator=torch.Generator().manual_seed(0), dtype=torch.bool)
    codes = torch.where(signs, 127, -128).to(torch.int8)
    codes[0], codes[1] = 127, -128
    ends = torch.full((1, 1), -128 if c % 2 else 127, dtype=torch.int8)
    weight = QTensor(codes[:4], torch.ones(1, 1), None if symmetric else ends, scheme)
    static = None
    if inputs.strategy == "tensor":
        static = QParams(torch.ones(1, 1), ends)
    x = codes[3:].flip(0).float() if static is None else codes[3:].float() - ends.float()
    solution = Solution(weight, inputs, None, static)
    held = reference.parameters(solution) | integers.prepare(weight)
    layout = Layout(LayerSpec(scheme, inputs), 4, c, torch.float32)
    entered = affine.quantize(x, linear.input_params(x, inputs, static), inputs)
    zeros = [0 if q.zero_point is None else q.zero_point.long() for q in (entered, weight)]
    exact = (entered.codes.long() - zeros[0]) @ (weight.codes.long() - zeros[1]).T
    expected = exact.float() * entered.scale
    assert torch.equal(integers.quantized_linear(x, held, layout, None), expected)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("size", [1e34, 1e-25])
def test_huge_and_tiny_tokens(size):
    served, plain = (
        layer(solved(Scheme()), torch.float32, kernel=kernel, bias=False) for kernel in ("cpu", "reference")
    )
    x = randn(4, 256) * size
    with torch.no_grad():
        y, expected = served(x), plain(x)
    assert torch.isfinite(y).all()
    assert ((y.double() - expected.double()).abs() <= rounding_bound(served, x)).all()


@pytest.mark.usefixtures("large")
def test_channels_of_weight_zero_hide_no_inputs():
    weight = randn(1024, 256)
    weight[:, 7] = 0
    served = layer(Solution(round_to_nearest(weight, Scheme())), torch.float32, bias=False)
    x = randn(5, 256)
    x[:, 7] = 2e3
    with torch.no_grad():
        error = served(x).double() - x.double() @ dequantize(served.solution.weight).double().T
    # Steps are 2^-23 of the 2000: inputs of 1 are left with 12 bits.
    step = 2e3 / (127 * 2**16)
    assert step < 2.0**-12
    bound = step * served.weight.double().abs().sum(1) + bounds.matmul_bound(served, x)
    assert (error.abs() <= bound).all()


def test_scale_and_zero_of_int4_cancel_as_far_as_bfloat16_goes():
    weight = torch.zeros(64, 256)
    weight[:, 0], weight[:, 1] = torch.linspace(0.1, 3, 64), torch.linspace(-2, -0.1, 64)
    q = round_to_nearest(weight, Scheme(4, False, "group", 256))
    served = layer(Solution(q), torch.bfloat16, bias=False)
    if served.kernel != "cpu":
        pytest.skip(served.reason)
    x = torch.ones(1, 256).bfloat16()
    x[:, :2] = 0
    with torch.no_grad():
        y = served(x).double()
    # One rounding of zero_point * scale, and none of the scale: half of what both would leave.
    bound = 254 * 2.0**-8 * (q.zero_point.double().abs() * q.scale.double() * (1 + 2.0**-8)).flatten()
    assert (y.abs() <= bound * (1 + 2.0**-8)).all()


def test_probes_run_on_the_cpu_whatever_the_default_device():
    operators.exact_int_mm.cache_clear()
    cpu.block_rows.cache_clear()
    with torch.device("meta"):
        fresh = nn.Sequential(nn.Linear(256, 1024), nn.Linear(1024, 64)).bfloat16()
    model = filled(nn.Sequential(nn.Linear(256, 1024), nn.Linear(1024, 64))).bfloat16()
    qz.quantize(model, config(weights=INT4))
    qz.convert(model)
    with torch.device("meta"):
        qz.convert(fresh, from_state=model.state_dict())
        assert operators.exact_int_mm() in (True, False)
    with torch.no_grad():
        x = randn(2, 256).bfloat16()
        assert torch.equal(fresh(x), model(x))


def test_forward_on_the_meta_device():
    for dtype in FLOATS:
        model = nn.Sequential(layer(solved(Scheme()), dtype)).to("meta")
        assert model(torch.empty(3, 256, dtype=dtype, device="meta")).shape == (3, 1024)


def test_integers_are_refused_by_name():
    served = layer(solved(Scheme()), torch.float32)
    with pytest.raises(
        qz.QuantizeError, match=r"layer 'layer': inputs of torch\.int64; accepted: inputs in floating point"
    ):
        served(torch.ones(2, 256, dtype=torch.int64))


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # torch's own
@every_scheme
@every_dtype
def test_derivatives_forward_and_backward_are_those_of_the_reference(scheme, dtype):
    served = layer(solved(scheme), dtype)
    plain = layer(solved(scheme), dtype, kernel="reference")
    x, v = randn(3, 256).to(dtype), randn(3, 256, seed=1).to(dtype)
    for a, b in zip(torch.func.jvp(served, (x,), (v,)), torch.func.jvp(plain, (x,), (v,)), strict=True):
        assert torch.equal(a, b)
    a, b = (torch.func.grad(lambda x, f=f: f(x).float().sum())(x) for f in (served, plain))
    assert torch.equal(a, b)


def test_a_failing_conversion_leaves_the_layer():
    model = nn.Sequential(layer(solved(Scheme(4, True, "group", 64)), torch.bfloat16))
    x = randn(3, 256).bfloat16()
    with torch.no_grad():
        expected = model(x)

    def failing(tensor):
        if tensor.numel():
            raise RuntimeError("no memory")
        return tensor.float()

    for module in (model, model[0]):
        with pytest.raises(RuntimeError, match="no memory"):
            module._apply(failing)
        with torch.no_grad():
            assert torch.equal(model(x), expected)


def test_swapped_parameters_that_cannot_be_leave_the_layer(monkeypatch):
    served = layer(solved(Scheme()), torch.float32)
    reference = weakref.ref(served.bias)
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    with pytest.raises(RuntimeError):
        served.half()
    monkeypatch.undo()
    assert reference() is served.bias
    assert served(randn(2, 256)).shape == (2, 1024)


def test_buffers_of_a_user_stay():
    served = layer(solved(Scheme(4, True, "group", 64)), torch.float32)
    served.register_buffer("mine", torch.arange(3.0))
    served.register_buffer("hidden", torch.arange(2), persistent=False)
    model = nn.Sequential(served)
    for _ in range(2):
        model = copy.deepcopy(model).bfloat16()
        model.load_state_dict(model.state_dict())
        assert torch.equal(model[0].mine, torch.arange(3.0).bfloat16())
        assert torch.equal(model[0].hidden, torch.arange(2))
        assert {"0.mine"} == {key for key in model.state_dict() if "mine" in key or "hidden" in key}


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # the compiler's own
@pytest.mark.parametrize("scheme", [Scheme(), Scheme(4, False, "group", 64)], ids=str)
def test_compiled_graphs_take_strides_prefill_and_gradients(scheme):
    torch._dynamo.reset()
    served = layer(solved(scheme), torch.bfloat16)
    compiled = torch.compile(lambda x: served(x.flatten(2).transpose(1, 2)), fullgraph=True)
    with torch.no_grad():
        for t in (4, 100):
            x = randn(1, 256, t, 1).bfloat16()
            tokens = x.flatten(2).transpose(1, 2)
            error = (compiled(x) - served(tokens)).double().abs().flatten(0, 1)
            assert (error <= bounds.matmul_bound(served, tokens)).all()
    x = randn(1, 256, 3, 1).bfloat16().requires_grad_()
    compiled(x).float().sum().backward()
    expected = torch.func.grad(lambda x: served(x.flatten(2).transpose(1, 2)).float().sum())(x.detach())
    # Each rounds scale, weight and result to bfloat16, and sums over the outputs in float32.
    size = bounds.reach(served.solution.weight)
    bound = 2 * (3 * bounds.unit(torch.bfloat16) + (len(size) + 1) * bounds.V) * size.sum(0)
    assert ((x.grad - expected).double().abs() <= bound[:, None, None].transpose(0, 1).reshape(1, -1, 1, 1)).all()


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_fixed_point_exports_for_any_number_of_tokens(symmetric, strict):
    served = nn.Sequential(layer(solved(Scheme(symmetric=symmetric)), torch.float32))
    x = randn(2, 7, 256)
    shapes = ({0: torch.export.Dim("b"), 1: torch.export.Dim("s")},)
    with torch.no_grad():
        exported = torch.export.export(served, (x,), dynamic_shapes=shapes, strict=strict).module()
        for b, s in ((2, 7), (3, 2), (4, 30)):
            x = randn(b, s, 256)
            assert ((exported(x) - served(x)).abs().flatten(0, 1) <= rounding_bound(served[0], x)).all()


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_int8_inputs_can_be_traced():
    served = layer(solved(Scheme(), Scheme(strategy="token")), torch.float32)
    with torch.no_grad():
        # The tracer knows no view of other types.
        traced = torch.jit.trace(served, randn(5, 256))
        assert torch.equal(traced(randn(7, 256)), served(randn(7, 256)))


def test_a_bias_may_be_written_to(monkeypatch):
    for given in (config(), config(inputs=TOKEN), config(inputs=TENSOR)):
        model = filled(nn.Sequential(nn.Linear(64, 1024)))
        qz.quantize(model, given)
        model(randn(5, 64))
        qz.convert(model)
        x = randn(2, 64)
        with torch.no_grad():
            before = model(x).double()
            model[0].bias.add_(1)
            after = model(x).double()
            # One rounding of each output, and one of the bias.
            slack = bounds.V * (before.abs() + after.abs() + model[0].bias.abs())
            assert ((after - before - 1).abs() <= slack).all()
