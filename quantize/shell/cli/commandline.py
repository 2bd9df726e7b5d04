"""``python -m quantize``: quantize a model of transformers, show what changed, and write the result."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from quantize.shell.budget import FORMATS, assign_formats
from quantize.shell.cli import output
from quantize.shell.cli.arguments import parser
from quantize.shell.cli.forecast import forecast
from quantize.shell.cli.outcome import demonstrate
from quantize.shell.cli.subjects import Language, Subject, subject_in
from quantize.shell.config import QuantizeError, parse, refusal
from quantize.shell.disk import export
from quantize.shell.plan import plan
from quantize.shell.progress import progress
from quantize.shell.report import picture
from quantize.shell.report.report import Report
from quantize.shell.report.text import WIDTH

SENTENCES = Path(__file__).with_name("sentences.txt")
_INT8 = {"type": "int8", "symmetric": True}
_FORMATS = {"weights": {**_INT8, "strategy": "channel"}, "inputs": {**_INT8, "strategy": "token"}}
CONFIG: dict[str, Any] = {"batch_num": 4, "quant_cfg": _FORMATS, "algorithm": "minmax"}
_CONFIG_LINES = 4
_Say = Callable[[str], None]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status, see ``--help``. The report goes to stdout."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # This also holds if the arguments are refused.
    as_json, status, told = "--json" in arguments, 0, dict[str, Any]()
    try:
        # With --json nothing else may write to stdout.
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            told = _run(parser().parse_args(arguments))
        if as_json:
            _print_json({"exit_status": 0, **told})
    except (QuantizeError, OSError) as error:
        # Messages of other libraries have many lines.
        status, message = 2, " ".join(str(error).split())
        print("error:", message, file=sys.stderr)
        if isinstance(error, BrokenPipeError):
            # At its end Python flushes stdout, which would fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
        print(message, file=sys.stderr)
    if as_json and status:
        _print_json({"exit_status": status, "error": message})
    return status


def _print_json(told: Mapping[str, Any]) -> None:
    """Print strict JSON: numbers that are not finite become null."""
    finite = json.loads(json.dumps(told), parse_constant=lambda _: None)
    print(json.dumps(finite, allow_nan=False), flush=True)


def _run(given: argparse.Namespace) -> dict[str, Any]:
    """Do what the options say, print the report unless JSON is wanted, and return all results as plain values."""
    # All early checks are here, before a model is read or hours are spent.
    config = CONFIG if given.config is None else _read("--config", given.config, json.loads, "a JSON file")
    if given.budget is not None:
        config = _budgeted(config if given.config is not None else {"batch_num": 4, "algorithm": "gptq"})
    parsed = parse(config)
    batches = 0 if parsed.data_free and given.budget is None else parsed.batch_num
    if given.plot is not None:
        picture.check(given.plot)
    if given.out is not None or given.dry_run:
        output.check(given.out, given.format, config, given.model)
    elif given.format is not None:
        raise refusal("--format", f"{given.format!r} without --out", "--out DIR, or no format")
    lines = _read("--text", given.text or SENTENCES, str.splitlines, "a UTF-8 text file")
    subject = subject_in(given.model, length=given.length)
    evaluate = given.evaluate or given.model is None
    lacking = isinstance(subject, Language) and given.text is None and (evaluate or batches > 0)
    if lacking and not given.dry_run:
        raise refusal("--text", "not given", "a file, to calibrate or measure a language model")
    text = [line.strip() for line in lines if line.strip()]
    calibration, held = ([], []) if lacking else subject.split(text, batches, given.batch_size, evaluate=evaluate)

    model = subject.outline() if given.dry_run else subject.model
    _check_layers(given, model, config)
    about: dict[str, Any] = {"directory": str(subject.directory.resolve()), "class": type(model).__name__}
    about |= {"parameters": sum(p.numel() for p in model.parameters()), "dtype": str(model.dtype).partition(".")[2]}
    say: _Say = (lambda _: None) if given.json else partial(print, flush=True)
    say("model: {directory}\n  {class}, {parameters:,} parameters in {dtype}".format(**about))
    # With a budget, the formats are not known yet.
    shown = {key: config[key] for key in config if key != "quant_cfg" or given.budget is None}
    say(_config(shown, given))
    source = "a text that is not given" if lacking else given.text or "built-in sentences"
    say(f"calibration: {subject.needs(batches, given.batch_size)}, of {source}" if batches else "calibration: none")
    if evaluate:
        say(f"evaluation: {subject.held}")
    needs = {"batches": batches, "batch_size": given.batch_size, "length": subject.length}
    told = {"model": about, "config": shown, "budget": given.budget, "calibration": needs, "format": given.format}
    told |= {option: path and str(path) for option, path in (("out", given.out), ("plot", given.plot))}
    if given.dry_run:
        tokens = batches * given.batch_size * subject.length
        return {**told, "dry_run": True, **_plan(given, model, config, tokens, say)}
    return {**told, "dry_run": False, **_quantize(given, subject, config, calibration, held, say)}


def _plan(given: argparse.Namespace, model: nn.Module, config: Any, tokens: int, say: _Say) -> dict[str, Any]:
    """Print and return what a run would do with ``model``, an outline."""
    parsed = parse(config)
    found = forecast(model, plan(model, parsed, outline=True), parsed, tokens, budget=given.budget)
    say("\n".join([*_table(found.report, given), str(found)]))
    if given.format in export.FORMATS:
        say(f"format: {given.format} can hold these layers")
    return found.as_dict()


def _quantize(
    given: argparse.Namespace, subject: Subject, config: Any, calibration: Sequence[Any], held: Sequence[Any], say: _Say
) -> dict[str, Any]:
    """Quantize, measure and write the model; print and return the results."""
    if given.budget is not None:
        chosen = assign_formats(
            subject.model,
            lambda _: subject.losses(progress(calibration, "calibrate for the formats", unit="batch")),
            given.budget,
            skip_layers=config.get("skip_layers"),
        )
        config = {**config, "quant_cfg": chosen}
        _check_layers(given, subject.model, config)
    write = None
    if given.out is not None:
        write = partial(output.write, directory=given.out, format=given.format, source=subject.directory)
    outcome = demonstrate(subject, config, calibration, held, write=write)
    say("\n".join([*_table(outcome.report, given), str(outcome)]))
    if given.out is not None:
        say(f"written: {given.out}, for {given.format if given.format in export.FORMATS else 'quantize.load'}")
    if given.plot is not None:
        outcome.report.plot(given.plot)
        say(f"drawn: {given.plot}")
    return {"config": config, **outcome.as_dict()}


def _config(config: Any, given: argparse.Namespace) -> str:
    """The config as JSON, in a few lines."""
    text = f"config: {json.dumps(config)}"
    if given.budget is not None:
        text += f", with formats chosen to fit into {given.budget:g} of the bytes"
    most = None if given.verbose else _CONFIG_LINES
    wrapped = textwrap.TextWrapper(WIDTH, subsequent_indent="  ", break_on_hyphens=False, max_lines=most,
                                   placeholder=" ... (--verbose prints all)")  # fmt: skip
    return wrapped.fill(text)


def _table(report: Report, given: argparse.Namespace) -> list[str]:
    """The table of all layers, if it is asked for."""
    return [report.table(), ""] if given.verbose else []


def _check_layers(given: argparse.Namespace, model: nn.Module, config: Any) -> None:
    if given.format in export.FORMATS:
        output.check_layers(plan(model, parse(config), outline=True), given.format, config)


def _read(option: str, file: Path, reader: Callable[[str], Any], accepted: str) -> Any:
    try:
        return reader(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise refusal(option, str(file), f"{accepted} ({error})") from None


def _budgeted(config: Any) -> Any:
    """``config`` with a format for weights alone, which the formats chosen for the budget will replace."""
    given = config.get("quant_cfg") if isinstance(config, Mapping) else None
    if isinstance(given, Mapping) and (found := [key for key in given if key != "weights"]):
        raise refusal("--budget", f"with quant_cfg.{found[0]!r} in the config", "a config for weights alone")
    return {**config, "quant_cfg": {"weights": FORMATS[0]}} if isinstance(config, Mapping) else config
