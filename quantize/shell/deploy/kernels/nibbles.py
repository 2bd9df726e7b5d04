"""int4 weights in bfloat16 by ``torch._weight_int4pack_mm_for_cpu``: one of the ways of :mod:`.cpu`.

The operator computes ``x W^T`` with ``W = code * scale + zero`` in groups of 32, 64, 128 or 256 inputs, scale and
zero in bfloat16; scales of channels and tensors are repeated. Its packed form depends on the processor; :func:`_block`
asks for it, so that codes come back exactly.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import rearrange, repeat
from torch import Tensor

from quantize.core import Scheme, Solution, linear
from quantize.shell.deploy.kernels import packed, reference
from quantize.shell.deploy.kernels.contract import Layout

_SIZES = (256, 128, 64, 32)
# With more tokens, a matmul of the dequantized weight wins.
_MANY = 64
# What the probe of the processor found, once it ran.
_found: list[int | None] = []


def obstacle(solved: Solution, dtype: torch.dtype) -> str | None:
    """See :class:`.Kernel`."""
    weight, block = solved.weight, _block()
    n, c = weight.codes.shape
    if solved.inputs is not None or weight.scheme.bits != 4:
        return f"no matmul takes int{weight.scheme.bits} weights and {solved.inputs or 'float'} inputs"
    if dtype != torch.bfloat16:
        return f"the matmul of packed int4 is fast in bfloat16 only, not in {dtype}"
    if _size(weight.scheme, c) is None:
        return f"{weight.scheme} of {c} inputs is not in whole groups of 32, 64, 128 or 256"
    if block is None:
        return "torch packs int4 for this processor in an order that is unknown here"
    return f"{n} outputs are no multiple of {block}" if n % block else None


def prepare(solved: Solution) -> dict[str, Tensor]:
    """See :class:`.Kernel`; the exact scales are kept beside those in bfloat16."""
    weight, held = solved.weight, reference.prepare(solved)
    n, c = weight.codes.shape
    size = _size(weight.scheme, c)
    assert size is not None
    # The zero of the rounded scale: with that of the exact one, the errors of both would meet every input of a group.
    scale = weight.scale.to(torch.bfloat16).to(weight.scale.dtype)
    zero = torch.zeros_like(scale) if weight.zero_point is None else -weight.zero_point * scale
    # [1, 1], [n, 1] or [n, g] to a pair for each group of each row.
    pairs = torch.stack([scale, zero], -1).expand(n, -1, -1)
    if weight.scheme.strategy != "group":
        pairs = repeat(pairs, "n 1 p -> n g p", g=c // size)
    del held["codes"]
    codes = torch._convert_weight_to_int4pack_for_cpu(weight.codes.to(torch.int32) + 8, 1)
    pairs = rearrange(pairs, "n g p -> g n p").to(torch.bfloat16).contiguous()
    return {**held, "packed": codes, "scale_and_zero": pairs}


def restore(held: Mapping[str, Tensor], layout: Layout) -> Solution:
    """See :class:`.Kernel`."""
    return reference.solution(unpack(held["packed"], known_block()), held, layout)


def forward(x: Tensor, held: Mapping[str, Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
    """See :class:`.Kernel`."""
    pairs = held["scale_and_zero"]
    if x.dtype != pairs.dtype:
        return reference.compute(x, restore(held, layout), bias)
    tokens = linear.smooth(x.reshape(-1, layout.c), held.get("smoothing")).to(x.dtype)
    if torch.compiler.is_exporting() or tokens.shape[0] <= _MANY:
        y = packed.int4pack_mm(tokens, held["packed"], layout.c // len(pairs), pairs)
        y = y if bias is None else y + bias
    else:
        y = torch.nn.functional.linear(tokens, _dequantize(held, layout), bias)
    return y.reshape(*x.shape[:-1], layout.n)


def _dequantize(held: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """The weight ``[n, c]``, a transposed view, in bfloat16: each product of a code and a scale is rounded once."""
    block, scale = known_block(), held["scale_and_zero"][..., 0].contiguous()
    codes = rearrange(_columns(held["packed"], block), "n c d -> c (n d)")
    codes = rearrange(codes, "(g k) n -> g k n", g=len(scale))
    zero_point = reference.zero_point(held, layout)
    zero = 8 if zero_point is None else 8 + zero_point.T.expand(len(scale), layout.n)[:, None]
    return rearrange((codes - zero).to(scale.dtype) * scale[:, None], "g k n -> n (g k)")


def unpack(words: Tensor, block: int) -> Tensor:
    """Undo ``_convert_weight_to_int4pack_for_cpu``: bytes ``[n, c / 2]`` to int8 codes ``[n, c]``.

    ``block`` rows lie together, column by column; a byte has row ``d`` below and row ``d + block / 2`` above.
    """
    return rearrange(_columns(words, block) - 8, "n c d -> (n d) c")


def _columns(words: Tensor, block: int) -> Tensor:
    """Codes plus 8, int8, in the order of the words: ``[n / block, c, block]``."""
    columns = rearrange(words.view(-1), "(n c d) -> n c d", c=words.shape[1] * 2, d=block // 2)
    return torch.cat([columns.bitwise_and(0xF), columns.bitwise_right_shift(4)], -1).view(torch.int8)


def known_block() -> int:
    """:func:`_block` where :func:`obstacle` found none."""
    # A compiler takes what stands here as a constant; it could not follow the probe.
    return _block() or 1


def _block() -> int | None:
    """How many rows torch packs together on this processor; None where it is not as :func:`unpack` knows it."""
    if not _found:
        random = torch.Generator("cpu").manual_seed(0)
        codes = torch.randint(-8, 8, (64, 32), generator=random, dtype=torch.int8, device="cpu")
        words = torch._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32) + 8, 1)
        _found.append(next((block for block in (64, 32) if torch.equal(unpack(words, block), codes)), None))
    return _found[0]


def _size(scheme: Scheme, c: int) -> int | None:
    sizes = _SIZES if scheme.group_size is None else (scheme.group_size,)
    return next((size for size in sizes if size in _SIZES and c % size == 0), None)
