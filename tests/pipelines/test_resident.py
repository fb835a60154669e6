"""Resident pipeline for GPUs, tested with its tensors on a CPU."""

import numpy as np
import pytest
import torch

from pipelines import Augmentation
from pipelines.resident import DevicePipeline
from pipelines.sampling import Sampler

AUGMENTATIONS = [Augmentation(), Augmentation(padding_mode="reflect", flip="alternating", cutout=8)]


@pytest.fixture(params=AUGMENTATIONS, ids=["default", "everything"])
def augmentation(request):
    return request.param


@pytest.fixture
def pipeline(dataset, augmentation):
    sampler = Sampler(size=len(dataset.train), batch_size=28, train=True, seed=11)
    return DevicePipeline(dataset, dataset.train, sampler, augmentation, torch.device("cpu"), torch.uint8)


def test_tensors_give_the_pixels_of_the_definition(pipeline, dataset, helpers, augmentation):
    for epoch in (0, 1):
        images, labels = helpers.collect(pipeline, epoch)
        expected_images, expected_labels = helpers.expected_epoch(dataset, epoch, augmentation)
        assert np.array_equal(images, expected_images)
        assert np.array_equal(labels, expected_labels)


def test_gather_by_step_tensor_gives_the_batches_and_reuses_memory(pipeline, dataset, helpers, augmentation):
    addresses = [tensor.data_ptr() for tensor in pipeline._loaded.columns()]
    for epoch in (1, 4):
        pipeline.load(epoch)
        expected_images, expected_labels = helpers.expected_epoch(dataset, epoch, augmentation)
        for step in (0, 3, 5):
            images, labels = pipeline.gather(torch.tensor([step]))
            assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), expected_images[28 * step : 28 * step + 28])
            assert np.array_equal(labels.numpy(), expected_labels[28 * step : 28 * step + 28])
    assert [tensor.data_ptr() for tensor in pipeline._loaded.columns()] == addresses


def test_gathering_compiles_as_one_graph(pipeline):
    compiled = torch.compile(pipeline.gather, fullgraph=True, dynamic=False, backend="aot_eager")
    pipeline.load(2)
    for step in (1, 4):
        images, labels = compiled(torch.tensor([step]))
        expected_images, expected_labels = pipeline.gather(torch.tensor([step]))
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)
        assert images.stride() == expected_images.stride()
