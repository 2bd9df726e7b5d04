import torch
from hypothesis import find, given
from hypothesis import strategies as st

from property_tests import strategies


@given(strategies.matrices(), strategies.integer_matrices(), strategies.weight_schemes())
def test_what_is_drawn_is_what_the_laws_assume(x, whole, scheme):
    assert torch.isfinite(x).all()
    assert x.dtype == torch.float32
    assert torch.equal(whole, whole.round())
    assert (scheme.strategy == "group") == (scheme.group_size is not None)


def test_hard_cases_are_reachable():
    find(strategies.matrices(), lambda x: bool(((x != 0) & (x.abs() < torch.finfo(x.dtype).tiny)).any()))
    find(strategies.matrices(), lambda x: bool((x == 0).all(1).any()))
    tokens = strategies.correlated_tokens(st.integers(1, 9), st.integers(2, 5))
    find(tokens, lambda x: bool((x == 0).all(0).any()))
    find(tokens, lambda x: torch.linalg.matrix_rank(x) < min(x.shape))
