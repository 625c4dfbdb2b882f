"""The layout's rules: imports point one way, in no circle; no package needs a command; sizes stay small."""

import ast
from functools import cache

import pytest
from conftest import ROOT

# From the top down: a module may import from the rows below its own, and from its own package.
LAYERS = ("training", "evaluation", "sampler", "sampling", "checkpointing", "models", "diffusion", "runtime")
COMMANDS = {
    "train", "sample", "sample_ddp", "evaluate", "extract_features", "download", "benchmark", "checkpoint",
}  # fmt: skip
MAY_USE_COMMANDS = {"benchmark", "experiments"}


@cache
def modules():
    """{dotted name: path} of all modules of the project, tests aside."""
    packages = [path.parent for path in ROOT.glob("*/__init__.py")] + [ROOT / "experiments"]
    paths = [*ROOT.glob("*.py"), *(path for package in packages for path in package.rglob("*.py"))]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


@cache
def imports_of(name):
    """The project's modules that a module imports, those inside functions too."""
    path, found = modules()[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            # A name may be a submodule, or something defined in the package itself:
            wanted = [
                f"{source}.{alias.name}" if f"{source}.{alias.name}" in modules() else source
                for alias in node.names
            ]
        else:
            continue
        found.update(wanted)
    return (found & modules().keys()) - {name}


def layer(name):
    """The row of LAYERS that a module stands in; -1 for commands and experiments, above all of them."""
    top = name.split(".")[0]
    return LAYERS.index(top) if top in LAYERS else -1


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_down(name):
    top = name.split(".")[0]
    assert top in LAYERS or top in COMMANDS | {"experiments"}, f"{name}: neither a layer nor a command"
    for other in imports_of(name):
        other_top = other.split(".")[0]
        if other_top in COMMANDS:
            assert top in MAY_USE_COMMANDS, f"{name} imports the command {other}"
        elif other_top != top:
            assert layer(other) > layer(name), f"{name} imports {other}, which stands above it"


def test_no_circles():
    def walk(name, path):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in imports_of(name):
                walk(other, [*path, name])
            done.add(name)

    done = set()
    for name in modules():
        walk(name, [])


def test_few_files_at_the_top():
    top = {path.stem for path in ROOT.glob("*.py")}
    assert top <= COMMANDS | {"models", "sampler"} and len(top) <= 12


def test_sizes():
    """Files a reader can hold in mind: at most 600 lines, train.py 350; functions at most 60, main 80.

    The other exceptions are to be shortened, never to grow."""
    exceptions = {
        "train": 350, "models": 650, "diffusion.gaussian_diffusion": 601,
    }  # fmt: skip
    for name, path in modules().items():
        text = path.read_text()
        assert text.count("\n") <= exceptions.get(name, 600), f"{name}: {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                limit = exceptions.get(f"{name}.{node.name}", 80 if node.name == "main" else 60)
                assert lines <= limit, f"{name}.{node.name}: {lines} lines"
