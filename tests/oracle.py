"""What sequential calibration must find, in the plainest way: full passes from the root that remember nothing.

For one step of layers after the other, every batch runs through the whole model, in which the layers of earlier steps
are quantized already, and with algorithms that ask for it through the float model as well.
"""

import copy

import torch
from torch import nn

from quantize.core import LayerSpec, Scheme, linear, minmax

SPEC = LayerSpec(Scheme(4))


class Quantized(nn.Module):
    def __init__(self, solution, bias):
        super().__init__()
        self.solution, self.bias = solution, bias

    def forward(self, x):
        s = self.solution
        return linear.fake_quantized_linear(
            x, s.weight, self.bias, inputs=s.inputs, smoothing=s.smoothing, static=s.static
        )


def linears(model):
    """The names of the linear layers, each once."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


@torch.no_grad()
def inputs_of(model, names, batches):
    """By batch and layer, what every call reads in a full run: the tensor, and a copy of its numbers at that time."""
    found = []
    for x in batches:
        calls = {}

        def observe(_module, args, name, calls=calls):
            calls.setdefault(name, []).append((args[0], args[0].clone()))

        handles = [
            model.get_submodule(name).register_forward_pre_hook(lambda m, a, name=name: observe(m, a, name))
            for name in names
        ]
        # The model may write to its argument.
        model(x.clone())
        for handle in handles:
            handle.remove()
        found.append(calls)
    return found


def called(model, batches):
    """The names of the layers in the order of their first calls."""
    return list(dict.fromkeys(name for calls in inputs_of(model, linears(model), batches) for name in calls))


def stages(model, batches):
    """The layers by the element of the outermost list that they are in; outside of lists each is a stage."""
    found = {}
    for name in called(model, batches):
        path = name.split(".")
        owners = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path))]
        lists = [depth for depth, owner in enumerate(owners) if isinstance(owner, (nn.ModuleList, nn.Sequential))]
        found.setdefault(".".join(path[: lists[0] + 1]) if lists else name, []).append(name)
    return list(found.values())


def siblings(model, names, batches):
    """The layers of one stage by the tensor that they read at their first call."""
    first = {}
    for calls in inputs_of(model, names, batches):
        for name, reads in calls.items():
            first.setdefault(name, reads[0])
    found = []
    for name in names:
        tensor, numbers = first[name]
        for theirs in found:
            other, others = first[theirs[0]]
            # Written to in between, a tensor is another one.
            if tensor is other and torch.equal(numbers, others):
                theirs.append(name)
                break
        else:
            found.append([name])
    return found


def solve(model, algorithm, batches):
    """The solution of every layer of ``model`` by name. The layers of ``model`` are replaced."""
    original, solutions = copy.deepcopy(model), {}
    names, steps = linears(model), stages(model, batches)
    if algorithm.paired:
        # What came in with a layer is corrected before the layers behind it in the same stage are fitted.
        steps = [step for stage in steps for step in siblings(original, stage, batches)]
    for step in steps:
        arriving, floating = (inputs_of(each, step, batches) for each in (model, original))
        for name in step:
            layer = model.get_submodule(name)
            state, tokens = algorithm.observer.init(layer.in_features), 0
            for mine, theirs in zip(arriving, floating, strict=True):
                for call, (_, x) in enumerate(mine.get(name, [])):
                    pair = [y.flatten(0, -2) for _, y in theirs.get(name, [])][call : call + 1]
                    state = algorithm.observer.update(state, x, *(pair if algorithm.paired else []))
                    tokens += x.numel() // layer.in_features
            solutions[name] = (
                algorithm.solve(layer.weight.detach(), algorithm.observer.finalize(state))
                if tokens >= algorithm.fewest
                else rounded(layer)
            )
            quantized = Quantized(solutions[name], layer.bias)
            for path, module in list(model.named_modules(remove_duplicate=False)):
                if module is layer:
                    model.set_submodule(path, quantized)
    # What no batch reached.
    return solutions | {name: rounded(original.get_submodule(name)) for name in names if name not in solutions}


def rounded(layer):
    """The fallback where there are too few tokens."""
    return minmax.algorithm(SPEC).solve(layer.weight.detach(), None)
