"""Wheel and source distribution: complete, small, and without data sets or results."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipelines", "fastresnet", "benchmarks")
KINDS = {".c", ".json", ".py", ".safetensors", ".sh", ".typed"}
"""Suffixes of what is installed."""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with both, as `python -m build` makes them."""
    build = pytest.importorskip("hatchling.build")
    folder = tmp_path_factory.mktemp("dist")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        build.build_wheel(str(folder))
        build.build_sdist(str(folder))
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as file:
        yield file


@pytest.fixture(scope="module")
def source_names(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as file:
        return {name.partition("/")[2] for name in file.getnames()}


def test_wheel_has_every_file_of_the_packages_but_results(wheel):
    paths = (path.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*"))
    expected = {path.as_posix() for path in paths if path.suffix in KINDS and "results" not in path.parts}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected
    assert {"pipelines/augment.c", "fastresnet/zoo.json", "fastresnet/pretrained/resnet20.safetensors"} < expected
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.namelist())


def test_source_distribution_can_be_tested_and_built(source_names):
    folders = {"benchmarks", "docs", "examples", "fastresnet", "notebooks", "pipelines", "tests"}
    files = {"Makefile", "LICENSE", "PKG-INFO", "README.md", "benchmarks/results/loaders-2-cores.png", "mkdocs.yml"}
    tests = {f"tests/{path.relative_to(ROOT / 'tests').as_posix()}" for path in (ROOT / "tests").rglob("*.py")}
    assert files | tests < source_names
    visible = {name.split("/")[0] for name in source_names if "/" in name and not name.startswith(".")}
    assert visible == folders  # no runs, no data sets


def test_both_are_small(built):
    assert all(path.stat().st_size < 8 << 20 for path in built.iterdir())  # of which weights are 6


def test_unpacked_wheel_works_by_itself(wheel, tmp_path):
    wheel.extractall(tmp_path)
    program = "import fastresnet; print(fastresnet.__file__, type(fastresnet.load_pretrained('resnet20')).__name__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(tmp_path / "fastresnet" / "__init__.py"), "CifarResNet"]
