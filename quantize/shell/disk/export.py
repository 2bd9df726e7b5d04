"""A converted model as a checkpoint that other programs load."""

from __future__ import annotations

import os

from torch import Tensor, nn

from quantize.shell.config import refusal, shown
from quantize.shell.disk import ascendv1, compressed_tensors, files
from quantize.shell.disk.parts import Parts

FORMATS = {"compressed-tensors": compressed_tensors, "ascendv1": ascendv1}


def export(model: nn.Module, directory: str | os.PathLike[str], *, format: str) -> None:  # noqa: A002 - the usual word
    """Write a converted model as a checkpoint in the ``format`` of another program; the model stays as it is.

    All parameters and persistent buffers are written, tied weights once, under the names that checkpoints of the model
    have; with the ``config`` and ``generation_config``
    of a model of transformers also its ``config.json`` and ``generation_config.json``. Tokenizers are not.

    - ``'compressed-tensors'``: for transformers and vLLM. ``model.safetensors``, and the format in ``config.json``. All
      formats but groups that do not divide the inputs. Asymmetric weights are read by transformers with
      ``quantization_config=CompressedTensorsConfig(dequantize=True)`` only.
    - ``'ascendv1'``: for vLLM on Ascend and MindIE. ``quant_model_weights.safetensors`` and
      ``quant_model_description.json``. Symmetric int8 weights by tensor or channel, inputs as they are, static, or
      symmetric by token.

    Neither holds a layer that smooths its inputs at run time. Scales by token are the loader's own: an input may take
    the next code.

    Args:
        model: a model after ``convert``.
        directory: a new or an empty one, in a directory that exists. It is there whole, or as it was.
        format: as above.

    Raises:
        QuantizeError: a model that is not converted, a layer that the format cannot hold, a directory with content, or
            no safetensors; nothing was written.
        OSError: it cannot be written; nothing is left.
    """
    if not (isinstance(format, str) and format in FORMATS):
        raise refusal("format", shown(format), f"one of {', '.join(map(repr, FORMATS))}")
    parts = Parts(model)
    files.check_new(directory)
    files.write(directory, *contents(parts, format))


def contents(parts: Parts, format: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:  # noqa: A002 - as above
    """What :func:`export` writes: tensors by file and by name, and texts by file."""
    written, tensors = FORMATS[format], dict(parts.others)
    for name, layer in parts.layers.items():
        tensors.update({f"{parts.names[name]}.{key}": tensor for key, tensor in written.tensors(name, layer).items()})
    return {written.FILE: tensors}, written.texts(parts, tensors)
