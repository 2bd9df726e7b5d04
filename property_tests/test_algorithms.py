"""Laws that every algorithm of the registry obeys, in every format that it is meant for."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from property_tests.laws import assert_pure, same_bits
from property_tests.oracles import U64, gram64, lost64, numpy64, row_losses, total_noise, values64
from property_tests.strategies import correlated_tokens, integer_matrices, normal_matrices
from quantize.core import (
    ALGORITHMS,
    LayerSpec,
    Scheme,
    awq,
    correction,
    dequantize,
    gptq,
    input_loss,
    metrics,
    round_to_nearest,
    smoothquant,
)

# Two groups of three and a ragged one.
C = 8


class Case(NamedTuple):
    name: str
    options: object
    spec: LayerSpec

    @property
    def algorithm(self):
        return ALGORITHMS[self.name].algorithm(self.spec, self.options)


def specs(strategies, *inputs):
    """Every format of the config, in an order in which every fifth one covers its choices."""
    return [
        LayerSpec(Scheme(bits, symmetric, strategy, 3 if strategy == "group" else None), each)
        for bits in (4, 8)
        for symmetric in (True, False)
        for strategy in strategies
        for each in inputs
    ]


INPUTS = [Scheme(8, symmetric, strategy) for symmetric in (True, False) for strategy in ("tensor", "token")]
WEIGHT_ONLY = specs(("tensor", "channel", "group"), None)
WITH_INPUTS = specs(("tensor", "channel"), *INPUTS)
# Widths that nothing deploys, and that the core solves as well.
RESEARCH = [
    LayerSpec(Scheme(2, True, "channel")),
    LayerSpec(Scheme(2, False, "group", 3)),
    LayerSpec(Scheme(3, True, "group", 3)),
    LayerSpec(Scheme(3, False, "tensor")),
    LayerSpec(Scheme(3, True, "channel"), Scheme(4, False, "token")),
    LayerSpec(Scheme(2, False, "channel"), Scheme(8, True, "tensor")),
]
# Beside its defaults, what of an algorithm runs other code: in every fifth format, among which are all granularities,
# both widths, and both with and without zero points. Fewer candidates than by default are the same code.
VARIANTS = {name: {name: module.Options()} for name, module in ALGORITHMS.items()}
VARIANTS["gptq"] |= {"gptq as in the paper": gptq.PAPER, "gptq with sweeps": gptq.Options(sweeps=2)}
VARIANTS["gptq"] |= {"gptq that corrects": gptq.Options(asymmetric=1.0), "gptq, one pass": gptq.Options(asymmetric=0.0)}
VARIANTS["gptq"] |= {"gptq, positive scales": gptq.Options(signed_scale=False)}
VARIANTS["awq"] = {"awq": awq.Options(grids_num=3), "awq without clip": awq.Options(clip=False, grids_num=3)}
VARIANTS["awq"] |= {"awq, positive scales": awq.Options(grids_num=3, signed_scale=False)}
VARIANTS["smoothquant"] |= {"smoothquant with a search": smoothquant.Options(grids_num=3)}
VARIANTS["smoothquant"] |= {
    "smoothquant, rounded by gptq": smoothquant.Options(rounding="gptq"),
    "smoothquant with a search, rounded by gptq": smoothquant.Options(grids_num=3, rounding="gptq"),
}
CASES = {
    f"{title}, {spec.weight}, inputs {spec.inputs}": Case(name, options, spec)
    for name, module in ALGORITHMS.items()
    for title, options in VARIANTS[name].items()
    for formats in (WEIGHT_ONLY, WITH_INPUTS, RESEARCH)
    for spec in (formats if title == name else () if formats is RESEARCH else formats[::5])
    if (spec.inputs is not None) in module.QUANTIZES_INPUTS
}


def cases(claimed):
    """The cases of which a law is claimed, and no others: each of them checks something."""
    return pytest.mark.parametrize("case", [pytest.param(case, id=key) for key, case in CASES.items() if claimed(case)])


def by_gptq(case):
    return case.name == "gptq" or getattr(case.options, "rounding", None) == "gptq"


def gptq_options(case):
    return case.options if case.name == "gptq" else gptq.Options()


def fits(case):
    """Whether scales are fitted to codes, and so are quotients of sums."""
    return (gptq_options(case).search_range or gptq_options(case).sweeps > 0) if by_gptq(case) else (
        case.name == "awq" and case.options.clip)  # fmt: skip


def signed(case):
    """Whether scales may be negative: those of symmetric weights, where the inputs stay as they are."""
    asked = gptq_options(case).signed_scale if by_gptq(case) else getattr(case.options, "signed_scale", False)
    return asked and case.spec.weight.symmetric and case.spec.inputs is None


# The formats multiply the examples: a fifth of them, for each.
some = settings(max_examples=-(-settings().max_examples // 5))
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
    assert ((q.scale != 0) if signed(case) else (q.scale > 0)).all()
    assert torch.isfinite(dequantize(q)).all()
    assert solution.inputs == case.spec.inputs
    assert (solution.static is not None) == (case.spec.inputs is not None and case.spec.inputs.strategy == "tensor")
    assert solution.smoothing is None or (torch.isfinite(solution.smoothing) & (solution.smoothing > 0)).all()


def smoothing_of(solution, weight):
    return torch.ones(C, dtype=weight.dtype) if solution.smoothing is None else solution.smoothing


def plain_changes(weight, smoothing, scheme):
    """What plain rounding changes, and the larger of what it and rounding the smoothed weight change: for the noise.

    A scale and a clipping are chosen one after the other: between them stands the scaled weight, rounded.
    """
    plain = values64(round_to_nearest(weight, scheme)) - numpy64(weight)
    between = values64(round_to_nearest(weight * smoothing, scheme)) / numpy64(smoothing) - numpy64(weight)
    return plain, np.maximum(np.abs(plain), np.abs(between))


# The paper's GPTQ has no guard. Inputs in floating point: what is lost is what the tokens lose.
@cases(lambda case: case.spec.inputs is None and getattr(case.options, "guard", True))
@some
@given(weights, tokens)
def test_never_worse_than_rounding_where_promised(case, weight, x):
    algorithm = case.algorithm
    solution = algorithm.solve(weight, statistic(algorithm, x))
    smoothing = smoothing_of(solution, weight)
    reached = values64(solution.weight) / numpy64(smoothing)
    plain, sizes = plain_changes(weight, smoothing, case.spec.weight)
    mine, rounded = error(reached, weight, x), error(plain + numpy64(weight), weight, x)
    # The choice is made from the Gram matrix: a sum over t tokens, two over c channels, one over n rows, and half a
    # dozen roundings of each entry. Here it is one over channels, a square, and one over tokens and rows.
    sizes = np.maximum(np.abs(reached), sizes + np.abs(numpy64(weight))) + np.abs(numpy64(weight))
    (n, c), t = weight.shape, len(x)
    off = ((t + 2 * c + n + 8) + (2 * c + t * n + 8)) * U64 * ((np.abs(numpy64(x)) @ sizes.T) ** 2).sum()
    # Two losses are compared at each of two choices.
    assert mine <= rounded + 4 * off
    # minmax states no error, the others both.
    assert (solution.error is None) == (solution.baseline_error is None) == (case.name == "minmax")
    if case.name != "minmax":
        assert abs(solution.error.item() - mine) <= off
        assert abs(solution.baseline_error.item() - rounded) <= off


# The weight is fitted to rounded inputs, and the errors are those of it alone, against what it is fitted to.
@cases(lambda case: case.spec.inputs is not None and by_gptq(case))
@some
@given(weights, tokens)
def test_never_worse_than_rounding_on_the_inputs_that_a_layer_meets(case, weight, x):
    algorithm = case.algorithm
    stats = statistic(algorithm, x)
    solution = algorithm.solve(weight, stats)
    scaled = weight if solution.smoothing is None else weight * solution.smoothing
    effective = input_loss.rounded_statistic(case.spec.inputs, stats, solution.smoothing)
    strength = gptq_options(case).asymmetric
    target, gram = numpy64(correction.corrected(scaled, effective, strength)), numpy64(effective.gram.total)
    found = []
    for q, stated in (
        (solution.weight, solution.error),
        (round_to_nearest(scaled, case.spec.weight), solution.baseline_error),
    ):
        change = values64(q) - target
        found.append((row_losses(change, gram).sum(), total_noise(np.abs(change), gram)))
        assert abs(stated.item() - found[-1][0]) <= found[-1][1]
    if gptq_options(case).guard:
        assert found[0][0] <= found[1][0] + found[0][1] + found[1][1]


# What AWQ weighs and states is the weight's error and that of the inputs together.
@cases(lambda case: case.spec.inputs is not None and case.name == "awq")
@some
@given(weights, tokens)
def test_never_worse_than_rounding_together_with_the_inputs(case, weight, x):
    algorithm = case.algorithm
    solution = algorithm.solve(weight, statistic(algorithm, x))
    inputs, gram, smoothing = case.spec.inputs, gram64(x), solution.smoothing
    plain, sizes = plain_changes(weight, smoothing, case.spec.weight)
    mine = values64(solution.weight) / numpy64(smoothing) - numpy64(weight)
    # Two losses are compared at each of two choices; the Gram matrix of the core sums t tokens in another order.
    sizes = np.maximum(sizes, np.abs(mine))
    noise = 2 * total_noise(sizes, gram) + 4 * len(x) * U64 * row_losses(sizes, gram64(x.abs())).sum()
    lost = [
        (lost64(inputs, numpy64(x), s) * ((numpy64(weight) * s) ** 2).sum(0)).sum()
        for s in (numpy64(smoothing), np.ones(C))
    ]
    # Terms that are not negative: sums over tokens, channels and rows, and 30 more operations.
    noise += 2 * (len(x) + sum(weight.shape) + 30) * U64 * sum(lost)
    # The candidates are compared by quotients.
    totals = [row_losses(mine, gram).sum() + lost[0], row_losses(plain, gram).sum() + lost[1]]
    assert abs(solution.error.item() - totals[0]) <= noise
    assert abs(solution.baseline_error.item() - totals[1]) <= noise
    assert totals[0] <= totals[1] * (1 + 4 * U64) + noise


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
    # A scale that is fitted to all rows is a quotient of such sums; its own test bounds it. A refitted one follows from
    # products with the Gram matrix, which may be added in another order for another place of the row.
    if case.spec.weight.strategy != "tensor":
        if not (by_gptq(case) and gptq_options(case).sweeps):
            assert torch.equal(a.weight.scale, b.weight.scale[order])
    elif not fits(case):
        assert torch.equal(a.weight.scale, b.weight.scale)
    if a.weight.zero_point is not None:
        rows = slice(None) if case.spec.weight.strategy == "tensor" else order
        assert torch.equal(a.weight.zero_point, b.weight.zero_point[rows])


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
        # A fitted scale is a quotient of sums, added in another order; its own test bounds it.
        if not fits(case):
            torch.testing.assert_close(mapped.weight.scale[i], alone.weight.scale, rtol=bound, atol=0)
        if alone.weight.zero_point is not None:
            assert torch.equal(mapped.weight.zero_point[i], alone.weight.zero_point)
        assert mapped.inputs == alone.inputs == case.spec.inputs
        if alone.static is not None:
            torch.testing.assert_close(mapped.static.scale[i], alone.static.scale, rtol=bound, atol=0)
        assert mapped.notes.keys() == alone.notes.keys()


@given(integer_matrices(n=st.integers(1, 4), c=st.just(C)), integer_matrices(n=st.integers(1, 3), c=st.just(C)))
def test_output_error_needs_no_tokens(x, delta):
    # Whole numbers: at most 4 * 3 * (8 * 225)^2 < 2^53, exact.
    expected = (numpy64(x) @ numpy64(delta).T) ** 2
    gram = torch.from_numpy(gram64(x))
    assert metrics.row_error(delta.double(), gram).tolist() == expected.sum(0).tolist()
    assert metrics.output_error(delta.double(), gram).item() == expected.sum()
