import dataclasses

import numpy as np
import pytest
import torch

from pipelines.augment import Normalization, crop_flip_cutout, fill_color, normalize
from pipelines.sampling import Augmentation, draw

FILL = np.array([125, 123, 114], np.uint8)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)


def augment_one(image, top, left, flip, cutout_top, cutout_left, augmentation):
    """Augment one image by the definition: pad, slice, mirror, fill."""
    padding = augmentation.crop_padding
    mode = {"zeros": "constant", "reflect": "reflect"}[augmentation.padding_mode]
    image = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode=mode)
    image = image[top : top + 32, left : left + 32]
    image = (image[:, ::-1] if flip else image).copy()
    for y in range(32):
        for x in range(32):
            in_rows = cutout_top <= y < cutout_top + augmentation.cutout
            if in_rows and cutout_left <= x < cutout_left + augmentation.cutout:
                image[y, x] = FILL
    return image


@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation(),
        Augmentation(padding_mode="reflect"),
        Augmentation(flip="none", crop_padding=0),
        Augmentation(cutout=8),
        Augmentation(cutout=17, crop_padding=12, padding_mode="reflect", flip="alternating"),
        Augmentation(crop_padding=31, cutout=32),
    ],
    ids=str,
)
def test_batched_augmentation_equals_the_definition_image_by_image(images, augmentation):
    draws = draw(3, 1, torch.arange(64), augmentation)
    out = crop_flip_cutout(torch.from_numpy(images), draws, augmentation, torch.from_numpy(FILL))
    per_image = zip(*(getattr(draws, f.name).tolist() for f in dataclasses.fields(draws)), strict=True)
    expected = [augment_one(image, *d, augmentation) for image, d in zip(images, per_image, strict=True)]
    assert out.dtype == torch.uint8
    assert np.array_equal(out.numpy(), np.stack(expected))


def test_cutout_squares_have_the_given_area_and_are_clipped_at_the_border(images):
    augmentation = Augmentation(crop_padding=0, flip="none", cutout=10)
    draws = draw(0, 0, torch.arange(64), augmentation)
    blank = torch.full((64, 32, 32, 3), 255, dtype=torch.uint8)
    filled = (crop_flip_cutout(blank, draws, augmentation, torch.zeros(3, dtype=torch.uint8)) == 0)[..., 0]
    areas = filled.sum((1, 2))
    assert areas.max() == 100
    assert areas.min() >= 25
    assert len(areas.unique()) > 5


def test_fill_color_is_the_rounded_mean(dataset):
    images = dataset.train.images.astype(np.float64)
    assert fill_color(dataset).tolist() == [round(images[..., channel].mean()) for channel in range(3)]


@pytest.mark.parametrize("name", ["half", "channel"])
def test_normalisation_equals_torchvisions(images, dataset, name):
    v2 = pytest.importorskip("torchvision.transforms.v2")
    mean, std = ((0.5,) * 3, (0.5,) * 3) if name == "half" else (dataset.mean, dataset.std)
    transform = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    expected = transform(torch.from_numpy(images).permute(0, 3, 1, 2))
    out = normalize(torch.from_numpy(images), Normalization.of(name, dataset), torch.float32)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


def test_pixel_normalisation_subtracts_the_mean_image(dataset):
    images = dataset.train.images[:50]
    mean_image = dataset.train.images.astype(np.float64).mean(axis=0) / 255
    out = normalize(torch.from_numpy(images.copy()), Normalization.of("pixel", dataset), torch.float32)
    expected = (images / 255 - mean_image).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalised_images_are_channels_last_and_rounded_once(images, dataset, dtype):
    normalization = Normalization.of("channel", dataset)
    out = normalize(torch.from_numpy(images), normalization, dtype)
    assert out.dtype == dtype
    assert out.shape == (64, 3, 32, 32)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, normalize(torch.from_numpy(images), normalization, torch.float32).to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_augmentation_on_the_gpu_is_bit_equal(images, compiled):
    augmentation = Augmentation(cutout=8)
    function = torch.compile(crop_flip_cutout) if compiled else crop_flip_cutout
    ids, fill = torch.arange(64), torch.from_numpy(FILL)
    expected = crop_flip_cutout(torch.from_numpy(images), draw(3, 1, ids, augmentation), augmentation, fill)
    on_gpu = function(torch.from_numpy(images).cuda(), draw(3, 1, ids.cuda(), augmentation), augmentation, fill.cuda())
    assert torch.equal(on_gpu.cpu(), expected)
