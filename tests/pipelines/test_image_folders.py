"""Folders of images by class: layouts, splits and notes, in a folder, a zip and a tar."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipelines.errors import DataError, UsageError

PACKINGS = ("folder", "zip", "tar", "tar.gz", "tar.xz", "tar.bz2")
CATS_AND_DOGS = ("train/cat/1.png", "train/cat/2.jpg", "train/dog/1.png", "test/cat/3.png", "test/dog/2.webp")


def pixels_of(name: str) -> np.ndarray:
    """Draw the pixels, uint8 [32, 32, 3], that `name` determines."""
    return np.random.default_rng(list(name.encode())).integers(0, 256, (32, 32, 3), np.uint8)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture
def pack(tmp_path, helpers):
    """Pack files, given by their names, as a folder, a zip or a tar: images with pixels by name, and others."""

    def pack_files(names, packing: str = "folder", others=(), name: str = "source"):
        members = {name: png(pixels_of(name)) for name in names} | dict(others)
        if packing == "zip":
            return helpers.make_zip(tmp_path / f"{name}.zip", members)
        if packing.startswith("tar"):
            mode = f"w:{packing.removeprefix('tar').lstrip('.')}"
            return helpers.make_tar(tmp_path / f"{name}.{packing}", members, mode)
        for inner, content in members.items():
            path = tmp_path / name / inner
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return tmp_path / name

    return pack_files


def check_images(images: np.ndarray, names) -> None:
    np.testing.assert_array_equal(images, np.stack([pixels_of(name) for name in names]))


# --- layouts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("above", ["", "archive/cifar/", "./"])
def test_images_are_read_in_order_of_their_classes_and_names(pack, read, packing, above):
    shuffled = ("train/dog/1.png", "test/dog/2.webp", "train/cat/2.jpg", "test/cat/3.png", "train/cat/1.png")
    images = {f"{above}{name}": png(pixels_of(name)) for name in shuffled}
    data, notes = read(pack([], packing, images))
    assert notes == []
    assert data.classes == ("cat", "dog")
    assert (data.train_labels.tolist(), data.test_labels.tolist()) == ([0, 0, 1], [0, 1])
    assert data.train_labels.dtype == data.test_labels.dtype == np.int64
    check_images(data.train_images, CATS_AND_DOGS[:3])
    check_images(data.test_images, CATS_AND_DOGS[3:])


@pytest.mark.parametrize("packing", ["folder", "tar"])
def test_images_by_class_come_before_batches_of_cifar10(pack, read, fake, packing):
    batches = {f"cifar-10-batches-bin/{name}": content for name, content in fake.binary().items()}
    data, notes = read(pack(CATS_AND_DOGS, packing, batches))
    assert (data.classes, notes) == (("cat", "dog"), [])


@pytest.mark.parametrize(
    ("train", "test"),
    [("Train", "Test"), ("TRAINING", "testing"), ("training_set", "test_set"), ("train-images", "test")],
)
def test_folders_of_splits_have_many_names(pack, read, train, test):
    names = (f"{train}/cat/1.png", f"{train}/dog/1.png", f"{test}/cat/3.png")
    data, notes = read(pack(names))
    check_images(data.train_images, names[:2])
    check_images(data.test_images, names[2:])
    assert notes == ["no test images of 1 of 2 classes: dog."]


@pytest.mark.parametrize("name", ["val", "valid", "Validation"])
def test_validation_images_stand_in_for_those_of_testing_with_a_note(pack, read, name):
    names = ("train/cat/1.png", "train/dog/1.png", f"{name}/cat/3.png", f"{name}/dog/4.png")
    path = pack(names)
    data, notes = read(path)
    check_images(data.test_images, names[2:])
    assert notes == [f"{path} has no test images; those of {name} are taken."]
    path = pack((*names, "test/cat/5.png", "test/dog/5.png"))
    data, notes = read(path)
    check_images(data.test_images, ("test/cat/5.png", "test/dog/5.png"))
    assert notes == [f"left out {name}, which is beside the test images (images: 2)."]


def test_folders_are_walked_and_ordered_as_by_image_folder(pack, read):
    datasets = pytest.importorskip("torchvision.datasets")
    inside = (
        "2.png",
        "10.PNG",
        "a b/1.jpg",
        "a/1.tif",
        "a/b/0.bmp",
        "a/b.png",
        "a-b/1.ppm",
        "Z/1.pgm",
        "é.webp",
        "x.tiff",
    )
    path = pack(
        [f"{split}/{name}/{file}" for split in ("train", "test") for name in ("B", "a", "á") for file in inside]
    )
    data, notes = read(path)
    assert notes == []
    for split, (images, labels) in data.splits().items():
        expected = datasets.ImageFolder(path / split)
        assert list(data.classes) == expected.classes
        assert labels.tolist() == expected.targets
        np.testing.assert_array_equal(images, np.stack([np.asarray(image) for image, _ in expected]))


def test_links_are_followed_and_loops_are_not(pack, read, tmp_path):
    path = pack(CATS_AND_DOGS)
    moved = tmp_path / "elsewhere"
    (path / "train" / "cat").rename(moved)
    (path / "train" / "cat").symlink_to(moved)
    (moved / "loop").symlink_to(path)
    (path / "train" / "dog" / "loop").symlink_to(path / "train" / "dog")
    data, _ = read(path)
    assert data.train_labels.tolist() == [0, 0, 1]


def test_pipe_is_no_image(pack, read):
    path = pack(CATS_AND_DOGS)
    os.mkfifo(path / "train" / "cat" / "5.png")
    assert len(read(path)[0].train_images) == 3


@pytest.mark.parametrize("packing", ["folder", "zip", "tar.gz"])
def test_debris_is_left_out_without_a_note(pack, read, packing):
    names = (".DS_Store", "._1.png", "Thumbs.db", "desktop.ini", ".ipynb_checkpoints/1-checkpoint.png", "@eaDir/1.png")
    debris = {f"train/cat/{name}": b"text" for name in names}
    debris |= {"__MACOSX/train/cat/._1.png": b"text", "__MACOSX/train/bird/1.png": b"text", "train/.git/x/1.png": b"x"}
    data, notes = read(pack(CATS_AND_DOGS, packing, debris))
    assert (data.classes, len(data.train_images), len(data.test_images)) == (("cat", "dog"), 3, 2)
    assert notes == []


def test_other_files_are_left_out_with_one_note(pack, read):
    others = dict.fromkeys(("train/cat/1.mov", "train/dog/2.MOV", "train/labels.csv", "LICENSE"), b"text")
    data, notes = read(pack((*CATS_AND_DOGS, "train/stray.png", "extra/cat/1.png"), others=others))
    assert len(data.train_images) == 3
    (note,) = notes
    assert note == (
        "left out files that are not images of a class: 2 .png, 2 .mov, 1 .csv "
        "(extra/cat/1.png, train/cat/1.mov, train/dog/2.MOV and 2 more)."
    )


# --- classes -----------------------------------------------------------------------------------------------------


def test_class_without_images_in_a_split_is_named(pack, read):
    path = pack(("train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "test/emu/1.png"))
    for folder in ("test/dog", "train/emu", "train/gnu"):
        (path / folder).mkdir()
    data, notes = read(path)
    assert data.classes == ("cat", "dog", "emu")
    assert data.test_labels.tolist() == [0, 2]
    assert notes == [
        "left out class folders without an image: gnu.",
        "no train images of 1 of 3 classes: emu.",
        "no test images of 1 of 3 classes: dog.",
    ]


def test_single_class_is_noted(pack, read):
    _, notes = read(pack(("training_set/training_set/1.png", "test_set/training_set/2.png")))
    assert notes == ["there is one class only, training_set: classes are the folders in training_set."]


def test_class_that_is_not_trained_is_refused(pack, refused):
    path = pack((*CATS_AND_DOGS, "test/yak/1.png"))
    refused(path, "test has classes that train lacks: yak")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("test/cat/1.png",), "has no train images"),
        (("1.png", "2.png"), "not in folders of their classes"),
        (("train/1.png", "test/2.png"), "not in folders of their classes"),
        (("a/train/cat/1.png", "b/train/cat/1.png"), "two folders for one split, a/train and b/train"),
        (("train/cat/1.png", "Train/cat/1.png"), "two folders for one split, Train and train"),
        (("train/cat/1.png", "train/dog/1.png"), "has no test images. --split 0.2"),
        (("cat/1.png", "dog/1.png"), "has no test images. --split 0.2"),
    ],
)
def test_other_layouts_are_refused(pack, refused, names, words):
    refused(pack(names), words)


@pytest.mark.parametrize("folders", [["train", "test"], ["train/ape", "test/ape"]], ids=["no class", "no image"])
def test_folder_without_images_is_refused(tmp_path, refused, folders):
    for name in folders:
        (tmp_path / "images" / name).mkdir(parents=True)
    refused(tmp_path / "images", "nor images")


# --- images of another size --------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
def test_images_of_another_size_are_resized_only_on_request(pack, read, refused, packing):
    large = np.kron(pixels_of("large"), np.ones((2, 2, 1), np.uint8))
    path = pack(CATS_AND_DOGS, packing, {"test/dog/3.png": png(large), "train/dog/2.png": png(large[:40])})
    with pytest.raises(DataError) as caught:
        read(path, skip_unreadable=True)
    message = str(caught.value)
    assert str(path) in message
    assert "test/dog/3.png has 64x64 pixels, not 32x32. --resize" in message or "2.png has 64x40 pixels" in message
    data, (note,) = read(path, resize=True)
    assert note == "2 of 7 images were not 32x32 and have been cropped to a square and resized."
    check_images(data.train_images[:3], CATS_AND_DOGS[:3])
    expected = ImageOps.fit(Image.fromarray(large), (32, 32))
    np.testing.assert_array_equal(data.test_images[-1], np.asarray(expected))


def test_images_to_test_on_are_resized(pack, read):
    large = np.kron(pixels_of("large"), np.ones((2, 2, 1), np.uint8))
    _, (note,) = read(pack([], others={"cat/1.png": png(large), "dog/1.png": png(large)}), only_test=True)
    assert note.startswith("2 of 2 images were not 32x32")


# --- splitting ---------------------------------------------------------------------------------------------------


def is_held_out(name: str, fraction: float) -> bool:
    digest = hashlib.sha256(pixels_of(name).tobytes()).hexdigest()
    return int(digest[:16], 16) < fraction * 2**64


@pytest.mark.parametrize("packing", ["folder", "zip", "tar.gz"])
@pytest.mark.parametrize("above", ["", "flowers/all/", "train/"])
@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_images_without_a_test_folder_are_split_by_their_hash(pack, read, packing, above, fraction):
    names = [f"{above}{flower}/{number:02}.png" for flower in ("iris", "rose") for number in range(30)]
    data, notes = read(pack(names, packing), split=fraction)
    assert notes == []
    assert data.classes == ("iris", "rose")
    check_images(data.train_images, [name for name in names if not is_held_out(name, fraction)])
    check_images(data.test_images, [name for name in names if is_held_out(name, fraction)])
    assert data.test_labels.tolist() == ["rose" in name for name in names if is_held_out(name, fraction)]
    assert abs(len(data.test_images) / 60 - fraction) < 0.2


def test_added_images_move_no_others_and_duplicates_stay_together(pack, read):
    names = [f"{flower}/{number}.png" for flower in ("iris", "rose") for number in range(20)]
    before, _ = read(pack(names), split=0.3)
    copies = {f"iris/copy-{number}.png": png(pixels_of(f"iris/{number}.png")) for number in range(20)}
    after, _ = read(pack([*names, *(f"rose/more-{number}.png" for number in range(20))], others=copies), split=0.3)
    for old, new in zip(before.splits().values(), after.splits().values(), strict=True):
        assert {image.tobytes() for image in old[0]} <= {image.tobytes() for image in new[0]}
    assert not {image.tobytes() for image in after.train_images} & {image.tobytes() for image in after.test_images}
    assert len(after.train_images) + len(after.test_images) == 80


def test_folders_inside_a_class_are_no_splits(pack, read):
    data, _ = read(pack([*CATS_AND_DOGS, "train/dog/test/big/1.png", "train/dog/train/big/1.png"]))
    assert data.train_labels.tolist() == [0, 0, 1, 1, 1]


def test_a_class_may_be_called_train(pack, read):
    data, _ = read(pack([f"{vehicle}/{number}.png" for vehicle in ("car", "train") for number in range(9)]), split=0.5)
    assert data.classes == ("car", "train")


def test_split_of_divided_images_is_refused(pack, refused):
    refused(pack(CATS_AND_DOGS), "--split 0.2", "has test images already, in test", kind=UsageError, split=0.2)


# --- images to test on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_note_says_which_images_stand_in_for_those_to_test_on(pack, read, split):
    names = [f"{split}/cat/1.png", f"{split}/dog/2.png"]
    data, (note,) = read(pack([*names, "test/1.png"]), only_test=True)
    check_images(data.test_images, names)
    assert note.endswith(f"no test images in folders of their classes; those of {split} are taken.")


# --- names and links in archives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [0, 0x800], ids=["without the flag of UTF-8", "with it"])
def test_names_in_a_zip_are_those_that_its_writer_meant(read, tmp_path, flag):
    """Programs on Windows write backslashes, and others UTF-8 without its flag."""
    names = ["train/dog/1.png", "train/kätzchen/1.png", "test/dog/2.png", "test/kätzchen/2.png"]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("train/", *names):
            entry = zipfile.ZipInfo("x")
            entry.create_system, entry.filename = 0, name.replace("/", "\\")
            archive.writestr(entry, b"" if name.endswith("/") else png(pixels_of(name)))
    content = (tmp_path / "a.zip").read_bytes()
    assert content.count(b"\x00\x08\x00\x00\x00\x00\x21\x00") == 4  # the flags of the two names, twice each
    if not flag:
        content = content.replace(b"\x00\x08\x00\x00\x00\x00\x21\x00", b"\x00\x00\x00\x00\x00\x00\x21\x00")
    (tmp_path / "a.zip").write_bytes(content)
    data, notes = read(tmp_path / "a.zip")
    assert (data.classes, notes) == (("dog", "kätzchen"), [])
    check_images(data.train_images, names[:2])
    check_images(data.test_images, names[2:])


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_an_image_that_is_a_link_in_a_tar_is_not_dropped_without_a_word(pack, read, refused, kind):
    path = pack(CATS_AND_DOGS, "tar")
    entry = tarfile.TarInfo("train/cat/3.png")
    entry.type, entry.linkname = kind, "train/cat/1.png"
    with tarfile.open(path, "a") as archive:
        archive.addfile(entry)
    refused(path, "train/cat/3.png is a link, which is not followed. Pack with tar --dereference --hard-dereference.")
    data, (note,) = read(path, skip_unreadable=True)
    check_images(data.train_images, CATS_AND_DOGS[:3])
    assert "1 of 6 images cannot be read" in note


@pytest.mark.parametrize("packing", ["zip", "tar"])
def test_a_name_with_a_line_end_stays_in_one_line(pack, refused, packing):
    refused(pack(CATS_AND_DOGS, packing, {"train/cat/a\nerror: b.png": b"text"}), r"train/cat/a\nerror: b.png is text")


@pytest.mark.parametrize("packing", ["zip", "tar"])
@pytest.mark.parametrize("name", ["..", "../.", "."])
def test_files_without_a_name_are_left_out(pack, read, packing, name):
    assert len(read(pack(CATS_AND_DOGS, packing, {name: b"text"}))[0].train_images) == 3


# --- unreadable images, and hostile archives ---------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
def test_unreadable_images_are_named_or_skipped(pack, read, refused, packing):
    damaged = {"train/cat/0.png": b"text", "train/dog/5.png": png(pixels_of("x"))[:200], "test/dog/0.png": b""}
    path = pack(CATS_AND_DOGS, packing, damaged)
    refused(path, "Others that cannot be read: 2. prepare and predict --skip-unreadable leave")
    data, (note,) = read(path, skip_unreadable=True)
    check_images(data.train_images, CATS_AND_DOGS[:3])
    check_images(data.test_images, CATS_AND_DOGS[3:])
    assert data.train_labels.tolist() == [0, 0, 1]
    assert note.startswith("3 of 8 images cannot be read and were skipped: ")
    assert all(name in note for name in damaged)


@pytest.mark.parametrize("packing", PACKINGS)
def test_only_unreadable_images_are_refused(pack, read, packing):
    with pytest.raises(DataError, match="has no train images"):
        read(pack((), packing, dict.fromkeys(CATS_AND_DOGS, b"text")), skip_unreadable=True)


@pytest.mark.parametrize("packing", ["zip", "tar"])
def test_paths_that_lead_outside_have_no_effect(pack, read, helpers, tmp_path, packing):
    path = pack((), packing, {f"../../{name}": png(pixels_of(name)) for name in CATS_AND_DOGS})
    before = helpers.tree(tmp_path)
    data, _ = read(path)
    check_images(data.train_images, CATS_AND_DOGS[:3])
    assert helpers.tree(tmp_path) == before
