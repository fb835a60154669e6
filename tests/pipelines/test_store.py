"""Binary data set: exact round trips, and rejection of damaged, foreign and half-written files."""

from __future__ import annotations

import dataclasses
import errno
import gc
import hashlib
import io
import json
import os
import pickle
import random
import re
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest

from pipelines.errors import DataError, UsageError
from pipelines.files import write_bytes
from pipelines.store import RawData, channel_statistics, open_store, prepare_command, write_store
from tests.limits import limits

FILES = ("train_images", "train_labels", "test_images", "test_labels", "pixel_mean")


def random_data(seed: int = 0, train: int = 23, test: int = 9) -> RawData:
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 200 + 20 * seed, (count, 32, 32, 3), np.uint8) for count in (train, test)]
    labels = [rng.integers(0, 4, count) for count in (train, test)]
    return RawData(("ant", "bee", "cat", "dog"), images[0], labels[0], images[1], labels[1])


def assert_holds(folder: Path, data: RawData) -> None:
    """The store `folder` opens and holds exactly `data`."""
    dataset = open_store(folder)
    assert dataset.classes == data.classes
    for split, images, labels in (
        (dataset.train, data.train_images, data.train_labels),
        (dataset.test, data.test_images, data.test_labels),
    ):
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int64)
        np.testing.assert_array_equal(split.images, images)
        np.testing.assert_array_equal(split.labels, labels)
        np.testing.assert_array_equal(split.ids, np.arange(len(labels)))
        assert len(split) == len(labels)


@pytest.fixture(scope="module")
def data() -> RawData:
    return random_data()


@pytest.fixture
def store(tmp_path, data) -> Path:
    """A whole store."""
    write_store(tmp_path / "toy", data, source="somewhere", version="9.9")
    return tmp_path / "toy"


def refused(folder: Path, name: str) -> None:
    """Opening `folder` raises a `DataError` that names its file `name` and the command that repairs it."""
    with pytest.raises(DataError) as caught:
        open_store(folder)
    assert caught.value.exit_code == 3
    assert str(folder / name) in str(caught.value)
    assert prepare_command(folder) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


def change_meta(folder: Path, change) -> None:
    """Replace meta.json by `change` of it."""
    path = folder / "meta.json"
    meta = json.loads(path.read_text())
    meta = change(meta) or meta
    rest = {key: value for key, value in meta.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**rest, "sha256": digest}))


def replace_file(folder: Path, key: str, content: bytes) -> None:
    """Replace `key`.npy by `content`, of which meta.json then gives the right size and SHA-256."""
    (folder / f"{key}.npy").write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change_meta(folder, lambda meta: meta["files"].update({f"{key}.npy": entry}))


def npy(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def npy_header(shape: str, descr: str = "'|u1'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


HOSTILE_HEADERS = {
    "huge": npy_header("(1099511627776, 32, 32, 3)"),
    "overflowing": npy_header("(4611686018427387904, 4)"),
    "negative": npy_header("(-1, 32, 32, 3)"),
    "without bytes": npy_header("(1152921504606846976,)", "'|V0'"),
    "deep": npy_header(9000 * "-" + "1"),
    "long": b"\x93NUMPY\x02\x00" + (20 << 20).to_bytes(4, "little") + (20 << 20) * b" ",
}


@pytest.mark.parametrize("content", HOSTILE_HEADERS.values(), ids=HOSTILE_HEADERS)
def test_a_hostile_header_of_an_array_is_refused(store, content):
    replace_file(store, "train_images", content)
    gc.collect()  # what other tests have left open would warn within the block
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with limits(len(content)), pytest.raises(DataError) as caught:
            open_store(store)
    assert re.fullmatch(r".*train_images\.npy (cannot be read|holds).{0,400}", str(caught.value))


HOSTILE_METAS = {
    "very many classes": {"classes": [str(number) for number in range(32_769)]},
    "a very long name of a class": {"classes": ["a", 1001 * "b", "c", "d"]},
    "a very long name": {"name": 1001 * "a"},
    "lists": {"x": 500_000 * [[]]},
    "nested": {"x": json.loads(500 * "[" + 500 * "]")},
    "large": {"x": (9 << 20) * "a"},
}


@pytest.mark.parametrize("change", HOSTILE_METAS.values(), ids=HOSTILE_METAS)
def test_a_hostile_description_is_refused(store, change):
    change_meta(store, lambda meta: meta.update(change))
    with limits((store / "meta.json").stat().st_size), pytest.raises(DataError, match=r"meta\.json"):
        open_store(store)


def test_as_many_classes_as_imagenet_has_are_opened(store):
    names = [f"n{number:08} animal" for number in range(21_841)]
    change_meta(store, lambda meta: meta.update(classes=names))
    assert open_store(store).classes == tuple(names)


# --- round trip --------------------------------------------------------------------------------------------------


def test_round_trip_is_exact(store, data):
    assert_holds(store, data)
    dataset = open_store(store)
    assert (dataset.name, dataset.folder) == ("toy", store)


@pytest.mark.parametrize("seed", range(3))
def test_statistics_are_those_of_numpy_in_float64(tmp_path, seed):
    data = random_data(seed, train=40)
    write_store(tmp_path / "toy", data, source="", version="")
    dataset, pixels = open_store(tmp_path / "toy"), data.train_images.astype(np.float64) / 255
    np.testing.assert_allclose(dataset.mean, pixels.mean(axis=(0, 1, 2)), rtol=0, atol=1e-6)
    np.testing.assert_allclose(dataset.std, pixels.std(axis=(0, 1, 2)), rtol=0, atol=1e-6)
    np.testing.assert_allclose(dataset.pixel_mean, pixels.mean(axis=0), rtol=0, atol=1e-6)
    assert dataset.pixel_mean.dtype == np.float32


@pytest.mark.parametrize("count", [1, 4095, 4096, 4097, 8193])
def test_statistics_of_any_number_of_images(count):
    images = np.random.default_rng(count).integers(0, 256, (count, 2, 2, 3), np.uint8)
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean(axis=(0, 1, 2)), rtol=0, atol=1e-9)
    np.testing.assert_allclose(std, (images / 255).std(axis=(0, 1, 2)), rtol=0, atol=1e-9)


def test_a_file_in_shared_memory_is_replaced_and_kept_as_the_previous_one():
    if not Path("/dev/shm").is_dir():
        pytest.skip("this system has no /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        file, previous = Path(folder) / "a", Path(folder) / "b"
        for content in (b"old", b"new"):
            write_bytes(file, content, previous=previous)
        assert (file.read_bytes(), previous.read_bytes()) == (b"new", b"old")


@pytest.mark.parametrize("level", [0, 255])
def test_store_of_constant_images_opens(tmp_path, data, level):
    images = np.full((5, 32, 32, 3), level, np.uint8)
    flat = RawData(data.classes, images, np.zeros(5, np.int64), images, np.zeros(5, np.int64))
    write_store(tmp_path / "flat", flat, source="", version="")
    assert open_store(tmp_path / "flat").mean == (level / 255,) * 3
    assert open_store(tmp_path / "flat").std == (1, 1, 1)


def test_meta_describes_the_store(store, data):
    meta = json.loads((store / "meta.json").read_text())
    assert (meta["name"], meta["classes"]) == ("toy", list(data.classes))
    assert (meta["counts"], meta["source"], meta["version"]) == ({"train": 23, "test": 9}, "somewhere", "9.9")
    assert sorted(meta["files"]) == sorted(f"{key}.npy" for key in FILES)
    for name, entry in meta["files"].items():
        content = (store / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_plain_numpy_reads_the_files(store, data):
    for key in FILES[:4]:
        np.testing.assert_array_equal(np.load(store / f"{key}.npy", allow_pickle=False), getattr(data, key))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", ["images", "labels"])
def test_arrays_are_read_only_memory_maps(store, split, name):
    array = getattr(getattr(open_store(store), split), name)
    assert isinstance(array, np.memmap)
    assert array.mode == "r"
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0


def test_store_in_a_folder_that_does_not_exist_yet(tmp_path, data):
    write_store(tmp_path / "a" / "b" / "toy", data, source="", version="")
    assert_holds(tmp_path / "a" / "b" / "toy", data)


def test_arrays_in_fortran_order_make_the_same_files(tmp_path, store, data):
    turned = RawData(data.classes, *(np.asfortranarray(getattr(data, key)) for key in FILES[:4]))
    write_store(tmp_path / "turned" / "toy", turned, source="somewhere", version="9.9")
    for path in store.iterdir():
        assert path.read_bytes() == (tmp_path / "turned" / "toy" / path.name).read_bytes()


def test_same_data_gives_the_same_files(tmp_path, store, data):
    write_store(tmp_path / "again" / "toy", data, source="somewhere", version="9.9")
    for path in store.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / "toy" / path.name).read_bytes()


def test_the_digest_is_that_of_images_labels_and_classes_alone(tmp_path, store, data):
    """A run can be resumed where the same images were prepared from another file."""
    digest = open_store(store).digest
    write_store(tmp_path / "elsewhere" / "bees", data, source="parts.joined", version="10.0")
    assert open_store(tmp_path / "elsewhere" / "bees").digest == digest
    for number, change in enumerate(
        (
            {"classes": ("ant", "bee", "cat", "dodo")},
            {"train_images": 255 - data.train_images},
            {"train_labels": 3 - data.train_labels},
            {"test_images": 255 - data.test_images},
            {"test_labels": 3 - data.test_labels},
        )
    ):
        folder = tmp_path / str(number) / "toy"
        write_store(folder, dataclasses.replace(data, **change), source="somewhere", version="9.9")
        assert open_store(folder).digest != digest, change.keys()


# --- holding images out ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 22])
def test_held_out_images_are_disjoint_and_complete(store, count):
    whole = open_store(store)
    kept, held = whole.hold_out(count)
    assert (len(kept.train), len(held.test)) == (23 - count, count)
    assert sorted([*kept.train.ids, *held.test.ids]) == list(range(23))
    assert (np.diff(kept.train.ids) > 0).all()
    assert (np.diff(held.test.ids) > 0).all()
    assert kept.test.ids.tolist() == list(range(9))
    assert kept.test.images is whole.test.images
    assert held.test.images is kept.train.images is whole.train.images


def test_held_out_images_are_the_same_every_time(store, tmp_path):
    first = open_store(store).hold_out(7)[1].test.ids
    assert first.tolist() == open_store(store).hold_out(7)[1].test.ids.tolist()
    write_store(tmp_path / "other", random_data(1), source="", version="")
    assert first.tolist() == open_store(tmp_path / "other").hold_out(7)[1].test.ids.tolist()


def test_held_out_images_are_spread_over_the_training_set(tmp_path):
    write_store(tmp_path / "long", random_data(train=1000), source="", version="")
    held = open_store(tmp_path / "long").hold_out(500)[1].test.ids
    in_tenths = np.bincount(held // 100)
    assert 30 < in_tenths.min() <= in_tenths.max() < 70  # 50 expected, standard deviation 4.7


def test_images_can_be_held_out_twice(store):
    kept, held = open_store(store).hold_out(10)
    kept_twice, held_twice = kept.hold_out(3)
    assert sorted([*kept_twice.train.ids, *held_twice.test.ids, *held.test.ids]) == list(range(23))


@pytest.mark.parametrize("count", [-1, 0, 23, 24])
def test_invalid_held_out_count_is_refused(store, count):
    with pytest.raises(UsageError, match=str(count)):
        open_store(store).hold_out(count)


# --- damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exists", [True, False])
def test_folder_without_store_gives_the_command_that_makes_it(tmp_path, exists):
    if exists:
        (tmp_path / "toy").mkdir()
    with pytest.raises(DataError, match="no prepared data set") as caught:
        open_store(tmp_path / "toy")
    assert f"fastresnet prepare --data toy --root {tmp_path} --source PATH" in str(caught.value)


@pytest.mark.parametrize("name", ["cifar10", "shapes10"])
def test_remedy_for_cifar10_and_shapes10_needs_no_source(tmp_path, name):
    with pytest.raises(DataError, match="no prepared data set") as caught:
        open_store(tmp_path / name)
    assert str(caught.value).endswith(f"fastresnet prepare --data {name} --root {tmp_path}")


def test_file_in_the_place_of_the_store_is_named(tmp_path):
    (tmp_path / "toy").write_text("text")
    with pytest.raises(DataError, match="no prepared data set") as caught:
        open_store(tmp_path / "toy")
    assert str(tmp_path / "toy") in str(caught.value)


@pytest.mark.parametrize("key", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "shorter", "longer", "flipped", "folder", "of another file"])
def test_damaged_array_is_named(store, key, damage):
    path = store / f"{key}.npy"
    content = path.read_bytes()
    middle = len(content) // 2
    path.unlink()
    match damage:
        case "empty":
            path.write_bytes(b"")
        case "shorter":
            path.write_bytes(content[:-1])
        case "longer":
            path.write_bytes(content + b"\0")
        case "flipped":
            path.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
        case "folder":
            path.mkdir()
        case "of another file":
            other = FILES[(FILES.index(key) + 1) % len(FILES)]
            path.write_bytes((store / f"{other}.npy").read_bytes())
    refused(store, path.name)


@pytest.mark.parametrize("key", FILES)
def test_array_of_another_store_of_the_same_shape_is_refused(tmp_path, store, key):
    write_store(tmp_path / "other" / "toy", random_data(1), source="somewhere", version="9.9")
    (tmp_path / "other" / "toy" / f"{key}.npy").replace(store / f"{key}.npy")
    refused(store, f"{key}.npy")


def test_swapped_splits_are_refused(store):
    for key in ("images", "labels"):
        (store / f"train_{key}.npy").rename(store / "other")
        (store / f"test_{key}.npy").rename(store / f"train_{key}.npy")
        (store / "other").rename(store / f"test_{key}.npy")
    refused(store, "train_images.npy")


@pytest.mark.parametrize(
    ("key", "array"),
    [
        ("train_images", np.zeros((22, 32, 32, 3), np.uint8)),
        ("train_images", np.zeros((23, 3, 32, 32), np.uint8)),
        ("train_images", np.zeros((23, 32, 32), np.uint8)),
        ("train_images", np.zeros((), np.uint8)),
        ("train_images", np.zeros((23, 32, 32, 3), np.uint8, "F")),
        ("test_images", np.zeros((9, 32, 32, 3), np.int8)),
        ("test_images", np.zeros((9, 32, 32, 3), np.float32)),
        ("train_labels", np.zeros(22, np.int64)),
        ("train_labels", np.zeros(0, np.int64)),
        ("train_labels", np.zeros((23, 1), np.int64)),
        ("train_labels", np.zeros((), np.int64)),
        ("test_labels", np.zeros(9, np.int32)),
        ("test_labels", np.zeros(9, ">i8")),
        ("test_labels", np.zeros(9, [("a", np.int64)])),
        ("test_labels", np.full(9, 4)),
        ("train_labels", np.full(23, -1)),
        ("pixel_mean", np.zeros((3, 32, 32), np.float32)),
        ("pixel_mean", np.zeros((32, 32, 3), np.float64)),
        ("pixel_mean", np.zeros((), np.float32)),
        ("pixel_mean", np.zeros((32, 32, 3), np.float32, "F")),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.dtype}{value.shape}{value.strides}",
)
def test_array_of_the_wrong_kind_with_a_valid_checksum_is_refused(store, key, array):
    replace_file(store, key, npy(array))
    refused(store, key.split("_")[0])  # the fault can be that the two files of a split do not fit together


class Canary:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("key", FILES)
@pytest.mark.parametrize("kind", ["array of objects", "bare pickle"])
def test_pickle_in_the_place_of_an_array_is_refused_and_never_runs(tmp_path, store, key, kind):
    canary = tmp_path / "canary"
    array = np.empty(1, object)
    array[0] = Canary(canary)
    content = npy(array, allow_pickle=True) if kind == "array of objects" else pickle.dumps(Canary(canary))
    replace_file(store, key, content)
    refused(store, f"{key}.npy")
    assert not canary.exists()
    np.load(io.BytesIO(content), allow_pickle=True)
    assert canary.exists()  # it would have run


@pytest.mark.parametrize("key", ["train_images", "test_labels"])
@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04", b"\x93NUMPY", "npz", "half", "unclosed"], ids=str)
def test_invalid_npy_file_with_a_valid_checksum_is_refused(store, key, content):
    whole = (store / f"{key}.npy").read_bytes()
    if content == "npz":
        file = io.BytesIO()
        np.savez(file, images=np.zeros(3))
        content = file.getvalue()
    if content == "half":
        content = whole[: len(whole) // 2]
    if content == "unclosed":
        content = whole.replace(b"}", b" ", 1)
    replace_file(store, key, content)
    refused(store, f"{key}.npy")


# --- damage to meta.json -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"text"', b"1", b"\xff\xfe\x00", b"{'schema': 1}", b"[" * 100_000, b"{}", b"\0" * 99],
    ids=lambda content: repr(content[:14]),
)
def test_invalid_meta_is_refused(store, content):
    (store / "meta.json").write_bytes(content)
    refused(store, "meta.json")


def test_folder_in_the_place_of_meta_is_named(store):
    (store / "meta.json").unlink()
    (store / "meta.json").mkdir()
    refused(store, "meta.json")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_truncated_meta_is_refused(store, part):
    os.truncate(store / "meta.json", int((store / "meta.json").stat().st_size * part))
    refused(store, "meta.json")


@pytest.mark.parametrize("key", ["schema", "name", "classes", "mean", "std", "files"])
def test_meta_without_a_key_is_refused(store, key):
    change_meta(store, lambda meta: meta.pop(key) and None)
    refused(store, "meta.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("schema", 2),
        ("schema", "1"),
        ("name", None),
        ("name", ""),
        ("name", ".."),
        ("name", ".hidden"),
        ("name", "/../../../tmp/evil"),
        ("name", "toy/evil"),
        ("classes", []),
        ("classes", "ant"),
        ("classes", [1, 2, 3, 4]),
        ("mean", [float("nan"), 0.5, 0.5]),
        ("mean", [0.5, 0.5]),
        ("mean", [0.5, 0.5, 1.5]),
        ("mean", [-0.5, 0.5, 0.5]),
        ("mean", ["0.5", "0.5", "0.5"]),
        ("mean", 0.5),
        ("std", [float("inf"), 0.5, 0.5]),
        ("std", [float("nan")] * 3),
        ("std", None),
        ("files", []),
        ("files", {}),
        ("files", {f"{key}.npy": {} for key in FILES[1:]}),
    ],
    ids=repr,
)
def test_meta_with_an_impossible_value_is_refused(store, key, value):
    change_meta(store, lambda meta: {**meta, key: value})
    refused(store, "meta.json")


@pytest.mark.parametrize(
    "entry", [None, {}, [], "text", 5, {"bytes": 1}, {"sha256": ""}, {"bytes": "", "sha256": ""}], ids=repr
)
def test_meta_with_an_impossible_entry_of_a_file_is_refused(store, entry):
    change_meta(store, lambda meta: meta["files"].update({"test_labels.npy": entry}))
    refused(store, "test_labels.npy")


def test_fewer_classes_than_labels_are_refused(store):
    change_meta(store, lambda meta: {**meta, "classes": ["ant", "bee"]})
    refused(store, "train_labels.npy")


def test_flipped_bit_in_meta_never_changes_what_is_opened(store):
    path = store / "meta.json"
    whole, rng, before, wrong = path.read_bytes(), random.Random(8), open_store(store), []
    for _ in range(60):
        place = rng.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
        try:
            after = open_store(store)
        except DataError:
            continue
        if any(getattr(before, key) != getattr(after, key) for key in ("name", "classes", "mean", "std")):
            wrong.append(place)
    assert not wrong


# --- writing fails half-way --------------------------------------------------------------------------------------


def fail_at(monkeypatch, module, function: str, number: int) -> None:
    """Make the `number`th call of `module.function` fail as on a full disk."""
    original, calls = getattr(module, function), iter(range(1, 1000))

    def failing(*arguments, **options):
        if next(calls) == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments, **options)

    monkeypatch.setattr(module, function, failing)


FAILURES = [
    *((np, "save", number) for number in (1, 3, 5)),
    *((os, "fsync", number) for number in (1, 5, 6, 7)),
    (Path, "mkdir", 1),
    (os, "rename", 1),
]
IDS = [f"{module.__name__}.{function} {number}" for module, function, number in FAILURES]


@pytest.mark.parametrize(("module", "function", "number"), FAILURES, ids=IDS)
def test_failure_without_an_old_store_leaves_nothing(tmp_path, monkeypatch, data, module, function, number):
    with monkeypatch.context() as patch:
        fail_at(patch, module, function, number)
        with pytest.raises(OSError, match="No space left") as caught:
            write_store(tmp_path / "toy", data, source="", version="")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("module", "function", "number"), FAILURES[:-1], ids=IDS[:-1])
def test_failure_leaves_the_old_store_unchanged(store, monkeypatch, data, helpers, module, function, number):
    before = helpers.tree(store)
    with monkeypatch.context() as patch:
        fail_at(patch, module, function, number)
        with pytest.raises(OSError, match="No space left"):
            write_store(store, random_data(1), source="", version="")
    assert_holds(store, data)
    assert helpers.tree(store) == before
    assert [path.name for path in store.parent.iterdir()] == ["toy"]


def test_failure_after_the_store_is_in_place_leaves_the_new_one(store, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at(patch, os, "fsync", 8)
        with pytest.raises(OSError, match="No space left"):
            write_store(store, random_data(1), source="", version="")
    assert_holds(store, random_data(1))
    assert [path.name for path in store.parent.iterdir()] == ["toy"]


def test_interruption_leaves_the_old_store(store, monkeypatch, data):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_store(store, random_data(1), source="", version="")
    assert_holds(store, data)
    assert [path.name for path in store.parent.iterdir()] == ["toy"]


def test_a_link_in_the_place_of_a_store_is_replaced(store, data, tmp_path):
    (tmp_path / "link").symlink_to(store)
    write_store(tmp_path / "link", random_data(1), source="", version="")
    assert not (tmp_path / "link").is_symlink()
    assert_holds(tmp_path / "link", random_data(1))
    assert_holds(store, data)


def test_new_store_replaces_the_old_one_and_what_a_killed_writer_left(store):
    left = store.parent / ".fastresnet-0123456789abcdef.tmp" / "new"
    left.mkdir(parents=True)
    (left / "train_images.npy").write_text("half")
    write_store(store, random_data(1), source="", version="")
    assert_holds(store, random_data(1))
    assert [path.name for path in store.parent.iterdir()] == ["toy"]
