"""Laws that every algorithm of the registry obeys, in every format that it is meant for."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from property_tests.laws import assert_pure, same_bits
from property_tests.oracles import U64, gram64, numpy64, values64
from property_tests.strategies import correlated_tokens, integer_matrices, normal_matrices
from quantize.core import ALGORITHMS, LayerSpec, Scheme, awq, dequantize, gptq, metrics, round_to_nearest, smoothquant

# Two groups of three and a ragged one.
C = 8


class Case(NamedTuple):
    name: str
    options: object
    spec: LayerSpec

    @property
    def algorithm(self):
        return ALGORITHMS[self.name].algorithm(self.spec, self.options)


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
# Beside its defaults, what of an algorithm runs other code: in every fifth format, among which are all granularities,
# both widths, and both with and without zero points. Fewer candidates than by default are the same code.
VARIANTS = {name: {name: module.Options()} for name, module in ALGORITHMS.items()}
VARIANTS["gptq"] |= {"gptq as in the paper": gptq.PAPER, "gptq with sweeps": gptq.Options(sweeps=2)}
VARIANTS["gptq"] |= {"gptq that corrects": gptq.Options(asymmetric=1.0), "gptq, one pass": gptq.Options(asymmetric=0.0)}
VARIANTS["awq"] = {"awq": awq.Options(grids_num=4), "awq without clip": awq.Options(clip=False, grids_num=4)}
VARIANTS["smoothquant"] |= {"smoothquant with a search": smoothquant.Options(grids_num=4)}
CASES = {
    f"{title}, {spec.weight}, inputs {spec.inputs}": Case(name, options, spec)
    for name, module in ALGORITHMS.items()
    for title, options in VARIANTS[name].items()
    for with_inputs, specs in ((False, WEIGHT_ONLY), (True, WITH_INPUTS))
    for spec in (specs if title == name else specs[::5])
    if with_inputs in module.QUANTIZES_INPUTS
}


def cases(claimed):
    """The cases of which a law is claimed, and no others: each of them checks something."""
    return pytest.mark.parametrize("case", [pytest.param(case, id=key) for key, case in CASES.items() if claimed(case)])


def refits(case):
    return getattr(case.options, "sweeps", 0) > 0


# The formats multiply the examples: a third of them, for each.
some = settings(max_examples=-(-settings().max_examples // 3))
every_case = cases(lambda case: True)
weights = normal_matrices(st.integers(1, 3), st.just(C), torch.float64)
whole_tokens = integer_matrices(n=st.integers(1, 4), c=st.just(C))
tokens = correlated_tokens(st.integers(1, 12), st.just(C))


def statistic(algorithm, *batches):
    observer = algorithm.paired or algorithm.observer
    state = observer.init(C, dtype=batches[0].dtype)
    for x in batches:
        state = observer.update(state, x)
    return observer.finalize(state)


def error(reached, weight, x):
    """Squared error of the outputs, from the tokens themselves."""
    return ((numpy64(x) @ (reached - numpy64(weight)).T) ** 2).sum()


@every_case
@some
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


# SmoothQuant weighs the inputs' error as well; the paper's GPTQ has no guard.
@cases(lambda case: case.name != "smoothquant" and getattr(case.options, "guard", True))
@some
@given(weights, tokens)
def test_never_worse_than_rounding_where_promised(case, weight, x):
    algorithm = case.algorithm
    solution = algorithm.solve(weight, statistic(algorithm, x))
    smoothing = torch.ones(C, dtype=weight.dtype) if solution.smoothing is None else solution.smoothing
    reached = values64(solution.weight) / numpy64(smoothing)
    plain = values64(round_to_nearest(weight, case.spec.weight))
    # A scale and a clipping are chosen one after the other: between them stands the scaled weight, rounded.
    between = values64(round_to_nearest(weight * smoothing, case.spec.weight)) / numpy64(smoothing)
    mine, rounded = error(reached, weight, x), error(plain, weight, x)
    # The choice is made from the Gram matrix: a sum over t tokens, two over c channels, one over n rows, and half a
    # dozen roundings of each entry. Here it is one over channels, a square, and one over tokens and rows.
    sizes = np.maximum(np.maximum(np.abs(reached), np.abs(plain)), np.abs(between)) + np.abs(numpy64(weight))
    (n, c), t = weight.shape, len(x)
    off = ((t + 2 * c + n + 8) + (2 * c + t * n + 8)) * U64 * ((np.abs(numpy64(x)) @ sizes.T) ** 2).sum()
    # Two losses are compared at each of two choices.
    assert mine <= rounded + 4 * off
    # minmax states no error, the others both.
    assert (solution.error is None) == (solution.baseline_error is None) == (case.name == "minmax")
    if case.name != "minmax":
        assert abs(solution.error.item() - mine) <= off
        assert abs(solution.baseline_error.item() - rounded) <= off


@every_case
@some
@given(weights, tokens, st.randoms(use_true_random=False))
def test_rows_are_interchangeable(case, weight, x, random):
    order = list(range(len(weight)))
    random.shuffle(order)
    algorithm = case.algorithm
    stats = statistic(algorithm, x)
    a, b = algorithm.solve(weight[order], stats), algorithm.solve(weight, stats)
    # Sums over the rows are added in another order. That decides between equals only: candidates within 1e-13 of each
    # other, which numbers drawn from a continuum are not.
    assert torch.equal(a.weight.codes, b.weight.codes[order])
    # A refitted scale is a quotient of such sums; its own test bounds it.
    if not refits(case):
        rows = slice(None) if case.spec.weight.strategy == "tensor" else order
        assert torch.equal(a.weight.scale, b.weight.scale[rows])


# The divisor of SmoothQuant is a root of the weights' maximum: see its own file for even powers.
@cases(lambda case: case.name != "smoothquant")
@some
@given(weights, tokens, st.integers(-8, 8))
def test_weights_scale_by_powers_of_two(case, weight, x, exponent):
    algorithm = case.algorithm
    stats = statistic(algorithm, x)
    a, b = algorithm.solve(weight, stats), algorithm.solve(weight * 2.0**exponent, stats)
    assert torch.equal(a.weight.codes, b.weight.codes)
    zero = weight.new_zeros(1)
    same_bits(a.smoothing is None or a.smoothing, b.smoothing is None or b.smoothing)
    alive = dequantize(a.weight) != zero
    assert torch.equal((dequantize(a.weight) * 2.0**exponent)[alive], dequantize(b.weight)[alive])


@every_case
@some
@given(weights, whole_tokens, whole_tokens)
def test_merged_batches_are_batches(case, weight, x, y):
    # Whole numbers: the statistics are exact, so the solutions are the same to the last bit.
    algorithm = case.algorithm
    weight, observer = weight.float(), algorithm.paired or algorithm.observer
    a, b = (observer.update(observer.init(C), batch) for batch in (x, y))
    merged = algorithm.solve(weight, observer.finalize(observer.merge(a, b)))
    same_bits(merged, algorithm.solve(weight, statistic(algorithm, y, x)))


@every_case
@some
@given(weights)
def test_no_token_at_all_still_solves(case, weight):
    algorithm = case.algorithm
    solution = algorithm.solve(weight, statistic(algorithm, weight[:0]))
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
def test_a_stack_of_layers_is_solved_as_each_alone(case):
    source = torch.Generator().manual_seed(0)
    stack, batches = (torch.randn(3, n, C, generator=source, dtype=torch.float64) for n in (4, 20))
    # Dead channels, and too few tokens: each layer has an order and a damping of its own.
    batches[0, :, 2], batches[1, 3:] = 0, 0
    algorithm = case.algorithm
    statistics = torch.func.vmap(lambda x: statistic(algorithm, x))(batches)
    mapped = assert_pure(algorithm.solve_stack, stack, statistics)
    # A scale is a maximum of smoothed weights. The smoothing is an exponential of logarithms of a mean over 20 tokens
    # (AWQ: at most 11 roundings of the largest logarithm, 20 of the mean, 2 of the result), or two powers and a
    # quotient (SmoothQuant: 5); two products follow. Both sides round.
    absmean = batches.abs().mean(1)
    largest = absmean[absmean > 0].log().abs().max().item()
    bound = 2 * (11 * largest + 24) * U64
    for i in range(3):
        alone = algorithm.solve(stack[i], statistic(algorithm, batches[i]))
        # In float64 and from a fixed seed: no code is within 1e-13 of a tie.
        assert torch.equal(mapped.weight.codes[i], alone.weight.codes)
        # A refitted scale is a quotient of sums, added in another order; its own test bounds it.
        if not refits(case):
            torch.testing.assert_close(mapped.weight.scale[i], alone.weight.scale, rtol=bound, atol=0)
        assert mapped.notes.keys() == alone.notes.keys()


@given(integer_matrices(n=st.integers(1, 4), c=st.just(C)), integer_matrices(n=st.integers(1, 3), c=st.just(C)))
def test_output_error_needs_no_tokens(x, delta):
    # Whole numbers: at most 4 * 3 * (8 * 225)^2 < 2^53, exact.
    expected = (numpy64(x) @ numpy64(delta).T) ** 2
    gram = torch.from_numpy(gram64(x))
    assert metrics.row_error(delta.double(), gram).tolist() == expected.sum(0).tolist()
    assert metrics.output_error(delta.double(), gram).item() == expected.sum()
