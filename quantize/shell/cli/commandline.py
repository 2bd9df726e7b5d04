"""``python -m quantize``: quantize a model of transformers, show what changed, and write the result."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from quantize.shell import api
from quantize.shell.budget import FORMATS, assign_formats
from quantize.shell.calibrate.layer import QUANTIZED
from quantize.shell.cli.subjects import Language, Subject, subject_in
from quantize.shell.config import QuantizeError, QuantizeWarning, parse, refusal
from quantize.shell.disk import export, files, storage
from quantize.shell.disk.parts import Parts
from quantize.shell.progress import progress
from quantize.shell.report import picture
from quantize.shell.report.report import Report

SENTENCES = Path(__file__).with_name("sentences.txt")
_INT8 = {"type": "int8", "symmetric": True}
_FORMATS = {"weights": {**_INT8, "strategy": "channel"}, "inputs": {**_INT8, "strategy": "token"}}
CONFIG: dict[str, Any] = {"batch_num": 4, "quant_cfg": _FORMATS, "algorithm": "minmax"}
_EPILOG = """\
examples:
  python -m quantize
  python -m quantize --model DIR --config int4.json --text prose.txt --evaluate \\
      --out NEW --format compressed-tensors --plot layers.png

  where int4.json, for a language model by GPTQ, may hold:
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
    what = parser.add_argument_group("what is quantized, and how").add_argument
    what("--model", type=Path, metavar="DIR", help="a Hugging Face model directory with a tokenizer: a causal language "
         "model, else a sentence encoder")  # fmt: skip
    what("--config", type=Path, metavar="FILE.json", help="the config of the README as JSON, where a list or a string "
         "stands for a set (default: minmax, int8 channel weights, int8 token inputs, 4 batches)")  # fmt: skip
    what("--budget", type=_share, metavar="SHARE", help="choose the format of every layer so that the weights fit into "
         "this share of their bytes with the smallest errors; in place of quant_cfg (default: gptq)")  # fmt: skip
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


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: a number between 0 and 1")
    return share


def _integer(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}; accepted: an int, at least {least}")
        return int(text)

    return integer


def _run(given: argparse.Namespace) -> None:
    # All that can be refused at once is refused here, before a model is read or hours are spent.
    config = CONFIG if given.config is None else _read("--config", given.config, json.loads, "a JSON file")
    if given.budget is not None:
        config = _budgeted(config if given.config is not None else {"batch_num": 4, "algorithm": "gptq"})
    data_free = parse(config).data_free and given.budget is None
    if given.plot is not None:
        picture.check(given.plot)
    if given.out is not None:
        _check_out(given.out, given.format, config)
    elif given.format is not None:
        raise refusal("--format", f"{given.format!r} without --out", "--out DIR, or no format")
    lines = _read("--text", given.text or SENTENCES, str.splitlines, "a UTF-8 text file")
    subject = subject_in(given.model, length=given.length)
    evaluate = given.evaluate or given.model is None
    if isinstance(subject, Language) and given.text is None and (evaluate or not data_free):
        raise refusal("--text", "not given", "a file, to calibrate or measure a language model")

    def write(model: nn.Module) -> None:
        if given.format in export.FORMATS:
            export.export(model, given.out, format=given.format)
        else:
            storage.save(model, given.out)
        subject.tokenizer.save_pretrained(given.out)

    text = [line.strip() for line in lines if line.strip()]
    if given.budget is not None:
        rows, _ = subject.split(text, config.get("batch_num", 1), given.batch_size, evaluate=evaluate)
        skipped = config.get("skip_layers")
        chosen = assign_formats(subject.model, lambda _: subject.losses(rows), given.budget, skip_layers=skipped)
        config = {**config, "quant_cfg": chosen}
    outcome = demonstrate(subject, config, text, batch=given.batch_size, evaluate=evaluate, write=given.out and write)
    print(f"model: {subject.directory.resolve()}\nconfig: {config}\n{outcome}", flush=True)
    if given.plot is not None:
        outcome.report.plot(given.plot)


def _read(option: str, file: Path, reader: Callable[[str], Any], accepted: str) -> Any:
    try:
        return reader(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise refusal(option, str(file), f"{accepted} ({error})") from None


def _budgeted(config: Any) -> Any:
    """``config`` for weights alone, with one of the formats that a budget chooses from; they replace its own."""
    given = config.get("quant_cfg") if isinstance(config, Mapping) else None
    if isinstance(given, Mapping) and (found := [key for key in given if key != "weights"]):
        raise refusal("--budget", f"with quant_cfg.{found[0]!r} in the config", "a config for weights alone")
    return {**config, "quant_cfg": {"weights": FORMATS[0]}} if isinstance(config, Mapping) else config


def _check_out(directory: Path, format: str | None, config: Any) -> None:  # noqa: A002 - as in export
    """Refuse a directory that cannot be written, and a config that the format cannot hold: one layer goes ahead."""
    files.check_new(directory)
    parsed = parse(config)
    spec = parsed.spec(("",))
    # Which layers have the formats of patterns is known once the model is.
    if format not in export.FORMATS or spec is None or any(each.pattern for each in parsed.formats):
        return
    size = 2 * (spec.weight.group_size or 32)
    # A model in float32 may be refused where one of this dtype is not.
    model = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 8)).bfloat16()
    with torch.no_grad(), warnings.catch_warnings(action="ignore", category=QuantizeWarning):
        api.quantize(model, {**config, "batch_num": 1, "skip_layers": None})
        model(torch.randn(32, size, generator=torch.Generator().manual_seed(0)).bfloat16())
        api.convert(model)
    try:
        export.FORMATS[format].texts(Parts(model))
    except QuantizeError as error:
        raise QuantizeError(f"--format {format}: " + str(error).removeprefix("layer '1': ")) from None


@dataclass(frozen=True)
class Outcome:
    """A report, ``sizes`` in bytes before and after, and what the held-out text gave. Prints as lines.

    ``measured``: what the subject gave before and after, ``[t, ...]`` each, or nothing; ``comparison``: that in a line.
    """

    report: Report
    sizes: Mapping[str, tuple[int, int]]
    measured: Sequence[Tensor]
    comparison: str

    def __str__(self) -> str:
        sizes = [f"{what}: {before:,} bytes before, {after:,} after ({after / before:.3f} x)"
                 for what, (before, after) in self.sizes.items()]  # fmt: skip
        return "\n".join([str(self.report), "", *sizes, self.comparison]).rstrip()


def demonstrate(
    subject: Subject, config: object, text: Sequence[str], *, batch: int = 4, evaluate: bool = True, write: Any = None
) -> Outcome:
    """Quantize ``subject.model`` in place, calibrated on a part of the lines ``text``; measure it on the rest.

    ``batch``: lines or rows in a forward pass. ``evaluate``: whether to measure. ``write`` is called with the converted
    model before it is measured.
    """
    parsed = parse(config)
    batches = 0 if parsed.data_free else parsed.batch_num
    calibration, held = subject.split(text, batches, batch, evaluate=evaluate)
    model = subject.model
    measured = _measured(subject, held, "float")
    # The report, printed in full, says the same.
    with warnings.catch_warnings(action="ignore", category=QuantizeWarning):
        api.quantize(model, config)
        before = _sizes(model)
        for each in progress(calibration, "calibrate", unit="batch", total=batches):
            subject(each)
    api.convert(model)
    if write is not None:
        write(model)
    measured += _measured(subject, held, "quantized")
    sizes = {what: (before[what], after) for what, after in _sizes(model).items()}
    return Outcome(api.report(model), sizes, measured, subject.compared(*measured) if measured else "")


def _measured(subject: Subject, held: Sequence[Any], what: str) -> list[Tensor]:
    found = [subject(each) for each in progress(held, f"measure, {what}", unit="batch")]
    return [torch.cat(found)] if found else []


def _sizes(model: nn.Module) -> dict[str, int]:
    layers = nn.ModuleList(each for each in model.modules() if isinstance(each, QUANTIZED))
    return {what: sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
            for what, module in (("quantized layers", layers), ("whole model", model))}  # fmt: skip
