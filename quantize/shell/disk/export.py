"""A converted model as a checkpoint that other programs load."""

from __future__ import annotations

import os

from torch import nn

from quantize.shell.config import refusal, shown
from quantize.shell.disk import ascendv1, ascendv1_mix, compressed_tensors, files
from quantize.shell.disk.parts import Parts, pairs

# Each has FILE, the name of the file of tensors, and LIMIT, the bytes of one where none are given; ``texts``, the other
# files by name, which refuses layers that have no place in the format; and ``tensors`` of a layer and its bias.
FORMATS = {"compressed-tensors": compressed_tensors, "ascendv1": ascendv1, "ascendv1-mix": ascendv1_mix}


def export(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    format: str,  # noqa: A002 - the usual word
    max_shard_size: int | str | None = None,
) -> None:
    """Write a converted model as a checkpoint in the ``format`` of another program; the model stays as it is.

    All parameters and persistent buffers are written, tied weights once, under the names that checkpoints of the model
    have; with the ``config`` and ``generation_config`` of a model of transformers also its ``config.json`` and
    ``generation_config.json``. Tokenizers are not.

    - ``'compressed-tensors'``: for transformers and vLLM. ``model.safetensors``, and the format in ``config.json``.
      Weights alone in all formats but groups that do not divide the inputs; symmetric weights with quantized inputs,
      int4 ones with inputs by token. transformers reads asymmetric weights with
      ``quantization_config=CompressedTensorsConfig(dequantize=True)`` only.
    - ``'ascendv1'``: for vLLM on Ascend and MindIE. ``quant_model_weights.safetensors``, in parts of 4 GiB, and
      ``quant_model_description.json``. Symmetric int8 weights by tensor or channel, inputs as they are, static (not in
      float32), or symmetric by token; experts by token only, and ``kv_b_proj`` not at all.
    - ``'ascendv1-mix'``: the same, but static layers also have what it takes to quantize their inputs by token. MindIE
      does that in prefill, and vLLM on all instances but those that receive KV caches from others; they decode with the
      static scale.

    Layers may have different formats, except those that loaders compute as one: ``q_proj``, ``k_proj`` and ``v_proj``,
    ``gate_proj`` and ``up_proj``, the experts of a mixture, and so on.

    None holds a layer that smooths its inputs at run time. Scales by token are the loader's own: an input may take
    the next code.

    Args:
        model: a model after ``convert``.
        directory: a new or an empty one, in a directory that exists. It is there whole, or as it was.
        format: as above.
        max_shard_size: bytes of tensors in a file, or a string such as ``'5GB'``; a larger model is written as several
            files and an index, as transformers does. No more than one of them is made at a time. None: as above.

    Raises:
        QuantizeError: a model that is not converted, a layer that the format cannot hold, a directory with content or
            without one around it, or no safetensors; nothing is left.
        OSError: it cannot be written; nothing is left.

    >>> import pathlib, tempfile, quantize as qz
    >>> model = nn.Sequential(nn.Linear(8, 4))
    >>> weights = {"type": "int8", "symmetric": True, "strategy": "channel"}
    >>> qz.quantize(model, {"quant_cfg": {"weights": weights}, "algorithm": "minmax"})
    >>> qz.convert(model)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     qz.export(model, f"{folder}/int8", format="compressed-tensors")
    ...     sorted(file.name for file in pathlib.Path(folder, "int8").iterdir())
    ['config.json', 'model.safetensors']
    """
    if not (isinstance(format, str) and format in FORMATS):
        raise refusal("format", shown(format), f"one of {', '.join(map(repr, FORMATS))}")
    files.check_new(directory)
    form, parts = FORMATS[format], Parts(model)
    limit = form.LIMIT if max_shard_size is None else files.shard_size(max_shard_size)
    texts = form.texts(parts)
    layers = {parts.names[name]: (layer, parts.biases.get(name)) for name, layer in parts.layers.items()}
    tensors = pairs(parts.others, layers, lambda held: form.tensors(*held))
    files.write(directory, form.FILE, tensors, texts, {}, limit)
