"""What calibration costs: forward passes under calibration against plain ones, in one run.

python -m tests.benchmarks.calibration [--rounds 15] [--language-model]

The model is all-MiniLM-L6-v2 on 16 x 128 tokens, or SmolLM2-135M-Instruct (see ``smollm2.py``) on 4 x 512 tokens.
"""

import argparse
import copy
import json
import statistics
import time
import warnings

import torch

import quantize as qz
from quantize.shell.cli import subjects
from tests.benchmarks import smollm2
from tests.models import TENSOR, TOKEN
from tests.models import config as make

CONFIGS = {
    "int8 token inputs": make(inputs=TOKEN),
    "int8 tensor inputs": make(inputs=TENSOR),
    "smoothquant, int8 tensor inputs": make("smoothquant", inputs=TENSOR),
    "awq": make("awq"),
    "gptq": make("gptq"),
}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--language-model", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore", qz.QuantizeWarning)
    if given.language_model:
        plain, tokens = smollm2.model(), {"input_ids": smollm2.rows("calib", 0, 4), "use_cache": False}
    else:
        plain = subjects.Encoder(subjects.packaged()).model
        tokens = {"input_ids": torch.randint(1000, 30000, (16, 128), generator=torch.Generator().manual_seed(0))}
    models = {"plain": plain}
    for name, config in CONFIGS.items():
        models[name] = copy.deepcopy(plain)
        qz.quantize(models[name], {**config, "batch_num": 2**32 - 1, "skip_layers": "lm_head"})
    seconds = {name: [] for name in models}
    for turn in range(given.rounds + 2):
        for name, model in models.items():
            start = time.perf_counter()
            model(**tokens)
            # The first two turns warm up.
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    result = {name: round(median / medians["plain"], 3) for name, median in medians.items()}
    print(f"{'forward pass under calibration':42}  ratio of medians to plain ({medians['plain']:.3f} s)")
    for name, ratio in result.items():
        print(f"{name:42}  {ratio:.3f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
