import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from property_tests.laws import assert_pure, same_bits
from property_tests.oracles import numpy64
from property_tests.strategies import correlated_tokens, normal_matrices, weight_schemes
from quantize.core import LayerSpec, Scheme, awq, dequantize, round_to_nearest, shrinkage
from quantize.core.observers import SumState

F64 = torch.float64


def outputs_error(weight, x, scale, scheme):
    """Run the layer on the tokens, scaled, rounded and divided again."""
    q = numpy64(dequantize(round_to_nearest(weight * scale, scheme)))
    made = (numpy64(x) / numpy64(scale)) @ q.T
    return ((made - numpy64(x) @ numpy64(weight).T) ** 2).sum()


@given(st.data(), weight_schemes(), st.integers(1, 12))
def test_the_chosen_scale_is_the_best_by_running_the_layer(data, scheme, grids_num):
    weight = data.draw(normal_matrices(st.integers(1, 5), st.integers(1, 9), F64))
    x = data.draw(correlated_tokens(st.integers(1, 20), st.just(weight.shape[1])))
    absmean = x.abs().mean(0)
    chosen = assert_pure(lambda *a: awq.search_scale(*a, scheme, grids_num=grids_num), weight, absmean, x.T @ x)
    grid = []
    for i in range(grids_num):
        m = np.where(numpy64(absmean) > 0, numpy64(absmean), np.nan) ** (i / grids_num)
        s = m / np.sqrt(np.nanmax(m) * np.nanmin(m)) if np.isfinite(m).any() else m
        grid.append(torch.from_numpy(np.where(np.isnan(s), 1.0, s)))
    errors = [outputs_error(weight, x, s, scheme) for s in grid]
    noise = 1e-12 * (x**2).sum().item() * (weight**2).sum().item()
    assert outputs_error(weight, x, chosen, scheme) <= min(errors) * (1 + 1e-6) + noise
    assert min((chosen - s).abs().max().item() for s in grid) < 1e-9


@given(st.data(), weight_schemes(), st.floats(0, 1))
def test_the_chosen_scale_never_loses_on_the_tokens_nor_without_chance(data, scheme, rho):
    weight = data.draw(normal_matrices(st.integers(1, 5), st.integers(1, 9), F64))
    x = data.draw(correlated_tokens(st.integers(1, 20), st.just(weight.shape[1])))
    gram = x.T @ x
    chosen = awq.search_scale(weight, x.abs().mean(0), gram, scheme, grids_num=7, rho=rho)
    noise = 1e-12 * (x**2).sum().item() * (weight**2).sum().item()
    for h in (gram, shrinkage.shrink(gram, torch.tensor(rho, dtype=F64))):
        errors = [
            np.einsum("ni,ij,nj->", d, numpy64(h), d)
            for d in (numpy64(awq.scaled_error(weight, s, scheme)) for s in (chosen, torch.ones_like(chosen)))
        ]
        assert errors[0] <= errors[1] + noise


@given(normal_matrices(st.integers(1, 5), st.integers(1, 9), F64), weight_schemes(), st.floats(0.001, 1000))
def test_equal_inputs_give_the_identity(weight, scheme, magnitude):
    c = weight.shape[1]
    scale = awq.search_scale(weight, torch.full((c,), magnitude, dtype=F64), torch.eye(c, dtype=F64), scheme)
    assert torch.equal(scale, torch.ones(c, dtype=F64))


@given(st.floats(0, 1), st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=6))
def test_candidates_are_normalized_and_safe(ratio, magnitudes):
    absmean = torch.tensor([0.0, *magnitudes])
    scale = assert_pure(lambda m: awq.candidate_scale(m, ratio), absmean)
    assert scale[0] == 1
    assert torch.isfinite(scale).all()
    assert (scale[1:].double().max() * scale[1:].double().min()).item() == pytest.approx(1, rel=1e-4)
    expected = np.array(magnitudes) ** ratio
    # The exponent is a float32 of magnitude below 70 after three roundings, on either side of the quotient.
    slack = 2 * 3 * 70 * 2.0**-24
    np.testing.assert_allclose(numpy64(scale[1:]) / numpy64(scale[1]), expected / expected[0], rtol=slack)


def test_one_large_channel_is_protected():
    source = torch.Generator().manual_seed(0)
    x = torch.randn(500, 16, generator=source, dtype=F64)
    x[:, 3] *= 30
    weight = torch.randn(8, 16, generator=source, dtype=F64)
    scheme = Scheme(4)
    scale = awq.search_scale(weight, x.abs().mean(0), x.T @ x, scheme)
    assert scale.argmax() == 3
    assert outputs_error(weight, x, scale, scheme) < 0.5 * outputs_error(weight, x, torch.ones_like(scale), scheme)


@given(st.data(), st.sampled_from(["tensor", "channel", "group"]))
def test_a_common_scale_is_the_best_for_the_sum_of_the_errors(data, strategy):
    c = data.draw(st.integers(2, 8))
    several = st.lists(normal_matrices(st.integers(1, 3), st.just(c), F64), min_size=1, max_size=3)
    weights = data.draw(several)
    x = data.draw(correlated_tokens(st.integers(1, 20), st.just(c)))
    scheme = Scheme(4, True, strategy, 3 if strategy == "group" else None)
    options = awq.Options(grids_num=6, shrink=0.0)
    statistic = (x.abs().mean(0), SumState(x.T @ x, torch.tensor(len(x))))
    chosen = awq.common_scale(LayerSpec(scheme), options, weights, statistic)

    def loss(scale):
        return sum((x @ awq.scaled_error(w, scale, scheme).T).square().sum().item() for w in weights)

    losses = [loss(awq.candidate_scale(statistic[0], i / 6)) for i in range(6)]
    assert loss(chosen) <= min(losses) * (1 + 1e-9) + 1e-12 * max(losses)
    # Given to the solver, it is what the solver finds by itself.
    alone = awq.solve(LayerSpec(scheme), options, weights[0], statistic)
    given_ = awq.solve(LayerSpec(scheme), options, weights[0], statistic, awq.common_scale(
        LayerSpec(scheme), options, weights[:1], statistic))  # fmt: skip
    same_bits(alone, given_)
