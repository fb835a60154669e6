"""Preparation of a store: once, by one process, after any earlier state and any kill; and the drawn shapes10."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines import prepare as preparation
from pipelines.cifar import CIFAR10_CLASSES, CIFARS
from pipelines.downloads import Archive
from pipelines.errors import DataError, Note, UsageError
from pipelines.prepare import data_root, find_dataset, prepare
from pipelines.shapes10 import CLASSES, draw_shapes10
from pipelines.store import Dataset, open_store

TRAIN, TEST = 40, 20


@pytest.fixture
def make(tmp_path, helpers):
    """`prepare` in the root `tmp_path / "data"`, with a small shapes10 and without progress."""

    def call(name: str = "shapes10", source: Path | None = None, **options: Any) -> tuple[Dataset, bool]:
        root = tmp_path / "data"
        return prepare(name, root, helpers.ignore, source=source, train_images=TRAIN, test_images=TEST, **options)

    return call


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def archive(tmp_path, helpers, fake) -> Path:
    """A fake CIFAR-10 with three classes of its own."""
    return helpers.pack(tmp_path, "tar.gz", fake.binary())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def damage(folder: Path, kind: str) -> None:
    """Damage a store."""
    images = folder / "train_images.npy"
    match kind:
        case "flipped bit":
            content = bytearray(images.read_bytes())
            content[5000] ^= 1
            images.write_bytes(content)
        case "truncated":
            os.truncate(images, 5000)
        case "missing":
            images.unlink()
        case "broken meta":
            os.truncate(folder / "meta.json", 50)
        case "empty meta":
            (folder / "meta.json").write_bytes(b"")


# --- once --------------------------------------------------------------------------------------------------------


def test_store_is_made_once_and_then_unchanged(make, root, helpers):
    dataset, made = make()
    assert made
    assert (len(dataset.train), len(dataset.test), dataset.classes) == (TRAIN, TEST, CLASSES)
    assert names(root) == {"shapes10", ".shapes10.lock"}
    before = helpers.tree(root)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, made = make()
    assert not made
    assert again.folder == dataset.folder == root / "shapes10"
    assert helpers.tree(root) == before


def test_source_gets_a_store_under_the_name_given(make, archive, helpers, fake):
    dataset, made = make("insects-3", archive)
    assert made
    assert dataset.name == "insects-3"
    assert dataset.classes == fake.classes
    np.testing.assert_array_equal(dataset.train.images, fake.train_images)
    np.testing.assert_array_equal(dataset.train.labels, fake.train_labels)
    np.testing.assert_array_equal(dataset.test.images, fake.test_images)
    np.testing.assert_array_equal(dataset.test.labels, fake.test_labels)
    assert json.loads((dataset.folder / "meta.json").read_text())["source"] == "fake.tar.gz"


def test_prepared_store_needs_no_source(make, archive):
    make("insects", archive)
    archive.unlink()
    assert not make("insects")[1]


def test_prepared_store_opens_in_a_root_that_is_read_only(make, monkeypatch):
    make()

    def read_only(*_, **__):
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(preparation, "FileLock", read_only)
    for name in ("mkdir", "touch", "unlink", "write_bytes"):
        monkeypatch.setattr(Path, name, read_only)
    assert not make()[1]


@pytest.mark.parametrize(
    ("argument", "variable", "expected"),
    [("a", "b", "a"), (None, "b", "b"), (None, "", "data"), (None, None, "data")],
)
def test_data_root_is_the_argument_or_the_variable_or_data(monkeypatch, argument, variable, expected):
    monkeypatch.delenv("FASTRESNET_DATA", raising=False)
    if variable is not None:
        monkeypatch.setenv("FASTRESNET_DATA", variable)
    assert data_root(argument and Path(argument)) == Path(expected)


def test_a_tilde_is_the_home_folder(monkeypatch, make):
    home = make()[0].folder.parents[1]
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("FASTRESNET_DATA", "~/data")
    assert data_root(None) == data_root(Path("~/data")) == home / "data"
    assert find_dataset("~/data/shapes10", None).digest == find_dataset("shapes10", None).digest


@pytest.mark.parametrize("name", ["CIFAR10", "Cifar-10", "cifar-10", "cifar10/", "cifra10", "cifar_10"])
def test_a_mistyped_name_gets_a_suggestion_and_leaves_nothing(root, helpers, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"no data set '{name}' .*did you mean 'cifar10'"):
        find_dataset(name, root)
    if "/" not in name:
        with pytest.raises(DataError, match=r"did you mean 'cifar10'.*--source PATH"):
            prepare(name, root, helpers.ignore)
    assert not root.exists()


@pytest.mark.parametrize("kind", ["flipped bit", "truncated", "missing", "broken meta"])
def test_a_damaged_store_is_not_said_to_be_another_name(make, root, archive, helpers, kind):
    make("insects", archive)
    damage(root / "insects", kind)
    with (
        pytest.warns(Note, match="preparing .*insects again"),
        pytest.raises(DataError, match=r"insects is damaged; prepare it from its files again: --source PATH$"),
    ):
        prepare("insects", root, helpers.ignore)


def test_a_prepared_name_is_suggested_too(make, root, archive):
    make("insects", archive)
    with pytest.raises(DataError, match="did you mean 'insects'"):
        find_dataset("Insect", root)
    with pytest.raises(DataError, match=r"no prepared data set in .*birds"):
        find_dataset("birds", root)


# --- what lies in the place of the store -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flipped bit", "truncated", "missing", "broken meta", "empty meta"])
def test_damaged_store_is_rebuilt_with_a_warning(make, root, helpers, kind):
    make()
    whole = {path.name: path.read_bytes() for path in (root / "shapes10").iterdir()}
    damage(root / "shapes10", kind)
    with pytest.warns(UserWarning, match="preparing .* again") as caught:
        assert make()[1]
    assert str(root / "shapes10") in str(caught[0].message)
    assert {path.name: path.read_bytes() for path in (root / "shapes10").iterdir()} == whole
    assert names(root) == {"shapes10", ".shapes10.lock"}


def test_damaged_store_that_cannot_be_rebuilt_is_unchanged(make, root, archive, helpers):
    make("insects", archive)
    damage(root / "insects", "flipped bit")
    before = helpers.tree(root / "insects")
    with pytest.warns(UserWarning, match="preparing .* again"), pytest.raises(DataError, match="--source"):
        make("insects")
    assert helpers.tree(root / "insects") == before


@pytest.mark.parametrize(
    "files",
    [
        {"notes.txt": "mine"},
        {"train_images.npy": "mine"},
        {"deeper/notes.txt": "mine"},
        {"meta.json": "{}", "notes.txt": "mine"},
        {"meta.json": "not JSON", "photos/1.png": "mine"},
        {"meta.json": '{"schema": 1, "name": "my experiment"}', "results.csv": "mine"},
    ],
    ids=lambda files: " ".join(files),
)
@pytest.mark.filterwarnings("ignore:preparing")
def test_folder_with_other_files_is_refused_and_untouched(make, root, helpers, files):
    for name, text in files.items():
        (root / "shapes10" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "shapes10" / name).write_text(text)
    before = helpers.tree(root / "shapes10")
    with pytest.raises(DataError, match="cannot replace") as caught:
        make()
    assert str(root / "shapes10") in str(caught.value)
    assert helpers.tree(root / "shapes10") == before


def test_file_in_the_place_of_the_store_is_refused_and_untouched(make, root):
    root.mkdir()
    (root / "shapes10").write_text("mine")
    with pytest.raises(DataError, match="cannot replace"):
        make()
    assert (root / "shapes10").read_text() == "mine"


def test_empty_folder_is_filled(make, root):
    (root / "shapes10").mkdir(parents=True)
    assert make()[1]
    assert len(open_store(root / "shapes10").train) == TRAIN


# --- what cannot be prepared -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a/b", "/a", "a/", "../a", "", ".", "..", ".x", "a\x1b", "a\n"])
def test_invalid_name_is_refused(make, tmp_path, archive, name):
    before = names(tmp_path)
    with pytest.raises(UsageError) as caught:
        make(name, archive)
    assert caught.value.exit_code == 2
    assert repr(name) in str(caught.value)
    assert names(tmp_path) == before


@pytest.fixture
def flowers(tmp_path) -> Path:
    """A folder of two classes of 20 images each and, in one of them, a file that is no image."""
    rng = np.random.default_rng(1)
    for flower in ("iris", "rose"):
        (tmp_path / "flowers" / flower).mkdir(parents=True)
        for number in range(20):
            image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
            image.save(tmp_path / "flowers" / flower / f"{number}.png")
    (tmp_path / "flowers" / "rose" / "none.png").write_text("no image")
    return tmp_path / "flowers"


def test_folder_of_classes_is_split_and_unreadable_images_are_skipped(make, root, flowers):
    with pytest.raises(DataError, match=r"none\.png is text .* --skip-unreadable"):
        make("flowers", flowers, split=0.25)
    assert not (root / "flowers").exists()
    with pytest.warns(Note, match=r"1 of 41 images cannot be read and were skipped: .*none\.png"):
        dataset, _ = make("flowers", flowers, split=0.25, skip_unreadable=True)
    assert len(dataset.train) + len(dataset.test) == 40
    assert 3 <= len(dataset.test) <= 17  # 10 are expected, 2.7 is the standard deviation
    assert json.loads((root / "flowers" / "meta.json").read_text())["source"] == "flowers, split 0.25"


def test_numbered_classes_of_cifar10_get_their_names_if_the_content_is_its(make, helpers, tmp_path, monkeypatch):
    fake = helpers.FakeCifar(CIFAR10_CLASSES)
    arrays = {name: getattr(fake, f"{split}_{kind}") for name, split, kind in (
        ("x_train", "train", "images"), ("y_train", "train", "labels"),
        ("x_test", "test", "images"), ("y_test", "test", "labels"),
    )}  # fmt: skip
    np.savez(tmp_path / "cifar10.npz", **arrays)
    with pytest.raises(DataError, match="images are not those of CIFAR-10"):
        make("cifar10", tmp_path / "cifar10.npz")
    digests = {
        split: hashlib.sha256(
            b"".join(
                sorted(
                    hashlib.sha256(bytes([label]) + image.tobytes()).digest()
                    for image, label in zip(arrays[f"x_{split}"], arrays[f"y_{split}"], strict=True)
                )
            )
        ).hexdigest()
        for split in ("train", "test")
    }
    monkeypatch.setattr("pipelines.cifar._CIFAR10_CONTENT", digests)
    assert make("cifar10", tmp_path / "cifar10.npz")[0].classes == CIFAR10_CLASSES


def test_images_of_another_size_are_resized_on_request_which_is_recorded(make, root, flowers):
    Image.new("RGB", (40, 30)).save(flowers / "rose" / "none.png")
    with pytest.raises(DataError, match=r"none\.png has 40x30 pixels, not 32x32\. --resize crops to a square"):
        make("flowers", flowers, split=0.25)
    with pytest.warns(Note, match=r"1 of 41 images were not 32x32"):
        make("flowers", flowers, split=0.25, resize=True)
    assert json.loads((root / "flowers" / "meta.json").read_text())["source"] == "flowers, split 0.25, resize"


@pytest.mark.parametrize("split", [0.0, 1.0, -0.1, 20.0, float("nan")])
def test_split_outside_0_to_1_is_refused(make, flowers, split):
    with pytest.raises(UsageError, match=rf"--split {split} is not between 0 and 1"):
        make("flowers", flowers, split=split)


@pytest.mark.parametrize("name", ["shapes10", "cifar10"])
def test_split_without_source_is_refused(make, root, name):
    with pytest.raises(UsageError, match="--split divides the images of a --source"):
        make(name, split=0.2)
    with pytest.raises(UsageError, match="--resize changes the images of a --source"):
        make(name, resize=True)
    assert not root.exists()


def test_unknown_name_without_source_is_refused(make, root):
    with pytest.raises(DataError, match="--source") as caught:
        make("insects")
    assert "insects" in str(caught.value)
    assert str(root) in str(caught.value)
    assert not root.exists()


def test_a_missing_source_is_refused_though_the_store_exists(make, root, archive):
    make("insects", archive)
    with pytest.raises(DataError, match="nowhere does not exist"):
        make("insects", root / "nowhere")


def test_a_constant_channel_is_named(make, tmp_path):
    for split, label in itertools.product(("train", "test"), ("ant", "bee")):
        (tmp_path / "images" / split / label).mkdir(parents=True)
        pixels = np.random.default_rng(len(label)).integers(0, 256, (32, 32, 3), np.uint8)
        pixels[..., 1] = 7
        Image.fromarray(pixels).save(tmp_path / "images" / split / label / "1.png")
    with pytest.warns(Note, match="the green channel is 7 in every pixel"):
        make("insects", tmp_path / "images")


def test_shapes10_takes_no_source(make, root, archive):
    with pytest.raises(UsageError, match="--data NAME"):
        make("shapes10", archive)
    assert not (root / "shapes10").exists()


def test_source_that_cannot_be_read_leaves_nothing(make, root, archive):
    os.truncate(archive, 1000)
    with pytest.raises(DataError, match=archive.name):
        make("insects", archive)
    assert names(root) <= {".insects.lock"}


def test_images_of_other_classes_are_not_cifar10(make, root, tmp_path):
    for name in ("train/ant", "test/ant", "train/bee", "test/bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "images" / name / "1.png")
    with pytest.raises(UsageError, match="not CIFAR-10") as caught:
        make("cifar10", tmp_path / "images")
    assert str(tmp_path / "images") in str(caught.value)
    assert not (root / "cifar10").exists()
    assert make("insects", tmp_path / "images")[1]


def test_other_pixels_in_the_classes_of_cifar10_are_not_cifar10(make, root, tmp_path, helpers):
    path = helpers.pack(tmp_path, "zip", helpers.FakeCifar(CIFAR10_CLASSES).python())
    with pytest.raises(DataError, match="not those of CIFAR-10") as caught:
        make("cifar10", path)
    assert str(path) in str(caught.value)
    assert not (root / "cifar10").exists()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_without_source_is_downloaded_verified_and_the_archive_removed(make, root, archive, monkeypatch, name):
    verified = []

    def download(wanted: Archive, folder: Path, _) -> Path:
        assert wanted is CIFARS[name].archive
        folder.mkdir(parents=True)
        return Path(shutil.copy(archive, folder))

    monkeypatch.setattr(preparation, "download", download)
    monkeypatch.setattr(
        preparation, "verify", lambda name, data, path: verified.append((name, data.classes, path.name))
    )
    dataset, made = make(name)
    assert made
    assert verified == [(name, dataset.classes, archive.name)]
    assert json.loads((dataset.folder / "meta.json").read_text())["source"] == "download"
    assert not (root / "downloads").exists()


def test_a_link_in_the_place_of_the_lock_is_not_followed(make, root, tmp_path):
    root.mkdir(exist_ok=True)
    (tmp_path / "precious").write_text("text")
    (root / ".shapes10.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=r"symbolic links: .*\.shapes10\.lock"):
        make("shapes10")
    assert (tmp_path / "precious").read_text() == "text"


# --- several processes, and processes that are killed ------------------------------------------------------------

WAITING_PROCESS = """
import sys
from pathlib import Path
from pipelines import prepare as preparation

def announced(*arguments, lock=preparation.FileLock):
    print("at the lock", flush=True)
    return lock(*arguments)

def report(what, done, total):
    if what == "drawing" and done < total:
        print("drawing", flush=True)
        sys.stdin.readline()

preparation.FileLock = announced
print(preparation.prepare("shapes10", Path(sys.argv[1]), report, train_images=40, test_images=20)[1])
"""


def start(root: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", WAITING_PROCESS, str(root)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("first_is_killed", [False, True])
def test_two_processes_at_once_make_one_store(root, first_is_killed):
    first = start(root)
    assert [first.stdout.readline(), first.stdout.readline()] == ["at the lock\n", "drawing\n"]
    second = start(root)
    assert second.stdout.readline() == "at the lock\n"
    if first_is_killed:
        first.kill()
    assert first.communicate("\n", timeout=10)[0] == ("" if first_is_killed else "True\n")
    assert second.communicate("\n", timeout=10)[0] == ("drawing\nTrue\n" if first_is_killed else "False\n")
    assert second.returncode == 0
    assert_shapes10(root / "shapes10")
    assert names(root) == {"shapes10", ".shapes10.lock"}


def assert_shapes10(folder: Path) -> None:
    """The store `folder` opens and holds the small shapes10."""
    dataset, expected = open_store(folder), draw_shapes10(TRAIN, TEST, lambda *_: None)
    np.testing.assert_array_equal(dataset.train.images, expected.train_images)
    np.testing.assert_array_equal(dataset.test.images, expected.test_images)
    np.testing.assert_array_equal(dataset.test.labels, expected.test_labels)


KILLED_PROCESSES = """
import os, shutil, signal, sys
from pathlib import Path
import numpy as np
from pipelines import prepare as preparation

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def die_at(function, number):
    calls = iter(range(1, 1000))
    def counting(*arguments, **options):
        if next(calls) == number:
            if function is np.save:
                arguments[0].write(b"half an array")
                arguments[0].flush()
            die()
        return function(*arguments, **options)
    return counting

def prepare_and_die(root, function, number):
    report = die_at(print, number) if function == "report" else lambda *_: None
    if function != "report":
        module, name = function.split(".")
        module = {"os": os, "np": np, "shutil": shutil}[module]
        setattr(module, name, die_at(getattr(module, name), number))
    preparation.prepare("shapes10", root, report, train_images=40, test_images=20)

for line in sys.stdin:
    root, function, number = line.split()
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        prepare_and_die(Path(root), function, int(number))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

BEFORE = [("report", 1), ("report", 3), ("np.save", 1), ("np.save", 4), ("os.fsync", 1), ("os.fsync", 6)]
BEFORE += [("shutil.rmtree", 1), ("os.fsync", 7), ("os.rename", 1)]
AFTER = [("os.fsync", 8), ("shutil.rmtree", 2), ("report", 4)]
REPLACING = [("np.save", 4), ("os.rename", 1), ("os.rename", 2), ("os.fsync", 8), ("shutil.rmtree", 2)]


def kill_at(folder: Path, moments: list[tuple[str, int]], prepared: Path | None = None) -> dict[tuple[str, int], Path]:
    """A root for each moment, in which a process was killed before the nth call of a function while preparing."""
    roots = {moment: folder / f"{number}" for number, moment in enumerate(moments)}
    for root in roots.values():
        if prepared:
            shutil.copytree(prepared, root)
    lines = "".join(f"{root} {function} {number}\n" for (function, number), root in roots.items())
    command = [sys.executable, "-W", "ignore", "-c", KILLED_PROCESSES]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["-9"] * len(moments)
    return roots


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> dict[tuple[str, int], Path]:
    return kill_at(tmp_path_factory.mktemp("killed"), BEFORE + AFTER)


@pytest.fixture(scope="module")
def killed_while_replacing(tmp_path_factory, helpers) -> dict[tuple[str, int], Path]:
    """A root for each moment, in which a process was killed while replacing a damaged store."""
    prepared = tmp_path_factory.mktemp("prepared")
    prepare("shapes10", prepared, helpers.ignore, train_images=TRAIN, test_images=TEST)
    damage(prepared / "shapes10", "flipped bit")
    return kill_at(tmp_path_factory.mktemp("replacing"), REPLACING, prepared)


def assert_recovers(root: Path, helpers) -> None:
    """Assert that preparing again gives the whole store and removes what the killed process left."""
    prepare("shapes10", root, helpers.ignore, train_images=TRAIN, test_images=TEST)
    assert_shapes10(root / "shapes10")
    assert names(root) == {"shapes10", ".shapes10.lock"}


@pytest.mark.parametrize("moment", BEFORE, ids=str)
def test_process_killed_before_the_store_is_in_place_leaves_none(killed, helpers, moment):
    root = killed[moment]
    with pytest.raises(DataError, match="no prepared data set"):
        open_store(root / "shapes10")
    assert_recovers(root, helpers)


@pytest.mark.parametrize("moment", AFTER, ids=str)
def test_process_killed_after_the_store_is_in_place_leaves_it_whole(killed, helpers, moment):
    root = killed[moment]
    assert_shapes10(root / "shapes10")
    assert_recovers(root, helpers)


@pytest.mark.parametrize("moment", REPLACING, ids=str)
@pytest.mark.filterwarnings("ignore:preparing")
def test_store_is_recovered_after_a_kill_during_its_replacement(killed_while_replacing, helpers, moment):
    root = killed_while_replacing[moment]
    if moment in AFTER:
        assert_shapes10(root / "shapes10")
    else:
        with pytest.raises(DataError):
            open_store(root / "shapes10")
    assert_recovers(root, helpers)


# --- shapes10 ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes():
    """Enough images that they are drawn in several chunks."""
    return draw_shapes10(2050, 150, lambda *_: None)


def test_shapes10_has_the_layout_of_cifar10(shapes):
    assert len(set(shapes.classes)) == 10
    assert (shapes.train_images.shape, shapes.test_images.shape) == ((2050, 32, 32, 3), (150, 32, 32, 3))
    assert shapes.train_images.dtype == shapes.test_images.dtype == np.uint8
    assert shapes.train_labels.dtype == shapes.test_labels.dtype == np.int64
    assert (shapes.train_images.min(), shapes.train_images.max()) == (0, 255)


def test_shapes10_is_balanced(shapes):
    assert np.bincount(shapes.train_labels).tolist() == [205] * 10
    assert np.bincount(shapes.test_labels).tolist() == [15] * 10


@pytest.mark.parametrize(("train", "test"), [(1, 1), (33, 150), (2001, 7)])
def test_smaller_shapes10_is_the_beginning_of_a_larger_one(shapes, train, test):
    smaller = draw_shapes10(train, test, lambda *_: None)
    np.testing.assert_array_equal(smaller.train_images, shapes.train_images[:train])
    np.testing.assert_array_equal(smaller.train_labels, shapes.train_labels[:train])
    np.testing.assert_array_equal(smaller.test_images, shapes.test_images[:test])
    np.testing.assert_array_equal(smaller.test_labels, shapes.test_labels[:test])


def test_no_image_of_shapes10_occurs_twice(shapes):
    images = np.concatenate([shapes.train_images, shapes.test_images])
    assert len({image.tobytes() for image in images}) == 2200


def test_shapes10_is_the_same_in_another_process(shapes):
    code = (
        "import hashlib\nfrom pipelines.shapes10 import draw_shapes10\n"
        "data = draw_shapes10(60, 20, lambda *_: None)\n"
        "print(hashlib.sha256(data.train_images.tobytes() + data.test_images.tobytes()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    here = shapes.train_images[:60].tobytes() + shapes.test_images[:20].tobytes()
    assert other == hashlib.sha256(here).hexdigest()


def test_drawing_reports_its_progress():
    calls = []
    draw_shapes10(2050, 150, lambda *call: calls.append(call))
    assert calls == [("drawing", 2000, 2200), ("drawing", 2050, 2200), ("drawing", 2200, 2200)]
