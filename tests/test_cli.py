import json
import subprocess
import sys

import pytest

from quantize.__main__ import main


def test_help_says_what_the_options_do():
    result = subprocess.run([sys.executable, "-m", "quantize", "--help"], capture_output=True, text=True, check=True)
    for option in ("--model DIR", "--config FILE.json", "--text FILE"):
        assert option in result.stdout


def test_the_demonstration_takes_a_config_and_a_text(tmp_path, capsys):
    given = {
        "quant_cfg": {"weights": {"type": "int4", "symmetric": False, "strategy": "group", "group_size": 32}},
        "algorithm": ["minmax"],
        "skip_layers": ["pooler"],
    }
    (tmp_path / "config.json").write_text(json.dumps(given))
    (tmp_path / "text.txt").write_text("One sentence.\n\nAnother one.\nA third.\n")
    assert main(["--config", str(tmp_path / "config.json"), "--text", str(tmp_path / "text.txt")]) == 0
    out = capsys.readouterr().out
    assert "int4 group 32 asymmetric" in out
    assert "pooler.dense: skip_layers: 'pooler'" in out
    assert "cosine of 1 sentence embeddings" in out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "nowhere"], "error: --model: nowhere; accepted: a directory with config.json"),
        (["--config", "nowhere.json"], "error: --config: nowhere.json; accepted: a JSON file"),
        (["--text", "nowhere.txt"], "error: --text: nowhere.txt; accepted: a UTF-8 text file"),
    ],
)
def test_mistakes_are_named(arguments, text, capsys):
    assert main(arguments) == 2
    assert text in capsys.readouterr().err


def test_a_refused_config_is_named(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"algorithm": "minmax"}')
    assert main(["--config", str(tmp_path / "config.json")]) == 2
    assert "error: quant_cfg: missing; accepted: " in capsys.readouterr().err
