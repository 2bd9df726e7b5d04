"""Functions of the core leave everything global alone."""

import pytest

from tests.shared import modes, random_states, unchanged


@pytest.fixture(autouse=True)
def unchanged_global_state():
    with unchanged(modes, random_states):
        yield
