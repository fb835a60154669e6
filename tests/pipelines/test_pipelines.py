"""The contract that all pipelines share, checked against images augmented one by one in NumPy."""

import contextlib
import gc
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import pipelines
from pipelines import PIPELINES, Augmentation, choose_pipeline
from pipelines.base import free_memory, is_installed, usable_processors
from pipelines.errors import DataError, UsageError
from pipelines.prepare import prepare

CPU = torch.device("cpu")
EVERYTHING = Augmentation(padding_mode="reflect", flip="alternating", cutout=8, normalization="channel")
AUGMENTATIONS = [Augmentation(), EVERYTHING]


@pytest.fixture(params=PIPELINES, scope="module")
def name(request, need):
    return need(request.param)


@pytest.fixture(scope="module")
def opened(name, dataset, helpers):
    """`helpers.open_small` on `dataset` that opens every pipeline once: FFCV compiles each for seconds."""
    cache = {}

    def open_once(pipeline, **changes):
        key = (pipeline, *sorted(changes.items()))
        if key not in cache:
            cache[key] = helpers.open_small(pipeline, dataset, **changes)
        return cache[key]

    yield open_once
    for pipeline in cache.values():
        pipeline.close()


# --- pixels and labels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=["default", "everything"])
def test_pixels_and_labels_equal_the_definition_over_two_epochs(name, opened, dataset, helpers, augmentation):
    pipeline = opened(name, augmentation=augmentation)
    for epoch in (0, 1):
        images, labels = helpers.collect(pipeline, epoch)
        expected_images, expected_labels = helpers.expected_epoch(dataset, epoch, augmentation)
        assert np.array_equal(images, expected_images)
        assert np.array_equal(labels, expected_labels)


@pytest.mark.parametrize("start", [1, 3, 5, 6])
def test_starting_in_the_middle_gives_the_rest_of_the_epoch(name, opened, dataset, helpers, start):
    pipeline = opened(name)
    assert len(pipeline) == 6
    expected_images, expected_labels = helpers.expected_epoch(dataset, 1, Augmentation())
    batches = list(pipeline.epoch(1, start))
    assert len(batches) == 6 - start
    for i, batch in enumerate(batches, start):
        assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), expected_images[28 * i : 28 * i + 28])
        assert np.array_equal(batch.labels.numpy(), expected_labels[28 * i : 28 * i + 28])


@pytest.mark.parametrize("taken", [0, 1, 2, 6])
def test_abandoned_epoch_does_not_affect_the_next(name, opened, dataset, helpers, taken):
    pipeline = opened(name)
    iterator = pipeline.epoch(0)
    for _ in range(taken):
        next(iterator)
    del iterator
    images, labels = helpers.collect(pipeline, 1)
    expected_images, expected_labels = helpers.expected_epoch(dataset, 1, Augmentation())
    assert np.array_equal(images, expected_images)
    assert np.array_equal(labels, expected_labels)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("train", [True, False])
def test_joined_batches_of_ranks_equal_the_single_process(name, opened, world_size, train):
    single = opened(name, train=train)
    ranks = [opened(name, train=train, rank=rank, world_size=world_size) for rank in range(world_size)]
    for epoch in (0, 2):
        for whole, *parts in zip(single.epoch(epoch), *(rank.epoch(epoch) for rank in ranks), strict=True):
            assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
            assert torch.equal(whole.labels, torch.cat([part.labels for part in parts]))
            assert whole.valid == sum(part.valid for part in parts)


def test_evaluation_gives_every_test_image_once_in_order_unaugmented(name, opened, dataset):
    batches = list(opened(name, train=False, augmentation=EVERYTHING).epoch(0))
    assert {len(batch.images) for batch in batches} == {28}
    images = torch.cat([batch.images[: batch.valid] for batch in batches]).permute(0, 2, 3, 1)
    labels = torch.cat([batch.labels[: batch.valid] for batch in batches])
    assert np.array_equal(images.numpy(), dataset.test.images)
    assert np.array_equal(labels.numpy(), dataset.test.labels)


def test_a_held_out_part_is_never_trained_on_and_evaluated_whole(name, dataset, helpers):
    training, validation = dataset.hold_out(50)
    plain = Augmentation(crop_padding=0, flip="none")
    pipeline = helpers.open_small(name, training, augmentation=plain, batch_size=11)
    trained = {image.tobytes() for epoch in range(3) for image in helpers.collect(pipeline, epoch)[0]}
    pipeline.close()
    held = {dataset.train.images[i].tobytes() for i in validation.test.ids}
    assert len(held) == 50
    assert len(trained) == 121
    assert not held & trained
    pipeline = helpers.open_small(name, validation, train=False, batch_size=25)
    images, labels = helpers.collect(pipeline, 0)
    pipeline.close()
    assert np.array_equal(images, dataset.train.images[validation.test.ids])
    assert np.array_equal(labels, dataset.train.labels[validation.test.ids])


def test_batches_stay_valid_after_the_pipeline_moves_on(name, opened):
    pipeline = opened(name)
    kept = list(pipeline.epoch(0))
    copies = [(batch.images.clone(), batch.labels.clone()) for batch in kept]
    list(pipeline.epoch(1))
    for batch, (images, labels) in zip(kept, copies, strict=True):
        assert torch.equal(batch.images, images)
        assert torch.equal(batch.labels, labels)


def test_a_file_truncated_while_in_use_is_named(name, tmp_path, helpers):
    formats = ("raw", "beton") if name == "ffcv" else ("raw",)
    small, _ = prepare("shapes10", tmp_path, helpers.ignore, train_images=171, test_images=20, formats=formats)
    file = small.folder / ("train.beton" if name == "ffcv" else "train_images.npy")
    with contextlib.closing(helpers.open_small(name, small)) as pipeline:
        batches = pipeline.epoch(0)
        next(batches)
        os.truncate(file, file.stat().st_size - 1)  # its last page stays readable
        with pytest.raises(DataError, match=f"{file}.*fastresnet prepare"):
            next(batches)
        batches.close()


def test_impossible_arguments_are_refused(dataset, helpers):
    with pytest.raises(UsageError, match="did you mean 'resident'"):
        helpers.open_small("residnet", dataset)
    with pytest.raises(UsageError, match="unknown decoder 'jpg': did you mean 'jpeg'"):
        helpers.open_small("dali", dataset, decode="jpg")
    with pytest.raises(UsageError, match="batch size 400 is larger than the training set, 171"):
        helpers.open_small("resident", dataset, batch_size=400)
    with pytest.raises(UsageError, match="batch size 1 is smaller than the number of ranks, 2"):
        helpers.open_small("resident", dataset, batch_size=1, world_size=2)


# --- normalised values -------------------------------------------------------------------------------------------

# Type, normalisation, split, rank and world size: every pair of settings occurs.
NORMALISED = [
    (torch.float32, "half", True, 0, 1),
    (torch.float32, "channel", False, 1, 2),
    (torch.float32, "pixel", True, 0, 2),
    (torch.bfloat16, "half", False, 0, 2),
    (torch.bfloat16, "channel", True, 0, 1),
    (torch.bfloat16, "pixel", False, 0, 1),
    (torch.float16, "half", False, 1, 2),
    (torch.float16, "channel", False, 0, 1),
    (torch.float16, "pixel", True, 1, 2),
]


def ulps(a, b):
    """Count the values of their type between `a` and `b`, element by element, and one for `b` itself."""
    assert a.dtype == b.dtype
    integers = {2: torch.int16, 4: torch.int32}[a.element_size()]

    def rank(values):
        bits = values.contiguous().view(integers).long()
        return torch.where(bits < 0, torch.iinfo(integers).min - bits, bits)

    return (rank(a) - rank(b)).abs()


def most_ulps(name, dtype):
    """DALI divides by the standard deviation, the others multiply by its inverse: in float32 two roundings more."""
    return 2 if (name, dtype) == ("dali", torch.float32) else 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ulps_count_the_representable_values(dtype):
    one, zero, inf = (torch.tensor([value], dtype=dtype) for value in (1.0, 0.0, torch.inf))
    up, down, tiny = torch.nextafter(one, inf), torch.nextafter(one, -inf), torch.nextafter(zero, inf)
    assert ulps(one, one) == ulps(zero, -zero) == 0
    assert ulps(one, up) == ulps(down, one) == ulps(-up, -one) == ulps(tiny, zero) == ulps(-zero, -tiny) == 1
    assert ulps(up, down) == ulps(tiny, -tiny) == 2
    assert ulps(one, 2 * one) == 1 / torch.finfo(dtype).eps


def formula(dataset, pixels, normalization):
    """float64 values of uint8 `pixels` [N, 32, 32, 3], as [N, 3, 32, 32]; and the scale of a pixel [3]."""
    mean, std = {
        "half": (0.5, 0.5),
        "channel": (np.array(dataset.mean), np.array(dataset.std)),
        "pixel": (dataset.train.images.astype(np.float64).mean(axis=0) / 255, 1.0),
    }[normalization]
    scale = torch.from_numpy(np.broadcast_to(1 / (255 * np.asarray(std, np.float64)), 3).copy())
    return torch.from_numpy(((pixels / 255 - mean) / std).transpose(0, 3, 1, 2)), scale


@pytest.mark.parametrize(("dtype", "normalization", "train", "rank", "world_size"), NORMALISED)
def test_normalised_values_follow_the_formula_and_are_those_of_resident(
    name, opened, dataset, helpers, dtype, normalization, train, rank, world_size
):
    augmentation = Augmentation(normalization=normalization, flip="alternating", cutout=8)
    settings = {
        "dtype": dtype, "augmentation": augmentation, "train": train, "rank": rank, "world_size": world_size,
    }  # fmt: skip
    pipeline, resident = opened(name, **settings), opened("resident", **settings)
    rows = slice(28 * rank // world_size, 28 * (rank + 1) // world_size)
    for epoch, start in ((0, 0), (1, 1), (1, 0)):
        if train:
            pixels = helpers.expected_epoch(dataset, epoch, augmentation)[0]
        else:
            pixels = dataset.test.images[np.minimum(np.arange(56), 49)]
        batches = zip(pipeline.epoch(epoch, start), resident.epoch(epoch, start), strict=True)
        for step, (batch, reference) in enumerate(batches, start):
            assert batch.images.dtype == dtype
            assert batch.labels.dtype == torch.int64
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            assert batch.valid == reference.valid
            assert torch.equal(batch.labels, reference.labels)
            assert ulps(batch.images, reference.images).max() <= most_ulps(name, dtype)
            expected, scale = formula(dataset, pixels[28 * step : 28 * step + 28][rows], normalization)
            # Arithmetic is in float32: the mean, under 256, is rounded twice (2**-17 each time); difference, scale and
            # product once each. Then comes the rounding to the type, which for small values of fp16 is subnormal.
            limits, single = torch.finfo(dtype), torch.finfo(torch.float32).eps
            arithmetic = 2**-16 * scale[:, None, None] + 1.5 * single * expected.abs()
            rounding = limits.eps / 2 * torch.clamp(expected.abs() + arithmetic, min=limits.tiny)
            assert ((batch.images.double() - expected).abs() <= arithmetic + rounding).all()
        assert step == len(pipeline) - 1


# --- leaks -------------------------------------------------------------------------------------------------------


def resources():
    """Threads, open files and resident bytes of this process."""
    counts = []
    for _ in range(30):  # a thread that was joined may take a moment to disappear from /proc
        counts.append(len(os.listdir("/proc/self/task")))
        time.sleep(0.01)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return min(counts), len(os.listdir("/proc/self/fd")), pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def frequent_garbage_collection():
    """Collect garbage as often as by default, not as rarely as in the other tests."""
    thresholds = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*thresholds)


@pytest.mark.usefixtures("frequent_garbage_collection")
@pytest.mark.parametrize("batches", [6, 1], ids=["whole", "abandoned after one batch"])
def test_fifty_epochs_leak_no_threads_files_or_memory(name, opened, batches):
    pipeline = opened(name)

    def run_epochs(count):
        for epoch in range(count):
            iterator = pipeline.epoch(epoch)
            for _ in range(batches):
                next(iterator)
            del iterator
        for _ in pipeline.epoch(count):  # to the end: no batch is in preparation when counting starts
            pass

    # A leak of a single batch of uint8 images in every epoch, the least that could be kept, would take twice as much.
    limit = 50 * 28 * 3072 / 2
    run_epochs(10)
    for _ in range(2):  # a leak grows in both rounds; the rest of a process that has run other tests may grow in one
        threads, files, memory = resources()
        run_epochs(50)
        threads_after, files_after, memory_after = resources()
        assert threads_after == threads
        assert files_after <= files  # fewer, if garbage of earlier tests was collected meanwhile
        growth = memory_after - memory
        if growth < limit:
            break
    assert growth < limit


# --- auto --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "installed", "beton", "expected", "reason"),
    [
        (4.0, {"nvidia.dali", "ffcv"}, True, "resident", "2,000 MB of images, 4.0 GB of memory free"),
        (3.9, {"nvidia.dali", "ffcv"}, True, "dali", "2,000 MB of images, 3.9 GB of memory free; DALI is installed"),
        (3.9, {"ffcv"}, True, "ffcv", "3.9 GB of memory free; FFCV is installed"),
        (3.9, {"ffcv"}, False, "torchvision", "3.9 GB of memory free; neither DALI nor FFCV"),
        (3.9, set(), True, "torchvision", "3.9 GB of memory free; neither DALI nor FFCV"),
    ],
)
def test_auto_picks_resident_if_it_fits_else_the_fastest_installed(
    store_of_2_gb, monkeypatch, free, installed, beton, expected, reason
):
    monkeypatch.setattr(pipelines, "free_memory", lambda _: int(free * 1e9))
    monkeypatch.setattr(pipelines, "is_installed", lambda module: module in installed)
    if beton:
        (store_of_2_gb.folder / "beton.json").write_text("{}")
    chosen, why = choose_pipeline(store_of_2_gb, CPU)
    assert chosen == expected
    assert reason in why


@pytest.fixture
def store_of_2_gb(dataset, tmp_path):
    """A data set of 2.0 GB, made of broadcast arrays that take no memory."""

    def images(count):
        return np.broadcast_to(np.zeros((), np.uint8), (count, 32, 32, 3))

    train, test = replace(dataset.train, images=images(500_000)), replace(dataset.test, images=images(151_041))
    return replace(dataset, train=train, test=test, folder=tmp_path)


def test_is_installed_distinguishes_missing_libraries():
    assert is_installed("torch")
    assert not is_installed("no_such_module")
    assert not is_installed("no_such_package.module")


def test_free_cpu_memory_is_at_most_the_total():
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total = 1024 * int(lines["MemTotal"].split()[0])
    assert 0 < free_memory(CPU) <= total


def test_processors_are_those_that_the_process_may_use(monkeypatch):
    """Taskset limits them. Without `sched_getaffinity`, all processors count."""
    code = "import os, pipelines.base; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])"
    command = [sys.executable, "-c", f"{code}; print(pipelines.base.usable_processors())"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "1\n"
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_processors() == os.cpu_count()


def test_two_open_epochs_of_torchvision_do_not_interfere(dataset, helpers):
    pipeline = helpers.open_small("torchvision", dataset, train=False, batch_size=20)
    first = pipeline.epoch(0)
    next(first)
    next(pipeline.epoch(0, 2))
    rows = [batch.labels for batch in first]
    assert np.array_equal(torch.cat(rows)[: len(dataset.test) - 20], dataset.test.labels[20:])
    pipeline.close()


@pytest.mark.parametrize(("processors", "workers"), [(3, 3), (64, 8)])
def test_torchvision_has_a_worker_for_each_usable_processor(dataset, helpers, monkeypatch, processors, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)))
    pipeline = helpers.open_small("torchvision", dataset)
    assert pipeline._loader.num_workers == workers
    pipeline.close()


# --- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=["default", "everything"])
def test_pipelines_on_the_gpu_give_the_same_bits(name, opened, dataset, helpers, augmentation):
    pipeline = opened(name, device=torch.device("cuda"), augmentation=augmentation)
    for epoch in (0, 1):
        expected_images, expected_labels = helpers.expected_epoch(dataset, epoch, augmentation)
        batches = list(pipeline.epoch(epoch))
        images = torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1).cpu()
        assert batches[0].images.is_cuda
        assert np.array_equal(images.numpy(), expected_images)
        assert np.array_equal(torch.cat([batch.labels for batch in batches]).cpu().numpy(), expected_labels)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "normalization", "train", "rank", "world_size"), NORMALISED)
def test_normalised_values_on_the_gpu_are_those_of_resident_on_the_cpu(
    name, opened, dtype, normalization, train, rank, world_size
):
    settings = {
        "dtype": dtype, "augmentation": Augmentation(normalization=normalization, flip="alternating", cutout=8),
        "train": train, "rank": rank, "world_size": world_size,
    }  # fmt: skip
    pipeline, resident = opened(name, device=torch.device("cuda"), **settings), opened("resident", **settings)
    for epoch, start in ((0, 0), (1, 1)):
        for batch, reference in zip(pipeline.epoch(epoch, start), resident.epoch(epoch, start), strict=True):
            assert batch.images.is_cuda
            assert batch.labels.is_cuda
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            images = batch.images.cpu()
            differs = ulps(images, reference.images) > most_ulps(name, dtype)
            if name == "dali" and dtype == torch.float32:  # its kernel adds -mean * scale, rounded, which is below 4
                differs &= (images - reference.images).abs() > 2**-23
            assert not differs.any()
            assert torch.equal(batch.labels.cpu(), reference.labels)


@pytest.mark.gpu
def test_free_gpu_memory_is_at_most_the_total():
    device = torch.device("cuda")
    assert 0 < free_memory(device) <= torch.cuda.get_device_properties(device).total_memory
