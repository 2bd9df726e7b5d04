"""Calibration of a language model at size: stage by stage against one pass, and llm-compressor where it is installed.

python -m tests.benchmarks.scale [--only SUBSTRING] [--rows 32]

SmolLM2-135M-Instruct (see ``smollm2.py``), int4 weights in groups of 64, calibrated on the first rows of ``calib`` in
batches of 4; every case in a process of its own. Seconds from the call that quantizes to the end of the last solve.
Memory is the peak of resident memory above the loaded model (as Linux tells it); ``forward`` is a pass that observes
nothing. Two processes share rows and cores, and meet over gloo: theirs is the memory of one. Perplexity on 20 rows of
``eval``, and on 16 of ``calib`` that were not calibrated on.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing

import quantize as qz
from tests.benchmarks import smollm2
from tests.benchmarks.memory import loaded, resident
from tests.models import WEIGHTS

EVALUATED = 20
GROUP = {**WEIGHTS, "type": "int4", "strategy": "group", "group_size": 64}


def case(algorithm, weights, rows=32):
    batches = rows // smollm2.BATCH
    return {"batch_num": batches, "quant_cfg": {"weights": weights}, "algorithm": algorithm, "skip_layers": "lm_head"}


OURS = {
    "forward": None,
    "gptq, one pass": {"sequential": False},
    "gptq": {},
    "gptq, not asymmetric": {"asymmetric": 0.0, "sequential": True},
    "awq": {},
    "awq, sequential": {"sequential": True},
}
RANKS = "gptq, one pass, 2 processes"
PEERS = ("llm-compressor gptq", "llm-compressor awq")


def ours(model, name, rows):
    if OURS[name] is not None:
        algorithm = {name.partition(",")[0]: OURS[name]}
        qz.quantize(model, case(algorithm, GROUP, rows=len(rows)))
    smollm2.run(model, rows)
    return model


def theirs(model, name, rows):
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    scheme = {"config_groups": {"all": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    recipe = [GPTQModifier(**scheme)] if name.endswith("gptq") else [AWQModifier(), QuantizationModifier(**scheme)]
    data = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in rows.split(smollm2.BATCH)]
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    # Pinning memory fails where there is no accelerator, and serves nothing there.
    IntermediatesCache.pin_memory = lambda *_, **__: None
    # It insists on a tokenizer, and has no use for it here.
    idle = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({})))
    return oneshot(model=model, dataset=loader, recipe=recipe, processor=idle, num_calibration_samples=len(rows))


def perplexities(model):
    texts = {"eval": smollm2.rows("eval", 0, EVALUATED), "calib": smollm2.rows("calib", 32, 48)}
    return {split: round(smollm2.perplexity(model, text), 3) for split, text in texts.items()}


def rank(number, size, directory, count):
    """What one of several processes does: its share of the rows, on its share of the cores."""
    torch.set_num_threads(max(1, torch.get_num_threads() // size))
    dist.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=number, world_size=size)
    model, rows = smollm2.model(), smollm2.rows("calib", 0, count)
    dist.barrier()
    before, start = loaded(), time.perf_counter()
    qz.quantize(model, {**case({"gptq": OURS["gptq, one pass"]}, GROUP), "batch_num": 2**32 - 1})
    for part in rows.split(smollm2.BATCH)[number::size]:
        smollm2.run(model, part)
    qz.finish(model, process_group=dist.group.WORLD)
    found = {"seconds": round(time.perf_counter() - start), "GiB": round(resident("VmHWM") - before, 2)}
    sums = [None] * size
    dist.all_gather_object(sums, [str(row) for row in qz.report(model).rows])
    assert all(each == sums[0] for each in sums)
    if number == 0:
        pathlib.Path(directory, "found").write_text(json.dumps({**perplexities(model), **found}))
    dist.barrier()
    dist.destroy_process_group()


def measure(name, count):
    """One case, in this process, or in two."""
    warnings.simplefilter("ignore")
    if name == RANKS:
        with tempfile.TemporaryDirectory() as directory:
            torch.multiprocessing.spawn(rank, (2, directory, count), nprocs=2)
            return json.loads(pathlib.Path(directory, "found").read_text())
    rows = smollm2.rows("calib", 0, count)
    peer = name in PEERS
    model = smollm2.model()
    if peer:
        # It looks for a file of the model's config.
        with tempfile.TemporaryDirectory() as directory:
            model.config.save_pretrained(directory)
            model.config.name_or_path = directory
            before, start = loaded(), time.perf_counter()
            model = theirs(model, name, rows)
    else:
        before, start = loaded(), time.perf_counter()
        model = ours(model, name, rows)
    seconds, memory = time.perf_counter() - start, resident("VmHWM") - before
    return {**perplexities(model), "seconds": round(seconds), "GiB": round(memory, 2)}


def installed():
    try:
        import llmcompressor  # noqa: F401
    except ImportError:
        return False
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--rows", type=int, default=32, help="rows to calibrate on, a multiple of 4")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(measure(given.case, given.rows)))
        return
    print(f"{'int4 group 64':28}    eval   calib  seconds    GiB", flush=True)
    for name in [*OURS, RANKS, *(PEERS if installed() else ())]:
        if given.only in name:
            command = [sys.executable, "-m", "tests.benchmarks.scale", "--case", name, "--rows", str(given.rows)]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            row = json.loads(result.stdout.splitlines()[-1])
            print(f"{name:28}{row['eval']:8.3f}{row['calib']:8.3f}{row['seconds']:9d}{row['GiB']:7.2f}", flush=True)


if __name__ == "__main__":
    main()
