"""The command line: the demonstration, and a tiny language model that is made here."""

import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
import torch

from quantize import QuantizedLinear, QuantizeError, QuantizeWarning, quantize, report
from quantize.__main__ import main
from quantize.shell.cli import commandline, output
from quantize.shell.cli.commandline import CONFIG
from quantize.shell.cli.outcome import demonstrate
from quantize.shell.cli.subjects import Encoder, Language
from quantize.shell.config import parse
from quantize.shell.disk import export, storage
from quantize.shell.plan import plan
from quantize.shell.progress import BAR, progress
from tests.ascend_loader import Loader

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
    command = [sys.executable, "-m", "quantize", "--help"]
    environment = {**os.environ, "COLUMNS": "80"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    for option in ("--model DIR", "--config FILE.json", "--text FILE", "--out DIR", "--batch-size N", "--length N",
                   "--budget SHARE", "--plot FILE", "--evaluate", "--format NAME", "--dry-run", "--json",
                   "-v, --verbose"):  # fmt: skip
        assert f"\n  {option}" in result.stdout
    for name in ("quantize", *export.FORMATS):
        assert name in result.stdout
    status = result.stdout.partition("exit status:\n")[2]
    assert [line.split()[0] for line in status.splitlines()[:4]] == ["0", "1", "2", "130"]
    assert max(map(len, result.stdout.splitlines())) <= 80
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
    config = " ".join(map(str.strip, report[2:4])).removeprefix("config: ")
    assert json.loads(config) == GPTQ
    assert report[4] == f"calibration: 6 rows of {LENGTH} tokens, in 2 batches of 3, of {tmp_path / 'text.txt'}"
    assert report[6].startswith("14 layers: int4 group 32 symmetric weights, float inputs, ")
    assert "  lm_head: skip_layers: 'lm_head'" in report
    assert report[-2:] == [f"written: {out}, for quantize.load", f"drawn: {plot}"]
    assert plot.read_bytes().startswith(b"\x89PNG")

    held = torch.tensor([row for row, _ in rows(lines[list(rows(lines))[5][1] + 1 :])])
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    told = rf"perplexity on {len(held)} held-out rows of {LENGTH} tokens: (\d+\.\d{{3}}) before, (\d+\.\d{{3}}) after"
    printed = [float(number) for number in re.fullmatch(told, report[-3]).groups()]
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


CHAT = "{% for message in messages %}<s> {{ message['content'] }} {% endfor %}"
# What stands beside the weights of models that are served, and what does not belong to them, or is no longer true.
BESIDE = {
    "preprocessor_config.json": '{"size": 3}',
    "code.py": "KEPT = 1\n",
    "LICENSE": "kept",
    "modules.json": json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]),
    "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
    "2_Dense/model.safetensors": "kept",
}
ELSEWHERE = (
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "onnx/model.onnx",
    ".cache/kept",
    "original/params.json",
    "2024_run/model.safetensors",
)


@pytest.fixture(scope="module")
def served(llama, tmp_path_factory):
    """A directory with all that servers read: tied embeddings, two chat templates, a generation config, code."""
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

    config = LlamaConfig.from_pretrained(llama, tie_word_embeddings=True, eos_token_id=5)
    path = saved(tmp_path_factory.mktemp("served"), "LlamaForCausalLM", config)
    told = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps({**told, "auto_map": {"AutoModel": "code.Model"}, "dtype": "bfloat16"})
    )
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.add_special_tokens({"eos_token": "w3", "additional_special_tokens": ["w7"]})
    tokenizer.chat_template = {"default": CHAT, "tool_use": "tools"}
    tokenizer.save_pretrained(path)
    GenerationConfig(temperature=0.25, top_k=7, do_sample=True, eos_token_id=[5, 9], bos_token_id=1).save_pretrained(
        path
    )
    for name, content in {**BESIDE, **dict.fromkeys(ELSEWHERE, "{}")}.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(content)
    (path / "code.py").chmod(0o600)
    return path


@pytest.mark.filterwarnings("ignore:You are using the default legacy behaviour")
@pytest.mark.parametrize("name", ["quantize", "compressed-tensors", "ascendv1"])
def test_a_directory_serves_alone(given, served, lines, tmp_path, name):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    out = tmp_path / "out"
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "batch_num": 1, "skip_layers": "lm_head"}))
    assert main([*given, "--model", str(served), "--out", str(out), "--format", name]) == 0
    # Nothing of the model is needed.
    theirs, ours = (AutoTokenizer.from_pretrained(path) for path in (served, out))
    assert ours(lines).input_ids == theirs(lines).input_ids
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.eos_token == "w3"
    assert ours.pad_token == theirs.pad_token
    assert ours.chat_template == theirs.chat_template == {"default": CHAT, "tool_use": "tools"}
    chat = [{"role": "user", "content": "w4 w5"}]
    assert ours.apply_chat_template(chat, tokenize=False) == "<s> w4 w5 "
    assert (
        GenerationConfig.from_pretrained(out).to_diff_dict() == GenerationConfig.from_pretrained(served).to_diff_dict()
    )
    assert GenerationConfig.from_pretrained(out).eos_token_id == [5, 9]
    config = AutoConfig.from_pretrained(out)
    assert (config.tie_word_embeddings, config.dtype, config.auto_map) == (
        True,
        torch.bfloat16,
        {"AutoModel": "code.Model"},
    )
    for file, content in BESIDE.items():
        assert (out / file).read_text() == content
    assert (out / "code.py").stat().st_mode == (out / "config.json").stat().st_mode
    assert not [file for file in ELSEWHERE if (out / file).exists()]
    if name == "compressed-tensors":
        model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(info.values()), info
        assert model.generation_config.top_k == 7
    else:
        # No program takes them for floating point.
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(out)
        model = AutoModelForCausalLM.from_config(config).eval()
    if name == "quantize":
        storage.load(model, out)
    if name == "ascendv1":
        loader = Loader(out)
        layer = "model.layers.0.mlp.down_proj"
        assert loader.layer(layer).kind == "W8A8_DYNAMIC"
        assert torch.equal(
            loader.held["model.embed_tokens.weight"], AutoModelForCausalLM.from_pretrained(served).lm_head.weight
        )
        return
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        # The first call decompresses the weights.
        model(torch.tensor([ours(lines[0]).input_ids]))
    for key, layer in AutoModelForCausalLM.from_pretrained(served).model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            w, u = layer.weight.double(), torch.finfo(torch.bfloat16).eps / 2
            # Half a step; the scale and its product with a code are rounded.
            bound = w.abs().amax(1, keepdim=True) / 127 * (0.5 + 128 * 2 * u)
            assert ((model.model.get_submodule(key).weight - w).abs() <= bound).all(), key


@pytest.mark.parametrize("name", ["quantize", "compressed-tensors"])
def test_a_directory_is_there_whole_or_not_at_all(given, tmp_path, name, monkeypatch, capsys):
    def full(source, target):
        assert target.parent.joinpath("model.safetensors").exists()
        raise OSError(f"no space left for {source.name}")

    (tmp_path / "config.json").write_text(json.dumps(MINMAX))
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(shutil, "copyfile", full)
    text = refused([*given[:4], "--out", str(tmp_path / "out"), "--format", name], capsys, late=True)
    assert text == f"error: no space left for {'generation_config' if name == 'quantize' else 'tokenizer'}.json\n"
    assert sorted(tmp_path.rglob("*")) == before


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
    monkeypatch.setitem(BAR, "delay", 0)
    assert list(progress([1, 2, 3], "calibrate", unit="batch")) == [1, 2, 3]
    assert ("calibrate" in stream.getvalue()) == terminal
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(progress([1, 2, 3], "solve", unit="batch")) == [1, 2, 3]
    assert "solve" not in stream.getvalue()


def test_a_bar_counts_the_units_of_its_items(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setitem(BAR, "delay", 0)
    assert list(progress(["ab", "c"], "solve", unit="layer", size=len)) == ["ab", "c"]
    assert "solve:   0%" in sys.stderr.getvalue()
    assert " 0/3 " in sys.stderr.getvalue()
    # Nothing is shown of what is soon over.
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setitem(BAR, "delay", 60)
    assert list(progress(["ab", "c"], "solve", unit="layer", size=len)) == ["ab", "c"]
    assert sys.stderr.getvalue() == ""


def test_every_stage_has_a_bar(given, tmp_path, monkeypatch, capsys):
    from transformers.utils import logging

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setitem(BAR, "delay", 0)
    try:
        assert main([*given, "--evaluate", "--out", str(tmp_path / "a")]) == 0
        first = stream.getvalue()
        stream.truncate(0)
        (tmp_path / "config.json").write_text(json.dumps({**GPTQ, "algorithm": {"gptq": {"sequential": False}}}))
        assert main([*given, "--budget", "0.2", "--out", str(tmp_path / "b")]) == 0
    finally:
        logging.disable_progress_bar()
        logging.set_tqdm_hook(None)
    capsys.readouterr()

    def stages(text):
        return list(dict.fromkeys(re.findall(r"\r([a-z ,]+): +\d+%", text)))

    assert stages(first) == ["tokenize", "read the model", "measure, float", "check the weights", "calibrate",
                             "solve in lock step", "convert", "write", "measure, quantized"]  # fmt: skip
    assert stages(stream.getvalue()) == ["tokenize", "read the model", "check the weights", "calibrate for the formats",
                                         "choose formats", "calibrate", "solve", "convert", "write"]  # fmt: skip


def refused(arguments, capsys, *, late=False):
    """The one line that a refusal prints, on stderr alone; if it comes late, after what was read."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out.splitlines()[:1] == [f"model: {arguments[1]}"] * late
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
        (["--out", "full"], "full: it has content; accepted: a new or an empty directory"),
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
    told = "error: --format compressed-tensors: the inputs are smoothed at run time"
    assert told in refused(arguments, capsys)
    assert told in refused([*given, "--dry-run", "--format", "compressed-tensors"], capsys)
    # Folded, there is nothing left that it could not hold: the next thing is to read the model.
    (tmp_path / "config.json").write_text(json.dumps({**SMOOTHQUANT, "algorithm": {"smoothquant": {"fold": True}}}))
    with pytest.raises(pytest.fail.Exception, match="AutoTokenizer was read"):
        main(arguments)


INT8, STATIC, TOKEN = (
    {"type": "int8", "symmetric": True, "strategy": strategy} for strategy in ("channel", "tensor", "token")
)


def formats(**patterns):
    return {**MINMAX, "quant_cfg": {"weights": INT8, **{f"*{key}": value for key, value in patterns.items()}}}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("told", ["dtype", "torch_dtype", None])
@pytest.mark.parametrize("name", ["ascendv1", "ascendv1-mix"])
def test_a_format_is_tried_in_the_dtype_of_the_model(given, tmp_path, llama, name, told, capsys):
    model = shutil.copytree(llama, tmp_path / "model")
    described = json.loads((model / "config.json").read_text())
    assert described.pop("dtype") == "float32"
    (model / "config.json").write_text(json.dumps(described if told is None else {**described, told: "float32"}))
    (tmp_path / "config.json").write_text(json.dumps({**MINMAX, "quant_cfg": {"weights": INT8, "inputs": STATIC}}))
    arguments = [*given, "--model", str(model), "--out", str(tmp_path / "out"), "--format", name]
    text = f"error: --format {name}: static inputs of a model in torch.float32, which loaders cast; accepted: the model"
    assert refused(arguments, capsys).startswith(text)
    # Loaded in 16 bits, the model is next to be read.
    for dtype in ("bfloat16", "float16"):
        (model / "config.json").write_text(json.dumps({**described, told or "dtype": dtype}))
        with pytest.raises(pytest.fail.Exception, match="AutoTokenizer was read"):
            main(arguments)


LAYERS = {
    "pattern": ("ascendv1", formats(**{"down_proj.weights": INT4}), "layer 'model.layers.0.mlp.down_proj': int4 weigh"),
    "static": (
        "ascendv1",
        formats(**{"mlp*.inputs": STATIC}),
        "layer 'model.layers.0.mlp.gate_proj': static inputs of",
    ),
    "skipped": ("ascendv1", {**formats(), "skip_layers": ["k_proj"]}, "layers 'model.layers.0.self_attn.q_proj', "),
    "named": (
        "compressed-tensors",
        {**formats(), "skip_layers": "1.mlp.up_proj"},
        "layers 'model.layers.1.mlp.gate_proj', ",
    ),
    "apart": ("compressed-tensors", formats(**{"k_proj.inputs": TOKEN}), "layers 'model.layers.0.self_attn.q_proj', "),
}


@pytest.mark.parametrize(("name", "config", "text"), LAYERS.values(), ids=LAYERS.keys())
def test_formats_of_layers_are_tried_before_anything_is_calibrated(
    given, tmp_path, name, config, text, monkeypatch, capsys
):
    monkeypatch.setattr(commandline, "demonstrate", lambda *_, **__: pytest.fail("it goes on"))
    arguments = [*given, "--out", str(tmp_path / "out"), "--format", name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert refused(arguments, capsys).startswith(f"error: --format {name}: {text}")
    assert not (tmp_path / "out").exists()
    # All of them alike are no reason.
    (tmp_path / "config.json").write_text(json.dumps(formats(**{"mlp*.inputs": TOKEN}) | {"skip_layers": ["_head"]}))
    with pytest.raises(pytest.fail.Exception, match="it goes on"):
        main(arguments)


def test_layers_are_tried_in_dtypes_of_their_own():
    model = torch.nn.ModuleDict({name: torch.nn.Linear(64, 64).bfloat16() for name in ("q_proj", "router", "o_proj")})
    config = {"algorithm": "minmax", "quant_cfg": {"weights": INT8, "inputs": STATIC}}
    model["router"].float()

    def check(name, config):
        output.check_layers(plan(model, parse(config)), name, config)

    with pytest.raises(QuantizeError, match=r"^--format ascendv1: layer 'router': static inputs of .* torch.float32,"):
        check("ascendv1", config)
    check("ascendv1", {**config, "skip_layers": "router"})
    # Nothing was done to the model, and one more name of a layer is the same layer.
    model["v_proj"] = model["q_proj"]
    check("compressed-tensors", config)
    assert all(type(layer) is torch.nn.Linear for layer in model.values())


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
    assert capsys.readouterr().err == "interrupted\n"
    assert main([*given, "--json"]) == 130
    out, err = capsys.readouterr()
    assert (json.loads(out), err) == ({"exit_status": 130, "error": "interrupted"}, "interrupted\n")


def test_what_cannot_be_written_is_one_line_too(given, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError("no space left\n  on this device")

    monkeypatch.setattr(commandline, "demonstrate", full)
    assert refused(given, capsys, late=True) == "error: no space left on this device\n"
    assert main([*given, "--json"]) == 2
    assert json.loads(capsys.readouterr().out) == {"exit_status": 2, "error": "no space left on this device"}


def test_formats_are_chosen_under_a_budget(given, tmp_path, llama, capsys):
    from transformers import AutoModelForCausalLM

    assert main([*given, "--budget", "0.2", "--out", str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["config"]
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    storage.load(model, tmp_path / "out")
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len({layer.record().weights for layer in layers}) > 1
    weights = [layer.solution.weight for layer in layers]
    bits = sum(q.codes.numel() * q.scheme.bits + 32 * q.scale.numel() for q in weights)
    assert bits <= 0.2 * sum(32 * q.codes.numel() for q in weights)
    # The config that is told is the one that was used.
    again = AutoModelForCausalLM.from_pretrained(llama).eval()
    with pytest.warns(QuantizeWarning, match="embed_tokens"):
        quantize(again, {**told, "algorithm": "minmax"})
    assert [row.weights for row in report(again).rows] == [layer.record().weights for layer in layers]


def told(arguments, capsys):
    """What a run tells as JSON, which knows no infinity."""
    assert main([*arguments, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out, parse_constant=pytest.fail)


WIDE = {**MINMAX, "quant_cfg": {"weights": INT8}}
PLANS = {
    "groups": GPTQ,
    "ragged, asymmetric": {**MINMAX, "quant_cfg": {"weights": {**INT4, "symmetric": False, "group_size": 64}}},
    "static": {**WIDE, "batch_num": 1, "quant_cfg": {"weights": INT8, "inputs": {**STATIC, "symmetric": False}}},
    "smoothed": {**SMOOTHQUANT, "batch_num": 1, "skip_layers": ["down", "nothing"]},
    "patterns": {**GPTQ, "quant_cfg": {"weights": INT8, "*mlp*.weights": INT4}, "algorithm": "awq"},
}


@pytest.mark.parametrize("config", PLANS.values(), ids=PLANS.keys())
def test_a_plan_is_what_a_run_does(given, tmp_path, config, capsys, monkeypatch):
    import safetensors.torch

    (tmp_path / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    ran = told([*given, "--out", str(out)], capsys)
    forbid(monkeypatch, "AutoModelForCausalLM")
    planned = told([*given, "--out", str(tmp_path / "another"), "--dry-run"], capsys)
    assert not (tmp_path / "another").exists()
    assert planned["bytes"] == ran["bytes"]
    assert planned["at_most"] is None
    for key in ("model", "config", "calibration"):
        assert planned[key] == ran[key]
    for key in ("skipped", "unmatched", "elements"):
        assert planned["report"][key] == ran["report"][key]
    for key in ("names", "shape", "weights", "inputs", "algorithm"):
        assert [row[key] for row in planned["report"]["layers"]] == [row[key] for row in ran["report"]["layers"]]
    # The bytes are those of the tensors in the file, apart from what is known of each layer.
    tensors = safetensors.torch.load_file(out / "model.safetensors")
    about = re.compile(r"\.(note\..*|error|baseline_error|_extra_state)$")
    assert sum(t.nbytes for key, t in tensors.items() if not about.search(key)) == ran["bytes"]["whole_model"]["after"]
    # Of the weights of Linear layers in float32.
    shapes = [row["shape"] for row in ran["report"]["layers"]]
    assert ran["bytes"]["quantized_layers"]["before"] == sum(4 * n * c for n, c in shapes)


@pytest.fixture
def outline(llama, tmp_path):
    """The directory of the language model without its weights."""
    path = tmp_path / "outline"
    shutil.copytree(llama, path, ignore=shutil.ignore_patterns("*.safetensors"))
    return path


def test_a_plan_needs_no_weights_and_no_text(given, outline, capsys):
    arguments = ["--model", str(outline), *given[2:4], *given[6:]]
    assert main([*arguments, "--dry-run", "--evaluate"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1] == "  LlamaForCausalLM, 73,536 parameters in float32"
    assert f"calibration: 6 rows of {LENGTH} tokens, in 2 batches of 3, of a text that is not given" in out
    assert "evaluation: all rows after the calibration, at least one" in out
    assert "14 layers: int4 group 32 symmetric weights, float inputs, gptq" in out
    assert "  lm_head: skip_layers: 'lm_head'" in out
    # The same is refused as in a run.
    assert "rows of 16 tokens to calibrate with" in refused(
        [*arguments, "--text", str(given[5]), "--batch-size", "99", "--dry-run"], capsys
    )
    assert "accepted: what AutoModelForCausalLM" in refused(["--model", str(outline), *given[2:]], capsys)


def test_a_plan_says_whether_the_format_holds_it(given, outline, tmp_path, capsys):
    arguments = ["--model", str(outline), *given[2:], "--dry-run", "--format"]
    assert main([*arguments, "compressed-tensors"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "format: compressed-tensors can hold these layers"
    _, config, text = LAYERS["skipped"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert refused([*arguments, "ascendv1"], capsys).startswith(f"error: --format ascendv1: {text}")


def test_a_plan_estimates_the_memory_of_calibration(given, outline, tmp_path, capsys):
    arguments = ["--model", str(outline), *given[2:], "--dry-run"]
    # float32; counts of tokens stand beside every Gram matrix, and the deviation from the float model beside one.
    batches = 2 * 3 * LENGTH * (2 * 64 + 96) * 4
    in_lock_step = told(arguments, capsys)["memory"]["bytes"]
    assert batches * 2 + 4 * 96**2 < in_lock_step <= batches * 2 + 2 * 4 * 96**2 + 64
    (tmp_path / "config.json").write_text(json.dumps({**GPTQ, "algorithm": {"gptq": {"sequential": False}}}))
    # By block: q, k, v; o; gate, up; down.
    grams = 2 * 4 * (3 * 64**2 + 96**2)
    in_one_pass = told(arguments, capsys)["memory"]["bytes"]
    assert grams <= in_one_pass <= grams + 2 * 4 * 64
    (tmp_path / "config.json").write_text(json.dumps(MINMAX))
    assert told(arguments, capsys)["memory"]["bytes"] == 0
    assert main(arguments) == 0
    assert "memory of calibration: none\n" in capsys.readouterr().out


def test_a_plan_under_a_budget_says_what_it_may_be_at_most(given, capsys):
    planned = told([*given, "--budget", "0.2", "--dry-run"], capsys)
    assert "quant_cfg" not in planned["config"]
    assert {row["weights"] for row in planned["report"]["layers"]} == {None}
    before, most = planned["bytes"]["quantized_layers"].values()
    ran = told([*given, "--budget", "0.2"], capsys)["bytes"]["quantized_layers"]
    assert ran["before"] == before
    # A byte for each layer is lost by rounding down.
    assert ran["after"] <= most + len(planned["report"]["layers"])
    assert 0.2 * before - len(planned["report"]["layers"]) <= most <= 0.2 * before


def test_json_is_alone_on_stdout_and_strict(given, tmp_path, monkeypatch, capsys):
    def loud(*arguments, **options):
        print("noise")
        return demonstrate(*arguments, **options)

    monkeypatch.setattr(commandline, "demonstrate", loud)
    out = tmp_path / "out"
    found = told([*given, "--evaluate", "--out", str(out)], capsys)
    assert found["exit_status"] == 0
    assert found["config"] == GPTQ
    assert found["out"] == str(out)
    assert len(found["report"]["layers"]) == 14
    assert 0 < found["comparison"]["perplexity_before"] != found["comparison"]["perplexity_after"]
    assert told(given, capsys)["comparison"] is None
    commandline._print_json({"least": -math.inf, "none": [math.nan, 1.5]})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"least": None, "none": [None, 1.5]}
    # What is refused is told as well, even if that is the command line.
    assert main(["--json", "--length", "x"]) == 2
    captured = capsys.readouterr()
    assert f"error: {json.loads(captured.out)['error']}\n" == captured.err


@pytest.mark.parametrize("name", ["quantize", "compressed-tensors"])
def test_a_full_disk_is_one_line(given, tmp_path, name, monkeypatch, capsys):
    import safetensors.torch

    def full(*_, **__):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    (tmp_path / "config.json").write_text(json.dumps(MINMAX))
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    text = refused([*given[:4], "--out", str(tmp_path / "out"), "--format", name], capsys, late=True)
    assert text == "error: I/O error: No space left on device (os error 28)\n"
    assert sorted(tmp_path.rglob("*")) == before


def test_nobody_reads_the_report(given):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "quantize", *given, "--dry-run"]
    with os.fdopen(writer, "wb") as pipe:
        result = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    # One line, and nothing from the interpreter as it ends.
    assert (result.returncode, result.stderr) == (2, "error: [Errno 32] Broken pipe\n")


def test_all_layers_are_shown_on_demand(given, outline, capsys):
    # Of a model with more blocks than are shown otherwise.
    described = json.loads((outline / "config.json").read_text())
    (outline / "config.json").write_text(json.dumps({**described, "num_hidden_layers": 20, "layer_types": None}))
    arguments = ["--model", str(outline), *given[2:], "--dry-run"]
    names = [row["names"][0] for row in told(arguments, capsys)["report"]["layers"]]
    assert len(names) == 20 * 7
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 40
    assert all(len(line) <= 100 for line in out.splitlines() if str(outline.parent) not in line)
    assert not any(name in out for name in names)
    assert main([*arguments, "--verbose"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in names)


def test_a_long_config_is_shown_in_part(given, tmp_path, capsys):
    patterns = {f"*layers.{i}.mlp.up_proj.weights": INT8 for i in range(200)}
    (tmp_path / "config.json").write_text(json.dumps({**GPTQ, "quant_cfg": {**GPTQ["quant_cfg"], **patterns}}))
    assert main([*given, "--dry-run"]) == 0
    lines = capsys.readouterr().out.split("calibration: ")[0].splitlines()
    assert len(lines) == 2 + 4
    assert lines[-1].endswith(" ... (--verbose prints all)")
    assert all(len(line) <= 100 for line in lines[2:])
    assert main([*given, "--dry-run", "-v"]) == 0
    shown = capsys.readouterr().out.split("config: ")[1].split("calibration: ")[0]
    assert list(json.loads(shown)["quant_cfg"]) == ["weights", *patterns]
