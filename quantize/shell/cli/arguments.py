"""The options of the command line, and what each says in ``--help``."""

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
  The report goes to stdout. Errors, warnings and progress bars go to stderr,
  the bars only to a terminal.

exit status:
  0    done
  1    not foreseen, such as too little memory: stderr has a traceback
  2    refused, or a file that cannot be read or written: stderr has one line
  130  interrupted
  In all cases --out is written whole, or left as it was.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise QuantizeError(f"{message}; see --help")


def parser() -> argparse.ArgumentParser:
    """What reads the command line; a QuantizeError for what it does not accept."""
    made = _Parser(
        prog="python -m quantize",
        description="Quantize a model of transformers on the CPU, print what was done to its layers,\n"
        "and write the result. Without --model: a demonstration with all-MiniLM-L6-v2,\n"
        "from the demo extra.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = made.add_argument_group("what is quantized, and how").add_argument
    what("--model", type=Path, metavar="DIR", help="a Hugging Face directory with a tokenizer: a causal language "
         "model, else a sentence encoder")  # fmt: skip
    what("--config", type=Path, metavar="FILE.json", help="the config of the README as JSON; a list or a string "
         "stands for a set (default: minmax, int8 channel weights, int8 token inputs, 4 batches)")  # fmt: skip
    what("--budget", type=_share, metavar="SHARE", help="choose a format for every layer: the smallest errors whose "
         "weights fit into this share of their bytes; replaces quant_cfg (default: gptq, 4 batches)")  # fmt: skip
    calibration = made.add_argument_group("calibration").add_argument
    calibration("--text", type=Path, metavar="FILE", help="UTF-8 text. A language model needs it to calibrate and to "
                "measure; the lines from the first on are joined into rows. For an encoder every line is a sentence "
                "(default: 32 sentences)")  # fmt: skip
    calibration("--batch-size", type=_integer(1), default=4, metavar="N",
                help="rows or sentences in a batch (default: 4)")  # fmt: skip
    calibration("--length", type=_integer(2), metavar="N", help="tokens in a row (default: 512, or what the model can "
                "take), or at most in a sentence (default: 256)")  # fmt: skip
    results = made.add_argument_group("results").add_argument
    results("--dry-run", action="store_true", help="print the plan and stop: formats, bytes, text and memory needed; "
            "weights are not read")  # fmt: skip
    results("--evaluate", action="store_true", help="measure before and after, on text that does not calibrate: the "
            "perplexity on the lines after the calibration lines; or the cosine of sentence embeddings on every second "
            "line (the demonstration always measures)")  # fmt: skip
    results("--out", type=Path, metavar="DIR", help="write the quantized model here, with all files that stand beside "
            "its weights, such as tokenizer and chat template; a new or an empty directory")  # fmt: skip
    results("--format", choices=("quantize", *export.FORMATS), metavar="NAME",
            help=f"of the files in --out: {', '.join(export.FORMATS)}; or quantize, for quantize.load into a model "
            "made by from_config (default)")  # fmt: skip
    results("--plot", type=Path, metavar="FILE", help=f"draw the layers into this file: {', '.join(picture.SUFFIXES)}")
    results("--json", action="store_true", help="print one JSON object on stdout, and nothing else: model, config, "
            "report, bytes, comparison, exit status; or the plan")  # fmt: skip
    results("-v", "--verbose", action="store_true", help="print a table of all layers too")
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
