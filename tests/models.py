"""Small models and configs that the tests share."""

import torch
import torch.utils._pytree as pytree
from torch import nn

import quantize as qz
from quantize.core import affine, dequantize, fake_quantize, linear

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


def hooks(model):
    """The forward hooks of all modules; torch lists them nowhere but in these attributes."""
    found = []
    for module in model.modules():
        found += [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return found


def snapshot(model):
    """Everything that a refused call must leave alone: values, identities, hooks, flags."""
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules(remove_duplicate=False)],
        "tensors": [(name, id(t), t.dtype) for name, t in model.named_parameters(remove_duplicate=False)],
        "values": [t.clone() for t in pytree.tree_leaves(model.state_dict()) if isinstance(t, torch.Tensor)],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "hooks": hooks(model),
        "training": [module.training for module in model.modules()],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
    }


def assert_same_snapshot(a, b):
    assert a.keys() == b.keys()
    for key in a:
        for x, y in zip(a[key], b[key], strict=True):
            assert (
                torch.equal(x.nan_to_num(nan=0.125), y.nan_to_num(nan=0.125)) if isinstance(x, torch.Tensor) else x == y
            ), key


def solutions(model):
    """What was found for every layer, by its name in the report."""
    return {row.name: model.get_submodule(row.name).solution for row in qz.report(model).rows}


def statistics(model, names, observer, run):
    """What ``observer`` remembers of the inputs of the layers ``names`` while ``run()`` calls the model."""
    states = {name: observer.init(model.get_submodule(name).in_features) for name in names}

    def observe(name):
        return lambda _module, args: states.update({name: observer.update(states[name], args[0])})

    handles = [model.get_submodule(name).register_forward_pre_hook(observe(name)) for name in names]
    run()
    for handle in handles:
        handle.remove()
    return {name: observer.finalize(state) for name, state in states.items()}


def rounding_bound(layer, x):
    """How far the converted layer may be from the float form of it.

    With quantized inputs, the bound of ``fake_quantized_linear``. With weights alone the reference kernel computes the
    float form itself; the others differ from the exact result, and so does the float form, by the roundings below.
    """
    s = layer.solution
    u, v = torch.finfo(x.dtype).eps / 2, 2.0**-24
    if s.inputs is None and layer.kernel == "reference":
        return torch.zeros(())
    if s.inputs is None:
        tokens = linear.smooth(x.flatten(0, -2), s.smoothing).to(x.dtype).double()
        # Scale and zero point may be rounded apart: nothing of one can be set off against the other.
        zero = torch.zeros_like(s.weight.scale) if s.weight.zero_point is None else s.weight.zero_point
        codes = affine.to_groups(s.weight.codes.double().abs(), s.weight.scheme)
        reach = (codes + zero.double().abs()[..., None]) * s.weight.scale.double().abs()[..., None]
        reach = affine.from_groups(reach, s.weight.scheme, s.weight.codes.shape)
        m = tokens.abs() @ reach.T + (0 if layer.bias is None else layer.bias.double().abs())
        # The float form: weights (u), c products and the sum (v), product and sum with the bias (2 u). A packed
        # matmul: scale or zero and weight (2 u), and the rest likewise.
        packed = (7 * u + (2 * x.shape[-1] + 16) * v) * m
        # Fixed point: a step of the token on every weight.
        step = tokens.abs().amax(1, keepdim=True) / (127 * 2**16)
        return packed + (x.dtype != torch.bfloat16) * step * dequantize(s.weight).double().abs().sum(1)
    tokens = linear.smooth(x.flatten(0, -2), s.smoothing)
    entered = fake_quantize(tokens, linear.input_params(tokens, s.inputs, s.static), s.inputs)
    m = entered.double().abs() @ dequantize(s.weight).double().abs().T
    m += 0 if layer.bias is None else layer.bias.double().abs()
    return (5 * u + (x.shape[-1] + 8) * v) * m


def assert_converts_by_rounding_only(model, *args, **kwargs):
    """Convert ``model`` and give every layer the input that it had before: the outputs agree up to the bound."""
    held = {}

    def keep(name):
        return lambda _module, arguments, output: held.update({name: (arguments[0].detach(), output.detach())})

    names = [row.name for row in qz.report(model).rows]
    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    qz.convert(model)
    for name, (x, y) in held.items():
        layer = model.get_submodule(name)
        assert ((layer(x) - y).flatten(0, -2).abs() <= rounding_bound(layer, x)).all(), name
