"""mixup and CutMix against the papers' definitions, image by image in NumPy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastresnet.training.mixing import Mixer, beta_quantiles
from pipelines.prng import Stream, hash64, stream_key

CPU = torch.device("cpu")
STEP = torch.tensor([5])


def batch(size=256, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, 32, 32, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(0, 10, (size,), generator=generator)


def mix(images, labels, *, mixup=0.0, cutmix=0.0, seed=3, step=STEP):
    return Mixer(mixup=mixup, cutmix=cutmix, seed=seed, device=CPU)(images, labels, step)


def hashed(purpose, count, seed=3, step=5):
    """Return the hash words from which the pairs draw, in order."""
    counters = np.arange(count, dtype=np.int64) + (step << 20)
    return hash64(stream_key(seed, purpose), counters).astype(np.uint64)


@pytest.mark.parametrize(
    ("alpha", "distribution"),
    [
        (1.0, lambda x: x),
        (2.0, lambda x: 3 * x**2 - 2 * x**3),
        (0.5, lambda x: 2 / np.pi * np.arcsin(np.sqrt(x))),
    ],
    ids=["uniform", "3x2 - 2x3", "arcsine"],
)
def test_beta_quantiles_against_distributions_in_closed_form(alpha, distribution):
    quantiles = beta_quantiles(alpha, 1000)
    np.testing.assert_allclose(distribution(quantiles), (np.arange(1000) + 0.5) / 1000, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.4, 1.0, 8.0])
def test_beta_quantiles_have_the_distributions_variance(alpha):
    """Var = 1 / (4 (2 alpha + 1)); quantiles at the middles of 4096 parts leave out a little of it."""
    assert beta_quantiles(alpha, 4096).var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=2e-3)


def test_mixup_averages_neighbours_in_the_share_drawn_for_the_pair():
    images, labels = batch()
    mixed, others, share = mix(images, labels, mixup=1.0)
    drawn = (hashed(Stream.MIX, 128) >> np.uint64(40)).astype(np.float64) / 2**24
    for i in range(256):
        # Beta(1, 1) is uniform, and drawn from 1024 quantiles.
        weight = (np.floor(drawn[i // 2] * 1024) + 0.5) / 1024
        partner = i + 1 if i % 2 == 0 else i - 1
        assert share[i].item() == pytest.approx(weight, abs=1e-4)
        assert others[i] == labels[partner]
        expected = share[i] * images[i] + (1 - share[i]) * images[partner]
        torch.testing.assert_close(mixed[i], expected, rtol=1e-5, atol=1e-6)
    assert mixed.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cutmix_exchanges_a_box_and_counts_its_pixels(dtype):
    images, labels = batch(dtype=dtype)
    mixed, others, share = mix(images, labels, cutmix=1.0)
    drawn = (hashed(Stream.MIX, 128) >> np.uint64(40)).astype(np.float64) / 2**24
    boxes = hashed(Stream.MIX_BOX, 128)
    for i in range(256):
        partner = i ^ 1
        half = round(32 * np.sqrt(1 - (np.floor(drawn[i // 2] * 1024) + 0.5) / 1024) / 2)
        word = int(boxes[i // 2])
        y, x = ((half_word * 32) >> 32 for half_word in (word >> 32, word & 0xFFFFFFFF))
        expected = images[i].clone()
        rows, columns = (slice(max(center - half, 0), max(center + half, 0)) for center in (y, x))
        expected[:, rows, columns] = images[partner][:, rows, columns]
        assert torch.equal(mixed[i], expected)
        outside = 1 - (min(y + half, 32) - max(y - half, 0)) * (min(x + half, 32) - max(x - half, 0)) / 1024
        assert share[i].item() == pytest.approx(outside, abs=1e-6)
        assert others[i] == labels[partner]


def test_with_mixup_and_cutmix_each_pair_uses_one_of_them():
    images, labels = batch(2048)
    mixed, _, share = mix(images, labels, mixup=1.0, cutmix=1.0)
    blended, _, blended_share = mix(images, labels, mixup=1.0)
    boxed, _, boxed_share = mix(images, labels, cutmix=1.0)
    is_blend, is_box = ((mixed == other).flatten(1).all(1) for other in (blended, boxed))
    assert (is_blend ^ is_box).all()
    assert torch.equal(is_blend[::2], is_blend[1::2])
    assert torch.equal(share, torch.where(is_blend, blended_share, boxed_share))
    assert 400 < is_box[::2].sum() < 624  # 7 standard deviations of 1024 fair coins


def test_draws_depend_on_seed_and_step_alone():
    images, labels = batch(64)
    first = mix(images, labels, mixup=0.4, cutmix=1.0)
    for a, b in zip(first, mix(images, labels, mixup=0.4, cutmix=1.0), strict=True):
        assert torch.equal(a, b)
    for changed in ({"seed": 4}, {"step": torch.tensor([6])}):
        assert not torch.equal(mix(images, labels, mixup=0.4, cutmix=1.0, **changed)[2], first[2])


def test_the_loss_of_a_step_is_the_cross_entropy_with_the_mixed_and_smoothed_labels():
    """One soft target over the classes is how the papers write it."""
    from fastresnet.config import TrainConfig
    from fastresnet.models import create_model
    from fastresnet.training.optimizer import create_optimizers
    from fastresnet.training.step import TrainStep

    images, labels = batch(16)
    torch.manual_seed(0)
    network = create_model("resnet20").to(memory_format=torch.channels_last)
    mixer = Mixer(mixup=1.0, cutmix=1.0, seed=3, device=CPU)
    optimizers = create_optimizers(network, TrainConfig())
    step = TrainStep(network, optimizers, [0.0], precision="fp32", device=CPU, label_smoothing=0.2, mixer=mixer)
    mixed, others, share = mixer(images, labels, torch.tensor([0]))
    target = share[:, None] * F.one_hot(labels, 10) + (1 - share[:, None]) * F.one_hot(others, 10)
    target = 0.8 * target + 0.2 / 10
    with torch.no_grad():
        logits = network(mixed)
    expected = -(target * logits.log_softmax(1)).sum(1).mean().item()
    dominant = torch.where(share < 0.5, others, labels)
    step(images, labels)
    loss, accuracy = step.metrics()
    assert loss == pytest.approx(expected, rel=1e-5)
    assert accuracy == pytest.approx(100 * (logits.argmax(1) == dominant).float().mean().item())
