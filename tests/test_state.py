"""Copies, pickles and state_dicts in every stage continue as the original does."""

import copy
import io
import pickle

import pytest
import torch

import quantize as qz
from tests.models import TENSOR, TOKEN, WEIGHTS, config, mlp, randn

CONFIGS = {
    "minmax": config(inputs=TENSOR, batch_num=2),
    "gptq": config("gptq", weights={**WEIGHTS, "type": "int4", "symmetric": False}, batch_num=2),
    "awq": config({"awq": {"grids_num": 3}}, batch_num=2),
    "smoothquant": config("smoothquant", inputs={**TENSOR, "symmetric": False}, batch_num=2),
    "token": config("smoothquant", inputs=TOKEN, batch_num=2),
}
BATCHES = [randn(40, 64, seed=seed) for seed in (1, 2)]
PROBE = randn(3, 64, seed=3)


def staged(given, stage):
    model = mlp()
    if stage == "float":
        return model
    qz.quantize(model, given)
    for x in BATCHES[: {"started": 0, "calibrating": 1}.get(stage, 2)]:
        model(x)
    if stage == "converted":
        qz.convert(model)
    return model


def finished(model, given):
    """Carry on from any stage to the converted model; its output on the probe."""
    if not any("Quantized" in type(m).__name__ for m in model.modules()):
        if not any("Calibration" in type(m).__name__ for m in model.modules()):
            qz.quantize(model, given)
        for x in BATCHES[model[0].seen :]:
            model(x)
        qz.convert(model)
    return model(PROBE)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


every_stage = pytest.mark.parametrize("stage", ["float", "started", "calibrating", "quantized", "converted"])
every_config = pytest.mark.parametrize("given", CONFIGS.values(), ids=CONFIGS.keys())


@every_stage
@every_config
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_goes_its_own_way(given, stage, copied):
    model = staged(given, stage)
    twin = copied(model)
    expected = finished(model, given)
    # The original's batches did not reach the copy.
    assert torch.equal(finished(twin, given), expected)
    assert str(qz.report(twin)) == str(qz.report(model))


@every_stage
@every_config
def test_a_state_dict_goes_round(given, stage):
    model = staged(given, stage)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = staged(given, "converted" if stage == "converted" else "float" if stage == "float" else "started")
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    if stage == "quantized":
        assert torch.equal(fresh(PROBE), model(PROBE))
    assert torch.equal(finished(fresh, given), finished(model, given))


def test_a_state_of_another_config_is_refused():
    state = staged(CONFIGS["minmax"], "calibrating").state_dict()
    with pytest.raises(qz.QuantizeError, match=r"layer '0': minmax, .*; accepted: a state of gptq, "):
        staged(CONFIGS["gptq"], "started").load_state_dict(state)


@pytest.mark.parametrize("stage", ["calibrating", "quantized", "converted"])
def test_casting_the_model_leaves_scales_and_statistics_in_float32(stage):
    model = staged(CONFIGS["smoothquant"], stage).to(torch.bfloat16)
    held = torch.utils._pytree.tree_leaves([(m.__dict__.get("statistics"), m.__dict__.get("solution")) for m in model])
    held += list(model.buffers())
    floats = [t.dtype for t in held if isinstance(t, torch.Tensor) and t.is_floating_point()]
    assert len(floats) >= 4
    assert set(floats) == {torch.float32}
    assert model(PROBE.bfloat16()).dtype == torch.bfloat16


def test_a_model_after_a_failed_forward_still_copies():
    model = staged(CONFIGS["gptq"], "calibrating")
    with pytest.raises(RuntimeError):
        model(randn(2, 63))
    assert torch.equal(
        finished(copy.deepcopy(model), CONFIGS["gptq"]), finished(through_pickle(model), CONFIGS["gptq"])
    )


def test_an_earlier_state_can_be_loaded_back_and_calibration_goes_on():
    given = CONFIGS["gptq"]
    model = staged(given, "calibrating")
    saved = copy.deepcopy(model.state_dict())
    model(BATCHES[1])
    expected = model(PROBE)
    model.load_state_dict(saved)
    assert qz.report(model).rows[0].stage == "calibrating"
    model(BATCHES[1])
    assert torch.equal(model(PROBE), expected)
    qz.convert(model)
    assert not model._forward_hooks


def test_a_state_of_other_options_is_refused():
    state = staged(CONFIGS["awq"], "calibrating").state_dict()
    with pytest.raises(qz.QuantizeError, match="grids_num=3"):
        staged(config("awq", batch_num=2), "started").load_state_dict(state)
