"""The solver of GPTQ against a straightforward port of the paper's algorithm 1, on one layer, in one run.

python -m tests.benchmarks.solver [--size 2048] [--rounds 5]
"""

import argparse
import json
import statistics
import time

import torch

from quantize.core import QParams, Scheme, dequantize, gptq, metrics, refine, round_to_nearest


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


def mine(weight, gram, scale, scheme, damp):
    """The same with one factorization and a sweep that reads what is decided; returns the same values."""
    order = torch.argsort(gram.diagonal(), descending=True)
    upper, _, _ = gptq.factor(gram[order][:, order], damp)
    return dequantize(refine.sweep(weight, weight, upper, QParams(scale), scheme, order))


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
    contenders = {"paper's loop": paper, "factor, sweep": mine}
    seconds = {name: [] for name in contenders}
    losses = {}
    for turn in range(given.rounds + 1):
        for name, contender in contenders.items():
            start = time.perf_counter()
            values = contender(weight, gram, scale, scheme, 0.01)
            # The first turn warms up.
            if turn:
                seconds[name].append(time.perf_counter() - start)
            losses[name] = metrics.output_error(values - weight, gram).item()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    base = medians["paper's loop"]
    for name, median in medians.items():
        print(f"{name:14} {median:8.3f} s  ratio {median / base:.3f}  loss {losses[name]:.6g}")
    print(json.dumps({"ratio": round(medians["factor, sweep"] / base, 3), "losses": losses}))


if __name__ == "__main__":
    main()
