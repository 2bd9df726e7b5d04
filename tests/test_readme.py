import pathlib
import re

import pytest

from quantize.core import ALGORITHMS
from tests.test_cli import WORDS, saved

README = pathlib.Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")
FOUND = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
# One continues the block before it.
BLOCKS = [FOUND[i - 1] + block if "core.ALGORITHMS[" in block else block for i, block in enumerate(FOUND)]


@pytest.fixture(autouse=True)
def registry():
    """As it was: a block adds an algorithm."""
    before = dict(ALGORITHMS)
    yield
    ALGORITHMS.clear()
    ALGORITHMS.update(before)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
@pytest.mark.filterwarnings("ignore:.*stay in floating point")
def test_its_blocks_run(block, tmp_path):
    names = {"__name__": "readme"}
    if "DIR" in block:
        from transformers import LlamaConfig

        sizes = {"vocab_size": len(WORDS), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        config = LlamaConfig(**sizes, num_attention_heads=4, bos_token_id=1, eos_token_id=0)
        source = saved(tmp_path / "source", "LlamaForCausalLM", config)
        names |= {"DIR": source, "NEW": tmp_path / "new", "text": " ".join(WORDS * 50)}
    exec(compile(block, str(README), "exec"), names)


def test_it_has_the_blocks_that_it_promises():
    assert len(BLOCKS) == 11
    assert "@" not in re.sub(r"```.*?```|`[^`]*`", "", TEXT, flags=re.DOTALL)
    for name in ALGORITHMS:
        assert f"| `{name}` |" in TEXT
