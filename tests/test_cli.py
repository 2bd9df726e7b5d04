"""The command line: the demonstration, and a tiny language model that is made here."""

import ast
import io
import json
import math
import random
import re
import subprocess
import sys

import pytest
import torch

from quantize import QuantizedLinear, QuantizeError, QuantizeWarning, quantize, report
from quantize.__main__ import main
from quantize.shell.cli import commandline
from quantize.shell.cli.commandline import CONFIG
from quantize.shell.cli.subjects import Encoder, Language
from quantize.shell.disk import storage
from quantize.shell.progress import progress

INT4 = {"type": "int4", "symmetric": True, "strategy": "group", "group_size": 32}
GPTQ = {"batch_num": 2, "quant_cfg": {"weights": INT4}, "algorithm": "gptq", "skip_layers": "lm_head"}
MINMAX = {"quant_cfg": {"weights": INT4}, "algorithm": "minmax"}
SMOOTHQUANT = {
    "quant_cfg": {
        "weights": {"type": "int8", "symmetric": True, "strategy": "channel"},
        "inputs": {"type": "int8", "symmetric": True, "strategy": "token"},
    },
    "algorithm": "smoothquant",
}
WORDS = ["<unk>", "<s>", *(f"w{i}" for i in range(90))]
LENGTH, LINES = 16, 60


def saved(directory, kind, config):
    """A model of random weights, and a tokenizer of :data:`WORDS` that begins a text with ``<s>``."""
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    transformers.utils.logging.disable_progress_bar()
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"unk_token": "<unk>", "pad_token": "<unk>", "bos_token": "<s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(directory)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        getattr(transformers, kind)(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A directory with a language model of two blocks."""
    from transformers import LlamaConfig

    config = LlamaConfig(vocab_size=len(WORDS), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                         bos_token_id=1, eos_token_id=0)  # fmt: skip
    return saved(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM", config)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A directory with an encoder of two blocks."""
    from transformers import BertConfig

    config = BertConfig(vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                        num_attention_heads=2, max_position_embeddings=64, initializer_range=0.5)  # fmt: skip
    return saved(tmp_path_factory.mktemp("bert"), "BertModel", config)


@pytest.fixture
def lines():
    """Lines of 5 to 9 words."""
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS[2:], k=draw.randint(5, 9))) for _ in range(LINES)]


@pytest.fixture
def given(tmp_path, llama, lines):
    """The arguments of a run of GPTQ on the language model."""
    (tmp_path / "config.json").write_text(json.dumps(GPTQ))
    (tmp_path / "text.txt").write_text("\n".join(lines))
    return ["--model", str(llama), "--config", str(tmp_path / "config.json"), "--text", str(tmp_path / "text.txt"),
            "--batch-size", "3", "--length", str(LENGTH)]  # fmt: skip


def forbid(monkeypatch, *kinds):
    """Fail where one of these is read."""
    import transformers

    for kind in kinds:
        monkeypatch.setattr(
            getattr(transformers, kind), "from_pretrained", lambda *_, kind=kind, **__: pytest.fail(f"{kind} was read")
        )


@pytest.fixture
def no_model(monkeypatch):
    """Fails where a tokenizer or a model is read."""
    forbid(monkeypatch, "AutoTokenizer", "AutoModel", "AutoModelForCausalLM")


def rows(lines):
    """Rows of tokens as the help describes them, made word by word, and the number of the last line that they need."""
    made, words = [], []
    for number, line in enumerate(lines):
        words += [WORDS.index(word) for word in line.split()]
        while len(words) >= LENGTH - 1:
            made.append([1, *words[: LENGTH - 1]])
            words = words[LENGTH - 1 :]
            yield made[-1], number


def perplexity(model, batches):
    """The perplexity, and how far one may be from it that was computed in float32 from the same logits."""
    losses, off, v = [], 0.0, 2.0**-24
    for tokens in batches:
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits
        loss = -logits.double()[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])
        losses.append(loss.flatten())
        # A maximum is subtracted and the logit that counts (2 v of a difference, at most twice the largest logit), as
        # many exponentials as there are words are summed, whose logarithm has their relative error, and a row of
        # losses is summed. exp, log and the division by the length: a unit in the last place each.
        off = max(off, v * (6 * 2 * logits.abs().max().item() + len(WORDS) + (LENGTH + 4) * loss.max().item()))
    found = math.exp(torch.cat(losses).mean().item())
    return found, found * math.expm1(off)


def test_help_says_what_the_options_do():
    # In a process of its own, which says nothing else.
    result = subprocess.run([sys.executable, "-m", "quantize", "--help"], capture_output=True, text=True, check=True)
    for option in ("--model DIR", "--config FILE.json", "--text FILE", "--out DIR", "--batch-size N", "--length N",
                   "--format {quantize,compressed-tensors,ascendv1}", "--plot FILE", "--evaluate"):  # fmt: skip
        assert option in result.stdout
    assert "exit status:\n  0    done\n  2    " in result.stdout
    assert result.stderr == ""


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


def test_an_encoder_is_measured_where_asked(bert, lines, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\n".join(lines[:9]))
    arguments = ["--model", str(bert), "--text", str(tmp_path / "text.txt")]
    assert main(arguments) == 0
    assert "cosine" not in capsys.readouterr().out
    assert main([*arguments, "--evaluate"]) == 0
    whole = capsys.readouterr().out.splitlines()[-1]
    told = r"cosine of 4 sentence embeddings, before and after: mean ([\d.]+), lowest ([\d.]+)"
    mean, lowest = map(float, re.fullmatch(told, whole).groups())
    assert 0 < lowest < mean < 1
    assert main([*arguments, "--evaluate", "--length", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] != whole


def test_all_sentences_calibrate_unless_some_are_measured(bert):
    encoder = Encoder(bert)
    calls, held = encoder.split("abcde", 4, 2, evaluate=False)
    assert (list(calls), held) == (["ab", "cd", "e", "ab"], [])
    calls, held = encoder.split("abcde", 3, 2, evaluate=True)
    assert (list(calls), held) == (["ac", "e", "ac"], ["bd"])
    with pytest.raises(QuantizeError, match="--text: 1 sentences; accepted: at least 2 lines of text"):
        encoder.split("a", 1, 2, evaluate=True)


def test_rows_begin_as_a_text_does_and_what_is_measured_comes_later(llama, lines):
    language = Language(llama, length=LENGTH)
    calibration, held = language.split(lines, 2, 3, evaluate=True)
    expected = list(rows(lines))
    assert torch.cat(calibration).tolist() == [row for row, _ in expected[:6]]
    assert [len(batch) for batch in calibration] == [3, 3]
    after = [row for row, _ in rows(lines[expected[5][1] + 1 :])]
    assert torch.cat(held).tolist() == after
    # What is quantized does not depend on whether it is measured.
    again, nothing = language.split(lines, 2, 3, evaluate=False)
    assert torch.equal(torch.cat(again), torch.cat(calibration))
    assert nothing == []


def test_a_language_model_is_quantized_measured_drawn_and_written(given, tmp_path, llama, lines, capfd):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, plot = tmp_path / "out", tmp_path / "layers.png"
    assert main([*given, "--evaluate", "--out", str(out), "--plot", str(plot)]) == 0
    printed, err = capfd.readouterr()
    assert err == ""
    report = printed.splitlines()
    assert report[0] == f"model: {llama}"
    assert report[1].startswith("config: {'batch_num': 2")
    assert " layers: int4 group 32 symmetric weights, float inputs, " in report[2]
    assert "  lm_head: skip_layers: 'lm_head'" in report
    assert plot.read_bytes().startswith(b"\x89PNG")

    held = torch.tensor([row for row, _ in rows(lines[list(rows(lines))[5][1] + 1 :])])
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    told = rf"perplexity on {len(held)} held-out rows of {LENGTH} tokens: (\d+\.\d{{3}}) before, (\d+\.\d{{3}}) after"
    printed = [float(number) for number in re.fullmatch(told, report[-1]).groups()]
    exact = perplexity(model, held.split(3))
    storage.load(model, out)
    for number, (found, off) in zip(printed, (exact, perplexity(model, held.split(3))), strict=True):
        # Of three decimals.
        assert abs(number - found) <= off + 0.0005
        # Before and after cannot be taken for each other.
        assert 2 * (off + 0.0005) < abs(printed[0] - printed[1])
    assert AutoTokenizer.from_pretrained(out)(lines[0]).input_ids == [1, *(WORDS.index(w) for w in lines[0].split())]


@pytest.mark.parametrize("name", ["compressed-tensors", "ascendv1"])
def test_other_programs_get_their_files_and_a_tokenizer(given, tmp_path, name, capsys):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "batch_num": 1}))
    assert main([*given, "--out", str(tmp_path / "out"), "--format", name]) == 0
    found = {path.name for path in (tmp_path / "out").iterdir()}
    own = {"compressed-tensors": "model.safetensors", "ascendv1": "quant_model_weights.safetensors"}[name]
    assert {own, "config.json", "tokenizer.json", "tokenizer_config.json"} <= found
    assert "perplexity" not in capsys.readouterr().out


def test_what_needs_no_text_asks_for_none(given, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(MINMAX))
    assert main(given[:4]) == 0
    assert "int4 group 32 symmetric" in capsys.readouterr().out


def test_a_pipe_gets_the_report_and_no_bars(given, capfd):
    from transformers.utils import logging

    # As in a process that just began: transformers would show bars.
    logging.enable_progress_bar()
    assert main(given) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert out.startswith("model: ")
    assert "whole model: " in out.splitlines()[-1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_for_terminals(monkeypatch, terminal):
    stream = (Terminal if terminal else io.StringIO)()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(progress([1, 2, 3], "calibrate", unit="batch")) == [1, 2, 3]
    assert ("calibrate" in stream.getvalue()) == terminal
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(progress([1, 2, 3], "solve", unit="batch")) == [1, 2, 3]
    assert "solve" not in stream.getvalue()


def refused(arguments, capsys):
    """The one line that a refusal prints, on stderr alone."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "nowhere"], "error: --model: nowhere; accepted: a directory with config.json"),
        (["--config", "nowhere.json"], "error: --config: nowhere.json; accepted: a JSON file"),
        (["--text", "nowhere.txt"], "error: --text: nowhere.txt; accepted: a UTF-8 text file"),
        (["--batch-size", "0"], "argument --batch-size: '0'; accepted: an int, at least 1"),
        (["--length", "1"], "argument --length: '1'; accepted: an int, at least 2"),
        (["--length", "x"], "argument --length: 'x'; accepted: an int, at least 2"),
        (["--length", "65"], "error: --length: 65; accepted: at most 64, the positions of the model"),
        (["--format", "gguf"], "argument --format: invalid choice: 'gguf'"),
        (["--format", "ascendv1"], "error: --format: 'ascendv1' without --out; accepted: --out DIR, or no format"),
        (["--out", "full"], "full: exists, and holds something; accepted: a new or an empty directory"),
        (
            ["--out", "full/a/b"],
            "full/a is not a directory that can be written to; accepted: a new or an empty directory",
        ),
        (["--out", "new", "--format", "ascendv1"], "error: --format ascendv1: int4 weights: "),
        (["--plot", "layers.gif"], "error: plot: layers.gif; accepted: a file name that ends in"),
        (["--plot", "nowhere/layers.png"], "error: plot: nowhere/layers.png; accepted: a file in a directory that"),
        (["--nonsense"], "error: unrecognized arguments: --nonsense; see --help"),
    ],
)
def test_mistakes_are_named_before_a_model_is_read(given, arguments, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    assert text in refused([*given, *arguments], capsys)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("no_model")
def test_a_refused_config_is_named(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"algorithm": "minmax"}')
    assert "error: quant_cfg: missing; accepted: " in refused(["--config", str(tmp_path / "config.json")], capsys)


@pytest.mark.usefixtures("no_model")
def test_a_format_that_cannot_hold_the_config_is_refused_at_once(given, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(SMOOTHQUANT))
    arguments = [*given, "--out", str(tmp_path / "out"), "--format", "compressed-tensors"]
    assert "error: --format compressed-tensors: its inputs are smoothed at run time" in refused(arguments, capsys)
    # Folded, there is nothing left that it could not hold: the next thing is to read the model.
    (tmp_path / "config.json").write_text(json.dumps({**SMOOTHQUANT, "algorithm": {"smoothquant": {"fold": True}}}))
    with pytest.raises(pytest.fail.Exception, match="AutoTokenizer was read"):
        main(arguments)


def test_text_is_counted_before_the_model_is_read(given, tmp_path, lines, monkeypatch, capsys):
    forbid(monkeypatch, "AutoModelForCausalLM")
    (tmp_path / "text.txt").write_text("\n".join(lines[:8]))
    few = len(list(rows(lines[:8])))
    text = f"error: --text: {few} rows of 16 tokens to calibrate with; accepted: text for 6 (batch_num 2 times"
    assert text in refused(given, capsys)
    # Enough to calibrate, and one line of 9 words at most after that.
    (tmp_path / "text.txt").write_text("\n".join(lines[: list(rows(lines))[5][1] + 2]))
    assert "6 rows of 16 tokens to calibrate with, 0 to measure" in refused([*given, "--evaluate"], capsys)
    assert "error: --text: not given; accepted: a file" in refused(given[:4], capsys)


def test_a_model_that_cannot_be_read_is_one_line(given, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    for text, told in (
        ("[]", "a config of transformers"),
        ("{", "a JSON file"),
        ('{"quantization_config": {}}', "which is quantized already; accepted: a model in floating point"),
        ('{"model_type": "bert"}', "whose tokenizer knows no word; accepted: a directory with its tokenizer"),
    ):
        (broken / "config.json").write_text(text)
        assert told in refused(["--model", str(broken)], capsys)
    (broken / "tokenizer.json").write_text("{")
    assert "what AutoTokenizer of transformers reads (" in refused(["--model", str(broken)], capsys)


def test_an_interrupt_has_a_status_of_its_own(given, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(commandline, "demonstrate", interrupted)
    assert main(given) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_what_cannot_be_written_is_one_line_too(given, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError("no space left\n  on this device")

    monkeypatch.setattr(commandline, "demonstrate", full)
    assert refused(given, capsys) == "error: no space left on this device\n"


def test_formats_are_chosen_under_a_budget(given, tmp_path, llama, capsys):
    from transformers import AutoModelForCausalLM

    assert main([*given, "--budget", "0.2", "--out", str(tmp_path / "out")]) == 0
    told = ast.literal_eval(capsys.readouterr().out.splitlines()[1].removeprefix("config: "))
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    storage.load(model, tmp_path / "out")
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len({layer.record().weights for layer in layers}) > 1
    weights = [layer.solution.weight for layer in layers]
    bits = sum(q.codes.numel() * q.scheme.bits + 32 * q.scale.numel() for q in weights)
    assert bits <= 0.2 * sum(32 * q.codes.numel() for q in weights)
    # The config that is printed is the one that was used.
    again = AutoModelForCausalLM.from_pretrained(llama).eval()
    with pytest.warns(QuantizeWarning, match="embed_tokens"):
        quantize(again, {**told, "algorithm": "minmax"})
    assert [row.weights for row in report(again).rows] == [layer.record().weights for layer in layers]
