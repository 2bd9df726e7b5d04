"""A converted model as a checkpoint that other programs load."""

from __future__ import annotations

import os

from torch import nn

from quantize.shell.config import refusal, shown
from quantize.shell.disk import ascendv1, ascendv1_mix, compressed_tensors, files
from quantize.shell.disk.parts import Parts, pairs

# Each module has FILE, the name of the file of tensors; LIMIT, its default limit in bytes; ``tensors`` of a layer and
# its bias; and ``texts``, the other files by name, which refuses layers that the format cannot hold.
FORMATS = {"compressed-tensors": compressed_tensors, "ascendv1": ascendv1, "ascendv1-mix": ascendv1_mix}


def export(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    format: str,  # noqa: A002 - the usual word
    max_shard_size: int | str | None = None,
) -> None:
    """Write a converted model as a checkpoint in the ``format`` of another program; the model stays as it is.

    The checkpoint has all parameters and persistent buffers, under the names that checkpoints of the model use; tied
    weights are written once. Models of transformers also get ``config.json`` and ``generation_config.json``. Tokenizers
    are not written.

    - ``'compressed-tensors'``: for transformers and vLLM. The files are ``model.safetensors``, and ``config.json`` with
      the formats. With float inputs it holds all weights, except groups that do not divide the inputs. With quantized
      inputs it holds symmetric weights; int4 weights need inputs with strategy 'token'. transformers reads asymmetric
      weights only with ``quantization_config=CompressedTensorsConfig(dequantize=True)``.
    - ``'ascendv1'``: for vLLM on Ascend and MindIE. The files are ``quant_model_weights.safetensors``, in parts of
      4 GiB, and ``quant_model_description.json``. It holds symmetric int8 weights with strategy 'tensor' or 'channel'.
      Inputs may be float, static (in float16 and bfloat16 models), or symmetric with strategy 'token'. Experts need
      strategy 'token', and ``kv_b_proj`` has to stay in floating point.
    - ``'ascendv1-mix'``: the same, but loaders can also quantize the inputs of static layers by token. MindIE uses the
      static scale only to decode, and vLLM only on instances that receive KV caches from others.

    Layers may have different formats, except those that loaders compute as one: ``q_proj``, ``k_proj`` and ``v_proj``,
    ``gate_proj`` and ``up_proj``, the experts of a mixture, and so on.

    No format holds a layer that smooths its inputs at run time. Loaders compute the scales of tokens themselves, so an
    input may get a neighbouring code.

    Args:
        model: a model after ``convert``.
        directory: a new or an empty one, whose parent exists. It is written completely, or left as it was.
        format: as above.
        max_shard_size: the most bytes of tensors in a file, an int or a string such as ``'5GB'``. A larger model is
            written as several files and an index, as transformers does; only one file is in memory at a time. None: the
            limit of the format.

    Raises:
        QuantizeError: a model that is not converted, a layer that the format cannot hold, a directory that has content
            or no parent, or no safetensors; nothing is left.
        OSError: the directory cannot be written; nothing is left of it.

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
