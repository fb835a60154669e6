"""DALI's image decoder against others, and errors without DALI."""

import io
import platform
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import Augmentation
from pipelines.errors import UsageError
from pipelines.formats import JpegSettings
from pipelines.prepare import prepare

torchvision_io = pytest.importorskip("torchvision.io")

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")

EVERYTHING = Augmentation(padding_mode="reflect", flip="alternating", cutout=8, normalization="channel")


# --- JPEG --------------------------------------------------------------------------------------------------------


def by_pillow(encoded):
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image)


def by_torchvision(encoded):
    buffer = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    return torchvision_io.decode_jpeg(buffer, torchvision_io.ImageReadMode.RGB).permute(1, 2, 0).numpy()


def decoded_images(dataset, split, decode=by_pillow):
    """uint8 [N, 32, 32, 3]: the images of a shard."""
    with tarfile.open(dataset.folder / f"{split}.tar") as archive:
        encoded = [archive.extractfile(member).read() for member in archive if member.name.endswith(".jpg")]
    return np.stack([decode(image) for image in encoded])


@pytest.fixture(scope="module")
def decoded(dataset):
    """The common data set with the images that Pillow finds in its shards."""
    train, test = (
        replace(split, images=decoded_images(dataset, split.name)) for split in (dataset.train, dataset.test)
    )
    assert not np.array_equal(train.images, dataset.train.images)
    return replace(dataset, train=train, test=test)


@pytest.fixture
def open_jpeg(dataset, helpers, need):
    """`helpers.open_small` for DALI and its decoder."""
    need("dali")
    opened = []

    def open_small(dataset=dataset, **changes):
        opened.append(helpers.open_small("dali", dataset, decode="jpeg", **changes))
        return opened[-1]

    yield open_small
    for pipeline in opened:
        pipeline.close()


def evaluated(pipeline):
    """Images [N, 32, 32, 3] and labels, without the padding of the last batch."""
    batches = list(pipeline.epoch(0))
    images = torch.cat([batch.images[: batch.valid] for batch in batches]).permute(0, 2, 3, 1)
    return images.numpy(), torch.cat([batch.labels[: batch.valid] for batch in batches]).numpy()


@pytest.mark.parametrize("decode", [by_pillow, by_torchvision])
@pytest.mark.parametrize(
    "settings",
    [{"quality": 10}, {"quality": 100}, {"subsampling": "4:2:2"}, {"subsampling": "4:2:0"}],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_evaluation_matches_other_decoders_for_every_test_image_in_order(
    dataset, open_jpeg, tmp_path, decode, settings
):
    """All three use libjpeg-turbo's accurate integer transform and smooth upsampling of colours: equal to the bit."""
    dataset = with_shards(dataset, tmp_path, **settings)
    images, labels = evaluated(open_jpeg(dataset, train=False, augmentation=EVERYTHING))
    assert np.array_equal(images, decoded_images(dataset, "test", decode))
    assert np.array_equal(labels, dataset.test.labels)


def with_shards(dataset, folder, **settings):
    """Copy the data set to `folder`, with shards of other settings."""
    arguments = {"train_images": len(dataset.train), "test_images": len(dataset.test)}
    formats, jpeg = ["raw", "jpeg"], JpegSettings(**settings)
    return prepare("shapes10", folder, lambda *_: None, **arguments, formats=formats, jpeg=jpeg)[0]


@pytest.mark.parametrize("augmentation", [Augmentation(), EVERYTHING], ids=["default", "everything"])
def test_training_augments_the_decoded_images_as_the_definition_says(open_jpeg, decoded, helpers, augmentation):
    pipeline = open_jpeg(augmentation=augmentation)
    for epoch in (0, 1):
        images, labels = helpers.collect(pipeline, epoch)
        expected_images, expected_labels = helpers.expected_epoch(decoded, epoch, augmentation)
        assert np.array_equal(images, expected_images)
        assert np.array_equal(labels, expected_labels)


@pytest.mark.parametrize("start", [1, 5, 6])
def test_starting_in_the_middle_gives_the_rest_of_the_epoch(open_jpeg, decoded, helpers, start):
    expected_images, expected_labels = helpers.expected_epoch(decoded, 1, Augmentation())
    batches = list(open_jpeg().epoch(1, start))
    assert len(batches) == 6 - start
    for i, batch in enumerate(batches, start):
        assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), expected_images[28 * i : 28 * i + 28])
        assert np.array_equal(batch.labels.numpy(), expected_labels[28 * i : 28 * i + 28])


@pytest.mark.parametrize("taken", [1, 2, 6])
def test_abandoned_epoch_does_not_affect_the_next(open_jpeg, decoded, helpers, taken):
    pipeline = open_jpeg()
    iterator = pipeline.epoch(0)
    for _ in range(taken):
        next(iterator)
    del iterator
    images, labels = helpers.collect(pipeline, 1)
    expected_images, expected_labels = helpers.expected_epoch(decoded, 1, Augmentation())
    assert np.array_equal(images, expected_images)
    assert np.array_equal(labels, expected_labels)


def test_a_held_out_part_is_read_from_the_training_shard(open_jpeg, dataset, decoded, helpers):
    training, validation = dataset.hold_out(50)
    images, labels = evaluated(open_jpeg(validation, train=False))
    assert np.array_equal(images, decoded.train.images[validation.test.ids])
    assert np.array_equal(labels, dataset.train.labels[validation.test.ids])
    plain = Augmentation(crop_padding=0, flip="none")
    trained, _ = helpers.collect(open_jpeg(training, augmentation=plain, batch_size=11), 0)
    assert sorted(image.tobytes() for image in trained) == sorted(
        image.tobytes() for image in decoded.train.images[training.train.ids]
    )


# --- the library -------------------------------------------------------------------------------------------------

BROKEN = {
    "not installed": ModuleNotFoundError("No module named 'nvidia.dali'"),
    "without its libraries": OSError("libdali_core.so: cannot open shared object file"),
}


@pytest.fixture(params=BROKEN.values(), ids=BROKEN)
def error(request, break_import):
    """Return the reason why DALI cannot be imported."""
    break_import("dali", request.param)
    return request.param


def test_missing_dali_names_the_extras(run, tmp_path, error):
    code, out, err = run("train", "smoke", "--data", "shapes10", "--pipeline", "dali", "--out", tmp_path / "run")
    assert (code, out) == (2, "")
    assert str(error) in err
    assert "'fastresnet[dali]'" in err
    assert "'fastresnet[dali-cu13]'" in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("system", "machine", "supported"),
    [
        ("Linux", "x86_64", True),
        ("Linux", "aarch64", True),
        ("Linux", "riscv64", False),
        ("Darwin", "arm64", False),
        ("Windows", "AMD64", False),
    ],
)
def test_unsupported_platform_is_named_instead_of_the_extras(
    dataset, helpers, error, monkeypatch, system, machine, supported
):
    names = {"Linux": "linux", "Darwin": "darwin", "Windows": "win32"}
    monkeypatch.setattr(sys, "platform", names[system])
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(UsageError) as caught:
        helpers.open_small("dali", dataset)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert ("fastresnet[dali]" in message) == supported
    assert (f"DALI does not run on {system} {machine}" in message) == (not supported)
