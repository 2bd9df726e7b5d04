"""The solver of GPTQ on one layer: against its unavoidable work, a port of the paper, llm-compressor, and its growth.

python -m tests.benchmarks.solver [--sizes 1024 2048 4096] [--rounds 3] [--threads 1]
python -m tests.benchmarks.solver --growth

All contenders round the same square layer to int4 channels with the same Gram matrix, scales and damping, in turn, in
one process. ``limit`` is what no solver can do without: ``n c^2 / 2`` multiplications in matmuls, and a Cholesky
factorization. llm-compressor takes part where it is installed. ``--growth`` measures :func:`quantize.core.gptq.solve`
with its defaults, and the Gram matrix, each size in a process of its own.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time

import torch

from quantize.core import LayerSpec, QParams, Scheme, dequantize, gptq, gram, metrics, refine, round_to_nearest
from tests.benchmarks.memory import loaded, resident

SCHEME, DAMP = Scheme(4), 0.01


def problem(size, tokens):
    source = torch.Generator().manual_seed(0)
    mix = torch.randn(size, size, generator=source) / size**0.5 + torch.eye(size)
    x = (torch.randn(tokens, size, generator=source) * torch.randn(size, generator=source).exp()) @ mix
    return torch.randn(size, size, generator=source), x


def paper(weight, h, scale, block_size=128):
    """Algorithm 1 with act-order: inverse, its Cholesky factor, and updates of all columns to the right."""
    order = torch.argsort(h.diagonal(), descending=True)
    w, h = weight[:, order].clone(), h[order][:, order].clone()
    h += DAMP * h.diagonal().mean() * torch.eye(len(h))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    values = torch.zeros_like(w)
    for start in range(0, w.shape[1], block_size):
        stop = min(start + block_size, w.shape[1])
        block, errors = w[:, start:stop].clone(), torch.zeros(len(w), stop - start)
        inner = upper[start:stop, start:stop]
        for j in range(stop - start):
            column = block[:, j]
            value = torch.clamp(torch.round(column / scale[:, 0]), SCHEME.qmin, SCHEME.qmax) * scale[:, 0]
            error = (column - value) / inner[j, j]
            block[:, j:] -= error[:, None] @ inner[j, j:][None]
            values[:, start + j], errors[:, j] = value, error
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return values[:, torch.argsort(order)]


def ours(weight, h, scale):
    """One factorization, and a sweep that reads what is decided."""
    order = torch.argsort(h.diagonal(), descending=True)
    upper, _, _ = refine.factor(h[order][:, order], DAMP)
    return dequantize(refine.sweep(weight, weight, upper, QParams(scale), SCHEME, order))


def limit(weight, h, scale):
    """The arithmetic alone; no solution."""
    half = h[:, : len(h) // 2].contiguous()
    weight @ half
    torch.linalg.cholesky(h + DAMP * h.diagonal().mean() * torch.eye(len(h)))


def llm_compressor():
    """Its solver, or None where it is not installed."""
    try:
        from compressed_tensors.quantization import QuantizationArgs
        from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    except ImportError:
        return None
    args = QuantizationArgs(num_bits=4, symmetric=True, strategy="channel", actorder="weight")

    def solve(weight, h, scale):
        zero = torch.zeros_like(scale, dtype=torch.int8)
        # It works in its arguments: copies are part of what it needs.
        values, *_ = quantize_weight(weight[None].clone(), h[None].clone(), scale[None], zero[None], None, args,
                                     percdamp=DAMP)  # fmt: skip
        return values[0]

    return solve


def compare(size, rounds):
    weight, x = problem(size, 2 * size)
    h = x.T @ x
    scale = round_to_nearest(weight, SCHEME).scale
    contenders = {"limit": limit, "quantize": ours, "paper's loop": paper, "llm-compressor": llm_compressor()}
    contenders = {name: contender for name, contender in contenders.items() if contender is not None}
    seconds = {name: [] for name in contenders}
    losses = {}
    for turn in range(rounds + 1):
        for name, contender in contenders.items():
            start = time.perf_counter()
            values = contender(weight, h, scale)
            # The first turn warms up.
            if turn:
                seconds[name].append(time.perf_counter() - start)
            if values is not None:
                losses[name] = metrics.output_error(values - weight, h).item()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        loss = f"loss {losses[name] / losses['quantize']:.4f}" if name in losses else ""
        print(f"{size:5} {name:15} {median:8.3f} s  ratio {median / medians['quantize']:6.3f}  {loss}", flush=True)
    return {name: median / medians["quantize"] for name, median in medians.items()}


def measure(what, size, tokens):
    """Seconds and GiB above what was there before, in this process."""
    weight, x = problem(size, tokens)
    state = gram.update(gram.init(size), x)
    before, start = loaded(), time.perf_counter()
    if what == "gram":
        gram.update(state, x)
    else:
        gptq.solve(LayerSpec(Scheme(4, True, "group", 64)), gptq.Options(), weight, state)
    seconds = time.perf_counter() - start
    return seconds, resident("VmHWM") - before


def growth(threads):
    sizes, tokens = (512, 1024, 2048, 4096), (1024, 2048, 4096, 8192)
    for what, over, cases in (
        ("solve", "c", [(size, 2 * size) for size in sizes]),
        ("gram", "c", [(size, 2048) for size in sizes]),
        ("gram", "tokens", [(1024, t) for t in tokens]),
    ):
        times = []
        for size, t in cases:
            command = [sys.executable, "-m", "tests.benchmarks.solver", "--threads", str(threads), "--point", what,
                       str(size), str(t)]  # fmt: skip
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            seconds, memory = json.loads(out)
            times.append(seconds)
            print(f"{what:6} c {size:5} tokens {t:6} {seconds:8.3f} s  {memory:6.3f} GiB", flush=True)
        # The exponent of the best power law: the slope in logarithms.
        xs = [math.log(size if over == "c" else t) for size, t in cases]
        slope = statistics.linear_regression(xs, list(map(math.log, times))).slope
        print(f"{what}: seconds grow like {over}^{slope:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.point:
        what, size, tokens = given.point
        print(json.dumps(measure(what, int(size), int(tokens))))
    elif given.growth:
        growth(given.threads)
    else:
        print(json.dumps({size: compare(size, given.rounds) for size in given.sizes}))


if __name__ == "__main__":
    main()
