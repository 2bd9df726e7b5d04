import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from property_tests.laws import assert_pure, same_bits
from property_tests.oracles import U64, gram64, lost64, numpy64
from property_tests.strategies import correlated_tokens, integer_matrices, seeds
from quantize.core import Scheme, input_loss, linear, quantize
from quantize.core.observers import PairedState, Range, SumState

F64 = torch.float64
input_schemes = st.builds(Scheme, st.sampled_from([4, 8]), st.booleans(), st.sampled_from(["tensor", "token"]))
tokens = correlated_tokens(st.integers(1, 12), st.integers(1, 5))


def extremes(x):
    return Range(x.amin(0).clamp(max=0), x.amax(0).clamp(min=0))


def statistic(x):
    return extremes(x), SumState(torch.from_numpy(gram64(x)), torch.tensor(len(x)))


def smoothings(c, seed):
    return torch.from_numpy(np.exp(np.random.default_rng(seed).normal(size=c)))


@given(tokens, input_schemes, st.none() | seeds)
def test_the_lost_power_is_its_formula(x, inputs, seed):
    s = None if seed is None else smoothings(x.shape[1], seed)
    lost = assert_pure(lambda *a: input_loss.lost_power(inputs, *a, s), *statistic(x))
    expected = lost64(inputs, numpy64(x), np.ones(x.shape[1]) if s is None else numpy64(s))
    # Terms that are not negative: a sum over the tokens, and a dozen more operations, of which a square counts twice.
    assert (np.abs(numpy64(lost) - expected) <= 2 * (len(x) + 24) * U64 * expected).all()


@pytest.mark.parametrize("strategy", ["tensor", "token"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_channel_loses_more_than_all(strategy, symmetric):
    # Powers of two. One channel of three sets a step far above the second; the third is dead.
    x = torch.tensor([[2.0**20, 1.0, 0.0], [-(2.0**20), -1.0, 0.0]], dtype=F64)
    lost = input_loss.lost_power(Scheme(8, symmetric, strategy), *statistic(x), None)
    assert lost[1].item() == 2
    assert lost[2].item() == 0
    # The first rounds with a step of at most 2^21 / 254, and loses a twelfth of the square of that, twice.
    assert 0 < lost[0].item() <= 2 * (2.0**21 / 254) ** 2 / 12
    # No token loses nothing.
    nothing = Range(torch.zeros(3), torch.zeros(3)), SumState(torch.zeros(3, 3), torch.tensor(0))
    assert input_loss.lost_power(Scheme(8, symmetric, strategy), *nothing, None).tolist() == [0, 0, 0]


@given(integer_matrices(n=st.integers(1, 12), c=st.integers(1, 4)), input_schemes, st.integers(-3, 3))
def test_dividing_all_channels_alike_divides_the_power(x, inputs, exponent):
    ranges, sums = statistic(x.double())
    s = torch.full((x.shape[1],), 2.0**exponent, dtype=F64)
    # Powers of two: exact.
    same_bits(input_loss.lost_power(inputs, ranges, sums, s) * 4.0**exponent,
              input_loss.lost_power(inputs, ranges, sums, None))  # fmt: skip


@pytest.mark.parametrize("paired", [False, True])
@given(tokens, input_schemes, st.none() | seeds, seeds)
def test_the_rounded_statistic_is_of_inputs_with_independent_errors(paired, x, inputs, seed, missing_seed):
    t, c = x.shape
    s = None if seed is None else smoothings(c, seed)
    ranges, sums = statistic(x)
    missing = np.random.default_rng(missing_seed).normal(size=(t, c)) * paired
    seen = PairedState(sums, torch.from_numpy(missing).T @ x) if paired else sums
    effective = assert_pure(lambda *a: input_loss.rounded_statistic(inputs, *a), (ranges, seen), s)
    divisor = np.ones(c) if s is None else numpy64(s)
    smoothed, lack = numpy64(x) / divisor, missing / divisor
    lost = lost64(inputs, numpy64(x), divisor)
    # Errors that have this power and are independent: every pattern of signs, the same for all tokens. A mean over the
    # patterns is the expectation; what is missing of the original is missing of the smoothed inputs, and the error is
    # missing with the opposite sign.
    size = np.sqrt(lost / t)
    gram, cross, magnitude = np.zeros((c, c)), np.zeros((c, c)), np.zeros((c, c))
    for signs in itertools.product([-1, 1], repeat=c):
        arriving = smoothed + size * signs
        gram += arriving.T @ arriving / 2**c
        cross += (lack - size * signs).T @ arriving / 2**c
        magnitude += (np.abs(lack) + np.abs(smoothed) + size).T @ (np.abs(smoothed) + size) / 2**c
    # Sums over the tokens, in the core and here; over the patterns, here; and the power, which is off by as much as in
    # the test of it.
    bound = 2 * (2 * t + 2**c + 40) * U64 * np.maximum(magnitude, magnitude.T)
    assert (np.abs(numpy64(effective.gram.total) - gram) <= bound).all()
    assert (np.abs(numpy64(effective.cross) - cross) <= bound).all()
    assert effective.gram.tokens.item() == t
    # Symmetric to the last bit, as any Gram matrix.
    assert torch.equal(effective.gram.total, effective.gram.total.T)


def test_the_power_is_that_of_rounding_uniform_inputs():
    # For inputs spread evenly over many steps `a`, an error is spread evenly over one: its square has the mean a^2 / 12
    # and the variance a^4 / 180. The mean over t tokens then has the standard deviation sqrt(12^2 / (180 t)), relative
    # to a^2 / 12; five of these, 1.4 percent, are exceeded once in two million draws. The last steps of a channel of
    # amplitude A are cut: the integral of e^2 - a^2 / 12 over a part of a step is at most a^3 / (36 sqrt(3)), which is
    # a / (3 sqrt(3) A) of the mean.
    t, source = 100000, torch.Generator().manual_seed(0)
    amplitudes = torch.tensor([1.0, 0.8, 0.5, 0.3], dtype=F64)
    x = (torch.rand(t, 4, generator=source, dtype=F64) * 2 - 1) * amplitudes
    for symmetric in (True, False):
        inputs = Scheme(8, symmetric, "tensor")
        ranges, sums = Range(x.amin(0), x.amax(0)), SumState(x.T @ x, torch.tensor(t))
        params = linear.static_params(ranges.low, ranges.high, inputs)
        q = quantize(x, params, inputs)
        zero = 0 if symmetric else q.zero_point.double()
        measured = ((q.codes.double() - zero) * q.scale - x).square().sum(0)
        lost = input_loss.lost_power(inputs, ranges, sums, None)
        slack = 5 * (144 / (180 * t)) ** 0.5 + params.scale / (3 * 3**0.5 * amplitudes)
        assert ((measured / lost - 1).abs() <= slack).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_met_is_what_rounding_normal_inputs_makes(symmetric):
    # Normal inputs: what an error has in common with an input vanishes like exp(-2 pi^2 sigma^2 / a^2), and no channel
    # here is much narrower than the step `a`. An entry sums t products of an error, with the power a^2 / 12, and an
    # input: it is off by at most six times sqrt(sum x^2 a^2 / 12), and on the diagonal by what squares of errors vary
    # by, sqrt(t a^4 / 180), as well.
    t, source = 20000, torch.Generator().manual_seed(0)
    mix = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.3, 0.0, 0.4]], dtype=F64)
    x = torch.randn(t, 3, generator=source, dtype=F64) @ mix
    s = torch.tensor([1.0, 2.0, 0.5], dtype=F64)
    inputs, ranges, sums = (
        Scheme(4, symmetric, "tensor"),
        Range(x.amin(0), x.amax(0)),
        SumState(x.T @ x, torch.tensor(t)),
    )
    effective = input_loss.rounded_statistic(inputs, (ranges, sums), s)
    params = linear.static_params(ranges.low, ranges.high, inputs, smoothing=s)
    q = quantize(x / s, params, inputs)
    arriving = (q.codes.double() - (0 if symmetric else q.zero_point.double())) * q.scale
    step, power = params.scale.item(), arriving.square().sum(0).sqrt()
    assert ((x / s).std(0) > 0.95 * step).all()
    entry = (6 * step / 12**0.5 * power).expand(3, 3)
    squares = torch.eye(3, dtype=F64) * 6 * (t / 180) ** 0.5 * step**2
    assert ((arriving.T @ arriving - effective.gram.total).abs() <= entry + entry.T + squares).all()
    assert (((x / s - arriving).T @ arriving - effective.cross).abs() <= entry + squares).all()
    # Without the power, either would be off by more than that.
    assert (effective.cross.diagonal().abs() > (2 * entry + squares).diagonal()).all()


@given(st.integers(1, 3), input_schemes, seeds, st.booleans(), st.booleans())
def test_a_stack_gives_the_statistic_of_each(e, inputs, seed, smoothed, paired):
    # Whole numbers, and powers of two as smoothing: the sums are exact, so that a map gives the same bits.
    source = np.random.default_rng(seed)
    x = torch.from_numpy(source.integers(-9, 10, (e, 6, 4)).astype(float))
    s = torch.from_numpy(2.0 ** source.integers(-2, 3, (e, 4)))
    missing = torch.from_numpy(source.integers(-3, 4, (e, 6, 4)).astype(float))

    def one(tokens, smoothing, lack):
        sums = SumState(tokens.T @ tokens, torch.tensor(len(tokens)))
        seen = PairedState(sums, lack.T @ tokens) if paired else sums
        return input_loss.rounded_statistic(inputs, (extremes(tokens), seen), smoothing if smoothed else None)

    mapped = torch.func.vmap(one)(x, s, missing)
    for k in range(e):
        alone = one(x[k], s[k], missing[k])
        same_bits((mapped.gram.total[k], mapped.cross[k]), (alone.gram.total, alone.cross))


@given(tokens, st.integers(1, 4), st.booleans(), st.none() | seeds, seeds)
def test_losses_are_parts_of_the_power_of_the_outputs(x, n, symmetric, seed, weight_seed):
    c = x.shape[1]
    s = None if seed is None else smoothings(c, seed)
    weight = torch.from_numpy(np.random.default_rng(weight_seed).normal(size=(n, c)))
    static = Scheme(8, symmetric, "tensor")
    ranges, sums = statistic(x)
    notes = assert_pure(lambda *a: input_loss.loss_notes(static, *a, s), weight, ranges, sums)
    divisor = np.ones(c) if s is None else numpy64(s)
    power = sum(gram64(x)[j, j] * numpy64(weight)[i, j] ** 2 for i in range(n) for j in range(c))
    for name, strategy in (("static_loss", "tensor"), ("token_loss", "token")):
        lost = lost64(Scheme(8, symmetric, strategy), numpy64(x), divisor)
        loss = sum(lost[j] * (numpy64(weight)[i, j] * divisor[j]) ** 2 for i in range(n) for j in range(c))
        # Terms that are not negative: sums over tokens, rows and channels on both sides, and two dozen roundings.
        bound = 4 * (len(x) + n + c + 24) * U64
        assert abs(notes[name].item() - (loss / power if power else 0)) <= bound * (loss / power if power else 0)
        assert 0 <= notes[name].item() <= 1 + bound
    # What of the Gram matrix is read is its diagonal.
    alone = SumState(sums.total.diagonal().clone(), sums.tokens)
    same_bits(input_loss.loss_notes(static, weight, ranges, alone, s), notes)
    assert input_loss.loss_notes(Scheme(8, symmetric, "token"), weight, ranges, sums, s) == {}
    assert input_loss.loss_notes(None, weight, ranges, sums, s) == {}
