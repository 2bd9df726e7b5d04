"""The experts of a mixture as one stack, against one after the other.

python -m tests.benchmarks.experts [--experts 64] [--shapes 256x512 768x2048] [--rounds 3] [--threads 2] [--device cpu]

Every expert is rounded to int4 in groups of 64 by gptq, with a Gram matrix of its own. Both ways take turns in one
process. Given are seconds for an expert (of the CPU, on other devices of the clock), their ratio, and the part of the
codes that differ.
"""

import argparse
import statistics
import time

import torch

from quantize.core import LayerSpec, Scheme, gptq
from quantize.core.observers import SumState

SPEC = LayerSpec(Scheme(4, True, "group", 64))


def problem(experts, n, c, device):
    """Weights ``[e, n, c]`` and the Gram matrices of tokens with heavy-tailed, correlated channels."""
    source = torch.Generator().manual_seed(0)
    weights = torch.randn(experts, n, c, generator=source)
    mix = torch.randn(c, c, generator=source) / c**0.5 + torch.eye(c)
    totals = torch.empty(experts, c, c)
    for total in totals:
        x = (torch.randn(2 * c, c, generator=source) * torch.randn(c, generator=source).exp()) @ mix
        torch.mm(x.T, x, out=total)
    return weights.to(device), SumState(totals.to(device), torch.full((experts,), 2 * c, device=device))


def seconds(function, device):
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    result = function()
    if device != "cpu":
        torch.accelerator.synchronize()
    return clock() - start, result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--shapes", nargs="+", default=["256x512", "768x2048"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    algorithm = gptq.algorithm(SPEC)
    print("shape       one after the other   as a stack   ratio   codes that differ")
    for shape in given.shapes:
        n, c = map(int, shape.split("x"))
        weights, stats = problem(given.experts, n, c, given.device)

        def alone(weights=weights, stats=stats):
            return [algorithm.solve(*each).weight.codes for each in zip(weights, map(SumState, *stats), strict=True)]

        def stacked(weights=weights, stats=stats):
            return algorithm.solve_stack(weights, stats).weight.codes

        alone(), stacked()
        found = [(seconds(alone, given.device), seconds(stacked, given.device)) for _ in range(given.rounds)]
        apart, together = (statistics.median(each[way][0] for each in found) / given.experts for way in (0, 1))
        differing = (torch.stack(found[0][0][1]) != found[0][1][1]).float().mean().item()
        print(f"{shape:10}  {apart:19.4f}  {together:11.4f}  {apart / together:6.2f}   {differing:.1e}", flush=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
