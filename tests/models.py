"""Small models and configs that the tests share."""

import torch
from torch import nn

WEIGHTS = {"type": "int8", "symmetric": True, "strategy": "channel"}
TOKEN = {"type": "int8", "symmetric": True, "strategy": "token"}
TENSOR = {"type": "int8", "symmetric": True, "strategy": "tensor"}


def config(algorithm="minmax", *, weights=WEIGHTS, inputs=None, **rest):
    return {"quant_cfg": {"weights": weights, "inputs": inputs}, "algorithm": algorithm, **rest}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def filled(model, seed=0):
    """Parameters from a generator of their own: nothing depends on the order of the tests."""
    source = generator(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=source) / (p.shape[-1] ** 0.5))
    return model


def mlp(*, c=64, hidden=96, out=32, dtype=torch.float32):
    return filled(nn.Sequential(nn.Linear(c, hidden), nn.ReLU(), nn.Linear(hidden, out))).to(dtype).eval()


def snapshot(model):
    """Everything that a refused call must leave alone: values, identities, hooks, flags."""
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules(remove_duplicate=False)],
        "tensors": [(name, id(t), t.dtype) for name, t in model.named_parameters(remove_duplicate=False)],
        "values": [t.detach().clone().view(torch.uint8) for t in model.state_dict().values()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "training": [module.training for module in model.modules()],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
    }


def assert_same_snapshot(a, b):
    assert a.keys() == b.keys()
    for key in a:
        for x, y in zip(a[key], b[key], strict=True):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, key
