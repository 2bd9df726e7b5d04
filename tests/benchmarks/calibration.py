"""What calibration costs: forward passes of all-MiniLM-L6-v2 under calibration against plain ones, in one run.

python -m tests.benchmarks.calibration [--rounds 15]
"""

import argparse
import copy
import json
import statistics
import time
import warnings

import torch

import quantize as qz
from quantize.shell import demo
from tests.models import TENSOR, TOKEN, config

CONFIGS = {
    "int8 token inputs": config(inputs=TOKEN),
    "int8 tensor inputs": config(inputs=TENSOR),
    "smoothquant, int8 tensor inputs": config("smoothquant", inputs=TENSOR),
    "awq": config("awq"),
    "gptq": config("gptq"),
}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore", qz.QuantizeWarning)
    plain = demo.Encoder(demo.packaged_model()).model
    tokens = {"input_ids": torch.randint(1000, 30000, (16, 128), generator=torch.Generator().manual_seed(0))}
    models = {"plain": plain}
    for name, given in CONFIGS.items():
        models[name] = copy.deepcopy(plain)
        qz.quantize(models[name], {**given, "batch_num": 2**32 - 1})
    seconds = {name: [] for name in models}
    for turn in range(rounds + 2):
        for name, model in models.items():
            start = time.perf_counter()
            model(**tokens)
            # The first two turns warm up.
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    result = {name: round(median / medians["plain"], 3) for name, median in medians.items()}
    print(f"{'calibration forward of 16 x 128 tokens':42}  ratio of medians to plain ({medians['plain']:.3f} s)")
    for name, ratio in result.items():
        print(f"{name:42}  {ratio:.3f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
