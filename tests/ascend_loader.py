"""How vLLM on Ascend reads an AscendV1 checkpoint: a reader that shares no code with the library.

It follows vllm-ascend, ``modelslim_config.py``, ``method_adapters.py`` and ``methods``: a type by ``<prefix>.weight``,
parameters of the loader's own dtypes into which the tensors of a file are copied, layers that are fused, and the
operators, as :mod:`tests.ascend` emulates them.
"""

import json

import torch
from safetensors.torch import load_file

from tests import ascend

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
# By type: what is a parameter, its shape for ``n`` outputs and ``c`` inputs, and its dtype; None: that of the model.
SCALED = {
    "weight": (lambda n, c: (n, c), torch.int8),
    "weight_scale": (lambda n, c: (n, 1), None),
    "weight_offset": (lambda n, c: (n, 1), None),
}
STATIC = {
    **SCALED,
    "input_scale": (lambda n, c: (1,), None),
    "input_offset": (lambda n, c: (1,), torch.int8),
    "quant_bias": (lambda n, c: (n,), torch.int32),
    "deq_scale": (lambda n, c: (n,), {torch.bfloat16: torch.float32, torch.float16: torch.int64}),
}
PARAMETERS = {
    "W8A16": SCALED,
    "W8A8_DYNAMIC": SCALED,
    "W8A8": STATIC,
    "W8A8_MIX": STATIC,
    "FLOAT": {"weight": (lambda n, c: (n, c), None)},
}
# Those may be computed or not used: the loader does not ask for them.
COMPUTED = {"weight_offset", "quant_bias", "deq_scale", "weight_scale"}
CODES = {torch.float16: 5, torch.bfloat16: 15}


class Loader:
    """The layers of a checkpoint in ``path``, made when they are asked for; all that was read is in ``read``.

    ``dtype`` is that of the config, if there is one. ``decodes``: whether the instance receives KV caches from others.
    """

    def __init__(self, path, dtype=None, *, decodes=False):
        self.decodes = decodes
        dtype = dtype or getattr(torch, json.loads((path / "config.json").read_text())["dtype"])
        # "auto": models in float32 are computed in bfloat16.
        self.dtype = torch.bfloat16 if dtype == torch.float32 else dtype
        self.types = json.loads((path / "quant_model_description.json").read_text())
        self.held, self.read = {}, set()
        for file in path.glob("*.safetensors"):
            self.held |= load_file(file)

    def type(self, names):
        """The one type of layers that are fused."""
        found = {self.types[f"{name}.weight"] for name in names}
        if len(found) > 1:
            raise ValueError("not all shards of a fused layer have one type")
        return found.pop()

    def layer(self, *names):
        """The function of the layers ``names``, whose outputs are one behind the other."""
        kind = self.type(names)
        # Its weight is taken apart, as a matrix of floats.
        assert kind == "FLOAT" or not names[0].endswith("kv_b_proj")
        made = self._parameters(kind, names)
        if kind == "W8A8_MIX":
            kind = "W8A8" if self.decodes else "W8A8_DYNAMIC"
        return Layer(kind, made, self.dtype)

    def expert(self, name):
        """The functions of an expert: gate and up as one, and down."""
        first = f"{name.rpartition('.')[0]}.0"
        kind = self.type([f"{first}.{part}" for part in ("gate_proj", "up_proj", "down_proj")])
        if kind != "W8A8_DYNAMIC":
            raise NotImplementedError(f"no experts of type {kind}")
        return [Layer(kind, self._parameters(kind, [f"{name}.{part}" for part in parts]), self.dtype)
                for parts in (("gate_proj", "up_proj"), ("down_proj",))]  # fmt: skip

    def _parameters(self, kind, names):
        sizes = [self.held[f"{name}.weight"].shape[0] for name in names]
        c, made = self.held[f"{names[0]}.weight"].shape[1], {}
        wanted = {**PARAMETERS[kind]}
        if any(f"{name}.bias" in self.held for name in names):
            wanted["bias"] = (lambda n, c: (n,), None)
        for key, (shape, dtype) in wanted.items():
            dtype = dtype.get(self.dtype) if isinstance(dtype, dict) else dtype or self.dtype
            # What is not loaded is whatever was in memory.
            whole = torch.full(shape(sum(sizes), c), 77, dtype=dtype)
            shards = whole.split(sizes) if len(whole) == sum(sizes) else [whole] * len(names)
            for name, shard in zip(names, shards, strict=True):
                full = f"{name}.{key}"
                if full not in self.held:
                    assert key in COMPUTED, f"{full} is not in the checkpoint"
                    continue
                assert shard.shape == self.held[full].shape, full
                shard.copy_(self.held[full])
                self.read.add(full)
            made[key] = whole
        for name in names:
            own = {key.removeprefix(f"{name}.") for key in self.held if key.startswith(f"{name}.")}
            assert own <= wanted.keys(), f"{name} has {own - wanted.keys()}, for which there is no parameter"
        return made


class Layer:
    """A layer as its parameters and ``kind`` say, on tokens ``[t, c]`` in the dtype of the model."""

    def __init__(self, kind, parameters, dtype):
        self.kind, self.p, self.dtype = kind, parameters, dtype

    def __call__(self, x):
        assert x.dtype == self.dtype
        p, out, bias = self.p, CODES[self.dtype], self.p.get("bias")
        if self.kind == "FLOAT":
            return torch.nn.functional.linear(x, p["weight"], bias)
        # A transposed view, as the operators want it.
        weight, scale = p["weight"].T, p["weight_scale"].flatten()
        if self.kind == "W8A16":
            wide = None if bias is None else bias.float() if self.dtype == torch.bfloat16 else bias
            return _run("weight_quant_batchmatmul", x, weight, scale, p["weight_offset"].flatten(), bias=wide)
        if self.kind == "W8A8_DYNAMIC":
            codes, steps = _run("dynamic_quant", x)
            return _run("quant_matmul", codes, weight, scale.float(), pertoken_scale=steps, bias=bias, output_dtype=out)
        c = x.shape[1]
        reciprocal = 1 / p["input_scale"].repeat(c)
        codes = _run("quantize", x, reciprocal, p["input_offset"].repeat(c).to(self.dtype), ascend._QINT8, -1, False)
        deq = p["deq_scale"]
        if deq.dtype == torch.int64:
            deq = deq.to(torch.int32).view(torch.float32)
        return _run("quant_matmul", codes, weight, deq, bias=p["quant_bias"], output_dtype=out)


def _run(name, *args, **kwargs):
    """An operator with the checks of its documentation."""
    return ascend.both(getattr(ascend, f"check_{name}"), getattr(ascend, name))(*args, **kwargs)


def fused(names):
    """``names`` of layers, those that the loader fuses together: lists of names."""
    found, left = [], list(names)
    while left:
        parent, _, last = left[0].rpartition(".")
        row = next((row for row in FUSED.values() if last in row), (last,))
        together = [f"{parent}.{key}" for key in row if f"{parent}.{key}" in left]
        found.append(together)
        left = [name for name in left if name not in together]
    return found
