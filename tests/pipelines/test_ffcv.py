"""FFCV's loader thread when it fails, hangs or is abandoned, and errors without FFCV."""

import os
import subprocess
import sys
import threading
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipelines import Augmentation
from pipelines.errors import RunError, UsageError

BATCHES = 6
"""Batches in an epoch of `pipeline`."""


@pytest.fixture(scope="module")
def pipeline(dataset, helpers, need):
    """One for all tests, compiled: from here on a batch takes milliseconds."""
    need("ffcv")
    pipeline = helpers.open_small("ffcv", dataset)
    assert len(list(pipeline.epoch(0))) == BATCHES
    yield pipeline
    pipeline.close()


@pytest.fixture
def in_thread(pipeline, monkeypatch):
    """`in_thread(batch, do)`: FFCV's thread calls `do` in place of making batch number `batch`."""
    from ffcv.loader.epoch_iterator import EpochIterator

    original = EpochIterator.run_pipeline

    def arm(batch, do):
        def armed(self, number, *arguments):
            return do() if number == batch else original(self, number, *arguments)

        monkeypatch.setattr(EpochIterator, "run_pipeline", armed)

    return arm


@pytest.fixture
def assert_works(pipeline, dataset, helpers, monkeypatch):
    """Remove the injected fault, and assert that an epoch is right and leaves no thread."""

    def assert_right():
        monkeypatch.undo()
        images, labels = helpers.collect(pipeline, 3)
        expected_images, expected_labels = helpers.expected_epoch(dataset, 3, Augmentation())
        assert np.array_equal(images, expected_images)
        assert np.array_equal(labels, expected_labels)
        assert loader_threads() == []

    return assert_right


def loader_threads():
    from ffcv.loader.epoch_iterator import EpochIterator

    return [thread for thread in threading.enumerate() if isinstance(thread, EpochIterator)]


# --- threads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("bit rot"), MemoryError("no room")], ids=repr)
@pytest.mark.parametrize("batch", [0, 2, BATCHES - 1])
def test_thread_error_is_raised_after_the_batches_before_it(
    pipeline, in_thread, assert_works, dataset, helpers, monkeypatch, batch, error
):
    from pipelines import ffcv

    def fail():
        raise error

    in_thread(batch, fail)
    monkeypatch.setattr(ffcv, "TIMEOUT_S", 20.0)  # its message would be another
    delivered = []
    with pytest.raises(RunError) as caught:
        delivered.extend(batch.images for batch in pipeline.epoch(1))
    assert repr(error) in str(caught.value)
    assert caught.value.__cause__ is error
    assert caught.value.exit_code == 1
    assert len(delivered) == batch
    expected = helpers.expected_epoch(dataset, 1, Augmentation())[0]
    for i, images in enumerate(delivered):
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), expected[28 * i : 28 * i + 28])
    assert loader_threads() == []
    assert_works()


def test_thread_error_in_an_abandoned_epoch_leaves_no_thread(pipeline, in_thread, assert_works):
    failed = threading.Event()

    def fail():
        failed.set()
        raise ValueError("bit rot")

    in_thread(3, fail)
    iterator = pipeline.epoch(1)
    next(iterator)
    assert failed.wait(20)  # the queue is full of what came before
    del iterator
    assert loader_threads() == []
    assert_works()


def test_hanging_thread_is_an_error_after_the_timeout(pipeline, in_thread, assert_works, monkeypatch):
    from pipelines import ffcv

    release, came_back = threading.Event(), []

    def hang():
        release.wait(20)
        came_back.append(True)
        raise ValueError("released")

    in_thread(0, hang)
    monkeypatch.setattr(ffcv, "TIMEOUT_S", 1.0)
    try:
        with pytest.raises(RunError, match="FFCV has delivered nothing for 1 s"):
            next(pipeline.epoch(1))
        assert not came_back
    finally:
        release.set()
        for thread in loader_threads():
            thread.join(20)
    assert loader_threads() == []
    assert_works()


@pytest.mark.parametrize("taken", [1, BATCHES - 1])
def test_abandoned_epoch_leaves_no_thread(pipeline, assert_works, taken):
    iterator = pipeline.epoch(1)
    for _ in range(taken):
        next(iterator)
    del iterator
    assert loader_threads() == []
    assert_works()


@pytest.mark.parametrize("held", [False, True], ids=["dropped", "held"])
def test_closed_pipeline_leaves_no_thread(dataset, helpers, need, held):
    """This holds while the iterator is still referenced, too, as by a traceback."""
    need("ffcv")
    closed = helpers.open_small("ffcv", dataset)
    iterator = closed.epoch(1)
    next(iterator)
    if not held:
        del iterator
    closed.close()
    try:
        assert loader_threads() == []
    finally:
        iterator = None


# --- the library -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def process(dataset, need):
    """A process in which torch has three threads and numba is allowed one: what it wrote, or the error."""
    need("ffcv")
    program = f"""
import torch
torch.set_num_threads(3)
import pipelines.ffcv
from ffcv.pipeline.compiler import Compiler
print(Compiler.num_threads, torch.get_num_threads(), flush=True)
from pathlib import Path
from pipelines import Augmentation, open_pipeline
from pipelines.store import open_store
settings = dict(device=torch.device("cpu"), dtype=torch.uint8, seed=0, augmentation=Augmentation())
dataset = open_store(Path({str(dataset.folder)!r}))
print(len(list(open_pipeline("ffcv", dataset, train=True, batch_size=28, **settings).epoch(0))))
"""
    command, environment = [sys.executable, "-c", program], {**os.environ, "NUMBA_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_importing_ffcv_keeps_the_threads_of_torch(process):
    assert process.stdout.splitlines()[0] == "1 3"  # FFCV has set both to 1


def test_epoch_runs_with_the_threads_that_numba_allows(process):
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[1:] == [str(BATCHES)]


BROKEN = {
    "not installed": ModuleNotFoundError("No module named 'ffcv'"),
    "not built": ImportError("No module named 'ffcv._libffcv'"),
    "without OpenCV": OSError("libopencv_core.so.406: cannot open shared object file"),
}


@pytest.fixture(params=BROKEN.values(), ids=BROKEN)
def error(request, break_import):
    """Return the reason why FFCV cannot be imported."""
    break_import("ffcv", request.param)
    return request.param


def assert_has_install_instructions(message, error):
    for part in (str(error), "'fastresnet[ffcv]'", "libopencv-dev", "libturbojpeg0-dev", "pkg-config"):
        assert part in message
    assert len(message.splitlines()) == 1


def test_missing_ffcv_names_the_extra_and_the_debian_packages(dataset, helpers, error):
    torch.set_num_threads(2)
    with pytest.raises(UsageError) as caught:
        helpers.open_small("ffcv", dataset)
    assert caught.value.exit_code == 2
    assert_has_install_instructions(str(caught.value), error)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    "command",
    [["train", "smoke", "--pipeline", "ffcv", "--out"], ["prepare", "--formats", "raw,beton", "--root"]],
    ids=["train", "prepare"],
)
def test_commands_without_ffcv_exit_with_2_before_any_work(run, tmp_path, error, command):
    code, out, err = run(*command, tmp_path / "made", "--data", "shapes10")
    assert (code, out) == (2, "")
    assert_has_install_instructions(err.strip(), error)
    assert not (tmp_path / "made").exists()


def test_stop_synchronises_cuda_streams_before_freeing_memory(need, monkeypatch):
    need("ffcv")
    from pipelines import ffcv

    done = []
    iterator = ffcv._EpochIterator.__new__(ffcv._EpochIterator)
    iterator.terminate_event, iterator._hangs, iterator.is_alive = threading.Event(), False, lambda: False
    iterator.cuda_streams = [SimpleNamespace(synchronize=partial(done.append, number)) for number in (1, 2)]
    iterator.close = lambda: done.append("closed")
    monkeypatch.setattr(ffcv, "IS_CUDA", True)
    iterator.stop()
    assert done == [1, 2, "closed"]
