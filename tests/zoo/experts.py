"""Mixtures of experts as transformers keeps them: its classes, found in its sources, and tiny models."""

import functools
import importlib
import importlib.util
import math
import pathlib
import re
import warnings

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree

import quantize as qz
from tests.models import config, generator

VOCABULARY, WIDTH = 96, 64
INT4 = {"type": "int4", "symmetric": True, "strategy": "channel"}
_DECORATED = re.compile(r"^@use_experts_implementation(?:\(.*\))?\nclass (\w+)", re.MULTILINE)


def classes():
    """``(module, class)`` for every class that carries the decorator; nothing is imported."""
    folder = pathlib.Path(importlib.util.find_spec("transformers").origin).parent / "models"
    return [
        (f"transformers.models.{file.parent.name}.{file.stem}", name)
        for file in sorted(folder.glob("*/modeling_*.py"))
        for name in _DECORATED.findall(file.read_text("utf-8"))
    ]


class Small:
    """A config in which every attribute is a small number by its name."""

    _experts_implementation = "eager"
    experts, hidden, inner = 6, 16, 24

    def __getattr__(self, name):
        known = {"expert": self.experts, "act": "silu", "limit": 1.5, "alpha": 1.5, "cap": 1.5, "eps": 1e-6,
                 "inter": self.inner, "hidden": self.hidden, "latent": None}  # fmt: skip
        if name.startswith("__"):
            raise AttributeError(name)
        return next((value for part, value in known.items() if part in name), 2)


def built(module, name, given=None):
    """An instance of such a class, with random parameters."""
    return drawn(getattr(importlib.import_module(module), name)(given or Small()), c=Small.hidden)


def drawn(model, seed=0, c=WIDTH):
    """Matrices of a gain near to 1 and biases from a generator of their own; norms stay as they are."""
    source = generator(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=source) / math.sqrt(c))
            elif "norm" not in name:
                p.copy_(torch.randn(p.shape, generator=source) / 4)
    return model


def _mixtral(t):
    return t.MixtralForCausalLM, t.MixtralConfig, {"intermediate_size": 96, "num_local_experts": 4}


def _qwen(t):
    given = {"moe_intermediate_size": 48, "num_experts": 6, "head_dim": 32, "decoder_sparse_step": 1}
    return t.Qwen3MoeForCausalLM, t.Qwen3MoeConfig, given


def _deepseek(t):
    given = {"moe_intermediate_size": 48, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1}
    given |= {"intermediate_size": 96, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32}
    return (
        t.DeepseekV3ForCausalLM,
        t.DeepseekV3Config,
        given | dict(zip(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), (16, 16, 32), strict=True)),
    )


def _gpt_oss(t):
    # The default scaling of positions does not fit so few of them, and the library says so.
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    given = {"intermediate_size": 64, "num_local_experts": 4, "head_dim": 32, "sliding_window": 16}
    return t.GptOssForCausalLM, t.GptOssConfig, given | {"rope_parameters": rope}


KINDS = {"mixtral": _mixtral, "qwen3_moe": _qwen, "deepseek_v3": _deepseek, "gpt_oss": _gpt_oss}


def made(kind, dtype=torch.float32, seed=0):
    """A tiny causal language model of that ``kind``, with two blocks."""
    import transformers

    model, options, given = KINDS[kind](transformers)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "max_position_embeddings": 64}
    return drawn(model(options(**sizes, **heads, **given)), seed).to(dtype).eval()


def batch(seed=0, *, rows=2, tokens=24):
    """Token numbers ``[rows, tokens]``."""
    return torch.randint(0, VOCABULARY, (rows, tokens), generator=generator(seed))


@torch.no_grad()
def logits(model, tokens):
    return model(tokens).logits


def run(model, batches):
    with torch.no_grad():
        for tokens in batches:
            model(tokens)
    return model


def routes(model, tokens):
    """By router, which experts it chose for every token."""
    found = {}

    def keep(_module, args, name):
        found.setdefault(name, []).append(args[1].sort().values)

    handles = [
        module.register_forward_pre_hook(functools.partial(keep, name=name))
        for name, module in model.named_modules()
        if name.endswith(".experts")
    ]
    run(model, [tokens])
    for handle in handles:
        handle.remove()
    return found


def experts(model):
    """The modules that hold experts, by name, whatever their class is now."""
    return {name: module for name, module in model.named_modules() if name.endswith(".experts")}


def given(algorithm, *, batch_num=2, inputs=None, **rest):
    """A config: int4 weights by channel, or int8 with quantized inputs."""
    named = {"one pass": {"gptq": {"sequential": False}}, "awq": {"awq": {"grids_num": 4, "clip": False}}}
    weights = INT4 if inputs is None else {**INT4, "type": "int8"}
    return config(named.get(algorithm, algorithm), weights=weights, inputs=inputs, batch_num=batch_num, **rest)


def gpt2():
    """A tiny GPT-2, whose linear layers are of a class of its own, with the weight transposed."""
    import transformers

    sizes = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return drawn(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))).eval()


def work(rank, size, directory, configs):
    """One of two processes, with one of the batches 1 and 2. By config and layer, tokens and solution, into a file."""
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=size)
    found = {}
    for name, each in configs.items():
        model = made("gpt_oss")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", qz.QuantizeWarning)
            qz.quantize(model, {**each, "batch_num": 99})
            run(model, [batch(1 + rank)])
            qz.finish(model, process_group=dist.group.WORLD)
        rows = qz.report(model).rows
        found[name] = {
            row.name: (row.tokens, pytree.tree_leaves(model.get_submodule(row.name).solution)) for row in rows
        }
    torch.save(found, f"{directory}/{rank}.pt")
    dist.destroy_process_group()
