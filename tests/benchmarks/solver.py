"""The solver of GPTQ against a straightforward port of the paper's algorithm 1, on one layer, in one run.

python -m tests.benchmarks.solver [--size 2048] [--rounds 5]
"""

import argparse
import json
import statistics
import time

import torch

from quantize.core import LayerSpec, Scheme, dequantize, gptq, metrics, round_to_nearest
from quantize.core.observers import SumState


def paper(weight, gram, scale, scheme, damp, block_size=128):
    """Algorithm 1 with act-order: inverse, its Cholesky factor, and updates of all columns to the right."""
    order = torch.argsort(gram.diagonal(), descending=True)
    w, h = weight[:, order].clone(), gram[order][:, order].clone()
    h += damp * h.diagonal().mean() * torch.eye(len(h))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    values = torch.zeros_like(w)
    for start in range(0, w.shape[1], block_size):
        stop = min(start + block_size, w.shape[1])
        block, errors = w[:, start:stop].clone(), torch.zeros(len(w), stop - start)
        inner = upper[start:stop, start:stop]
        for j in range(stop - start):
            column = block[:, j]
            value = torch.clamp(torch.round(column / scale[:, 0]), scheme.qmin, scheme.qmax) * scale[:, 0]
            error = (column - value) / inner[j, j]
            block[:, j:] -= error[:, None] @ inner[j, j:][None]
            values[:, start + j], errors[:, j] = value, error
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return values[:, torch.argsort(order)]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    source = torch.Generator().manual_seed(0)
    size, scheme = given.size, Scheme(4)
    mix = torch.randn(size, size, generator=source) / size**0.5 + torch.eye(size)
    tokens = (torch.randn(4 * size, size, generator=source) * torch.randn(size, generator=source).exp()) @ mix
    weight, gram = torch.randn(size, size, generator=source), tokens.T @ tokens
    scale = round_to_nearest(weight, scheme).scale
    options = gptq.Options(search_range=False, shrink=0.0, sweeps=0, guard=False)
    state = SumState(gram, torch.tensor(len(tokens)))
    contenders = {
        "paper's loop": lambda: paper(weight, gram, scale, scheme, options.damp),
        "gptq.solve": lambda: dequantize(gptq.solve(LayerSpec(scheme), options, weight, state).weight),
    }
    seconds = {name: [] for name in contenders}
    losses = {}
    for turn in range(given.rounds + 1):
        for name, contender in contenders.items():
            start = time.perf_counter()
            values = contender()
            # The first turn warms up.
            if turn:
                seconds[name].append(time.perf_counter() - start)
            losses[name] = metrics.output_error(values - weight, gram).item()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    base = medians["paper's loop"]
    for name, median in medians.items():
        print(f"{name:14} {median:8.3f} s  ratio {median / base:.3f}  loss {losses[name]:.6g}")
    print(json.dumps({"ratio": round(medians["gptq.solve"] / base, 3), "losses": losses}))


if __name__ == "__main__":
    main()
