"""Compiled augmentation against the PyTorch operators it replaces, and the fallback without a compiler."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import Augmentation, augment, compiler, open_pipeline
from pipelines.augment import Augment, NativeAugment, create_augment
from pipelines.errors import Note
from pipelines.sampling import draw

CPU = torch.device("cpu")


@pytest.fixture
def clear_compile_cache():
    """Clear the cache of the compiled function before and after the test."""
    augment._load.cache_clear()
    yield
    augment._load.cache_clear()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalization", ["half", "channel", "pixel"])
@pytest.mark.parametrize(
    "pixels",
    [
        {"crop_padding": 0, "flip": "none"},
        {"crop_padding": 4},
        {"crop_padding": 31, "cutout": 32},
        {"crop_padding": 31, "padding_mode": "reflect", "flip": "alternating", "cutout": 1},
        {"crop_padding": 4, "padding_mode": "reflect", "cutout": 16},
    ],
    ids=lambda pixels: " ".join(f"{name}={value}" for name, value in pixels.items()),
)
def test_native_augmentation_is_bit_equal_to_the_reference(dataset, dtype, normalization, pixels):
    augmentation = Augmentation(normalization=normalization, **pixels)
    compiled = create_augment(dataset, augmentation, CPU, dtype)
    assert isinstance(compiled, NativeAugment)
    reference = Augment(dataset, augmentation, CPU, dtype)
    images = np.asarray(dataset.train.images)
    rows = np.random.default_rng(0).integers(0, len(images), 200)
    draws = draw(3, 1, rows, augmentation)
    out, expected = compiled(images, rows, draws), reference(images, rows, draws)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, expected)


def test_every_byte_is_rounded_like_the_reference(dataset):
    """All 256 values in all places: drawn images need not contain them."""
    images = (np.arange(256)[:, None, None, None] + np.arange(3072).reshape(32, 32, 3)).astype(np.uint8)
    rows = np.arange(256)
    for normalization in ("half", "channel", "pixel"):
        augmentation = Augmentation(crop_padding=0, flip="none", normalization=normalization)
        draws = draw(0, 0, rows, augmentation)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            compiled = create_augment(dataset, augmentation, CPU, dtype)(images, rows, draws)
            assert torch.equal(compiled, Augment(dataset, augmentation, CPU, dtype)(images, rows, draws))


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-compiler", "no C compiler 'no-such-compiler'"), ("false", "cannot compile augment.c")],
)
def test_without_a_working_compiler_pytorch_is_used_with_a_note(
    dataset, monkeypatch, clear_compile_cache, compiler, reason
):
    settings = {
        "train": True, "batch_size": 64, "device": CPU, "dtype": torch.float32, "seed": 0,
        "augmentation": Augmentation(cutout=8),
    }  # fmt: skip
    with_compiler = open_pipeline("resident", dataset, **settings)
    augment._load.cache_clear()
    monkeypatch.setenv("CC", compiler)
    with pytest.warns(Note, match=reason):
        without = open_pipeline("resident", dataset, **settings)
    assert isinstance(without._augment, Augment)
    for a, b in zip(with_compiler.epoch(1), without.epoch(1), strict=True):
        assert torch.equal(a.images, b.images)
    with_compiler.close()
    without.close()


def test_the_compiler_may_be_named_with_options(dataset, monkeypatch, clear_compile_cache):
    monkeypatch.setenv("CC", "cc -Wall -Wextra -Werror")
    assert isinstance(create_augment(dataset, Augmentation(), CPU, torch.float32), NativeAugment)


def test_c_files_are_loaded_from_memory_where_no_folder_allows_it(dataset, tmp_path, monkeypatch, clear_compile_cache):
    loaded, load = [], ctypes.CDLL

    def refuse_files(path):
        if not path.startswith("/proc/self/fd/"):
            raise OSError(f"{path}: failed to map segment from shared object")  # as in a folder mounted noexec
        loaded.append(path)
        return load(path)

    monkeypatch.setattr(compiler.ctypes, "CDLL", refuse_files)
    assert isinstance(create_augment(dataset, Augmentation(), CPU, torch.float32), NativeAugment)
    (tmp_path / "answer.c").write_text("int answer(void) { return 42; }")
    assert compiler.compile_c(tmp_path / "answer.c").answer() == 42
    assert len(set(loaded)) == 2


def test_without_a_folder_for_temporary_files_there_is_no_compilation(monkeypatch):
    def fail():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(compiler.tempfile, "TemporaryDirectory", fail)
    with pytest.raises(compiler.CompilerError, match=r"no folder to compile in .*set TMPDIR to one"):
        compiler.compile_c(Path("any.c"))


def test_buffer_is_reused_once_unreferenced():
    buffers = augment._Buffers()
    batch = buffers.take(6000)
    part, address = batch.view(torch.bfloat16)[10:20], batch.data_ptr()
    del batch
    assert buffers.take(6000).data_ptr() != address
    del part
    assert buffers.take(6000).data_ptr() == address


def test_buffer_of_another_size_is_not_reused():
    buffers = augment._Buffers()
    buffers.take(6000)
    batch = buffers.take(8000)
    assert batch.shape == (8000,)
