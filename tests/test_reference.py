"""The reference that ``python -m pydoc`` prints is complete, and every check of it notices damage."""

import ast
import dataclasses
import functools
import importlib
import inspect
import pkgutil
import pydoc
import re
import textwrap

import pytest

import quantize as qz
from quantize import core
from quantize.core.algorithms.contract import BaseOptions
from quantize.shell import api
from quantize.shell.disk import storage

CODE = re.compile(r"``([^`]+)``")
SHAPE = re.compile(r"\[[^][()'\"]*\]")


def defined(module):
    """The public functions and classes that ``module`` defines, by name."""
    return {name: value for name, value in vars(module).items() if not name.startswith("_") and callable(value)
            and getattr(value, "__module__", None) == module.__name__}  # fmt: skip


def public(package, name):
    """The functions and classes that users find under ``name`` of ``package``."""
    value = getattr(package, name)
    if inspect.ismodule(value):
        return {f"{name}.{key}": each for key, each in defined(value).items()} if value is not core else {}
    return {name: value} if inspect.isclass(value) or inspect.isroutine(inspect.unwrap(value)) else {}


THINGS = {f"{package.__name__}.{key}": value for package in (qz, core) for name in package.__all__
          for key, value in public(package, name).items()}  # fmt: skip
OPTIONS = {name: module.Options for name, module in core.ALGORITHMS.items()}
MODULES = [importlib.import_module(found.name) for found in pkgutil.walk_packages(core.__path__, "quantize.core.")]


def arguments(thing):
    """The names that a caller writes, with their annotations: parameters, or the fields of a value."""
    if not inspect.isclass(thing):
        return {name: str(each.annotation) for name, each in inspect.signature(thing).parameters.items()}
    fields = [field.name for field in dataclasses.fields(thing)] if dataclasses.is_dataclass(thing) else ()
    return {name: str(thing.__annotations__[name]) for name in getattr(thing, "_fields", fields)}


@functools.cache
def raised(thing):
    """The errors that the body raises, by name; '' for one that a check raises for it."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(thing)))).body
    if inspect.isclass(thing):
        tree = ast.Module([node for node in tree.body if getattr(node, "name", "") in ("__init__", "__post_init__")])
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = ast.unparse(node.exc.func)
            found.add("QuantizeError" if name == "refusal" else name)
        elif isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and is_check(ast.unparse(node.func))):
            found.add("")
    return found


def is_array(annotation):
    return re.search(r"\bTensor\b", annotation) and "Callable" not in annotation


def is_check(name):
    return name.rpartition(".")[2].startswith("check_")


def prose(doc):
    """The docstring without its examples."""
    return "\n\n".join(part for part in doc.split("\n\n") if not part.lstrip().startswith(">>>"))


def faults(thing, doc):
    """What the docstring ``doc`` of ``thing`` lacks."""
    doc = inspect.cleandoc(doc or "")
    text = prose(doc)
    first, names = doc.split("\n")[0], arguments(thing)
    spans = " ".join(CODE.findall(text))
    described = re.search(r"^Args:\n((?: .*\n?|\n)*)", text, re.MULTILINE)
    spans += " " + " ".join(re.findall(r"^    (\w+):", described[1], re.MULTILINE) if described else ())
    # Sentences, and entries of lists.
    sentences = [" ".join(each.split()) for each in re.split(r"(?<=\.)\s|\n- |\n\n", text)]
    if not first.endswith("."):
        yield "the first line is no sentence"
    if not re.search(r"^>>> ", doc, re.MULTILINE):
        yield "no example"
    for name, annotation in names.items():
        if not re.search(rf"\b{name}\b", spans):
            yield f"{name} is not named"
        if is_array(annotation) and not any(has_shape(each, name) for each in sentences):
            yield f"{name} has no shape"
    errors = re.search(r"^Raises:\n((?: .*\n?)*)", text, re.MULTILINE)
    if raised(thing) and not errors:
        yield "it raises, and has no 'Raises:'"
    for name in raised(thing):
        if errors and not re.search(rf"^    {name or '[A-Z]'}", errors[1], re.MULTILINE):
            yield f"'Raises:' lacks {name}"


def has_shape(sentence, name):
    """Whether a sentence names an argument and soon after it a shape, or the function where the shape is told."""
    found = re.search(rf"``{name}``(.*)", sentence)
    return found and re.match(rf".{{0,70}}?``{SHAPE.pattern}|.*\bas (for|there)\b", found[1])


@pytest.mark.parametrize("name", THINGS)
def test_docstrings_are_complete(name):
    assert not list(faults(THINGS[name], THINGS[name].__doc__))


@pytest.mark.parametrize("name", THINGS)
def test_pydoc_finds_them(name):
    assert THINGS[name].__doc__.split("\n")[0] in pydoc.plain(pydoc.render_doc(name))


@pytest.mark.parametrize("name", THINGS)
def test_damage_to_a_docstring_is_noticed(name):
    thing, doc = THINGS[name], inspect.cleandoc(THINGS[name].__doc__)
    head, *rest = doc.split("\n")
    damaged = ["", "\n".join([head.removesuffix("."), *rest]), re.sub(r"^>>> .*", "", doc, flags=re.MULTILINE)]
    damaged += [re.sub(rf"\b{each}\b", "other", doc) for each in arguments(thing)]
    if any(map(is_array, arguments(thing).values())):
        damaged.append(SHAPE.sub("there", doc).replace("as for :", ""))
    if raised(thing):
        damaged += [doc.replace("Raises:", "It raises"), re.sub(r"^(    )\w+Error:", r"\1", doc, flags=re.MULTILINE)]
    for each in damaged:
        assert list(faults(thing, each)), each


@pytest.mark.parametrize("name", OPTIONS)
def test_options_tell_defaults_and_what_is_accepted(name):
    text = " ".join(OPTIONS[name].__doc__.split())
    for field in dataclasses.fields(OPTIONS[name]):
        accepted = "" if isinstance(field.default, bool) else f"; {field.metadata['accepted']}"
        assert f"- ``{field.name}`` ({field.default!r}{accepted}): " in text
    assert issubclass(OPTIONS[name], BaseOptions)


@pytest.mark.parametrize("name", core.ALGORITHMS)
def test_algorithms_name_their_source(name):
    assert re.search(r"^Source: .*\d{4}, \"", core.ALGORITHMS[name].__doc__, re.MULTILINE)


def test_letters_of_shapes_are_explained():
    known = set(re.findall(r"``(\w)``", core.__doc__))
    for name, thing in THINGS.items():
        shapes = [SHAPE.search(code) for code in CODE.findall(prose(thing.__doc__)) if name.startswith("quantize.core")]
        letters = {letter for shape in shapes if shape for letter in re.findall(r"\b[a-z]\b", shape[0])}
        assert letters <= known, name


@pytest.mark.parametrize("package", [qz, core], ids=lambda package: package.__name__)
def test_the_names_of_a_package_exist_and_are_sorted(package):
    assert package.__all__ == sorted(set(package.__all__))
    for name in package.__all__:
        value = getattr(package, name)
        # What is neither module, function nor class has no docstring that pydoc prints: its package describes it.
        if not inspect.ismodule(value) and not public(package, name):
            assert re.search(rf"^- .*``{name}``.*: ", package.__doc__, re.MULTILINE), name


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_what_the_core_defines_is_public(module):
    """A module of the core is public under its own name, and what is public by itself is the module's."""
    name = module.__name__.rpartition(".")[2]
    assert inspect.getdoc(module)
    for key, value in defined(module).items():
        found = getattr(core, name) if name in core.__all__ else None
        assert found is module, f"core.{name} is missing, where {key} is"
        assert getattr(core, key, value) is value or key in core.ALGORITHMS or inspect.ismodule(getattr(core, key))


def test_what_the_shell_defines_for_callers_is_public():
    for module in (api, storage):
        for key, value in defined(module).items():
            assert key in qz.__all__
            # Other tests watch public calls through wrappers.
            assert inspect.unwrap(getattr(qz, key)) is value


def test_presets_are_described():
    for name in vars(qz.presets):
        if name.isupper() and not name.startswith("_"):
            assert f"- ``{name}``: " in qz.presets.__doc__
