"""Fixtures that all tests share, and no silent skips in CI.

They are a small drawn data set, CIFAR-10 if its archive is available, and the command line in-process.
"""

import dataclasses
import functools
import gc
import importlib.util
import multiprocessing
import os
import shutil
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import pipelines
from fastresnet import cli, models, weights
from fastresnet.run_folder import RunFolder
from pipelines import LIBRARIES
from pipelines.prepare import prepare

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # of onnxruntime in the tests themselves
os.environ["NUMBA_OPT"] = "0"  # optimising takes half of FFCV's compilation
# Inductor remembers for the whole process where its headers are: not in a home folder that a test has made.
os.environ.setdefault("XDG_CACHE_HOME", str(Path.home() / ".cache"))

os.environ.pop("COLUMNS", None)  # pytest-xdist sets it, and tables are folded to it

# PyTorch's modules and all tests live until the end: collecting garbage among them took a tenth of the time.
gc.set_threshold(50_000, 20, 10)


def pytest_collection_finish():
    gc.freeze()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """Fail a run in CI for a skipped test, unless it needs a GPU."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not os.environ.get("CI"):
        return
    skipped = [report for report in reporter.stats.get("skipped", []) if "gpu" not in report.keywords]
    if skipped and session.exitstatus == pytest.ExitCode.OK:
        reporter.write_line(
            f"\n{len(skipped)} tests skipped in CI that do not need a GPU: that is a failure.", red=True
        )
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def quiet(*_):
    """Ignore a progress report."""


@pytest.fixture(scope="session")
def need():
    """`need("dali")` skips the test, visibly, where the library of that pipeline is not installed."""

    def need_library(pipeline: str) -> str:
        if pipeline in LIBRARIES:
            threads = torch.get_num_threads()
            pytest.importorskip(LIBRARIES[pipeline])
            torch.set_num_threads(threads)  # importing FFCV sets it to 1
        return pipeline

    return need_library


@pytest.fixture
def break_import(monkeypatch):
    """`break_import("dali", error)`: importing the library of that pipeline raises `error`.

    Its imported modules, and our own module for it, leave `sys.modules` until the end of the test.
    """

    def break_library(pipeline: str, error: Exception) -> None:
        library, ours = LIBRARIES[pipeline], f"pipelines.{pipeline}"
        for name in [name for name in sys.modules if name == ours or f"{name}.".startswith(f"{library}.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(pipelines, pipeline, raising=False)

        class Broken:
            @staticmethod
            def find_spec(name, *_):
                if name == library:
                    torch.set_num_threads(1)  # as importing FFCV does
                    raise error

        parent = types.ModuleType(library.partition(".")[0])  # of nvidia.dali
        parent.__path__ = []
        if parent.__name__ != library:
            monkeypatch.setitem(sys.modules, parent.__name__, parent)
        monkeypatch.setattr(sys, "meta_path", [Broken, *sys.meta_path])

    threads = torch.get_num_threads()
    yield break_library
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def python(tmp_path_factory) -> str:
    """Return a program that replaces `sys.executable` and starts quickly (tests/forks.py)."""
    folder, root = tmp_path_factory.mktemp("forks"), Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.forks", folder]
    with subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE) as server:
        assert server.stdout.readline()
        yield str(folder / "python")
        server.terminate()


@pytest.fixture(scope="session")
def quick_workers(python):
    """Make `multiprocessing` spawn its processes with `python`, from now on."""
    multiprocessing.set_executable(python)


@pytest.fixture
def quick_processes(python, quick_workers, monkeypatch):
    """Make the test, and the code under test, start `python` in place of `sys.executable`."""
    monkeypatch.setattr(sys, "executable", python)


@pytest.fixture(scope="session")
def cifar10_archive() -> Path:
    """The official archive (python version), where $FASTRESNET_TEST_SOURCE names it."""
    source = os.environ.get("FASTRESNET_TEST_SOURCE")
    if not source:
        pytest.skip("FASTRESNET_TEST_SOURCE does not name the CIFAR-10 archive")
    return Path(source)


@pytest.fixture(scope="session")
def cifar10_folder(cifar10_archive, tmp_path_factory) -> Path:
    """The archive's folder, unpacked once for all workers of pytest-xdist: that takes seconds."""
    place = tmp_path_factory.getbasetemp()
    place = (place.parent if "PYTEST_XDIST_WORKER" in os.environ else place) / "cifar10"
    with FileLock(f"{place}.lock"):
        if not place.exists():
            shutil.unpack_archive(cifar10_archive, f"{place}.part")
            Path(f"{place}.part").rename(place)
    return place / "cifar-10-batches-py"


@pytest.fixture(scope="session")
def data_root(tmp_path_factory) -> Path:
    """A data root with a small shapes10: 171 training and 50 test images, so that no batch size divides them.

    In every format that can be written here.
    """
    root = tmp_path_factory.mktemp("data")
    formats = ("raw", "beton", "jpeg") if importlib.util.find_spec("ffcv") else ("raw", "jpeg")
    prepare("shapes10", root, quiet, train_images=171, test_images=50, formats=formats)
    return root


@pytest.fixture(scope="session")
def dataset(data_root):
    return prepare("shapes10", data_root, quiet)[0]


@pytest.fixture(scope="session", autouse=True)
def known_entry_points():
    """Look for those of installed packages once for each `sys.path`: it takes longer than reading most test data."""
    find = metadata.entry_points

    @functools.cache
    def find_once(_, **selection):
        return find(**selection)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata, "entry_points", lambda **selection: find_once(tuple(sys.path), **selection))
        yield


@pytest.fixture(scope="session")
def draw_curves():
    """The method of `RunFolder` that draws the curves of a run, which `no_curves` replaces."""
    return RunFolder.draw_curves


@pytest.fixture(scope="session", autouse=True)
def no_curves(draw_curves):
    """Draw no curves at the end of runs: that takes longer than such runs themselves."""

    def draw_nothing(run, rows):
        if rows and run.writes:
            (run.path / "curves.png").write_bytes(b"a picture")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "draw_curves", draw_nothing)
        yield


@pytest.fixture(scope="module")
def known_shapes():
    """Remember the tensors of each known network: files are compared with those of many, which takes longest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "_shapes", functools.cache(weights._shapes))
        yield


@pytest.fixture
def resnet8(monkeypatch):
    """Name a network with one block in each stage, which takes a third of the time of ResNet-20."""
    monkeypatch.setitem(models.MODELS, "resnet8", dataclasses.replace(models.MODELS["resnet20"], depth=8))
    return "resnet8"


@pytest.fixture
def run(capsys, monkeypatch, data_root):
    """Run a command line in this process: `code, out, err = run("train", ...)`."""
    monkeypatch.setenv("FASTRESNET_DATA", str(data_root))

    def run_command(*arguments):
        capsys.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:  # the help
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return run_command


WITHOUT_TORCHVISION = """
import sys
from importlib import metadata

def version(name, original=metadata.version):
    if name == "torchvision":
        raise metadata.PackageNotFoundError(name)
    return original(name)

metadata.version = version
sys.modules["torchvision"] = None
"""


@pytest.fixture
def without_torchvision(tmp_path) -> dict[str, str]:
    """The environment of a process in which, and in those that it starts, there is no torchvision."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "sitecustomize.py").write_text(WITHOUT_TORCHVISION)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "hidden"), str(Path(__file__).parents[1])])}
