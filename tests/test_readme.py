import pathlib
import re

import pytest

README = pathlib.Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_its_blocks_run(block, capsys):
    exec(compile(block, str(README), "exec"), {"__name__": "readme"})


def test_it_has_the_blocks_that_it_promises():
    assert len(BLOCKS) == 4
    for name in ("minmax", "gptq", "awq", "smoothquant"):
        assert f"| `{name}` |" in TEXT
