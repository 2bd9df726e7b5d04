"""Layers with several names, weights with several owners, tensors with several readers, models in several parts."""

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

import quantize as qz
from quantize.core import LayerSpec, Scheme, gptq
from quantize.core.observers import SumState
from tests.memory import Alive
from tests.models import TENSOR, TOKEN, config, filled, hooks, mlp, randn, solutions
from tests.zoo.layers import Shared, Siblings, Tied


@pytest.mark.filterwarnings("ignore::quantize.QuantizeWarning")
def test_a_tied_embedding_stays_as_it_is_and_keywords_arrive():
    model = filled(Tied())
    kept = model.embed.weight.detach().clone()
    qz.quantize(model, config(inputs=TOKEN))
    assert model.head.weight is model.embed.weight
    model(tokens=torch.arange(10))
    qz.convert(model)
    assert torch.equal(model.embed.weight, kept)
    assert model.head.codes.shape == (10, 64)
    assert torch.isfinite(model(tokens=torch.arange(3))).all()


def test_one_layer_under_two_names_is_one_layer():
    model = filled(Shared())
    qz.quantize(model, config(inputs=TENSOR))
    assert model.first is model.inner[0]
    model(torch.ones(3, 8))
    report = qz.report(model)
    assert [row.names for row in report.rows] == [("first", "inner.0"), ("inner.1",)]
    # Called twice in a forward pass: 2 x 3 tokens.
    assert [row.tokens for row in report.rows] == [6, 3]
    assert "first = inner.0" in str(report)
    qz.convert(model)
    assert model.first is model.inner[0]
    assert isinstance(model.first, qz.QuantizedLinear)


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_a_layer_called_twice_sees_both_inputs(factor):
    model = filled(Shared())
    inputs = []
    model.first.register_forward_pre_hook(lambda _module, args: inputs.append(args[0].detach()))
    with torch.no_grad():
        model.first.weight *= factor
    qz.quantize(model, config(inputs=TENSOR))
    model(randn(5, 8))
    scales = [torch.maximum(-x.min() / 128, x.max() / 127) for x in inputs]
    assert len(scales) == 2
    # One of the calls has the wider range, which counts.
    assert (scales[0] < scales[1]) == (factor > 1)
    assert model.first.solution.static.scale == max(scales)


def test_siblings_share_one_observation():
    def observations():
        """How many Gram matrices of 16 channels a saved state holds, and how many of them in memory of their own."""
        found = [leaf for leaf in pytree.tree_leaves(model.state_dict())
                 if isinstance(leaf, torch.Tensor) and leaf.shape == (16, 16)]  # fmt: skip
        return len(found), len({leaf.data_ptr() for leaf in found})

    model = filled(Siblings())
    qz.quantize(model, config({"gptq": {"sequential": False}}, batch_num=3))
    # Sums of products of small integers are exact in any order.
    batches = [randn(20, 16, seed=seed).mul(4).round() for seed in (1, 2, 3)]
    with torch.no_grad():
        model(batches[0].clone())
        assert observations() == (3, 1)
        # Written to in between, the same tensor is another observation.
        model(batches[1].clone(), write=True)
        assert observations() == (3, 2)
        model(batches[2].clone())
    gram = sum(x.T @ x for x in batches)
    for name, total in (("q", gram), ("k", gram), ("v", gram + 3 * batches[1].T @ batches[1])):
        weight = model.get_parameter(f"{name}.weight").detach()
        statistic = SumState(total, torch.tensor(60))
        expected = gptq.solve(LayerSpec(Scheme()), gptq.Options(), weight, statistic)
        assert torch.equal(solutions(model)[name].weight.codes, expected.weight.codes)
        assert torch.equal(solutions(model)[name].error, expected.error)


def test_a_layer_called_often_keeps_one_state():
    # Inputs are of another size than the Gram matrix.
    held, alive = [], Alive(nbytes=4 * 8 * 8)

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            for _ in range(10):
                held.append(alive.now)
                x = self.layer(x.tanh())
            return x

    model = filled(Loop())
    qz.quantize(model, config({"gptq": {"sequential": False}}))
    with torch.no_grad(), alive:
        model(randn(4, 8))
    # None at first, and one from then on, or the one before it besides.
    assert held[0] == 0
    assert min(held[1:]) >= 1
    assert max(held) <= 2
    assert qz.report(model).rows[0].tokens == 40


def test_a_part_of_a_model_can_be_quantized_and_converted_from_outside():
    model = filled(nn.Sequential(mlp(), nn.Linear(32, 8)))
    qz.quantize(model[0], config(inputs=TENSOR))
    model(randn(2, 64))
    qz.convert(model)
    assert [type(module) for module in model[0]] == [qz.QuantizedLinear, nn.ReLU, qz.QuantizedLinear]
    assert type(model[1]) is nn.Linear
    assert len(qz.report(model).rows) == 2


def test_parts_with_sessions_of_their_own_are_finished_together():
    model = nn.Sequential(mlp(), nn.Sequential(nn.Linear(32, 8)))
    for part in model:
        qz.quantize(part, config(inputs=TENSOR, batch_num=2))
    model[0](randn(2, 64))
    with pytest.raises(qz.QuantizeError, match="layer '0': 0 batches seen"):
        qz.finish(model)
    model[1](randn(2, 32))
    qz.finish(model)
    qz.convert(model)
    assert not hooks(model)
    assert [row.stage for row in qz.report(model).rows] == ["converted"] * 3


def test_a_part_may_be_converted_before_the_next_is_quantized():
    model = filled(nn.Sequential(nn.Sequential(nn.Linear(64, 64)), nn.Sequential(nn.Linear(64, 8))))
    qz.quantize(model[0], config(inputs=TENSOR))
    model(randn(2, 64))
    qz.convert(model[0])
    qz.quantize(model[1], config(inputs=TENSOR, batch_num=9))
    model(randn(2, 64))
    qz.finish(model)
    qz.convert(model)
    assert [row.stage for row in qz.report(model).rows] == ["converted"] * 2
