"""``python -m quantize``: quantize a model of transformers, show what changed, and write the result."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from quantize.shell import api
from quantize.shell.cli import subjects
from quantize.shell.cli.demonstration import CONFIG, demonstrate
from quantize.shell.config import QuantizeError, QuantizeWarning, parse, refusal
from quantize.shell.disk import export, files, storage
from quantize.shell.disk.parts import Parts
from quantize.shell.report import picture

SENTENCES = Path(__file__).with_name("sentences.txt")
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
    what = partial(parser.add_argument_group("what is quantized, and how").add_argument, type=Path)
    what("--model", metavar="DIR", help="a Hugging Face model directory with a tokenizer: a causal language model, "
         "else a sentence encoder")  # fmt: skip
    what("--config", metavar="FILE.json", help="the config of the README as JSON, where a list or a string stands for "
         "a set (default: minmax, int8 channel weights, int8 token inputs, 4 batches)")  # fmt: skip
    calibration = parser.add_argument_group("calibration").add_argument
    calibration("--text", type=Path, metavar="FILE", help="UTF-8 text; a language model needs one, unless nothing is "
                "calibrated or measured, and takes lines from the first on, joined into rows; for an encoder every "
                "line is a sentence (default: 32 of its own)")  # fmt: skip
    calibration("--batch-size", type=_integer(1), default=4, metavar="N",
                help="rows or sentences in a batch (default: 4)")  # fmt: skip
    calibration("--length", type=_integer(2), metavar="N", help="tokens in a row (default: 512, or what the model can "
                "take), or at most in a sentence (default: 256)")  # fmt: skip
    results = parser.add_argument_group("results").add_argument
    results("--evaluate", action="store_true", help="measure before and after: the perplexity on the lines after those "
            "that calibrate, or the cosine of sentence embeddings on every second line, while the others calibrate "
            "(default: in the demonstration only)")  # fmt: skip
    results("--out", type=Path, metavar="DIR", help="write the quantized model and its tokenizer here: new, or empty")
    results("--format", choices=("quantize", *export.FORMATS),
            help="of the files in --out; quantize: for quantize.load (default: quantize)")  # fmt: skip
    results("--plot", type=Path, metavar="FILE", help=f"draw the layers into this file: {', '.join(picture.SUFFIXES)}")
    return parser


def _integer(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}; accepted: an int, at least {least}")
        return int(text)

    return integer


def _run(given: argparse.Namespace) -> None:
    # All that can be refused at once is refused here, before a model is read or hours are spent.
    config = CONFIG if given.config is None else _read("--config", given.config, json.loads, "a JSON file")
    data_free = parse(config).algorithm.data_free
    if given.plot is not None:
        picture.check(given.plot)
    if given.out is not None:
        _check_out(given.out, given.format, config)
    elif given.format is not None:
        raise refusal("--format", f"{given.format!r} without --out", "--out DIR, or no format")
    lines = _read("--text", given.text or SENTENCES, str.splitlines, "a UTF-8 text file")
    text = [line.strip() for line in lines if line.strip()]
    directory = subjects.packaged() if given.model is None else given.model
    if not (directory / "config.json").is_file():
        raise refusal("--model", str(directory), "a directory with config.json, weights and a tokenizer")
    told = _read("--model", directory / "config.json", json.loads, "a JSON file")
    subject = subjects.read(directory, told, length=given.length)
    evaluate = given.evaluate or given.model is None
    if isinstance(subject, subjects.Language) and given.text is None and (evaluate or not data_free):
        raise refusal("--text", "not given", "a file, to calibrate or measure a language model")

    def write(model: nn.Module) -> None:
        if given.out is None:
            return
        if given.format in export.FORMATS:
            export.export(model, given.out, format=given.format)
        else:
            storage.save(model, given.out)
        subject.tokenizer.save_pretrained(given.out)

    outcome = demonstrate(subject, config, text, batch=given.batch_size, evaluate=evaluate, converted=write)
    print(f"model: {directory.resolve()}\nconfig: {config}\n{outcome}", flush=True)
    if given.plot is not None:
        outcome.report.plot(given.plot)


def _check_out(directory: Path, format: str | None, config: Any) -> None:  # noqa: A002 - as in export
    """Refuse a directory that cannot be written, and a config that the format cannot hold: one layer goes ahead."""
    files.check_new(directory)
    parent = directory.resolve().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise refusal("--out", str(directory), "a new or an empty directory, in one that exists and can be written to")
    if format not in export.FORMATS:
        return
    size = parse(config).spec.weight.group_size or 32
    model = nn.Sequential(nn.LayerNorm(2 * size), nn.Linear(2 * size, 8))
    with torch.no_grad(), warnings.catch_warnings(action="ignore", category=QuantizeWarning):
        api.quantize(model, {**config, "batch_num": 1, "skip_layers": None})
        model(torch.randn(32, 2 * size, generator=torch.Generator().manual_seed(0)))
        api.convert(model)
    try:
        export.FORMATS[format].texts(Parts(model))
    except QuantizeError as error:
        told = str(error).removeprefix("layer '1': ")
        raise QuantizeError(f"--format {format}: {told}") from None


def _read(option: str, file: Path, reader: Callable[[str], Any], accepted: str) -> Any:
    try:
        return reader(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise refusal(option, str(file), f"{accepted} ({error})") from None
