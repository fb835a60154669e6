"""Short versions of the campaigns in `fuzz.py` and `kills.py`."""

import dataclasses
import faulthandler
import mmap
import os
import random
import time
import warnings

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pipelines.base import is_installed
from tests import limits
from tests.faults import fuzz, kills

KINDS = [
    *("archive tar.gz", "archive tar.xz", "archive zip", "archive tar", "binary batches"),
    *("npz", "mat", "parquet"),
    *("store", "meta.json", "beton", "jpeg"),
    *(f"image {name}" for name in ("png", "jpg", "gif", "bmp", "tiff", "webp", "ppm")),
    *("checkpoint", "state dict (zip)", "state dict (pickle)", "description", "pickle"),
    *("config", "run", "benchmark result"),
]


NEEDED = {"beton": "ffcv", "mat": "scipy", "parquet": "pyarrow"}
"""Libraries that make, or read, some kinds."""


@pytest.fixture(scope="module")
def kinds(known_shapes, tmp_path_factory):
    """Kinds of files that can be made here: some need a library."""
    made = fuzz.kinds(tmp_path_factory.mktemp("kinds"))
    assert list(made) == [name for name in KINDS if name not in NEEDED or is_installed(NEEDED[name])]
    return {name: (kind, kind.read(kind.folder)) for name, kind in made.items()}


@settings(
    max_examples=500, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(name=st.sampled_from(KINDS), number=st.integers(0, 100), choose=st.randoms(use_true_random=False))
def test_damaged_files_give_the_right_content_or_a_user_error(kinds, tmp_path_factory, name, number, choose):
    assume(name in kinds)
    kind, expected = kinds[name]
    file = kind.damaged[number % len(kind.damaged)]
    data = fuzz.damage((kind.folder / file).read_bytes(), choose)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuzz.try_input(kind, file, data, tmp_path_factory.mktemp("damaged"), expected)


@pytest.mark.parametrize("name", KINDS)
def test_undamaged_files_give_the_right_content(kinds, need, tmp_path, name):
    if name in NEEDED:
        need(NEEDED[name])
        pytest.importorskip(NEEDED[name])
    kind, expected = kinds[name]
    data = (kind.folder / kind.damaged[0]).read_bytes()
    assert fuzz.try_input(kind, kind.damaged[0], data, tmp_path, expected) == "right"


def new_pages(size):
    """Write to newly mapped memory: the heap may have free memory from earlier tests."""
    with mmap.mmap(-1, size) as memory:
        return memory.write(b"x" * size)


@pytest.mark.parametrize(
    ("read", "defect"),
    [
        (lambda _: "another", "another content"),
        (lambda _: time.sleep(30), "not done in 2 s"),
        (lambda _: new_pages(100 << 20), "bytes of memory"),
    ],
    ids=["wrong content", "hangs", "takes too much memory"],
)
def test_fuzzer_detects_wrong_content_hangs_and_excess_memory(kinds, tmp_path, monkeypatch, read, defect):
    monkeypatch.setattr(limits, "SECONDS", 2 if defect == "not done in 2 s" else 60)
    kind, expected = kinds["checkpoint"]
    bad = dataclasses.replace(kind, read=read, verified=defect == "another content")
    with pytest.raises(limits.Defect, match=defect):
        fuzz.try_input(bad, "last.ckpt", b"", tmp_path, expected)


def test_fuzzer_detects_a_crash_of_the_reader(kinds, tmp_path):
    kind, expected = kinds["checkpoint"]

    def read(folder):
        if folder == kind.folder:
            return expected
        faulthandler.disable()  # pytest's, whose traceback would look like a failure
        return os.abort()

    with pytest.raises(limits.Defect, match="the process died"):
        fuzz.try_inputs_in_child(dataclasses.replace(kind, read=read), range(1), tmp_path)


@pytest.mark.usefixtures("quick_processes")
def test_killed_commands_resume_to_the_uninterrupted_result(tmp_path):
    campaign = kills.Campaign(kills.SCENARIOS["train, twice at once"], tmp_path, random.Random(2))
    while campaign.kills < 2:
        campaign.run(2)
    assert campaign.counts["ends"]
