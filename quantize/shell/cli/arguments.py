"""The options of the command line, with their help texts."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from quantize.shell.config import QuantizeError
from quantize.shell.disk import export
from quantize.shell.report import picture

_EPILOG = """\
examples:
  python -m quantize
  python -m quantize --model DIR --config int4.json --dry-run
  python -m quantize --model DIR --config int4.json --text prose.txt \\
      --evaluate --out NEW --format compressed-tensors

  where int4.json, for a language model by GPTQ, may hold:
    {"batch_num": 32, "algorithm": "gptq", "skip_layers": ["lm_head"],
     "quant_cfg": {"weights": {"type": "int4", "symmetric": true,
                               "strategy": "group", "group_size": 64}}}

output:
  The report goes to stdout. Errors, warnings and progress bars go to stderr;
  bars are only shown on a terminal.

exit status:
  0    done
  1    an unexpected error, such as too little memory: a traceback on stderr
  2    refused, or a file cannot be read or written: one line on stderr
  130  interrupted
  In all cases --out is written completely, or left as it was.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise QuantizeError(f"{message}; see --help")


def parser() -> argparse.ArgumentParser:
    """The parser of the command line. It raises QuantizeError for what it does not accept."""
    made = _Parser(
        prog="python -m quantize",
        description="Quantize a model of transformers on the CPU, print what was done to its layers,\n"
        "and write the result. Without --model, it demonstrates this with\n"
        "all-MiniLM-L6-v2 from the demo extra.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = made.add_argument_group("what is quantized, and how").add_argument
    what("--model", type=Path, metavar="DIR", help="a Hugging Face directory with a tokenizer; a model that is "
         "not a causal language model is used as a sentence encoder")  # fmt: skip
    what("--config", type=Path, metavar="FILE.json", help="the config as JSON, see the README; write a set as a list "
         "or a string (default: minmax, int8 channel weights, int8 token inputs, 4 batches)")  # fmt: skip
    what("--budget", type=_share, metavar="SHARE", help="choose a format for every layer, with the smallest error "
         "for which the weights fit into this share of their bytes; replaces quant_cfg (default: gptq, 4 "
         "batches)")  # fmt: skip
    calibration = made.add_argument_group("calibration").add_argument
    calibration("--text", type=Path, metavar="FILE", help="UTF-8 text. A language model needs it to calibrate and to "
                "measure; its lines are joined into rows of tokens. For an encoder every line is a sentence (default "
                "for an encoder: 32 sentences)")  # fmt: skip
    calibration("--batch-size", type=_integer(1), default=4, metavar="N",
                help="rows or sentences in a batch (default: 4)")  # fmt: skip
    calibration("--length", type=_integer(2), metavar="N", help="tokens in a row of a language model (default: 512, or "
                "fewer if the model takes fewer); most tokens in a sentence of an encoder (default: 256)")  # fmt: skip
    results = made.add_argument_group("results").add_argument
    results("--dry-run", action="store_true", help="print the plan and stop: formats, bytes, text and memory needed; "
            "weights are not read")  # fmt: skip
    results("--evaluate", action="store_true", help="measure the model before and after, on text that is not used "
            "to calibrate: the perplexity of a language model on the lines after the calibration lines; the cosine of "
            "the embeddings of an encoder on every second line (the demonstration always measures)")  # fmt: skip
    results("--out", type=Path, metavar="DIR", help="write the quantized model into this new or empty directory, with "
            "the other files of the model, such as tokenizer and chat template")  # fmt: skip
    results("--format", choices=("quantize", *export.FORMATS), metavar="NAME",
            help="the format of --out: compressed-tensors (for transformers and vLLM), ascendv1 or ascendv1-mix (for "
            "vLLM-Ascend and MindIE), or quantize (default), which quantize.load reads into a model made by "
            "from_config")  # fmt: skip
    results(
        "--plot",
        type=Path,
        metavar="FILE",
        help=f"draw a picture of the layers into this file: {', '.join(picture.SUFFIXES)}",
    )
    results("--json", action="store_true", help="print only one JSON object on stdout, with model, config, report, "
            "bytes, comparison and exit status; with --dry-run, the plan")  # fmt: skip
    results("-v", "--verbose", action="store_true", help="also print a table of all layers")
    return made


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
