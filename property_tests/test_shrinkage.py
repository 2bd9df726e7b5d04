import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from property_tests.laws import assert_pure
from property_tests.oracles import numpy64
from property_tests.strategies import correlated_tokens
from quantize.core.observers import SumState
from quantize.core.shrinkage import intensity, shrink

F64 = torch.float64
sizes = st.integers(1, 9)


def state(gram, tokens):
    return SumState(gram, torch.tensor(tokens))


@given(correlated_tokens(st.integers(1, 30), sizes), st.floats(0.1, 100))
def test_the_intensity_is_the_estimator_on_the_channels_that_live(x, strength):
    t, c = x.shape
    rho = assert_pure(lambda s: intensity(s, strength), state(x.T @ x, t)).item()
    alive = numpy64(x)[:, (numpy64(x) != 0).any(0)]
    r = alive / np.sqrt((alive**2).sum(0))
    r = r.T @ r
    off = ~np.eye(len(r), dtype=bool)
    variance = (1 + r[off] ** 2).sum() / (t / (strength + c / t))
    found = (r[off] ** 2).sum()
    assert rho == pytest.approx(min(variance / found, 1) if found > 0 else 1, rel=1e-6, abs=1e-12)


@given(correlated_tokens(st.integers(1, 30), sizes), st.floats(0, 1))
def test_shrinking_keeps_the_diagonal_and_stays_a_gram_matrix(x, rho):
    gram = x.T @ x
    shrunk = assert_pure(lambda h: shrink(h, torch.tensor(rho)), gram)
    assert torch.equal(shrunk.diagonal(), gram.diagonal())
    assert (shrunk.abs() <= gram.abs()).all()
    assert torch.linalg.eigvalsh(shrunk).min() >= -1e-9 * (1 + gram.diagonal().max().item())


@given(correlated_tokens(st.integers(1, 30), sizes))
def test_the_ends(x):
    gram = x.T @ x
    assert intensity(state(gram, len(x)), 0.0) == 0
    assert torch.equal(shrink(gram, torch.tensor(0.0)), gram)
    # As many tokens as would make any correlation certain, and one that counts for less than one.
    assert intensity(state(gram, 10**15), 4.0) in (pytest.approx(0, abs=1e-6), 1)
    assert intensity(state(gram, 1), 4.0) == 1
    assert torch.equal(shrink(gram, torch.tensor(1.0)), torch.diag(gram.diagonal()))
    for tokens in (0, 1, 100):
        assert intensity(state(torch.zeros_like(gram), tokens), 4.0) == 1
