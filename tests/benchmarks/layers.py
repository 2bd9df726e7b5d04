"""Held-out output error of single layers, against rounding, for every switch of the algorithms alone and together.

python -m tests.benchmarks.layers [--blocks 0 10 20 29] [--json FILE]

Layers of SmolLM2-135M-Instruct (see ``smollm2.py``), calibrated on 1 batch and on 8 batches of 4 rows, measured on 32
other rows. Of each column the geometric mean over the layers and the worst layer: error / error of minmax.
"""

import argparse
import json
import math
import pathlib

import torch

from quantize.core import (
    ALGORITHMS,
    LayerSpec,
    Scheme,
    channel_absmean,
    dequantize,
    gptq,
    gram,
    metrics,
    product,
    round_to_nearest,
)
from tests.benchmarks import smollm2
from tests.models import statistics

SCHEMES = {"int8 channel": Scheme(8), "int4 group 64": Scheme(4, True, "group", 64), "int4 channel": Scheme(4)}
Options = gptq.Options
OBSERVER = product(channel_absmean, gram)
VARIANTS = {
    "gptq, the paper's": ("gptq", gptq.PAPER),
    "  with act_order": ("gptq", Options(search_range=False, shrink=0.0, guard=False)),
    "  and search_range": ("gptq", Options(shrink=0.0, guard=False)),
    "  and shrink": ("gptq", Options(guard=False)),
    "gptq (and guard)": ("gptq", Options()),
    "  without act_order": ("gptq", Options(act_order=False)),
    "  without search_range": ("gptq", Options(search_range=False)),
    "  without shrink": ("gptq", Options(shrink=0.0)),
    "  with 1 sweep": ("gptq", Options(sweeps=1)),
    "  with 3 sweeps": ("gptq", Options(sweeps=3)),
    "awq": ("awq", ALGORITHMS["awq"].Options()),
    "  without clip": ("awq", ALGORITHMS["awq"].Options(clip=False)),
}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 10, 20, 29])
    parser.add_argument("--json", type=pathlib.Path, help="keep the table in this file")
    given = parser.parse_args()
    model = smollm2.model()
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and any(f"layers.{block}." in name for block in given.blocks)
    ]

    def observed(*rows):
        return statistics(model, names, OBSERVER, lambda: smollm2.run(model, smollm2.rows(*rows)))

    seen = {f"{n} batch{'es' * (n > 1)}": observed("calib", 0, 4 * n) for n in (1, 8)}
    held_out = observed("calib", 40, 72)
    table = {}
    for title, scheme in SCHEMES.items():
        print(f"{title}, {len(names)} layers".ljust(36) + "".join(f"{column:>22}" for column in seen), flush=True)
        for variant, (algorithm, options) in VARIANTS.items():
            line = {}
            for column, stats in seen.items():
                ratios = []
                for name in names:
                    weight, h = model.get_submodule(name).weight, held_out[name][1].total
                    statistic = stats[name] if algorithm == "awq" else stats[name][1]
                    solution = ALGORITHMS[algorithm].algorithm(LayerSpec(scheme), options).solve(weight, statistic)
                    reached = solution.effective_weight(), dequantize(round_to_nearest(weight, scheme))
                    errors = [metrics.output_error(each - weight, h).item() for each in reached]
                    ratios.append(errors[0] / errors[1])
                mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                line[column] = {"mean": round(mean, 3), "worst": round(max(ratios), 3)}
            table[f"{title}: {variant.strip()}"] = line
            cells = "".join(f"{c['mean']:12.3f} ({c['worst']:.3f})".rjust(22) for c in line.values())
            print(f"{variant:36}{cells}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
