"""``python -m quantize``: quantize a model of transformers, show what changed, and write the result."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from quantize.shell import api
from quantize.shell.cli import demo
from quantize.shell.cli.language import Language
from quantize.shell.config import QuantizeError, QuantizeWarning, parse, refusal
from quantize.shell.disk import converted as storage
from quantize.shell.disk import export, files
from quantize.shell.report import picture

_OWN = "quantize"
FORMATS = (_OWN, *export.FORMATS)

_EPILOG = """\
examples:
  the demonstration, on a packaged sentence encoder:
    python -m quantize
  a language model, int4 by GPTQ, measured, and written for transformers and vLLM:
    python -m quantize --model DIR --config int4.json --text prose.txt --evaluate \\
        --out NEW --format compressed-tensors --plot layers.png

  where int4.json may hold:
    {"batch_num": 32, "algorithm": "gptq", "skip_layers": ["lm_head"], "quant_cfg": {"weights":
        {"type": "int4", "symmetric": true, "strategy": "group", "group_size": 64}}}

exit status:
  0    done
  2    refused, or a file that cannot be read or written: one line on stderr says what and why
  130  interrupted
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise QuantizeError(f"{message}; see --help")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, as ``--help`` lists them. The report goes to stdout."""
    try:
        _run(_parser().parse_args(arguments))
    except (QuantizeError, OSError) as error:
        # Those of other libraries have many lines.
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m quantize",
        description="Quantize a model of transformers on the CPU, and print what was done to every layer.\n"
        "Without --model: a demonstration with all-MiniLM-L6-v2 from the demo extra.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("what is quantized, and how")
    group.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="a Hugging Face model directory with a tokenizer: a causal language model, else a sentence encoder",
    )
    group.add_argument(
        "--config",
        type=Path,
        metavar="FILE.json",
        help="the config of the README as JSON, where a list or a string stands for a set "
        "(default: minmax, int8 channel weights, int8 token inputs, 4 batches)",
    )
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="UTF-8 text; a language model needs one, unless nothing is calibrated or measured, and takes lines from "
        "the first on, joined into rows; for an encoder every line is a sentence (default: 32 of its own)",
    )
    group.add_argument(
        "--batch-size", type=_integer(1), default=4, metavar="N", help="rows or sentences in a batch (default: 4)"
    )
    group.add_argument(
        "--length",
        type=_integer(2),
        metavar="N",
        help="tokens in a row (default: 512, or what the model can take), or at most in a sentence (default: 256)",
    )
    group = parser.add_argument_group("results")
    group.add_argument(
        "--evaluate",
        action="store_true",
        help="measure before and after: the perplexity on the lines after those that calibrate, or the cosine of "
        "sentence embeddings on every second line, while the others calibrate (default: in the demonstration only)",
    )
    group.add_argument(
        "--out", type=Path, metavar="DIR", help="write the quantized model and its tokenizer here: new, or empty"
    )
    group.add_argument(
        "--format", choices=FORMATS, help="of the files in --out; quantize: for quantize.load (default: quantize)"
    )
    group.add_argument(
        "--plot", type=Path, metavar="FILE", help=f"draw the layers into this file: {', '.join(picture.SUFFIXES)}"
    )
    return parser


def _integer(least: int) -> Any:
    def integer(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}; accepted: an int, at least {least}")
        return int(text)

    return integer


def _run(given: argparse.Namespace) -> None:
    # All that can be refused at once is refused here, before a model is read or hours are spent.
    config = demo.CONFIG if given.config is None else _json("--config", given.config)
    data_free = parse(config).algorithm.data_free
    if given.plot is not None:
        picture.check(given.plot)
    if given.out is not None:
        _check_out(given.out, given.format or _OWN, config)
    elif given.format is not None:
        raise refusal("--format", f"{given.format!r} without --out", "--out DIR, or no format")
    text = demo.SENTENCES if given.text is None else _lines(given.text)
    directory = demo.packaged_model() if given.model is None else given.model
    if not (directory / "config.json").is_file():
        raise refusal("--model", str(directory), "a directory with config.json, weights and a tokenizer")
    subject = _subject(directory, given.length)
    evaluate = given.evaluate or given.model is None
    if isinstance(subject, Language) and given.text is None and (evaluate or not data_free):
        raise refusal("--text", "not given", "a file, to calibrate or measure a language model")

    def write() -> None:
        if given.out is not None:
            _write(subject.model, given.out, given.format or _OWN)
            subject.tokenizer.save_pretrained(given.out)

    outcome = demo.demonstrate(subject, config, text, batch=given.batch_size, evaluate=evaluate, converted=write)
    print(f"model: {directory.resolve()}")
    print(f"config: {config}")
    print(demo.text(outcome), flush=True)
    if given.plot is not None:
        outcome.report.plot(given.plot)


def _subject(directory: Path, length: int | None) -> demo.Subject:
    told = _json("--model", directory / "config.json")
    if not isinstance(told, dict):
        raise refusal("--model", str(directory / "config.json"), "a config of transformers")
    if "quantization_config" in told:
        raise refusal("--model", f"{directory}, which is quantized already", "a model in floating point")
    most = told.get("max_position_embeddings")
    if length is not None and isinstance(most, int) and length > most:
        raise refusal("--length", str(length), f"at most {most}, the positions of the model")
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
        from transformers.utils import logging
    except ImportError:
        return demo.Encoder(directory, length=length)
    # Bars of its own, over the tensors of a file, which it shows in a pipe as well.
    logging.disable_progress_bar()  # type: ignore[no-untyped-call] # transformers leaves it bare
    if not set(told.get("architectures") or ()) & set(CAUSAL.values()):
        return demo.Encoder(directory, length=length)
    return Language(directory, length=length or min(Language.length, most or Language.length))


def _check_out(directory: Path, format: str, config: Any) -> None:  # noqa: A002 - as in export
    """Refuse a directory that cannot be written, and a config that the format cannot hold: one layer goes ahead."""
    files.check_new(directory)
    parent = directory.resolve().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise refusal("--out", str(directory), "a new or an empty directory, in one that exists and can be written to")
    size = parse(config).spec.weight.group_size or 32
    model = nn.Sequential(nn.LayerNorm(2 * size), nn.Linear(2 * size, 8))
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantizeWarning)
        api.quantize(model, {**config, "batch_num": 1, "skip_layers": None})
        model(torch.randn(32, 2 * size, generator=torch.Generator().manual_seed(0)))
        api.convert(model)
        try:
            _write(model, Path(scratch) / "model", format)
        except QuantizeError as error:
            told = str(error).removeprefix("layer '1': ")
            raise QuantizeError(f"--format {format}: {told}") from None


def _write(model: nn.Module, directory: Path, format: str) -> None:  # noqa: A002 - as in export
    if format == _OWN:
        storage.save(model, directory)
    else:
        export.export(model, directory, format=format)


def _json(option: str, file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise refusal(option, str(file), f"a JSON file ({error})") from None


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise refusal("--text", str(file), f"a UTF-8 text file ({error})") from None
