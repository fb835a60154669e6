"""Parquet files as those of the Hugging Face hub, written by pyarrow, and damaged ones."""

from __future__ import annotations

import io
import json
import random
import sys

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import UsageError, UserError
from tests.limits import limits

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

NAMES = ("ant", "bee", "cat")


def pixels_of(seed: int, height: int = 32, width: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def table(seeds, image: str = "img", label: str = "label", names=NAMES, **columns):
    """A table of images, each drawn from its seed, whose class is the seed modulo 3."""
    features = {image: {"_type": "Image"}, label: {"_type": "ClassLabel", "names": names}}
    content = {
        image: [{"bytes": png(pixels_of(seed)), "path": f"{seed}.png"} for seed in seeds],
        label: [seed % 3 for seed in seeds],
    }
    made = pa.table({**content, **columns})
    return made.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})} if names else None
    )


def encoded(made, **options) -> bytes:
    file = io.BytesIO()
    parquet.write_table(made, file, **options)
    return file.getvalue()


@pytest.fixture
def pack(tmp_path, helpers):
    """Pack tables, or bytes, by their names."""

    def pack_files(tables, packing: str = "folder"):
        members = {name: made if isinstance(made, bytes) else encoded(made) for name, made in tables.items()}
        if packing != "folder":
            return (helpers.make_zip if packing == "zip" else helpers.make_tar)(tmp_path / f"data.{packing}", members)
        for name, content in members.items():
            (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "data" / name).write_bytes(content)
        return tmp_path / "data"

    return pack_files


def check(data, train, test) -> None:
    """Check that `data` are the images of these seeds, in their order."""
    for (images, labels), seeds in zip(data.splits().values(), (train, test), strict=True):
        np.testing.assert_array_equal(images, np.stack([pixels_of(seed) for seed in seeds]))
        assert labels.tolist() == [seed % 3 for seed in seeds]
        assert labels.dtype == np.int64


@pytest.mark.parametrize("packing", ["folder", "zip", "tar"])
@pytest.mark.parametrize(
    ("first", "second", "test"),
    [
        ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"),
        ("data/train-00000-of-00002-ab12.parquet", "data/train-00001-of-00002-cd34.parquet", "data/test.parquet"),
        ("plain_text/train/0000.parquet", "plain_text/train/0001.parquet", "plain_text/test/0000.parquet"),
        ("cifar10_train_a.PARQUET", "cifar10_train_b.parquet", "cifar10_test.parquet"),
    ],
)
def test_files_of_the_hub_are_read_in_order(pack, read, packing, first, second, test):
    path = pack({second: table(range(5, 9)), test: table(range(20, 24)), first: table(range(5))}, packing)
    data, notes = read(path)
    assert (data.classes, notes) == (NAMES, [])
    check(data, range(9), range(20, 24))


@pytest.mark.parametrize(
    ("image", "label", "columns"),
    [("img", "label", {}), ("image", "label", {"other": [[1]] * 9}), ("img", "fine_label", {"coarse_label": [7] * 9})],
)
@pytest.mark.parametrize("options", [{"row_group_size": 2}, {"compression": "zstd", "use_dictionary": False}])
def test_columns_have_two_names(pack, read, image, label, columns, options):
    tables = {
        f"{name}.parquet": encoded(table(range(start, start + 9), image, label, **columns), **options)
        for name, start in (("train", 0), ("test", 9))
    }
    check(read(pack(tables))[0], range(9), range(9, 18))


@pytest.mark.parametrize("type_", ["int8", "uint8", "int32", "uint64"])
def test_labels_have_any_type_of_integers_and_classes_without_names_have_numbers(pack, read, type_):
    made = table(range(200), names=None)
    made = made.set_column(1, "label", made.column("label").cast(type_))
    data, _ = read(pack({"train.parquet": made, "test.parquet": made}))
    assert data.classes == ("0", "1", "2")
    check(data, range(200), range(200))


@pytest.mark.parametrize("metadata", [b"{", b"[]", b'{"info": {}}', b'{"info": {"features": {"label": {"names": 5}}}}'])
def test_other_metadata_are_no_names_of_classes(pack, read, metadata):
    made = table(range(5)).replace_schema_metadata({"huggingface": metadata})
    assert read(pack({"train.parquet": made, "test.parquet": made}))[0].classes == ("0", "1", "2")


@pytest.mark.parametrize("name", ["train-00000-of-00001.parquet", "0000.parquet"])
def test_a_file_to_train_on_is_divided(tmp_path, read, refused, name):
    path = tmp_path / name
    path.write_bytes(encoded(table(range(60))))
    refused(path, "has no test images. --split 0.2")
    data, notes = read(path, split=0.4)
    assert notes == []
    train, test = ({image.tobytes() for image in images} for images, _ in data.splits().values())
    assert train | test == {pixels_of(seed).tobytes() for seed in range(60)}
    assert 8 < len(test) < 40
    assert not train & test


def test_divided_files_are_not_split(pack, read):
    with pytest.raises(UsageError, match=r"--split 0\.5: .* has test images already, in test\.parquet"):
        read(pack({"train.parquet": table(range(3)), "test.parquet": table(range(3))}), split=0.5)


def test_validation_files_stand_in_for_those_of_testing_or_are_left_out(pack, read):
    tables = {"data/train.parquet": table(range(3)), "data/validation-00000-of-00001.parquet": table(range(3, 6))}
    data, notes = read(pack(tables))
    check(data, range(3), range(3, 6))
    assert len(notes) == 1
    assert notes[0].endswith("no test images; those of data/validation-00000-of-00001.parquet are taken.")
    data, notes = read(pack({"data/test.parquet": table(range(6, 9)), "data/extra.parquet": table(range(3))}))
    check(data, range(3), range(6, 9))
    (note,) = notes
    assert note.endswith(": data/extra.parquet, data/validation-00000-of-00001.parquet.")


def test_images_to_test_on_need_no_others(tmp_path, read):
    (tmp_path / "test.parquet").write_bytes(encoded(table(range(4))))
    data, notes = read(tmp_path / "test.parquet", only_test=True)
    assert notes == []
    assert (len(data.train_labels), data.test_labels.tolist()) == (0, [0, 1, 2, 0])


def test_images_of_another_size_and_unreadable_ones_are_as_in_folders(pack, read, refused):
    contents = [png(pixels_of(1, 40, 64)), png(pixels_of(2)), b"text", None]
    made = pa.table({"image": [{"bytes": content} for content in contents], "label": [0, 1, 2, 0]})
    path = pack({"train.parquet": made, "test.parquet": table(range(3), "image", names=None)})
    refused(path, "train.parquet, row 0 has 64x40 pixels, not 32x32. --resize")
    refused(path, "train.parquet, row 2 is text", "Others that cannot be read: 1", resize=True)
    data, notes = read(path, resize=True, skip_unreadable=True)
    assert data.train_labels.tolist() == [0, 1]
    np.testing.assert_array_equal(data.train_images[1], pixels_of(2))
    assert any("2 of 7 images cannot be read and were skipped" in note and "row 3" in note for note in notes)
    assert "1 of 5 images were not 32x32 and have been cropped to a square and resized." in notes


ONE = table(range(3))
BAD = {
    "other columns": (
        ONE.rename_columns(["pixels", "y"]),
        "has columns pixels (struct<bytes: binary, path: string>), y",
    ),
    "images without bytes": (pa.table({"img": ["1.png"], "label": [0]}), "has columns img (string), label (int64)"),
    "texts as bytes": (pa.table({"img": [{"path": "1.png"}], "label": [0]}), "has columns img (struct<path: string>)"),
    "numbers as bytes": (pa.table({"img": [{"bytes": 5}], "label": [0]}), "has columns img (struct<bytes: int64>)"),
    "labels of texts": (ONE.set_column(1, "label", pa.array(["a", "b", "c"])), "label (string)"),
    "labels of floats": (ONE.set_column(1, "label", pa.array([0.5, 1, 2])), "label (double)"),
    "missing labels": (ONE.set_column(1, "label", pa.array([1, None, 2])), "has images without a label"),
    "labels out of range": (ONE.set_column(1, "label", pa.array([0, 1, 3])), "train labels 0..3, but 3 classes"),
    "negative labels": (ONE.set_column(1, "label", pa.array([0, -1, 2])), "train labels -1..2, but 3 classes"),
    "other classes": (table(range(3), names=("ant", "bee", "dog")), "different columns or classes"),
    "no rows": (ONE.slice(0, 0), "has no train images"),
    "text": (b"not found" * 100, "train.parquet cannot be read as Parquet: Parquet magic bytes not found"),
    "nothing": (b"", "train.parquet cannot be read as Parquet: Parquet file size is 0 bytes"),
}


@pytest.mark.parametrize(("made", "words"), BAD.values(), ids=BAD)
def test_other_files_are_refused(pack, refused, made, words):
    refused(pack({"train.parquet": made, "test.parquet": ONE}), words)


@pytest.mark.parametrize("names", [("train-00000-of-00002", "test"), ("train-00000-of-00002", "train-00002-of-00002")])
def test_missing_files_are_noticed(pack, refused, names):
    refused(pack(dict.fromkeys((f"{name}.parquet" for name in names), ONE)), "of 2 Parquet files for train. Fetch all")


def test_several_data_sets_are_refused(pack, refused):
    names = [f"{folder}/{split}.parquet" for folder in ("cropped", "full") for split in ("train", "test")]
    refused(pack(dict.fromkeys(names, ONE)), "has data sets in several folders: cropped, full. Give one of them.")


def test_files_to_test_on_only_are_refused(pack, refused):
    path = pack({"test.parquet": ONE})
    for split in (None, 0.5):
        refused(path, "has no train images: a Parquet file to train on has train in its name", split=split)


def test_truncated_and_changed_files_give_data_or_an_error(pack, read):
    content, rng = encoded(table(range(6))), random.Random(1)
    messages = []
    for _ in range(60):
        place = rng.randrange(len(content))
        changed = content[:place] + bytes([content[place] ^ rng.randrange(1, 256)]) + content[place + 1 :]
        path = pack({"train.parquet": content[:place] if rng.random() < 0.3 else changed, "test.parquet": ONE})
        try:
            read(path)
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert all(len(message.splitlines()) == 1 for message in messages)


@pytest.mark.parametrize("kind", ["many rows", "large images"])
def test_file_that_unpacks_to_far_more_is_refused(pack, refused, kind):
    count, content = (2_000_000, b"") if kind == "many rows" else (40, bytes(1 << 20))
    images = pa.StructArray.from_arrays([pa.array([content]).take(pa.array(np.zeros(count, np.int64)))], ["bytes"])
    made = pa.table({"img": images, "label": pa.array(np.zeros(count, np.int64))})
    file = encoded(made, use_dictionary=False, compression="zstd")
    del images, made
    path = pack({"train.parquet": file, "test.parquet": ONE})
    with limits(len(file)):
        refused(path, "train.parquet claims", "too many for its size")


def varint(number: int) -> bytes:
    """Encode a number as Thrift's compact protocol does, which doubles positive ones."""
    groups, number = [], 2 * number
    while number >= 128:
        groups.append(number & 127 | 128)
        number >>= 7
    return bytes([*groups, number])


def test_footer_that_claims_less_than_the_pages_unpack_to_is_not_believed(pack, refused):
    images = pa.StructArray.from_arrays([pa.array([bytes(1 << 20)] * 40)], ["bytes"])
    made = pa.table({"img": images, "label": pa.array(np.zeros(40, np.int64))})
    file = encoded(made, use_dictionary=False, compression="zstd", data_page_size=1 << 30, write_statistics=False)
    claimed = parquet.ParquetFile(io.BytesIO(file)).metadata.row_group(0).column(0).total_uncompressed_size
    less = bytes(byte | 128 for byte in varint(1000).ljust(len(varint(claimed)), b"\0")[:-1]) + b"\0"
    file = file[:-500] + file[-500:].replace(varint(claimed), less)
    assert parquet.ParquetFile(io.BytesIO(file)).metadata.row_group(0).column(0).total_uncompressed_size == 1000
    with limits(len(file)):
        refused(pack({"train.parquet": file, "test.parquet": ONE}), "train.parquet claims", "too many for its size")


def test_page_that_claims_much_takes_no_memory(pack, refused):
    content = encoded(ONE, compression="none", use_dictionary=False)
    start = parquet.ParquetFile(io.BytesIO(content)).metadata.row_group(0).column(0).data_page_offset
    size = next(number for number in range(100_000) if content[start + 3 :].startswith(varint(number) + b"\x15"))
    large = content[: start + 3] + 2 * (b"\x15".join([varint(2**30)])) + content[start + 3 + len(varint(size)) :]
    with limits(len(content)):
        refused(pack({"train.parquet": large, "test.parquet": ONE}), "train.parquet")


@pytest.mark.parametrize(
    ("content", "count", "words"),
    [
        (lambda: np.random.default_rng(0).bytes(4 << 20), 60, "cannot be read as an image"),
        (lambda: png(np.zeros((2800, 2800, 3), np.uint8)), 30, "have too many pixels for their bytes"),
    ],
)
def test_repeated_image_takes_the_memory_and_time_of_few(pack, refused, content, count, words):
    images = pa.StructArray.from_arrays([pa.array([content()] * count)], ["bytes"])
    made = pa.table({"img": images, "label": pa.array(np.zeros(count, np.int64))})
    file = encoded(made, dictionary_pagesize_limit=100 << 20)
    assert len(file) < 2 * len(content())
    del images, made
    path = pack({"train.parquet": file, "test.parquet": table(range(3), names=None)})
    with limits(4 * len(file)):  # of pyarrow's pool, which keeps some copies; all images would take 60 times as much
        refused(path, words, resize=True)


def test_missing_library_is_named(pack, read, monkeypatch):
    path = pack({"train.parquet": ONE, "test.parquet": ONE})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UsageError, match=r"Parquet files need pyarrow .*: pip install 'fastresnet\[parquet\]'"):
        read(path)
