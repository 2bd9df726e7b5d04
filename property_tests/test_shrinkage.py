import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from property_tests.laws import assert_pure
from property_tests.oracles import U64, gram64, numpy64
from property_tests.strategies import correlated_tokens, integer_matrices
from quantize.core.observers import SumState
from quantize.core.shrinkage import intensity, shrink

F64 = torch.float64
sizes = st.integers(1, 9)


def state(gram, tokens):
    return SumState(gram, torch.tensor(tokens))


@given(correlated_tokens(st.integers(1, 30), sizes), st.floats(0.1, 100), st.sampled_from([1, 10**3, 10**6, 10**15]))
def test_the_intensity_is_the_estimator_on_the_channels_that_live(x, strength, copies):
    # Every token many times: the same correlations, with more and more certainty.
    t, c = len(x) * copies, x.shape[1]
    rho = assert_pure(lambda s: intensity(s, strength), state(x.T @ x, t)).item()
    alive = numpy64(x)[:, (numpy64(x) != 0).any(0)]
    r = alive / np.sqrt((alive**2).sum(0))
    r = r.T @ r
    off = ~np.eye(len(r), dtype=bool)
    found, counted = (r[off] ** 2).sum(), t / (strength + c / t)
    chance = (1 + r[off] ** 2).sum() / counted
    if found == 0:
        assert rho == 1
        return
    # A correlation is a sum over the tokens and three more operations, on both sides, and none is above 1; the core
    # takes the diagonal out of the sum of all c^2 squares. So ``found`` is off by ``wrong``, which enters rho as a
    # factor and as a summand. ``counted`` is three operations on a count that is converted, in either of them.
    wrong = 2 * (2 * (len(x) + 6) + c**2) * U64 * c**2
    bound = (chance / found + 1 / counted) * wrong / found + 20 * U64 * chance / found
    assert abs(rho - min(chance / found, 1)) <= bound


@given(integer_matrices(n=st.integers(1, 6)), st.integers(0, 16))
def test_shrinking_mixes_with_the_diagonal(x, sixteenths):
    # Whole numbers and sixteenths: exact. Gram matrix and diagonal are positive semidefinite, so the mixture is, too.
    gram, rho = gram64(x), sixteenths / 16
    shrunk = assert_pure(lambda h: shrink(h, torch.tensor(rho, dtype=F64)), torch.from_numpy(gram))
    assert np.array_equal(numpy64(shrunk), (1 - rho) * gram + rho * np.diag(np.diag(gram)))


@given(correlated_tokens(st.integers(1, 30), sizes), st.floats(0, 1))
def test_shrinking_keeps_the_diagonal_and_raises_nothing(x, rho):
    gram = x.T @ x
    shrunk = assert_pure(lambda h: shrink(h, torch.tensor(rho)), gram)
    assert torch.equal(shrunk.diagonal(), gram.diagonal())
    assert (shrunk.abs() <= gram.abs()).all()


@given(correlated_tokens(st.integers(1, 30), sizes))
def test_the_ends(x):
    gram = x.T @ x
    assert intensity(state(gram, len(x)), 0.0) == 0
    assert torch.equal(shrink(gram, torch.tensor(0.0)), gram)
    # One token that counts for less than one: chance explains more than any correlation.
    assert intensity(state(gram, 1), 4.0) == 1
    assert torch.equal(shrink(gram, torch.tensor(1.0)), torch.diag(gram.diagonal()))
    for tokens in (0, 1, 100):
        assert intensity(state(torch.zeros_like(gram), tokens), 4.0) == 1
