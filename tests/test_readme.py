import pathlib
import re

import pytest

from quantize.core import ALGORITHMS

README = pathlib.Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture(autouse=True)
def registry():
    """As it was: a block adds an algorithm."""
    before = dict(ALGORITHMS)
    yield
    ALGORITHMS.clear()
    ALGORITHMS.update(before)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_its_blocks_run(block):
    exec(compile(block, str(README), "exec"), {"__name__": "readme"})


def test_it_has_the_blocks_that_it_promises():
    assert len(BLOCKS) == 9
    assert "@" not in re.sub(r"```.*?```|`[^`]*`", "", TEXT, flags=re.DOTALL)
    for name in ALGORITHMS:
        assert f"| `{name}` |" in TEXT
