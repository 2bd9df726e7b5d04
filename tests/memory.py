"""What is kept alive, seen from outside: storages of one size."""

import weakref

import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Alive(TorchDispatchMode):
    """Storages of ``nbytes`` that operators allocated while this is on and that nobody has freed: ``now``, ``most``."""

    def __init__(self, nbytes):
        super().__init__()
        self.nbytes, self.now, self.most = nbytes, 0, 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {storage.data_ptr() for storage in storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in storages(result):
            address = storage.data_ptr()
            if storage.nbytes() == self.nbytes and address not in before | self._known:
                self._known.add(address)
                self.now += 1
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, address)
        return result

    def _freed(self, address):
        self._known.discard(address)
        self.now -= 1


def storages(value):
    leaves = pytree.tree_leaves(value)
    return [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_sparse]
