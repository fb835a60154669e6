"""Images labelled by a text file: tables as Kaggle's, and Tiny-ImageNet."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from tests.limits import limits

PACKINGS = ("folder", "zip", "tar.gz")


def pixels_of(name: str, side: int = 32) -> np.ndarray:
    """Draw the pixels, uint8 [side, side, 3], that `name` determines."""
    return np.random.default_rng(list(name.encode())).integers(0, 256, (side, side, 3), np.uint8)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture
def pack(tmp_path, helpers):
    """Pack images, whose names determine their pixels, and texts."""

    def pack_files(images, texts, packing: str = "folder"):
        members = {name: png(pixels_of(name)) for name in images} | {name: t.encode() for name, t in texts.items()}
        if packing == "zip":
            return helpers.make_zip(tmp_path / "source.zip", members)
        if packing == "tar.gz":
            return helpers.make_tar(tmp_path / "source.tar.gz", members, "w:gz")
        for name, content in members.items():
            path = tmp_path / "source" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return tmp_path / "source"

    return pack_files


# --- tables ------------------------------------------------------------------------------------------------------

NUMBERS = range(1, 61)
TABLE = "id,label\n" + "".join(f"{number},{('frog', 'cat', 'truck')[number % 3]}\n" for number in NUMBERS)
IMAGES = [f"train/{number}.png" for number in NUMBERS]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("above", ["", "cifar-10/"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("trainLabels.csv", str),
        ("train.csv", lambda text: "\ufeff" + text.replace("id,label", "Filename,Class")),
        ("train_labels.csv", lambda text: text.replace("\n", "\r\n").replace(",frog", ',"frog"')),
        ("train.csv", lambda text: text.replace("\n", ",0.5\n").replace(",cat", ".png,cat")),
    ],
)
def test_images_of_a_table_are_divided(pack, read, packing, above, name, change):
    path = pack([f"{above}{image}" for image in IMAGES], {f"{above}{name}": change(TABLE)}, packing)
    data, notes = read(path, split=0.4)
    assert notes == []
    assert data.classes == ("cat", "frog", "truck")
    labels = {
        pixels_of(f"{above}train/{number}.png").tobytes(): ("frog", "cat", "truck")[number % 3] for number in NUMBERS
    }
    found = {
        image.tobytes(): data.classes[label]
        for images, of_split in data.splits().values()
        for image, label in zip(images, of_split, strict=True)
    }
    assert found == labels
    assert 5 < len(data.test_images) < 45


def test_images_may_be_beside_the_table(pack, read):
    data, _ = read(pack(["1.png", "2.jpg"], {"train.csv": "id,label\n1,ant\n2.jpg,bee\n"}), only_test=True)
    np.testing.assert_array_equal(data.test_images, np.stack([pixels_of("1.png"), pixels_of("2.jpg")]))


def test_classes_that_are_numbers_are_in_their_order(pack, read):
    table = "id,label\n" + "".join(f"{number},{number % 12}\n" for number in NUMBERS)
    assert read(pack(IMAGES, {"train.csv": table}), split=0.5)[0].classes == tuple(map(str, range(12)))


@pytest.mark.parametrize("packing", PACKINGS)
def test_images_without_a_label_are_left_out_with_a_note(pack, read, packing):
    others = [*(f"test/{number}.png" for number in range(5)), "train/99.png"]
    texts = {"trainLabels.csv": TABLE, "sampleSubmission.csv": "id,label\n1,cat\n"}
    data, notes = read(pack([*IMAGES, *others], texts, packing), split=0.3)
    assert len(data.train_images) + len(data.test_images) == 60
    assert notes == ["left out images without a label in trainLabels.csv: 5 in test, 1 in train."]


def test_images_of_a_table_need_a_split(pack, refused):
    refused(pack(IMAGES, {"trainLabels.csv": TABLE}), "has no test images. --split 0.2")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("1,frog\n2,cat\n", "train.csv begins with '1,frog'. Its first line must name columns: id,label"),
        ("id,breed\n1,frog\n", "begins with 'id,breed'"),
        ("name;label\n1;frog\n", "begins with 'name;label'"),
        ("", "begins with ''"),
        ("id,label\n", "has no classes"),
        ("id,label\n1,frog\n2\n", "line 3, has no label"),
        ("id,label\n1,frog\n2, \n", "line 3, has no label"),
        ("id,label\n1,frog\n1,frog\n", "line 3: several images or labels of id '1'"),
        ("id,label\n1,frog\n1.png,cat\n", "line 3: several images or labels of id '1.png'"),
        ("id,label\n1,frog\n61,cat\n62,cat\n63,cat\n64,cat\n", "names images that are missing (4): '61', '62', '63'."),
        ("id,label\n../secret,frog\n", "names images that are missing (1): '../secret'."),
        ('id,label\n"a\n\x1b[31m",frog\n', r"missing (1): 'a\n\x1b[31m'."),
        ("id,label\n/etc/passwd,frog\n", "names images that are missing (1): '/etc/passwd'."),
        ("id,label\ntrain/1.png,frog\n", "names images that are missing (1): 'train/1.png'."),
        ('id,label\n1,"frog\n', "line 2, cannot be read"),
        ('id,label\n1,"fr"og"\n', "line 2, cannot be read"),
        ("id,label\n1," + 200_000 * "a" + "\n", "line 2, cannot be read"),
    ],
)
def test_damaged_tables_are_refused(pack, refused, tmp_path, table, words):
    (tmp_path / "secret.png").write_bytes(png(pixels_of("secret")))
    refused(pack(IMAGES, {"train.csv": table}), words, split=0.5)


@pytest.mark.parametrize("content", [b"id,label\n\xff,frog\n", b"\xff\xfei\0d\0"])
def test_table_in_another_encoding_is_refused(pack, refused, content):
    path = pack(IMAGES, {})
    (path / "train.csv").write_bytes(content)
    refused(path, "train.csv is no text in UTF-8", split=0.5)


def test_two_tables_are_refused(pack, refused):
    refused(pack(IMAGES, {"train.csv": TABLE, "trainLabels.csv": TABLE}), "several tables of labels", split=0.5)


@pytest.mark.parametrize("row", ["{},a\n", "1,a\n"])
def test_table_without_end_is_refused(pack, refused, row):
    path = pack(IMAGES, {"train.csv": "id,label\n" + "".join(row.format(number) for number in range(900_000))})
    with limits(8 << 20):
        refused(path, "train.csv", split=0.5)
    (path / "train.csv").write_text("id,label\n" + 3_000_000 * "1,a\n")
    with limits(12 << 20):
        refused(path, "train.csv has over 8,388,608 bytes", split=0.5)


def test_many_tables_take_no_time(pack, refused):
    path = pack(IMAGES, {f"{number}/train.csv": TABLE for number in range(3000)})
    with limits(1 << 20, seconds=5):
        refused(path, "not in folders of their classes", split=0.5)


# --- Tiny-ImageNet -----------------------------------------------------------------------------------------------

WNIDS = ("n01443537", "n02124075", "n03126707")
TRAINED = [f"train/{wnid}/images/{wnid}_{number}.JPEG" for wnid in WNIDS for number in range(2)]
VALIDATED = [f"val/images/val_{number}.JPEG" for number in range(3)]
UNLABELLED = [f"test/images/test_{number}.JPEG" for number in range(4)]
BOXES = {f"train/{wnid}/{wnid}_boxes.txt": f"{wnid}_0.JPEG\t0\t0\t62\t62\n" for wnid in WNIDS}
ANNOTATIONS = "".join(f"val_{number}.JPEG\t{wnid}\t0\t32\t44\t62\n" for number, wnid in enumerate(reversed(WNIDS)))
WORDS = "n00001740\tentity\nn01443537\tgoldfish, Carassius auratus\nn02124075\tEgyptian cat\nn03126707\tcrane\n"
TEXTS = {**BOXES, "val/val_annotations.txt": ANNOTATIONS, "wnids.txt": "\n".join(WNIDS)}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("above", ["", "tiny-imagenet-200/"])
def test_tiny_imagenet_is_read(pack, read, packing, above):
    names = [f"{above}{name}" for name in (*TRAINED, *VALIDATED, *UNLABELLED)]
    texts = {f"{above}{name}": text for name, text in (TEXTS | {"words.txt": WORDS}).items()}
    data, notes = read(pack(names, texts, packing))
    assert data.classes == ("goldfish", "Egyptian cat", "crane")
    np.testing.assert_array_equal(data.train_images, np.stack([pixels_of(f"{above}{name}") for name in TRAINED]))
    np.testing.assert_array_equal(data.test_images, np.stack([pixels_of(f"{above}{name}") for name in VALIDATED]))
    assert data.train_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.test_labels.tolist() == [2, 1, 0]
    annotations, place = f"{above}val/val_annotations.txt", f"{above}test/images"
    assert notes == [f"left out images without a label in {annotations}: 4 in {place}."]


@pytest.mark.parametrize(
    ("words", "classes"),
    [
        ("", WNIDS),
        ("n02124075\tEgyptian cat\n", (WNIDS[0], "Egyptian cat", WNIDS[2])),
        (WORDS.replace("Egyptian cat", "crane, bird"), ("goldfish, Carassius auratus", "crane, bird", "crane")),
        (WORDS.replace("Egyptian cat", "crane"), WNIDS),
    ],
)
def test_classes_of_tiny_imagenet_keep_their_ids_unless_words_are_unique(pack, read, words, classes):
    assert read(pack((*TRAINED, *VALIDATED), TEXTS | {"words.txt": words}))[0].classes == classes


def test_images_to_test_on_of_tiny_imagenet_are_the_annotated_ones(pack, read):
    data, _ = read(pack((*TRAINED, *VALIDATED), TEXTS), only_test=True)
    assert (len(data.train_labels), data.test_labels.tolist()) == (0, [2, 1, 0])


def test_tiny_imagenet_with_its_validation_images_in_folders_of_classes_is_read(pack, read):
    names = [f"val/{wnid}/images/val_{number}.JPEG" for number, wnid in enumerate(WNIDS)]
    data, notes = read(pack((*TRAINED, *names, *UNLABELLED), TEXTS))
    assert (data.classes, data.test_labels.tolist()) == (WNIDS, [0, 1, 2])
    assert any("no test images; those of val are taken" in note for note in notes)
    assert any("4 .jpeg" in note and "test/images/test_0.JPEG" in note for note in notes)


def test_validation_images_of_cinic10_are_left_out_with_a_note(pack, read):
    names = [f"{split}/{name}/1.png" for split in ("train", "test", "valid") for name in ("airplane", "bird")]
    data, notes = read(pack(names, {"README": "", "synsets-to-cifar-10-classes.txt": "", "x.csv": ""}))
    assert (len(data.train_images), len(data.test_images)) == (2, 2)
    assert notes == ["left out valid, which is beside the test images (images: 2)."]


@pytest.mark.parametrize(
    ("annotations", "words"),
    [
        ("val_7.JPEG\tn01443537\n", "line 1: image 'val_7.JPEG' is missing"),
        ("../../train/n01443537/images/n01443537_0.JPEG\tn01443537\n", "line 1: image '../../train/n01443537/"),
        ("val_0.JPEG\tn09999999\n", "line 1: 'n09999999' is no class in train"),
        ("val_0.JPEG\n", "line 1: '' is no class in train"),
        ("val_0.JPEG\tn01443537\nval_0.JPEG\tn01443537\n", "line 2: image 'val_0.JPEG' is missing"),
        ("", "has no test images"),
    ],
)
def test_damaged_annotations_are_refused(pack, refused, annotations, words):
    refused(pack((*TRAINED, *VALIDATED), TEXTS | {"val/val_annotations.txt": annotations}), words)
