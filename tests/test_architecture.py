"""The seams of the package: who may import whom, and that a new algorithm is a file and a line."""

import ast
import graphlib
import json
import pathlib
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import quantize as qz
from quantize.core import ALGORITHMS, Algorithm, Solution, channel_range, round_to_nearest
from quantize.core.algorithms.contract import BaseOptions, option
from quantize.shell.report import rows
from tests.models import TENSOR, config, mlp, randn

KNOWN = {"torch", "einops", "quantize", "dataclasses", "collections", "typing", "functools", "itertools", "__future__"}
PACKAGE = pathlib.Path(qz.__file__).parent


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def attributes(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("core/**/*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_the_core_knows_tensors_only(file):
    for name in imports(file):
        top, *rest = name.split(".")
        assert top in KNOWN
        assert rest[:1] != ["nn"]
        assert name.startswith("quantize.core") == (top == "quantize"), name
    forbidden = {"torch.nn", "torch.no_grad", "torch.set_grad_enabled", "torch.set_default_dtype", "torch.backends"}
    assert not forbidden & set(attributes(file))


def test_the_config_does_not_know_torch():
    assert not [name for name in imports(PACKAGE / "shell" / "config.py") if name.startswith("torch")]


def test_nothing_rebinds_the_function_to_a_module():
    assert not list(PACKAGE.rglob("quantize.py"))
    assert callable(qz.quantize)
    for name in ALGORITHMS:
        assert getattr(qz.core, name) is ALGORITHMS[name]


# Each may import from those before it. The docstring of the shell draws the same picture.
ROOMS = [
    "config",
    "progress",
    "offload",
    "modes",
    "values",
    "views",
    "report",
    "plan",
    "deploy",
    "fold",
    "calibrate",
    "budget",
    "disk",
    "api",
    "cli",
]


def room(name):
    """The place in ROOMS of a module ``quantize.shell.<room>...``."""
    return ROOMS.index(name.split(".")[2])


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("shell/*/**/*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_rooms_import_from_rooms_above(file):
    mine = ROOMS.index(file.relative_to(PACKAGE / "shell").parts[0].removesuffix(".py"))
    names = [name for name in imports(file) if name.startswith("quantize.")]
    below = [name for name in names if name.startswith("quantize.shell.") and room(name) > mine]
    assert not below
    assert not [name for name in names if name.split(".")[1] not in ("core", "shell", "presets")]


def test_the_shell_has_these_rooms_and_says_so():
    folder = PACKAGE / "shell"
    found = {path.relative_to(folder).parts[0].removesuffix(".py") for path in folder.rglob("*.py")} - {"__init__"}
    assert found == set(ROOMS)
    drawn = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    left = [line.strip().split("   ")[0] for line in drawn.splitlines() if line.startswith("    ")]
    assert [word.removesuffix("/") for words in left for word in words.split()] == ROOMS
    for path in folder.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_no_file_imports_itself_by_a_circle():
    files = {".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts): file for file in PACKAGE.rglob("*.py")}
    files = {name.removesuffix(".__init__"): file for name, file in files.items()}
    # Imports for types only count, since ``imports`` looks into every block.
    graph = {name: {found for found in files if any(each in (found, f"{found}.{each.rpartition('.')[2]}")
                                                   for each in imports(file))} - {name}
             for name, file in files.items()}  # fmt: skip
    # Importing from a package runs what stands in its __init__; modules of it import each other by full names.
    graph = {name: {each for each in found if not name.startswith(f"{each}.")} for name, found in graph.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_files_have_one_subject():
    assert not [file.name for file in PACKAGE.rglob("*.py") if len(file.read_text().splitlines()) > 250]


class Toy:
    """Rounds weights to a step given in the options: as a module of its own would."""

    QUANTIZES_INPUTS = frozenset({True})

    @dataclass(frozen=True)
    class Options(BaseOptions):
        bonus: int = option(3, "an int, at least 1", lambda value: value >= 1)

    @staticmethod
    def algorithm(spec, options):
        def solve(weight, inputs):
            static = qz.core.linear.static_params(inputs.low, inputs.high, spec.inputs)
            notes = {"bonus": torch.tensor(options.bonus)}
            return Solution(round_to_nearest(weight, spec.weight), spec.inputs, static=static, notes=notes)

        return Algorithm(channel_range, solve)


def test_a_new_algorithm_is_a_file_and_a_line(monkeypatch):
    monkeypatch.setitem(ALGORITHMS, "toy", Toy)
    model = mlp()
    with pytest.raises(qz.QuantizeError, match=r"algorithm\.toy\.bonus: 0; accepted: an int, at least 1"):
        qz.quantize(model, config({"toy": {"bonus": 0}}, inputs=TENSOR))
    with pytest.raises(
        qz.QuantizeError, match=r"algorithm: 'toy' with float inputs; accepted: quantized inputs, or one of"
    ):
        qz.quantize(model, config("toy"))
    qz.quantize(model, config({"toy": {"bonus": 5}}, inputs=TENSOR))
    model(randn(4, 64))
    qz.convert(model)
    assert "bonus 5" in qz.report(model).table()


def test_the_report_is_plain_data():
    model = nn.ModuleDict({"a": nn.Linear(64, 8), "b": nn.Linear(8, 8)})
    qz.quantize(model, config(skip_layers="b"))
    data = json.loads(json.dumps(qz.report(model).as_dict()))
    (layer,) = data["layers"]
    assert layer["names"] == ["a"]
    assert layer["shape"] == [8, 64]
    assert (layer["weights"], layer["inputs"], layer["algorithm"]) == ("int8 channel symmetric", None, "minmax")
    assert layer.keys() == {*vars(qz.report(model).rows[0])} - {"fell_back"}
    assert layer["tokens"] == 0
    assert layer["weight_sqnr"] > 40
    assert data["skipped"] == [{"name": "b", "reason": "skip_layers: 'b'", "asked": True, "elements": 64}]
    exact = nn.Sequential(nn.Linear(4, 4))
    nn.init.zeros_(exact[0].weight)
    qz.quantize(exact, config())
    assert qz.report(exact).as_dict()["layers"][0]["weight_sqnr"] is None
    told = str(qz.report(model)).splitlines()
    assert told[0] == "1 layer: int8 channel symmetric weights, float inputs, minmax, quantized"
    assert told[2] == "SQNR dB  shape  layer"
    assert told[3].endswith("   8x64  a")


def test_a_row_of_the_report_goes_through_json():
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8))
    nn.init.zeros_(model[1].weight)
    qz.quantize(model, config("smoothquant", inputs=TENSOR))
    model(randn(3, 64))
    for row in qz.report(model).rows:
        assert rows.from_plain(json.loads(json.dumps(rows.as_plain(row)))) == row
    assert row.weight_sqnr == float("inf")
