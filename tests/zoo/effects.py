"""Models whose layers are fitted in the order of execution: what they write to, take and give."""

import dataclasses

import torch

from tests.zoo.sequential import Block, C, Chain

# What is written to.


class InPlace(Chain):
    """The input of a block is written to before, and used again after it."""

    def step(self, block, x):
        y = block(x.mul_(0.5))
        return x + y


class WritingBlock(Block):
    def forward(self, x):
        return x.add_(self.down(self.up(x)))


class Writing(Chain):
    """Blocks that write to their input, which is used again."""

    kind = WritingBlock

    def step(self, block, x):
        y = block(x)
        return x * 0.5 + y


class BehindBlock(Block):
    def forward(self, x):
        y = super().forward(x)
        x.data.mul_(0.5)
        return y


class Behind(Chain):
    """Blocks that write to their input where autograd does not look."""

    kind = BehindBlock

    def step(self, block, x):
        return block(x) + x


class AliasBlock(Block):
    def forward(self, x):
        y = super().forward(x)
        return y, y.view(-1, C), x


class Aliases(Chain):
    """Blocks that give one tensor in two forms, one of which is written to, and their input."""

    kind = AliasBlock

    def step(self, block, x):
        y, flat, same = block(x)
        flat.mul_(0.5)
        return y + same


class Argument(Chain):
    """Writes to its argument."""

    def forward(self, x):
        return super().forward(x.mul_(0.5).add_(0.1))


class Twice(Chain):
    """One tensor under two names, and it looks."""

    def forward(self, x):
        return self.both(x, x)

    def both(self, q, k):
        q.mul_(2)
        return super().forward(q + k if q is k else q - k)


# What blocks take and give.


class TupleBlock(Block):
    def forward(self, x, *, mask, cache=None):
        return super().forward(x * mask), {"hidden": x.mean(-1), "cache": cache}


class Tuples(Chain):
    """Keywords, and tensors and objects in containers."""

    kind = TupleBlock

    def forward(self, x, mask=None):
        x, seen = self.first(x), 0
        for block in self.blocks:
            x, more = block(x, mask=torch.ones_like(x) if mask is None else mask, cache=object())
            seen = seen + more["hidden"]
        return self.head(x + seen[..., None])


@dataclasses.dataclass
class Opaque:
    hidden: torch.Tensor


class OpaqueBlock(Block):
    def forward(self, x):
        return Opaque(super().forward(x))


class Opaques(Chain):
    """Outputs in an object that nobody can look into."""

    kind = OpaqueBlock

    def step(self, block, x):
        return block(x).hidden


class Sparse(Chain):
    """A sparse tensor between the blocks."""

    def step(self, block, x):
        t = x[..., 0].numel()
        return block(torch.sparse.mm(torch.eye(t).to_sparse(), x.reshape(t, C)).view(x.shape))


MODELS = [InPlace, Writing, Behind, Aliases, Argument, Twice, Tuples, Opaques, Sparse]
