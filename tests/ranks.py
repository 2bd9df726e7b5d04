"""What processes of their own run: ranks, and calibrations that are killed."""

import multiprocessing
import os
import pathlib
import signal

import torch
import torch.distributed as dist

import quantize as qz
from quantize.shell.calibrate import layer as calibration
from quantize.shell.calibrate.layer import CalibrationLinear
from quantize.shell.calibrate.ranks import Ranks
from tests.models import config, filled, randn
from tests.zoo.sequential import LongChain as Chain

C = 32
INT4 = {"type": "int4", "symmetric": True, "strategy": "channel"}
CONFIGS = {
    "gptq": config({"gptq": {"sequential": False}}, weights=INT4),
    "stages": config("gptq", weights=INT4),
    "awq": config("awq", weights=INT4),
    "static": config("smoothquant", inputs={"type": "int8", "symmetric": False, "strategy": "tensor"}),
    "mixed": {
        "quant_cfg": {
            "weights": INT4,
            "*gate.weights": {**INT4, "type": "int8"},
            "*down.inputs": {"type": "int8", "symmetric": True, "strategy": "token"},
        },
        "algorithm": "gptq",
    },
    "minmax": config(inputs={"type": "int8", "symmetric": True, "strategy": "tensor"}),
}
# Multiples of 1/8: sums of their products are exact in float32, in any order.
BATCHES = [torch.round(randn(2, 20, C, seed=seed) * 8) / 8 for seed in range(5)]


def warm():
    """Processes forked from one that has imported everything, and computed nothing yet."""
    # The one that forks finds the modules by the environment.
    os.environ["PYTHONPATH"] = str(pathlib.Path(__file__).parent.parent)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def calibrated(name, batches, seed=0, *, batch_num=99):
    model = filled(Chain(), seed)
    qz.quantize(model, {**CONFIGS[name], "batch_num": batch_num})
    with torch.no_grad():
        for x in batches:
            model(x)
    return model


def solutions(model):
    return {m.names[0]: torch.utils._pytree.tree_leaves(m.solution) for m in model.modules()
            if isinstance(m, CalibrationLinear)}  # fmt: skip


def share(rank, size):
    """What a rank sees: all batches between them, the last rank none."""
    return BATCHES[rank :: size - 1] if size > 1 and rank < size - 1 else [] if size > 1 else BATCHES


def calibrate_and_die(name, path, kill):
    """Calibrate with four batches, saving after each; killed before a batch, or while the fifth layer is solved."""
    statistic, solved = CalibrationLinear.statistic, []

    def dying(layer):
        solved.append(layer)
        if kill == "solve" and len(solved) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return statistic(layer)

    CalibrationLinear.statistic = dying
    model = calibrated(name, [], batch_num=4)
    for number, x in enumerate(BATCHES[:4]):
        if kill == f"batch {number}":
            os.kill(os.getpid(), signal.SIGKILL)
        with torch.no_grad():
            model(x)
        qz.save_calibration(model, path)


def work(rank, size, rendezvous, directory):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    found = {}
    for name in CONFIGS:
        model = calibrated(name, share(rank, size))
        qz.finish(model, process_group=dist.group.WORLD)
        found[name] = {"solutions": solutions(model), "tokens": [row.tokens for row in qz.report(model).rows]}
    merged = calibrated("gptq", share(rank, size))
    Ranks(dist.group.WORLD).merge(calibration.calibrated(merged))
    found["gram"] = merged.first.statistics.total
    found["errors"] = errors(rank)
    torch.save(found, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


def errors(rank):
    """The messages of calls that every rank must refuse."""
    models = {
        "weights": calibrated("gptq", BATCHES[:1], seed=rank),
        "config": calibrated("awq" if rank else "gptq", BATCHES[:1]),
        "no batch": calibrated("gptq", []),
        "broken": calibrated("gptq", BATCHES[:1]),
    }
    if rank == 1:
        models["mode"] = calibrated("gptq", BATCHES[:1])
    else:
        models["mode"] = calibrated("stages", BATCHES[:1])
    for layer in models["broken"].modules():
        if isinstance(layer, CalibrationLinear) and layer.names[0] == "blocks.1.up":
            layer.statistic = failing
    alone = filled(Chain())
    qz.quantize(alone, {**CONFIGS["gptq"], "batch_num": 1})
    alone(BATCHES[rank])
    models["alone"] = alone
    models["one alone"] = filled(Chain())
    qz.quantize(models["one alone"], {**CONFIGS["gptq"], "batch_num": 1 if rank == 0 else 9})
    models["one alone"](BATCHES[rank])
    models["weight"] = calibrated("gptq", BATCHES[:1])
    models["replay"] = calibrated("stages", BATCHES[:1])
    if rank == 1:
        with torch.no_grad():
            models["weight"].head.weight[0, 0] = torch.nan
        models["replay"].norm.forward = failing
    told = {}
    for name, model in models.items():
        try:
            qz.finish(model, process_group=dist.group.WORLD)
        except (qz.QuantizeError, RuntimeError) as error:
            told[name] = str(error)
    return told


def failing(*_):
    raise RuntimeError("out of memory")
