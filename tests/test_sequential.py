"""Sequential calibration fits every layer to what the quantized ones before it give: to the code, as the oracle does.

Whatever the mechanism.
"""

import pytest
import torch

import quantize as qz
from quantize.core import LayerSpec, Scheme, awq, gptq, smoothquant
from tests import oracle
from tests.models import TENSOR, TOKEN, config, solutions
from tests.zoo import effects, sequential
from tests.zoo.sequential import Chain, batches, given, made

MODELS = [*sequential.MODELS, *effects.MODELS]


def expected(kind, asymmetric=0.0):
    options = gptq.Options(asymmetric=asymmetric, search_range=False)
    return oracle.solve(made(kind), gptq.algorithm(oracle.SPEC, options), batches())


def calibrated(kind, **options):
    model = made(kind)
    qz.quantize(model, given(**options))
    with torch.no_grad():
        for x in batches():
            model(x)
    return model


def differing(found, wanted):
    """The names of the layers whose weights are not the same to the last bit."""
    assert found.keys() == wanted.keys()
    same = {
        name: torch.equal(found[name].weight.codes, solution.weight.codes)
        and torch.equal(found[name].weight.scale, solution.weight.scale)
        for name, solution in wanted.items()
    }
    return {name for name, each in same.items() if not each}


@pytest.mark.filterwarnings("ignore:(no token|fewer than 16 tokens) reached:quantize.QuantizeWarning")
@pytest.mark.filterwarnings("ignore:calibrated in full passes:quantize.QuantizeWarning")
@pytest.mark.parametrize("asymmetric", [0.0, 0.5])
@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_every_stage_is_fitted_to_the_quantized_ones_before(kind, asymmetric):
    model = calibrated(kind, asymmetric=asymmetric)
    assert {row.stage for row in qz.report(model).rows} == {"quantized"}
    assert not differing(solutions(model), expected(kind, asymmetric))
    # Those that leave something in attributes for later are the only ones that cannot run side by side.
    assert bool(qz.report(model).remarks) == (kind in (sequential.Leaving, sequential.Stateful))
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("asymmetric", [0.0, 0.5])
def test_it_is_not_what_one_pass_gives(asymmetric):
    one_pass = solutions(calibrated(Chain, sequential=False))
    # Only what nothing is quantized before.
    assert differing(one_pass, expected(Chain, asymmetric)) == one_pass.keys() - {"first"}


def test_awq_runs_in_stages_too():
    staged, one_pass = (solutions(calibrated(Chain, algorithm="awq", sequential=each)) for each in (True, False))
    wanted = oracle.solve(made(Chain), awq.algorithm(oracle.SPEC, awq.Options(clip=False)), batches())
    assert not differing(staged, wanted)
    assert all(torch.equal(staged[name].smoothing, solution.smoothing) for name, solution in wanted.items())
    assert differing(one_pass, wanted) == wanted.keys() - {"first"}


@pytest.mark.parametrize("inputs", [TENSOR, TOKEN])
def test_smoothquant_runs_in_stages_too(inputs):
    spec = LayerSpec(Scheme(8), Scheme(8, True, inputs["strategy"]))
    wanted = oracle.solve(made(Chain), smoothquant.algorithm(spec, smoothquant.Options(grids_num=4)), batches())
    model = made(Chain)
    qz.quantize(model, config({"smoothquant": {"grids_num": 4, "sequential": True}}, inputs=inputs, batch_num=3))
    with torch.no_grad():
        for x in batches():
            model(x)
    staged = solutions(model)
    assert not differing(staged, wanted)
    assert all(torch.equal(staged[name].smoothing, solution.smoothing) for name, solution in wanted.items())


def test_a_stage_that_no_batch_reaches_falls_back():
    class Idle(Chain):
        def forward(self, x):
            return self.head(self.blocks[0](self.first(x)))

    model = made(Idle)
    qz.quantize(model, given(batch_num=1))
    with pytest.warns(
        qz.QuantizeWarning, match="no token reached 6 of 11 layers, which fall back to minmax: blocks.1.up"
    ):
        model(batches()[0])
    assert qz.report(model).as_dict()["layers"][-2]["algorithm"] == "minmax (no tokens)"
