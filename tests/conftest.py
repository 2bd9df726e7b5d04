"""Tests leave torch's modes alone, and so do public calls, which draw no random numbers either."""

import functools

import pytest

from tests.shared import modes, random_states, unchanged

# isort: split
# After the settings that the module above makes for torch.
import quantize as qz

CALLS = [name for name in qz.__all__ if callable(getattr(qz, name)) and not isinstance(getattr(qz, name), type)]


def watched(call):
    @functools.wraps(call)
    def checked(*args, **kwargs):
        with unchanged(modes, random_states):
            return call(*args, **kwargs)

    return checked


@pytest.fixture(autouse=True)
def unchanged_global_state(monkeypatch):
    # Tests may draw numbers of their own, as the constructors of torch do: the library may not.
    for name in CALLS:
        monkeypatch.setattr(qz, name, watched(getattr(qz, name)))
    with unchanged(modes):
        yield
