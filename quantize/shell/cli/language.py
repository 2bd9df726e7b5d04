"""Causal language models of transformers: rows of tokens, and perplexity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from quantize.shell.cli.demo import Subject
from quantize.shell.config import refusal


class Language(Subject):
    """A causal language model on rows of ``length`` tokens; the first lines calibrate, and the rest is measured."""

    kind, length = "AutoModelForCausalLM", 512

    def split(
        self, text: Sequence[str], batches: int, batch: int, *, evaluate: bool
    ) -> tuple[Iterable[Any], Sequence[Any]]:
        """Batches ``[t, length]`` of tokens: what is measured starts with the line after the last that calibrates."""
        lines = iter(text)
        calibration = list(islice(self._rows(lines), batches * batch))
        held = list(self._rows(lines)) if evaluate else []
        if len(calibration) < batches * batch or (evaluate and not held):
            found = f"{len(calibration)} rows of {self.length} tokens to calibrate with"
            accepted = f"text for {batches * batch} (batch_num {batches} times --batch-size {batch})"
            if evaluate:
                found, accepted = (
                    f"{found}, {len(held)} to measure",
                    f"{accepted}, and for at least 1 in the lines after",
                )
            raise refusal("--text", found, accepted)
        return _batches(calibration, batch), _batches(held, batch)

    @torch.no_grad()
    def __call__(self, batch: Tensor) -> Tensor:
        """The mean negative log likelihood of the tokens after the first of every row: ``[t]``."""
        logits = self.model(input_ids=batch, use_cache=False).logits
        # Row by row: in float32 the logits of a batch may well be larger than the model.
        return torch.stack(
            [cross_entropy(row[:-1].float(), tokens[1:]) for row, tokens in zip(logits, batch, strict=True)]
        )

    def compared(self, before: Tensor, after: Tensor) -> str:
        """The perplexities, in a line: all rows have one length, so that the mean of their means is that of tokens."""
        perplexity = [values.double().mean().exp() for values in (before, after)]
        return (
            f"perplexity on {len(before)} held-out rows of {self.length} tokens: "
            f"{perplexity[0]:.3f} before, {perplexity[1]:.3f} after"
        )

    def _rows(self, lines: Iterator[str]) -> Iterator[list[int]]:
        """Rows of ``length`` tokens, each begun as the tokenizer begins a text; of the last line what fills a row."""
        start = [token for token in self.tokenizer("").input_ids if token == self.tokenizer.bos_token_id]
        tokens: list[int] = []
        size = self.length - len(start)
        for line in lines:
            tokens += self.tokenizer(f"{line}\n", add_special_tokens=False, verbose=False).input_ids
            full = len(tokens) // size * size
            yield from (start + tokens[i : i + size] for i in range(0, full, size))
            tokens = tokens[full:]


def _batches(rows: list[list[int]], batch: int) -> list[Tensor]:
    return [torch.tensor(rows[i : i + batch]) for i in range(0, len(rows), batch)]
