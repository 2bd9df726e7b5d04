"""Converted layers against ``nn.Linear`` in the same dtype, and against the reference kernel, in one run.

python -m tests.benchmarks.speed [--seconds 0.5] [--json FILE]

A layer of 2048x2048, and the linear layers of a decoder block of SmolLM2-135M (576 channels, 1536 in the middle, one
after the other on inputs of their own), with 1, 16 and 256 tokens. A format that ends on ``cpu-bf16`` asks for that
kernel. Every number is a median over alternating rounds: ``float`` is the time of nn.Linear over that of the kernel,
``reference`` the same for the reference kernel; above 1 the kernel is faster.
"""

import argparse
import json
import pathlib
import statistics
import time

import torch
from torch import nn

import quantize as qz

INT8 = {"type": "int8", "symmetric": True, "strategy": "channel"}
FORMATS = {
    "int8 channel": {"weights": INT8},
    "int4 group 64": {"weights": {"type": "int4", "symmetric": True, "strategy": "group", "group_size": 64}},
    "int4 group 64, cpu-bf16": {"weights": {"type": "int4", "symmetric": True, "strategy": "group", "group_size": 64}},
    "int8 channel, int8 token": {"weights": INT8, "inputs": {"type": "int8", "symmetric": True, "strategy": "token"}},
    "int8 channel, int8 tensor": {"weights": INT8, "inputs": {"type": "int8", "symmetric": True, "strategy": "tensor"}},
}
SIZES = {
    "2048x2048": [(2048, 2048)],
    "SmolLM2 block": [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)],
}
TOKENS = (1, 16, 256)


class Layers(nn.Module):
    """Layers that each get an input of their own, so that nothing is in the cache that would not be in a model."""

    def __init__(self, shapes, dtype):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(c, n, bias=False, dtype=dtype) for n, c in shapes)

    def forward(self, inputs):
        for layer in self.layers:
            layer(inputs[layer.in_features])


def converted(shapes, dtype, given, inputs, kernel):
    torch.manual_seed(0)
    model = Layers(shapes, dtype)
    qz.quantize(model, {"quant_cfg": given, "algorithm": "minmax"})
    model(inputs)
    qz.convert(model, kernel=kernel)
    return model


def medians(models, inputs, seconds):
    """Seconds of each model: rounds in turn, so that all see the same machine."""
    taken = {name: [] for name in models}
    end = time.perf_counter() + seconds * len(models)
    for model in models.values():
        model(inputs)
    while time.perf_counter() < end or min(map(len, taken.values())) < 5:
        for name, model in models.items():
            start = time.perf_counter()
            model(inputs)
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--json", type=pathlib.Path)
    given = parser.parse_args()
    rows = []
    head = f"{'size':14} {'format':26} {'dtype':9} {'kernel':10} {'tokens':>6} {'us':>8} {'float':>6} {'reference':>9}"
    print(head, "-" * len(head), sep="\n")
    for size, shapes in SIZES.items():
        for dtype in (torch.bfloat16, torch.float32):
            for name, formats in FORMATS.items():
                asked = "cpu-bf16" if name.endswith("cpu-bf16") else None
                if asked and dtype == torch.bfloat16:
                    continue
                calibration = {c: torch.randn(64, c, dtype=dtype) for _, c in shapes}
                models = {"float": Layers(shapes, dtype)}
                for key, kernel in (("kernel", asked), ("reference", "reference")):
                    models[key] = converted(shapes, dtype, formats, calibration, kernel)
                kernel = models["kernel"].layers[0].kernel
                for t in TOKENS:
                    taken = medians(models, {c: torch.randn(t, c, dtype=dtype) for _, c in shapes}, given.seconds)
                    ratios = {other: taken[other] / taken["kernel"] for other in ("float", "reference")}
                    short = str(dtype).removeprefix("torch.")
                    rows.append({"size": size, "format": name, "dtype": short, "kernel": kernel, "tokens": t,
                                 "seconds": taken, **ratios})  # fmt: skip
                    print(f"{size:14} {name:26} {short:9} {kernel:10} {t:6} {taken['kernel'] * 1e6:8.0f} "
                          f"{ratios['float']:6.2f} {ratios['reference']:9.2f}", flush=True)  # fmt: skip
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
