"""``python -m quantize``: quantize a sentence encoder and show what changed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from quantize.shell import demo
from quantize.shell.config import QuantizeError, refusal


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m quantize",
        description="Quantize a transformer and compare its sentence embeddings before and after.",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="a Hugging Face model directory with a tokenizer (default: all-MiniLM-L6-v2 from the demo extra)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE.json",
        help="the config as JSON, where a list or a string stands for a set "
        "(default: minmax, int8 channel weights, int8 token inputs, 4 batches)",
    )
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="UTF-8 text, one sentence a line; even lines calibrate, odd ones are measured (default: 32 of its own)",
    )
    given = parser.parse_args(arguments)
    try:
        config = demo.CONFIG if given.config is None else _json(given.config)
        sentences = demo.SENTENCES if given.text is None else _lines(given.text)
        directory = demo.packaged_model() if given.model is None else given.model
        if not (directory / "config.json").is_file():
            raise refusal("--model", str(directory), "a directory with config.json, weights and a tokenizer")
        print(f"model: {directory.resolve()}")
        print(f"config: {config}")
        print(demo.text(demo.demonstrate(demo.Encoder(directory), config, sentences)))
    except QuantizeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _json(file: Path) -> object:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise refusal("--config", str(file), f"a JSON file ({error})") from None


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise refusal("--text", str(file), f"a UTF-8 text file ({error})") from None


if __name__ == "__main__":
    sys.exit(main())
