"""The contract that all pipelines share, checked against images augmented one by one in NumPy."""

import numpy as np
import pytest
import torch

from pipelines import PIPELINES, Augmentation, open_pipeline
from pipelines.errors import UsageError
from pipelines.sampling import Purpose, draw, permutation, stream_key

CPU = torch.device("cpu")
AUGMENTATIONS = [
    Augmentation(),
    Augmentation(padding_mode="reflect", flip="alternating", cutout=8, normalization="channel"),
]


@pytest.fixture(params=PIPELINES)
def name(request):
    return request.param


def open_small(name, dataset, **changes):
    arguments = {
        "train": True,
        "batch_size": 48,
        "device": CPU,
        "dtype": torch.uint8,
        "seed": 11,
        "augmentation": Augmentation(),
    }
    return open_pipeline(name, dataset, **{**arguments, **changes})


def expected_epoch(dataset, epoch, augmentation, *, seed=11, batch_size=48):
    """uint8 images [N, 32, 32, 3] and labels of a training epoch."""
    ids = dataset.train.ids
    ids = ids[permutation(stream_key(seed, epoch, Purpose.ORDER), ids)]
    ids = ids[: len(ids) // batch_size * batch_size]
    draws = draw(seed, epoch, ids, augmentation)
    fill = np.round(np.array(dataset.mean) * 255).astype(np.uint8)
    padding = augmentation.crop_padding
    mode = {"zeros": "constant", "reflect": "reflect"}[augmentation.padding_mode]
    out = []
    for i, sample in enumerate(ids):
        image = np.pad(dataset.train.images[sample], ((padding, padding), (padding, padding), (0, 0)), mode=mode)
        image = image[draws.top[i] : draws.top[i] + 32, draws.left[i] : draws.left[i] + 32]
        image = (image[:, ::-1] if draws.flip[i] else image).copy()
        y, x = np.arange(32) - draws.cutout_top[i], np.arange(32) - draws.cutout_left[i]
        hidden = ((y >= 0) & (y < augmentation.cutout))[:, None] & ((x >= 0) & (x < augmentation.cutout))
        image[hidden] = fill
        out.append(image)
    return np.stack(out), dataset.train.labels[ids]


def collect(pipeline, epoch, start=0):
    batches = list(pipeline.epoch(epoch, start))
    images = torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1)
    return images.numpy(), torch.cat([batch.labels for batch in batches]).numpy()


@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=["default", "everything"])
def test_pixels_and_labels_equal_the_definition_over_two_epochs(name, dataset, augmentation):
    pipeline = open_small(name, dataset, augmentation=augmentation)
    for epoch in (0, 1):
        images, labels = collect(pipeline, epoch)
        expected_images, expected_labels = expected_epoch(dataset, epoch, augmentation)
        assert np.array_equal(images, expected_images)
        assert np.array_equal(labels, expected_labels)
    pipeline.close()


@pytest.mark.parametrize("start", [1, 3, 5, 6])
def test_starting_in_the_middle_gives_the_rest_of_the_epoch(name, dataset, start):
    pipeline = open_small(name, dataset)
    assert len(pipeline) == 6
    expected_images, expected_labels = expected_epoch(dataset, 1, Augmentation())
    batches = list(pipeline.epoch(1, start))
    assert len(batches) == 6 - start
    for i, batch in enumerate(batches, start):
        assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), expected_images[48 * i : 48 * i + 48])
        assert np.array_equal(batch.labels.numpy(), expected_labels[48 * i : 48 * i + 48])
    pipeline.close()


def test_an_abandoned_epoch_leaves_no_trace_in_the_next(name, dataset):
    pipeline = open_small(name, dataset)
    iterator = pipeline.epoch(0)
    next(iterator)
    next(iterator)
    del iterator
    assert np.array_equal(collect(pipeline, 1)[0], expected_epoch(dataset, 1, Augmentation())[0])
    pipeline.close()


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("train", [True, False])
def test_ranks_joined_are_the_single_process(name, dataset, world_size, train):
    single = open_small(name, dataset, train=train)
    ranks = [open_small(name, dataset, train=train, rank=r, world_size=world_size) for r in range(world_size)]
    for whole, *parts in zip(single.epoch(2), *(rank.epoch(2) for rank in ranks), strict=True):
        assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
        assert torch.equal(whole.labels, torch.cat([part.labels for part in parts]))
        assert whole.valid == sum(part.valid for part in parts)
    for pipeline in (single, *ranks):
        pipeline.close()


def test_evaluation_gives_every_test_image_once_in_order_unaugmented(name, dataset):
    pipeline = open_small(name, dataset, train=False, augmentation=AUGMENTATIONS[1])
    batches = list(pipeline.epoch(0))
    assert {len(batch.images) for batch in batches} == {48}
    images = torch.cat([batch.images[: batch.valid] for batch in batches]).permute(0, 2, 3, 1)
    labels = torch.cat([batch.labels[: batch.valid] for batch in batches])
    assert np.array_equal(images.numpy(), dataset.test.images)
    assert np.array_equal(labels.numpy(), dataset.test.labels)
    pipeline.close()


def test_a_held_out_part_is_never_trained_on(name, dataset):
    training, validation = dataset.hold_out(100)
    pipeline = open_small(name, training, augmentation=Augmentation(crop_padding=0, flip="none"), batch_size=33)
    trained = {image.tobytes() for epoch in range(3) for image in collect(pipeline, epoch)[0]}
    held = {dataset.train.images[i].tobytes() for i in validation.test.ids}
    assert len(held) == 100
    assert len(trained) == 231
    assert not held & trained
    pipeline.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalization", ["half", "channel", "pixel"])
def test_normalised_batches_follow_the_formula_within_one_rounding(name, dataset, dtype, normalization):
    pipeline = open_small(name, dataset, dtype=dtype, augmentation=Augmentation(normalization=normalization))
    batch = next(iter(pipeline.epoch(0)))
    pixels = expected_epoch(dataset, 0, Augmentation())[0][:48] / 255
    mean, std = {
        "half": (0.5, 0.5),
        "channel": (np.array(dataset.mean), np.array(dataset.std)),
        "pixel": (dataset.train.images.astype(np.float64).mean(axis=0) / 255, 1.0),
    }[normalization]
    expected = torch.from_numpy(((pixels - mean) / std).transpose(0, 3, 1, 2))
    assert batch.images.dtype == dtype
    assert batch.labels.dtype == torch.int64
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    rounding = torch.finfo(dtype).eps / 2 * expected.abs()
    assert ((batch.images.double() - expected).abs() <= rounding + 1e-6).all()
    pipeline.close()


def test_all_pipelines_agree_to_the_bit_after_normalisation(dataset):
    pipelines = [open_small(name, dataset, dtype=torch.bfloat16, augmentation=AUGMENTATIONS[1]) for name in PIPELINES]
    for first, *others in zip(*(pipeline.epoch(0) for pipeline in pipelines), strict=True):
        for other in others:
            assert torch.equal(first.images, other.images)
    for pipeline in pipelines:
        pipeline.close()


def test_batches_stay_valid_after_the_pipeline_moves_on(name, dataset):
    pipeline = open_small(name, dataset)
    kept = list(pipeline.epoch(0))
    copies = [batch.images.clone() for batch in kept]
    list(pipeline.epoch(1))
    assert all(torch.equal(batch.images, copy) for batch, copy in zip(kept, copies, strict=True))
    pipeline.close()


def test_impossible_arguments_are_refused(dataset):
    with pytest.raises(UsageError, match="did you mean 'resident'"):
        open_small("residnet", dataset)
    with pytest.raises(UsageError, match="batch size 400 is larger than the training set, 331"):
        open_small("resident", dataset, batch_size=400)


@pytest.mark.gpu
@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=["default", "everything"])
def test_pipelines_on_the_gpu_give_the_same_bits(name, dataset, augmentation):
    pipeline = open_small(name, dataset, device=torch.device("cuda"), augmentation=augmentation)
    for epoch in (0, 1):
        expected_images, expected_labels = expected_epoch(dataset, epoch, augmentation)
        batches = list(pipeline.epoch(epoch))
        images = torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1).cpu()
        assert batches[0].images.is_cuda
        assert np.array_equal(images.numpy(), expected_images)
        assert np.array_equal(torch.cat([batch.labels for batch in batches]).cpu().numpy(), expected_labels)
    pipeline.close()
