import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from property_tests.laws import assert_pure, same_bits
from property_tests.oracles import U32, gram64, numpy64
from property_tests.strategies import integer_matrices, normal_matrices
from quantize.core import channel_absmean, channel_range, channel_square, gram, paired_gram, product

OBSERVERS = {
    "channel_range": channel_range,
    "channel_absmean": channel_absmean,
    "channel_square": channel_square,
    "gram": gram,
    "paired_gram": paired_gram,
    "product": product(channel_range, channel_absmean, gram),
    "paired product": product(channel_range, paired_gram),
}
every_observer = pytest.mark.parametrize("observer", OBSERVERS.values(), ids=OBSERVERS.keys())
C = 4
# Whole numbers: every sum of a few is exact in float32, so that the laws of addition hold bit for bit.
batches = integer_matrices(n=st.integers(0, 6), c=st.just(C))


def seen(observer, *tokens):
    state = observer.init(C)
    for x in tokens:
        state = assert_pure(observer.update, state, x)
    return state


@every_observer
@given(batches, batches, batches)
def test_states_are_a_commutative_monoid(observer, a, b, c):
    a, b, c = (seen(observer, x) for x in (a, b, c))
    same_bits(observer.merge(observer.merge(a, b), c), observer.merge(a, observer.merge(b, c)))
    same_bits(assert_pure(observer.merge, a, b), observer.merge(b, a))
    same_bits(observer.merge(a, observer.init(C)), a)


@every_observer
@given(batches, batches)
def test_splitting_tokens_changes_nothing(observer, a, b):
    whole = seen(observer, torch.cat([a, b]))
    same_bits(seen(observer, a, b), whole)
    same_bits(observer.merge(seen(observer, a), seen(observer, b)), whole)
    same_bits(assert_pure(observer.finalize, whole), observer.finalize(seen(observer, b, a)))


@every_observer
@given(batches)
def test_leading_axes_are_all_tokens(observer, x):
    same_bits(seen(observer, x[:, None, None]), seen(observer, x))
    same_bits(seen(observer, *x), seen(observer, x))


@given(normal_matrices(st.integers(1, 40), st.just(C)))
def test_statistics_are_those_of_float64_loops(x):
    exact = numpy64(x)
    low, high = channel_range.finalize(seen(channel_range, x))
    assert low.tolist() == [min(0.0, *column) for column in exact.T]
    assert high.tolist() == [max(0.0, *column) for column in exact.T]
    # t products and their sum, or t magnitudes, their sum and a quotient: t + 1 roundings of float32 at most, of the
    # sum of the magnitudes. One more pays for float64.
    slack = (len(x) + 2) * U32
    absmean = channel_absmean.finalize(seen(channel_absmean, x)).numpy()
    expected = np.array([sum(map(abs, column)) / len(x) for column in exact.T])
    assert (np.abs(absmean - expected) <= slack * expected).all()
    total, tokens = gram.finalize(seen(gram, x))
    assert tokens.item() == len(x)
    assert (np.abs(total.numpy() - gram64(x)) <= slack * gram64(x.abs())).all()


@pytest.mark.parametrize("c", [1, 63, 64, 65, 128, 200, 515])
def test_a_gram_matrix_of_several_strips_is_exact_and_symmetric(c):
    # Whole numbers: the sums are exact, so that any strip that is off shows.
    x = torch.randint(-9, 10, (12, c), generator=torch.Generator().manual_seed(c)).float()
    total = assert_pure(gram.update, gram.update(gram.init(c), x[:5]), x[5:]).total
    assert torch.equal(total.double(), torch.from_numpy(gram64(x)))
    rough = gram.update(gram.init(c), x * 0.1 + 1 / 3).total
    assert torch.equal(rough, rough.T)


@given(integer_matrices(n=st.integers(1, 6), c=st.just(C)), st.data())
def test_what_is_missing_of_the_original_is_paired_token_by_token(x, data):
    original = data.draw(integer_matrices(n=st.just(len(x)), c=st.just(C)))
    state = assert_pure(paired_gram.update, paired_gram.init(C), x, original)
    same_bits(state.gram, gram.update(gram.init(C), x))
    expected = np.zeros((C, C))
    for mine, theirs in zip(numpy64(x), numpy64(original), strict=True):
        missing = theirs - mine
        if missing @ missing <= mine @ mine:
            expected += np.outer(missing, mine)
    assert state.cross.tolist() == expected.tolist()
    # Batches add up, and without an original of the same shape there is nothing to correct.
    halves = [paired_gram.update(paired_gram.init(C), *pair) for pair in ((x[:1], original[:1]), (x[1:], original[1:]))]
    same_bits(paired_gram.merge(*halves), state)
    for other in (None, original[:0]):
        assert not paired_gram.update(paired_gram.init(C), x, other).cross.any()


@given(st.lists(st.sampled_from(list(OBSERVERS.values())), max_size=4), st.data())
def test_a_product_hands_originals_to_those_that_take_them(parts, data):
    # Nested products, too: paired is what holds something paired.
    assert product(*parts).paired == any(part in (paired_gram, OBSERVERS["paired product"]) for part in parts)
    parts = [*parts, paired_gram]
    whole = product(*parts)
    heights = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))
    pairs = [[data.draw(integer_matrices(n=st.just(n), c=st.just(C))) for _ in range(2)] for n in heights]
    state, alone = whole.init(C), [part.init(C) for part in parts]
    for x, original in pairs:
        state = assert_pure(whole.update, state, x, original)
        alone = [
            part.update(s, x, original) if part.paired else part.update(s, x)
            for part, s in zip(parts, alone, strict=True)
        ]
    same_bits(state, tuple(alone))
    same_bits(whole.finalize(state), tuple(part.finalize(s) for part, s in zip(parts, alone, strict=True)))
    same_bits(whole.merge(state, state), tuple(part.merge(s, s) for part, s in zip(parts, alone, strict=True)))


@given(batches, st.data())
def test_batches_with_originals_merge(x, data):
    observer = OBSERVERS["paired product"]
    original = data.draw(integer_matrices(n=st.just(len(x)), c=st.just(C), bound=30))
    cut = data.draw(st.integers(0, len(x)))
    whole = observer.update(observer.init(C), x, original)
    halves = [observer.update(observer.init(C), *pair) for pair in (
        (x[:cut], original[:cut]), (x[cut:], original[cut:]))]  # fmt: skip
    same_bits(observer.merge(*halves), whole)
    same_bits(observer.merge(*reversed(halves)), whole)
    # Without originals nothing is missing, and what else is remembered is the same.
    ranges, paired = observer.update(observer.init(C), x)
    same_bits((ranges, paired.gram), (whole[0], whole[1].gram))
    assert not paired.cross.any()
    # Half of what arrives is missing: every pair counts, and the cross statistic is half of the Gram matrix.
    twice = observer.update(observer.init(C), 2 * x, 3 * x)[1]
    same_bits(2 * twice.cross, twice.gram.total)
    # One that takes none cannot be given any.
    for other in (channel_range, channel_absmean, gram):
        assert not other.paired
        with pytest.raises(TypeError):
            other.update(other.init(C), x, original)


def test_statistics_of_many_experts_at_once():
    # Whole numbers: exact in whatever order a batched product adds. Two strips, the second of one channel.
    c = 65
    x = torch.randint(-9, 10, (3, 20, c), generator=torch.Generator().manual_seed(0)).float()
    many = torch.func.vmap(lambda tokens: gram.update(gram.init(c), tokens))(x)
    start = torch.stack([gram.update(gram.init(c), tokens).total for tokens in x])
    add = torch.func.vmap(
        lambda total, tokens: gram.update(gram.init(c)._replace(total=total), tokens).total, (0, None)
    )
    more = add(start, x[0])
    for i, tokens in enumerate(x):
        expected = torch.from_numpy(gram64(tokens)).float()
        assert torch.equal(many.total[i], expected)
        assert torch.equal(more[i], expected + torch.from_numpy(gram64(x[0])).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    # 4096 ones: bfloat16 would stall at 256, float16 would lose units beyond 2048.
    x = torch.ones(4096, C, dtype=dtype)
    assert channel_absmean.finalize(seen(channel_absmean, x)).tolist() == [1.0] * C
    assert (gram.finalize(seen(gram, x)).total == 4096).all()
    assert channel_range.finalize(seen(channel_range, x)).high.dtype == torch.float32


@every_observer
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_shows_in_the_state(observer, bad):
    import torch.utils._pytree as pytree

    x = torch.ones(3, C)
    x[1, 2] = bad
    leaves = [leaf for leaf in pytree.tree_leaves(seen(observer, x)) if leaf.is_floating_point()]
    assert not all(torch.isfinite(leaf).all() for leaf in leaves)


def test_no_token_is_the_empty_statistic():
    low, high = channel_range.finalize(channel_range.init(2))
    assert not low.any()
    assert not high.any()
    assert not channel_absmean.finalize(channel_absmean.init(2)).any()


@given(integer_matrices(n=st.integers(0, 6), c=st.integers(1, 5)))
def test_squares_are_the_diagonal_of_the_gram_matrix(x):
    # Whole numbers: exact in both orders of additions.
    squares, sums = (each.finalize(each.update(each.init(x.shape[1]), x)) for each in (channel_square, gram))
    assert torch.equal(squares.total, sums.total.diagonal())
    assert squares.tokens == sums.tokens == len(x)
