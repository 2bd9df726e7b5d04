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
        # Quantized layers compute in the dtype of their inputs, also under autocast.
        with torch.autocast(x.device.type, enabled=False):
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


def steps(model, batches):
    """The layers by the tensors that they read at all of their calls, in the order of execution."""
    reads = inputs_of(model, linears(model), batches)
    found = []
    for name in merged([list(calls) for calls in reads]):
        for theirs in found:
            if all(alike(calls.get(name, []), calls.get(theirs[0], [])) for calls in reads):
                theirs.append(name)
                break
        else:
            found.append([name])
    return found


def alike(mine, theirs):
    """Whether the calls of two layers read the same tensors; written to in between, a tensor is another one."""
    return len(mine) == len(theirs) and all(
        tensor is other and torch.equal(numbers, others)
        for (tensor, numbers), (other, others) in zip(mine, theirs, strict=True)
    )


def merged(orders):
    """All names, each behind what comes before it in any batch, where the batches do not contradict each other."""
    rest, found = list(dict.fromkeys(name for order in orders for name in order)), []
    while rest:
        free = [
            name
            for name in rest
            if not any(name in order and set(order[: order.index(name)]) & set(rest) for order in orders)
        ]
        # The batch that has most before it decides where they contradict each other.
        longest = max(([name for name in order if name in rest] for order in orders), key=len)
        found.append((free or longest)[0])
        rest.remove(found[-1])
    return found


def solve(model, algorithm, batches):
    """The solution of every layer of ``model`` by name. The layers of ``model`` are replaced."""
    original, solutions, observer = copy.deepcopy(model), {}, algorithm.paired or algorithm.observer
    names = linears(model)
    for step in steps(original, batches):
        arriving, floating = (inputs_of(each, step[:1], batches) for each in (model, original))
        first, layers = step[0], [model.get_submodule(name) for name in step]
        state, tokens = observer.init(layers[0].in_features), 0
        for mine, theirs in zip(arriving, floating, strict=True):
            for call, (_, x) in enumerate(mine.get(first, [])):
                pair = [y.flatten(0, -2) for _, y in theirs.get(first, [])][call : call + 1]
                state = observer.update(state, x, *(pair if algorithm.paired else []))
                tokens += x.numel() // layers[0].in_features
        for name, solution in zip(step, solved(algorithm, layers, observer.finalize(state), tokens), strict=True):
            layer = model.get_submodule(name)
            solutions[name] = solution
            quantized = Quantized(solution, layer.bias)
            for path, module in list(model.named_modules(remove_duplicate=False)):
                if module is layer:
                    model.set_submodule(path, quantized)
    # What no batch reached.
    return solutions | {name: rounded(original.get_submodule(name)) for name in names if name not in solutions}


def solved(algorithm, layers, statistic, tokens):
    """The solutions of layers that read the same; that solving them together is right is a property of the core."""
    weights = [layer.weight.detach() for layer in layers]
    if tokens < algorithm.fewest:
        return [rounded(layer) for layer in layers]
    if algorithm.together is not None:
        return algorithm.together(weights, statistic)
    return [algorithm.solve(weight, statistic) for weight in weights]


def rounded(layer):
    """The fallback where there are too few tokens."""
    return minmax.algorithm(SPEC).solve(layer.weight.detach(), None)
