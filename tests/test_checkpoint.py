"""A calibration that is killed goes on from its last file, bit for bit."""

import signal

import pytest
import torch

import quantize as qz
from quantize.shell.calibrate.layer import CalibrationLinear
from tests import ranks
from tests.models import config, mlp
from tests.ranks import BATCHES, calibrated, solutions


@pytest.mark.parametrize("kill", ["batch 1", "batch 3", "solve"])
@pytest.mark.parametrize("name", ["gptq", "stages", "static"])
def test_a_killed_calibration_goes_on(name, kill, tmp_path):
    path = tmp_path / "calibration.pt"
    process = ranks.warm().Process(target=ranks.calibrate_and_die, args=(name, path, kill))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    saved = 1 if kill == "batch 1" else 3
    whole = calibrated(name, BATCHES[:4], batch_num=4)
    model = calibrated(name, [], batch_num=4)
    qz.load_calibration(model, path)
    assert qz.report(model).rows[0].stage == "calibrating"
    for x in BATCHES[saved:4]:
        model(x)
    mine, theirs = solutions(model), solutions(whole)
    assert theirs
    for layer, leaves in theirs.items():
        assert all(torch.equal(a, b) for a, b in zip(leaves, mine[layer], strict=True))


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "calibration.pt"
    model = mlp()
    qz.quantize(model, config("gptq", batch_num=2))
    qz.save_calibration(model, path)
    before = path.read_bytes()

    def failing(_state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(OSError, match="disk full"):
        qz.save_calibration(model, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["calibration.pt"]


def test_refusals_name_what_is_wrong(tmp_path):
    path = tmp_path / "calibration.pt"
    with pytest.raises(qz.QuantizeError, match="model: not under calibration"):
        qz.save_calibration(mlp(), path)
    model = mlp()
    qz.quantize(model, config("gptq", batch_num=2))
    qz.save_calibration(model, path)
    with pytest.raises(qz.QuantizeError, match="model: not under calibration"):
        qz.load_calibration(mlp(), path)
    other = mlp()
    qz.quantize(other, config("awq", batch_num=2))
    with pytest.raises(qz.QuantizeError, match="layer '0': gptq"):
        qz.load_calibration(other, path)
    wider = mlp(hidden=128)
    qz.quantize(wider, config("gptq", batch_num=2))
    held, wanted = (rf"'0\.weight', torch\.float32 \[{n}, 64\]" for n in (96, 128))
    with pytest.raises(qz.QuantizeError, match=rf"calibration\.pt: {held}; accepted: {wanted}"):
        qz.load_calibration(wider, path)
    assert any(isinstance(m, CalibrationLinear) for m in wider.modules())
