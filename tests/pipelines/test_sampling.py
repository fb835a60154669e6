import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import UsageError
from pipelines.prng import Stream, hash64, pair_below, permutation, stream_key
from pipelines.sampling import Augmentation, Sampler, draw

MASK = (1 << 64) - 1
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


def splitmix64(seed: int, index: int) -> int:
    """Output number `index` of SplitMix64 in unbounded integers, after the C code of Sebastiano Vigna."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_hash_gives_the_published_outputs_of_splitmix64():
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert hash64(1234567, np.arange(5, dtype=np.int64)).view(np.uint64).tolist() == published


@given(key=INT64, counters=st.lists(st.integers(0, 1 << 40), min_size=1, max_size=20))
def test_hash_agrees_between_numpy_torch_and_unbounded_integers(key, counters):
    expected = [splitmix64(key & MASK, counter) for counter in counters]
    assert (hash64(key, np.array(counters)).view(np.uint64)).tolist() == expected
    assert [value & MASK for value in hash64(key, torch.tensor(counters)).tolist()] == expected


def test_keys_of_neighbouring_seeds_epochs_and_purposes_all_differ():
    keys = {stream_key(seed, epoch, purpose) for seed in range(20) for epoch in range(20) for purpose in list(Stream)}
    assert len(keys) == 20 * 20 * len(Stream)


@pytest.mark.parametrize("mode", ["random", "alternating", "none"])
def test_draws_agree_between_numpy_and_torch(mode):
    augmentation = Augmentation(flip=mode, cutout=9, padding_mode="reflect")
    ids = np.arange(1000, dtype=np.int64)
    a, b = draw(7, 3, ids, augmentation), draw(7, 3, torch.from_numpy(ids), augmentation)
    for name in ("top", "left", "flip", "cutout_top", "cutout_left"):
        assert getattr(a, name).tolist() == getattr(b, name).tolist()


def test_permutation_agrees_between_numpy_and_torch():
    ids = np.arange(50_000, dtype=np.int64)
    key = stream_key(1, 2, Stream.ORDER)
    assert np.array_equal(permutation(key, ids), permutation(key, torch.from_numpy(ids)).numpy())


def assert_uniform(values: np.ndarray, cells: int) -> None:
    """Pearson's chi-squared statistic within 4 standard deviations of its mean: one chance in about 15,000 to fail."""
    observed = np.bincount(values, minlength=cells)
    assert len(observed) == cells
    expected = len(values) / cells
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert abs(statistic - (cells - 1)) < 4 * np.sqrt(2 * (cells - 1))


@pytest.mark.parametrize("bound", [2, 9, 13, 32])
def test_pairs_are_uniform_and_independent(bound):
    first, second = pair_below(hash64(stream_key(0, 0, 0), np.arange(200_000)), bound)
    assert_uniform(first * bound + second, bound * bound)


def test_crops_are_uniform_over_samples_and_over_epochs():
    over_samples = draw(0, 0, np.arange(100_000), Augmentation())
    assert_uniform(over_samples.top * 9 + over_samples.left, 81)
    over_epochs = [draw(0, epoch, np.array([17]), Augmentation()) for epoch in range(5_000)]
    assert_uniform(np.array([int(d.top[0]) * 9 + int(d.left[0]) for d in over_epochs]), 81)


def test_crop_and_flip_of_a_sample_are_independent():
    draws = draw(5, 1, np.arange(100_000), Augmentation())
    assert_uniform(draws.flip * 81 + draws.top * 9 + draws.left, 162)


def test_crops_of_neighbouring_epochs_and_seeds_are_independent():
    ids = np.arange(100_000)
    a, b, c = draw(0, 0, ids, Augmentation()), draw(0, 1, ids, Augmentation()), draw(1, 0, ids, Augmentation())
    assert_uniform(a.top * 9 + b.top, 81)
    assert_uniform(a.top * 9 + c.top, 81)


def test_flips_and_cutouts_of_neighbouring_epochs_and_seeds_are_independent():
    ids, augmentation = np.arange(100_000), Augmentation(cutout=8)
    a, *others = (draw(seed, epoch, ids, augmentation) for seed, epoch in ((0, 0), (0, 1), (1, 0)))
    for other in others:
        assert_uniform(a.flip * 2 + other.flip, 4)
        for column in ("cutout_top", "cutout_left"):
            first, second = (getattr(draws, column) - getattr(a, column).min() for draws in (a, other))
            cells = int(first.max()) + 1
            assert_uniform(first * cells + second, cells * cells)
    tops = int(a.cutout_top.max() - a.cutout_top.min()) + 1
    assert_uniform(a.top * tops + a.cutout_top - a.cutout_top.min(), 9 * tops)


def test_first_and_last_place_of_the_order_are_uniform_over_epochs():
    ids = np.arange(50)
    orders = np.array([permutation(stream_key(3, epoch, Stream.ORDER), ids) for epoch in range(20_000)])
    assert_uniform(orders[:, 0], 50)
    assert_uniform(orders[:, -1], 50)


def test_every_epoch_is_another_permutation():
    sampler = Sampler(size=1000, batch_size=1, train=True, seed=0)
    ids = np.arange(1000)
    orders = [sampler.positions(epoch, ids).ravel() for epoch in range(3)]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[1], orders[2])


def test_alternating_flip_mirrors_every_sample_in_every_other_epoch():
    ids = np.arange(10_000)
    flips = [draw(0, epoch, ids, Augmentation(flip="alternating")).flip for epoch in range(4)]
    assert_uniform(flips[0], 2)
    assert np.array_equal(flips[0], 1 - flips[1])
    assert np.array_equal(flips[0], flips[2])
    assert np.array_equal(flips[1], flips[3])


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_joined_batches_of_ranks_equal_the_single_process(train, world_size):
    ids = np.arange(107)
    whole = Sampler(size=107, batch_size=16, train=train, seed=4)
    ranks = [
        Sampler(size=107, batch_size=16, train=train, seed=4, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert {len(rank) for rank in ranks} == {len(whole)}
    joined = np.concatenate([rank.positions(2, ids) for rank in ranks], axis=1)
    assert np.array_equal(joined, whole.positions(2, ids))
    for step in range(len(whole)):
        assert sum(rank.valid(step) for rank in ranks) == whole.valid(step)


def test_training_drops_the_ragged_batch_and_evaluation_pads_it():
    train = Sampler(size=107, batch_size=16, train=True, seed=0)
    test = Sampler(size=107, batch_size=16, train=False, seed=0)
    assert (len(train), len(test)) == (6, 7)
    positions = test.positions(0, np.arange(107))
    real = [row[: test.valid(step)] for step, row in enumerate(positions)]
    assert np.concatenate(real).tolist() == list(range(107))
    assert [train.valid(step) for step in range(6)] == [16] * 6


def test_a_subset_keeps_the_relative_order_of_the_whole():
    ids = np.arange(1000)
    subset = ids[ids % 3 == 0]
    key = stream_key(0, 0, Stream.ORDER)
    of_whole = ids[permutation(key, ids)]
    assert np.array_equal(subset[permutation(key, subset)], of_whole[of_whole % 3 == 0])


@pytest.mark.parametrize(
    "arguments",
    [
        {"size": 10, "batch_size": 11, "train": True},
        {"size": 0, "batch_size": 4, "train": False},
        {"size": 10, "batch_size": 2, "train": True, "rank": 0, "world_size": 3},
        {"size": 10, "batch_size": 4, "train": True, "rank": 2, "world_size": 2},
    ],
)
def test_impossible_samplers_are_refused(arguments):
    with pytest.raises(UsageError):
        Sampler(seed=0, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"crop_padding": 32}, {"crop_padding": -1}, {"cutout": 33}, {"padding_mode": "edge"}, {"flip": "randon"}],
)
def test_impossible_augmentations_are_refused(arguments):
    with pytest.raises(UsageError):
        Augmentation(**arguments)


@pytest.mark.gpu
def test_hash_and_order_agree_on_the_gpu():
    ids = torch.arange(50_000)
    key = stream_key(0, 5, Stream.ORDER)
    assert torch.equal(hash64(key, ids), hash64(key, ids.cuda()).cpu())
    assert torch.equal(permutation(key, ids), permutation(key, ids.cuda()).cpu())
