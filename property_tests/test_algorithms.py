"""Laws that every algorithm of the registry obeys, in every format that it is meant for."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from property_tests.laws import assert_pure, same_bits
from property_tests.strategies import correlated_tokens, integer_matrices, normal_matrices
from quantize.core import ALGORITHMS, LayerSpec, Scheme, awq, dequantize, gptq, metrics, round_to_nearest, smoothquant

C = 8


class Case(NamedTuple):
    name: str
    options: object
    spec: LayerSpec

    @property
    def algorithm(self):
        return ALGORITHMS[self.name].algorithm(self.spec, self.options)

    @property
    def never_worse_than_rounding(self):
        # SmoothQuant weighs the inputs' error as well; the paper's GPTQ has no guard.
        return self.name != "smoothquant" and getattr(self.options, "guard", True)


WEIGHT_ONLY = [
    LayerSpec(Scheme(bits, symmetric, strategy, 3 if strategy == "group" else None))
    for bits in (4, 8)
    for symmetric in (True, False)
    for strategy in ("tensor", "channel", "group")
]
WITH_INPUTS = [
    LayerSpec(Scheme(8, True, strategy), Scheme(8, symmetric, inputs))
    for strategy in ("tensor", "channel")
    for symmetric in (True, False)
    for inputs in ("tensor", "token")
]
# Beside its defaults, what of an algorithm runs other code: in a third of the formats.
VARIANTS = {name: {name: module.Options()} for name, module in ALGORITHMS.items()}
VARIANTS["gptq"] |= {"gptq as in the paper": gptq.PAPER, "gptq with sweeps": gptq.Options(sweeps=2)}
VARIANTS["gptq"] |= {"gptq that corrects": gptq.Options(sequential=True, asymmetric=1.0)}
VARIANTS["awq"] |= {"awq without clip": awq.Options(clip=False, grids_num=5)}
VARIANTS["smoothquant"] |= {"smoothquant with a search": smoothquant.Options(grids_num=4)}
CASES = [
    pytest.param(Case(name, options, spec), id=f"{title}, {spec.weight}, inputs {spec.inputs}")
    for name, module in ALGORITHMS.items()
    for title, options in VARIANTS[name].items()
    for with_inputs, specs in ((False, WEIGHT_ONLY), (True, WITH_INPUTS))
    for spec in (specs if title == name else specs[::3])
    if with_inputs in module.QUANTIZES_INPUTS
]
MAPPABLE = ("minmax", "awq", "smoothquant")

every_case = pytest.mark.parametrize("case", CASES)
weights = normal_matrices(st.integers(1, 5), st.just(C), torch.float64)
whole_tokens = integer_matrices(n=st.integers(1, 6), c=st.just(C))
tokens = correlated_tokens(st.integers(1, 24), st.just(C))


def statistic(algorithm, *batches):
    state = algorithm.observer.init(C, dtype=batches[0].dtype)
    for x in batches:
        state = algorithm.observer.update(state, x)
    return algorithm.observer.finalize(state)


def error(q, smoothing, weight, x):
    """Squared error of the outputs, from the tokens themselves."""
    reached = dequantize(q) / (1 if smoothing is None else smoothing)
    return ((x @ (reached - weight).T) ** 2).sum().item()


@every_case
@given(weights, tokens)
def test_solving_is_pure_and_gives_a_valid_layer(case, weight, x):
    algorithm = case.algorithm
    solution = assert_pure(algorithm.solve, weight, statistic(algorithm, x))
    q = solution.weight
    assert q.scheme == case.spec.weight
    assert q.codes.dtype == torch.int8
    assert q.codes.shape == weight.shape
    assert case.spec.weight.qmin <= q.codes.min()
    assert q.codes.max() <= case.spec.weight.qmax
    assert q.scale.shape == case.spec.weight.grid_shape(*weight.shape)
    assert (q.zero_point is None) == case.spec.weight.symmetric
    assert (q.scale > 0).all()
    assert torch.isfinite(dequantize(q)).all()
    assert solution.inputs == case.spec.inputs
    assert (solution.static is not None) == (case.spec.inputs is not None and case.spec.inputs.strategy == "tensor")
    assert solution.smoothing is None or (torch.isfinite(solution.smoothing) & (solution.smoothing > 0)).all()


@every_case
@given(weights, tokens)
def test_never_worse_than_rounding_where_promised(case, weight, x):
    if not case.never_worse_than_rounding:
        return
    algorithm = case.algorithm
    solution = algorithm.solve(weight, statistic(algorithm, x))
    rounded = error(round_to_nearest(weight, case.spec.weight), None, weight, x)
    mine = error(solution.weight, solution.smoothing, weight, x)
    # The choice is made from the Gram matrix: both errors carry the rounding of its sums in float64.
    noise = 1e-12 * (x**2).sum().item() * (weight**2).sum().item()
    assert mine <= rounded + noise
    if solution.error is not None:
        assert solution.error.item() == pytest.approx(mine, abs=noise, rel=1e-6)
        assert solution.baseline_error.item() == pytest.approx(rounded, abs=noise, rel=1e-6)


@every_case
@given(weights, tokens, st.randoms(use_true_random=False))
def test_rows_are_interchangeable(case, weight, x, random):
    order = list(range(len(weight)))
    random.shuffle(order)
    algorithm = case.algorithm
    stats = statistic(algorithm, x)
    a, b = algorithm.solve(weight[order], stats), algorithm.solve(weight, stats)
    if torch.equal(a.weight.codes, b.weight.codes[order]):
        rows = slice(None) if case.spec.weight.strategy == "tensor" else order
        torch.testing.assert_close(a.weight.scale, b.weight.scale[rows], rtol=1e-12, atol=0)
        return
    # A choice for all rows at once compares sums over them, whose order of addition decides between equals only.
    errors = [error(s.weight, s.smoothing, w, x) for s, w in ((a, weight[order]), (b, weight))]
    assert abs(errors[0] - errors[1]) <= 1e-12 * (x**2).sum().item() * (weight**2).sum().item()


@every_case
@given(weights, tokens, st.integers(-8, 8))
def test_weights_scale_by_powers_of_two(case, weight, x, exponent):
    if case.name == "smoothquant":
        # Its divisor takes a root of the weights' maximum: scaling is exact up to rounding only, see its own file.
        return
    algorithm = case.algorithm
    stats = statistic(algorithm, x)
    a, b = algorithm.solve(weight, stats), algorithm.solve(weight * 2.0**exponent, stats)
    assert torch.equal(a.weight.codes, b.weight.codes)
    zero = weight.new_zeros(1)
    same_bits(a.smoothing is None or a.smoothing, b.smoothing is None or b.smoothing)
    alive = dequantize(a.weight) != zero
    assert torch.equal((dequantize(a.weight) * 2.0**exponent)[alive], dequantize(b.weight)[alive])


@every_case
@given(
    weights, integer_matrices(n=st.integers(1, 6), c=st.just(C)), integer_matrices(n=st.integers(1, 6), c=st.just(C))
)
def test_merged_batches_are_batches(case, weight, x, y):
    # Whole numbers: the statistics are exact, so the solutions are the same to the last bit.
    algorithm = case.algorithm
    weight, observer = weight.float(), algorithm.observer
    a, b = (observer.update(observer.init(C), batch) for batch in (x, y))
    merged = algorithm.solve(weight, observer.finalize(observer.merge(a, b)))
    same_bits(merged, algorithm.solve(weight, statistic(algorithm, y, x)))


@every_case
@given(weights)
def test_no_token_at_all_still_solves(case, weight):
    algorithm = case.algorithm
    stats = algorithm.observer.finalize(algorithm.observer.init(C, dtype=weight.dtype))
    solution = algorithm.solve(weight, stats)
    same_bits(solution.weight.codes, round_to_nearest(weight, case.spec.weight).codes)
    assert solution.smoothing is None or (solution.smoothing == 1).all()


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_weights_are_solved_in_float32(case, dtype):
    source = torch.Generator().manual_seed(0)
    weight, x = torch.randn(4, C, generator=source).to(dtype), torch.randn(20, C, generator=source)
    algorithm = case.algorithm
    same_bits(
        algorithm.solve(weight, statistic(algorithm, x)), algorithm.solve(weight.float(), statistic(algorithm, x))
    )


@every_case
def test_a_stack_of_layers_maps_where_claimed(case):
    if case.name not in MAPPABLE:
        return
    source = torch.Generator().manual_seed(0)
    stack, batches = torch.randn(3, 4, C, generator=source), torch.randn(3, 20, C, generator=source)
    algorithm = case.algorithm
    mapped = torch.func.vmap(lambda w, x: algorithm.solve(w, statistic(algorithm, x)))(stack, batches)
    for i in range(3):
        alone = algorithm.solve(stack[i], statistic(algorithm, batches[i]))
        assert torch.equal(mapped.weight.codes[i], alone.weight.codes)
        torch.testing.assert_close(mapped.weight.scale[i], alone.weight.scale)


def test_output_error_needs_no_tokens():
    x = torch.randn(30, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    delta = torch.randn(3, C, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert metrics.output_error(delta, x.T @ x).item() == pytest.approx(((x @ delta.T) ** 2).sum().item())
