"""Divergence of SmolLM2-135M-Instruct after quantization from itself, on text that calibration did not see.

python -m tests.benchmarks.accuracy [--only SUBSTRING] [--rows N]

Calibrates on the first rows of ``calib`` (8 by default), and measures on the first 12 rows of ``eval``: the divergence
is the mean of KL(float || quantized) in nats a token, with its standard error over the rows; perplexity stands beside
it. Seconds are CPU-seconds of calibrating and solving. See ``smollm2.py`` for model and text.
"""

import argparse
import dataclasses
import time
import warnings

import quantize as qz
from tests.benchmarks import smollm2
from tests.models import TENSOR, TOKEN, WEIGHTS

EVALUATED = 12
ONE = {"sequential": False}
PAPER = {"gptq": {**dataclasses.asdict(qz.core.gptq.PAPER), **ONE}}
INT4 = {**WEIGHTS, "type": "int4"}
GROUP = {**INT4, "strategy": "group", "group_size": 64}
ASYMMETRIC = {**GROUP, "symmetric": False}


def cases(name, weights, algorithms, inputs=None, **patterns):
    told = {"minmax": "minmax", "awq": "awq", "gptq": "gptq", "gptq as in the paper": PAPER,
            "gptq, one pass": {"gptq": ONE}, "smoothquant": "smoothquant",
            "smoothquant, rounded by gptq": {"smoothquant": {"rounding": "gptq"}}}  # fmt: skip
    formats = {"weights": weights, "inputs": inputs, **patterns}
    return {f"{name}, {each}": (told[each], formats) for each in algorithms}


GPTQS = "gptq as in the paper", "gptq, one pass", "gptq"
CASES = (
    cases("int4 group 64", GROUP, ("minmax", *GPTQS, "awq"))
    | cases("int4 group 64 asymmetric", ASYMMETRIC, ("minmax", "gptq"))
    | cases("int4 channel", INT4, ("minmax", *GPTQS, "awq"))
    | cases("int4 channel, int8 token", INT4, ("minmax", "smoothquant", "smoothquant, rounded by gptq", "awq", "gptq"),
            TOKEN)
    | cases("int8 channel", WEIGHTS, ("minmax",))
    | cases("int8 channel, int8 token", WEIGHTS, ("minmax", "smoothquant", "smoothquant, rounded by gptq"), TOKEN)
    | cases("int8 channel, int8 tensor", WEIGHTS, ("minmax", "smoothquant"), TENSOR)
    | cases("int8 channel, int8 tensor but down_proj by token", WEIGHTS, ("minmax",), TENSOR,
            **{"*down_proj.inputs": TOKEN})
)  # fmt: skip


def measure(case, rows, reference):
    algorithm, formats = case
    model, start = smollm2.model(), time.process_time()
    calibration = smollm2.rows("calib", 0, rows)
    given = {"batch_num": len(calibration.split(smollm2.BATCH)), "quant_cfg": formats, "algorithm": algorithm}
    with warnings.catch_warnings(action="ignore", category=qz.QuantizeWarning):
        qz.quantize(model, {**given, "skip_layers": "lm_head"})
        if any(row.stage == "calibrating" for row in qz.report(model).rows):
            smollm2.run(model, calibration)
    seconds = time.process_time() - start
    text = smollm2.rows("eval", 0, EVALUATED)
    return *smollm2.divergence(model, reference, text), smollm2.perplexity(model, text), seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--rows", type=int, default=8, help="rows of 512 tokens to calibrate with")
    given = parser.parse_args()
    reference = smollm2.model()
    print(f"{'SmolLM2-135M-Instruct':62}divergence         perplexity  CPU-seconds", flush=True)
    for name, case in CASES.items():
        if given.only in name:
            mean, error, perplexity, seconds = measure(case, given.rows, reference)
            print(f"{name:62}{mean:.4f} +- {error:.4f}  {perplexity:10.2f}  {seconds:11.0f}", flush=True)


if __name__ == "__main__":
    main()
