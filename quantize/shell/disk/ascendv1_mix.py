"""AscendV1 with static layers of type W8A8_MIX; see :mod:`quantize.shell.disk.ascendv1`."""

from functools import partial

from quantize.shell.disk import ascendv1

FILE, LIMIT = ascendv1.FILE, ascendv1.LIMIT
tensors = partial(ascendv1.tensors, mix=True)
texts = partial(ascendv1.texts, mix=True)
