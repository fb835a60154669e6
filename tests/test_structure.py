"""Structure of the code: imports go one way, functions and classes stay small enough to read."""

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("pipelines", "fastresnet", "benchmarks")
"""Packages from the bottom up: each imports itself and those before it."""

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for layer in LAYERS
    for path in sorted((ROOT / layer).rglob("*.py"))
}


@functools.cache
def tree(module):
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def imported(module):
    """Modules of this project that `module` imports at any place in its code."""
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base for alias in node.names]
        else:
            continue
        yield from (name for name in names if name in FILES)


def test_the_files_and_their_imports_are_found():
    assert len(FILES) > 60
    assert {"pipelines.sampling", "pipelines.errors"} <= set(imported("pipelines"))
    assert "pipelines.ffcv" in imported("pipelines.prepare")
    assert "fastresnet.training.step" in imported("fastresnet.training.loop")


@pytest.mark.parametrize("layer", LAYERS)
def test_no_package_imports_one_above_it(layer):
    above = LAYERS[LAYERS.index(layer) + 1 :]
    modules = [module for module in FILES if module.split(".")[0] == layer]
    assert not [
        (module, name) for module in modules for name in imported(module) if name.split(".")[0] in above
    ]  # fmt: skip


def test_imports_have_no_cycles():
    graphlib.TopologicalSorter({module: set(imported(module)) for module in FILES}).prepare()


def test_everything_is_compiled_with_private_caches():
    attributes = [
        (module, node) for module in FILES for node in ast.walk(tree(module)) if isinstance(node, ast.Attribute)
    ]
    calls = {module for module, node in attributes if ast.unparse(node) == "torch.compile"}
    assert calls == {"fastresnet.compilation"}


def test_matplotlib_is_imported_in_one_place():
    imports = [
        (module, node) for module in FILES for node in ast.walk(tree(module)) if isinstance(node, ast.ImportFrom)
    ]
    assert {module for module, node in imports if (node.module or "").startswith("matplotlib")} == {
        "fastresnet.figures"
    }


def test_functions_and_classes_are_within_size_limits():
    nodes = [(module, node) for module in FILES for node in ast.walk(tree(module))]
    functions = [(module, node) for module, node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f"{module}.{node.name}": node.end_lineno - node.lineno + 1 for module, node in functions}
    assert not {name: lines for name, lines in long.items() if lines > 120}
    classes = {
        f"{module}.{node.name}": sum(isinstance(child, ast.FunctionDef) for child in node.body)
        for module, node in nodes
        if isinstance(node, ast.ClassDef)
    }
    assert not {name: methods for name, methods in classes.items() if methods > 20}


@pytest.fixture
def shadowed(tmp_path):
    """Run Python in a folder that has a module of the name of a package of ours."""

    def run(package, *command):
        (tmp_path / f"{package}.py").write_text("")
        return subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)

    return run


@pytest.mark.parametrize(("package", "command"), [("pipelines", "list"), ("benchmarks", "bench")])
def test_command_reports_a_shadowed_package_in_one_line(shadowed, tmp_path, package, command):
    done = shadowed(package, "-m", "fastresnet", command)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"fastresnet: {tmp_path / package}.py is imported in place of fastresnet's own package")


def test_import_of_a_shadowed_package_raises_import_error(shadowed, tmp_path):
    done = shadowed("pipelines", "-c", "import fastresnet")
    assert done.stderr.splitlines()[-1].startswith(f"ImportError: {tmp_path / 'pipelines.py'} is imported in place of")
