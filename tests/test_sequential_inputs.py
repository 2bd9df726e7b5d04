"""What a model under sequential calibration is called with: what counts, what is kept, what cannot be given twice."""

import itertools
import weakref

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

import quantize as qz
from tests.models import TENSOR, TOKEN, config, filled, randn, solutions
from tests.zoo.sequential import TOKENS, C, Chain, batches, given, made


class Cache:
    def __init__(self):
        self.seen = []


class Caching(Chain):
    def forward(self, x, cache=None):
        if cache is not None:
            cache.seen.append(x)
        return super().forward(x)


def test_arguments_that_cannot_be_given_twice_are_calibrated_in_one_pass():
    model, plain = made(Caching), made(Caching)
    qz.quantize(model, given())
    qz.quantize(plain, given(sequential=False))
    told = "calibrated in one pass, not layer by layer: the model was called with an argument of type Cache"
    with pytest.warns(qz.QuantizeWarning, match=told):
        model(batches()[0], cache=Cache())
    plain(batches()[0])
    for x in batches()[1:]:
        model(x, cache=Cache())
        plain(x)
    wanted = solutions(plain)
    for name, found in solutions(model).items():
        assert torch.equal(found.weight.codes, wanted[name].weight.codes), name
    assert told in " ".join(str(qz.report(model)).split())
    assert qz.report(model).as_dict()["remarks"][0].startswith(told)


def test_a_later_batch_that_cannot_be_given_twice_is_refused():
    model = made(Caching)
    qz.quantize(model, given())
    model(batches()[0])
    with pytest.raises(qz.QuantizeError, match="model: an argument of type Cache"):
        model(batches()[1], cache=Cache())
    assert qz.report(model).rows[0].tokens == 0
    for x in batches()[1:]:
        model(x)
    assert qz.report(model).rows[0].stage == "quantized"


class Masked(Chain):
    def forward(self, x, attention_mask=None):
        return super().forward(x)


def padded(fill, x):
    """``x`` with ``fill`` in the places of the padding, and the mask."""
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[0, 15:] = 0
    mask[1, :3] = 0
    return torch.where(mask[..., None] == 0, fill, x), mask


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("positional", [True, False])
def test_padding_does_not_count(sequential, positional):
    models = []
    for fill in (1e3, batches()[1]):
        model = made(Masked)
        models.append(model)
        qz.quantize(model, given(batch_num=1, sequential=sequential))
        x, mask = padded(fill, batches()[0])
        model(x, mask) if positional else model(x, attention_mask=mask)
        assert {row.tokens for row in qz.report(model).rows} == {2 * TOKENS - 8}
    # The blocks work on each token alone, and both batches have one shape: the other tokens are the same to the bit.
    first, second = map(solutions, models)
    for name, found in first.items():
        assert torch.equal(found.weight.codes, second[name].weight.codes), name


@pytest.mark.parametrize("sequential", [True, False])
def test_what_counts_is_as_without_padding(sequential):
    model, plain = made(Masked), made(Masked)
    for each in (model, plain):
        qz.quantize(each, given(batch_num=1, sequential=sequential))
    # Sums of small integers are exact: in whatever shape the first layer sees its tokens, it sees the same.
    x, mask = padded(1e3, (8 * batches()[0]).round())
    model(x, attention_mask=mask)
    plain(x[mask.bool()][None])
    a, b = solutions(model)["first"], solutions(plain)["first"]
    assert torch.equal(a.weight.codes, b.weight.codes)
    assert torch.equal(a.error, b.error)


@pytest.mark.parametrize("sequential", [True, False])
def test_nan_in_padding_does_not_matter(sequential):
    model, plain = made(Masked), made(Masked)
    for each, fill in ((model, torch.nan), (plain, 0.0)):
        qz.quantize(each, given(batch_num=1, sequential=sequential))
        x, mask = padded(fill, batches()[0])
        each(x, attention_mask=mask.bool())
    assert {row.tokens for row in qz.report(model).rows} == {2 * TOKENS - 8}
    wanted = solutions(plain)
    for name, found in solutions(model).items():
        assert torch.equal(found.weight.codes, wanted[name].weight.codes), name


def kept(model):
    """How many bytes of tensors a saved state has besides the parameters, each piece of memory counted once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    leaves = [leaf for leaf in pytree.tree_leaves(model.state_dict()) if isinstance(leaf, torch.Tensor)]
    held = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for leaf in leaves}
    return sum(nbytes for address, nbytes in held.items() if address not in parameters)


def test_batches_are_kept_without_what_they_are_cut_from():
    class Pair(Chain):
        def forward(self, x, y, z):
            return super().forward(x + y + z[1])

    model, data = made(Pair), torch.zeros(1000, TOKENS, C)
    storage = weakref.ref(data.untyped_storage())
    rows = data[:2].nbytes
    qz.quantize(model, given())
    sizes = [kept(model)]
    for whole in (None, data):
        model(data[:2], data[2:4], [whole, data[:2]])
        sizes.append(kept(model))
    # The rows alone; and where all of it is an argument, a copy of it that the rows are cut from.
    assert [after - before for before, after in itertools.pairwise(sizes)] == [3 * rows, data.nbytes]
    del data, whole
    assert storage() is None


def test_one_tensor_under_several_names_stays_one():
    seen = []

    class Named(Chain):
        def forward(self, q, k, part):
            q.add_(1)
            seen.append((q is k, part.data_ptr() == q.data_ptr(), torch.equal(part, k[:1])))
            return super().forward(k)

    model = made(Named)
    qz.quantize(model, given(batch_num=1))
    x = batches()[0]
    model(x, x, x[:1])
    # The user's own pass, and others.
    assert len(seen) > 1
    assert set(seen) == {(True, True, True)}


@pytest.mark.parametrize(("algorithm", "inputs"), [
    *itertools.product(["gptq", {"awq": {"sequential": True}}], [None, TENSOR, TOKEN]),
    # Of weights alone, minmax needs no batch.
    *itertools.product([{"minmax": {"sequential": True}}], [TENSOR, TOKEN]),
])  # fmt: skip
def test_a_batch_without_a_token_counts_and_brings_nothing(algorithm, inputs):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(64, 64))

        def forward(self, x, attention_mask=None):
            return self.inner(x)

    def solved(batches):
        model = filled(Masked())
        qz.quantize(model, config(algorithm, inputs=inputs, batch_num=len(batches)))
        for x, mask in batches:
            model(x, attention_mask=mask)
        (row,) = qz.report(model).rows
        assert (row.stage, row.tokens) == ("quantized", 40)
        return model.inner[0].solution

    hidden = randn(1, 40, 64, seed=1), torch.zeros(1, 40, dtype=torch.int64)
    seen = randn(1, 40, 64, seed=2), torch.ones(1, 40, dtype=torch.int64)
    alone, after = solved([seen]), solved([hidden, seen])
    assert torch.equal(alone.weight.codes, after.weight.codes)
    assert torch.equal(alone.weight.scale, after.weight.scale)


def test_weights_alone_that_need_no_batch_are_solved_at_once_whatever_the_schedule():
    model = filled(nn.Sequential(nn.Linear(64, 64)))
    given = config({"minmax": {"sequential": True}})
    given["quant_cfg"]["*nope.inputs"] = TENSOR
    with pytest.warns(qz.QuantizeWarning, match=r"'\*nope.inputs' of skip_layers or quant_cfg matched nothing"):
        qz.quantize(model, given)
    assert qz.report(model).rows[0].stage == "quantized"
