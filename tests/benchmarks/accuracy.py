"""Perplexity of SmolLM2-135M-Instruct after quantization, on text that calibration did not see.

python -m tests.benchmarks.accuracy [--only SUBSTRING] [--json FILE]

Every case runs in a process of its own: quantize, calibrate on the first rows of ``calib``, solve, evaluate on the
first 20 rows of ``eval``. Seconds are those of calibrating and solving. See ``smollm2.py`` for model, text and measure.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import time
import warnings

import quantize as qz
from tests.benchmarks import smollm2
from tests.models import TENSOR, TOKEN, WEIGHTS

INT4 = {**WEIGHTS, "type": "int4"}
GROUP = {**INT4, "strategy": "group", "group_size": 64}
EVALUATED = 20


def case(algorithm, weights, inputs=None, rows=32):
    return {
        "batch_num": rows // smollm2.BATCH,
        "quant_cfg": {"weights": weights, "inputs": inputs},
        "algorithm": algorithm,
        "skip_layers": "lm_head",
    }


CASES = {
    "float32": None,
    "int8 channel, minmax": case("minmax", WEIGHTS),
    "int4 group 64, minmax": case("minmax", GROUP),
    "int4 group 64, gptq as in the paper": case(
        {"gptq": {key: getattr(qz.core.gptq.PAPER, key) for key in qz.core.gptq.PAPER.__dataclass_fields__}}, GROUP
    ),
    "int4 group 64, gptq": case("gptq", GROUP),
    "int4 group 64, gptq, 4 rows": case("gptq", GROUP, rows=4),
    "int4 group 64, gptq, one pass": case({"gptq": {"sequential": False}}, GROUP),
    "int4 group 64, gptq, one pass, 4 rows": case({"gptq": {"sequential": False}}, GROUP, rows=4),
    "int4 group 64, awq": case("awq", GROUP),
    "int4 group 64, awq, folded": case({"awq": {"fold": True}}, GROUP),
    "int4 group 64, awq, 4 rows": case("awq", GROUP, rows=4),
    "int4 channel, minmax": case("minmax", INT4),
    "int4 channel, gptq, one pass": case({"gptq": {"sequential": False}}, INT4),
    "int4 channel, gptq, one pass, 4 rows": case({"gptq": {"sequential": False}}, INT4, rows=4),
    "int4 channel, awq": case("awq", INT4),
    "int8 channel, token inputs, minmax": case("minmax", WEIGHTS, TOKEN),
    "int8 channel, token inputs, smoothquant": case("smoothquant", WEIGHTS, TOKEN),
    "int8 channel, tensor inputs, minmax": case("minmax", WEIGHTS, TENSOR),
    "int8 channel, tensor inputs, smoothquant": case("smoothquant", WEIGHTS, TENSOR),
    "int8 channel, token inputs, smoothquant, folded": case({"smoothquant": {"fold": True}}, WEIGHTS, TOKEN),
    "int8 channel, tensor inputs, with a search": case({"smoothquant": {"grids_num": 20}}, WEIGHTS, TENSOR),
    "int8 channel, tensor inputs, with a search, folded": case(
        {"smoothquant": {"grids_num": 20, "fold": True}}, WEIGHTS, TENSOR
    ),
}


def measure(name):
    """One case, in this process."""
    warnings.simplefilter("ignore", qz.QuantizeWarning)
    given, model = CASES[name], smollm2.model()
    start = time.perf_counter()
    if given is not None:
        qz.quantize(model, given)
        if any(row.stage == "calibrating" for row in qz.report(model).rows):
            smollm2.run(model, smollm2.rows("calib", 0, given["batch_num"] * smollm2.BATCH))
    seconds = time.perf_counter() - start
    perplexity = smollm2.perplexity(model, smollm2.rows("eval", 0, EVALUATED))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"perplexity": round(perplexity, 3), "seconds": round(seconds), "peak GiB": round(peak, 2)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--json", type=pathlib.Path, help="keep the table in this file")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(measure(given.case)))
        return
    table = {}
    print(f"{'SmolLM2-135M-Instruct':44}perplexity  seconds  peak GiB", flush=True)
    for name in CASES:
        if given.only in name:
            command = [sys.executable, "-m", "tests.benchmarks.accuracy", "--case", name]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            table[name] = json.loads(result.stdout.splitlines()[-1])
            print(f"{name:44}{table[name]['perplexity']:10.3f}  {table[name]['seconds']:7d}  "
                  f"{table[name]['peak GiB']:8.2f}", flush=True)  # fmt: skip
    if given.json:
        given.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
