"""Reading of sources: official archives, folders of images, and damaged or hostile files."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.archives import list_files
from pipelines.cifar import CIFAR10_CLASSES, CIFARS, verify
from pipelines.errors import DataError, UsageError
from pipelines.sources import read_source
from pipelines.store import RawData, channel_statistics
from tests.limits import limits

PACKINGS = ("tar", "tar.gz", "tar.xz", "zip", "folder", "folder above")
COMPRESSED = ("tar.gz", "tar.xz", "zip")


@pytest.fixture
def read(helpers):
    """`read_source` without its progress."""
    return lambda path: read_source(path, helpers.ignore)


@pytest.fixture
def refused(read):
    """Reading `path` raises a `DataError` of one or two lines that names `path` and says each of `words`."""

    def check(path, *words):
        with pytest.raises(DataError) as caught:
            read(path)
        message = str(caught.value)
        assert caught.value.exit_code == 3
        assert str(path) in message
        assert all(word in message for word in words), message
        assert len(message.splitlines()) <= 2, message
        return message

    return check


@pytest.fixture
def batches(tmp_path, helpers, fake):
    """An unpacked python version, with the members given as keywords replaced."""
    return lambda **members: helpers.make_folder(tmp_path / "batches", {**fake.python(), **members})


def same_arrays(data: RawData, fake) -> bool:
    names = ("train_images", "train_labels", "test_images", "test_labels")
    return all(np.array_equal(getattr(data, name), getattr(fake, name)) for name in names)


# --- the official packings ---------------------------------------------------------------------------------------


def test_stock_unpickler_finds_the_pixels_of_the_fakes(fake):
    batch = pickle.loads(fake.python()["data_batch_2"], encoding="bytes")
    np.testing.assert_array_equal(batch[b"data"].reshape(7, 3, 32, 32)[:, 1], fake.train_images[7:14, :, :, 1])
    assert batch[b"labels"] == fake.train_labels[7:14].tolist()


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("version", ["python 2", "python 3", "binary"])
@pytest.mark.parametrize("classes", [("ant", "bee", "cat"), CIFAR10_CLASSES], ids=len)
def test_every_packing_gives_the_exact_arrays_in_batch_order(tmp_path, helpers, read, classes, version, packing):
    fake = helpers.FakeCifar(classes)
    dump = helpers.pickle_like_python3 if version == "python 3" else None
    members = fake.binary() if version == "binary" else fake.python(dump)
    helpers.assert_equal(read(helpers.pack(tmp_path, packing, members)), fake)


def test_members_at_the_top_of_an_archive_are_found(tmp_path, helpers, fake, read):
    helpers.assert_equal(read(helpers.make_tar(tmp_path / "flat.tar", fake.python())), fake)


def test_report_counts_the_members(tmp_path, helpers, fake):
    calls = []
    read_source(helpers.pack(tmp_path, "zip", fake.binary()), lambda *call: calls.append(call))
    assert [(done, total) for _, done, total in calls] == [(i, 7) for i in range(1, 8)]


@pytest.mark.parametrize("packing", PACKINGS)
def test_reading_changes_nothing_on_disk(tmp_path, helpers, fake, read, monkeypatch, packing):
    monkeypatch.chdir(tmp_path)
    path = helpers.pack(tmp_path, packing, fake.python())
    before = helpers.tree(tmp_path)
    read(path)
    assert helpers.tree(tmp_path) == before


# --- CIFAR-100 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("version", ["python 2", "python 3"])
def test_cifar100_has_its_fine_labels(tmp_path, helpers, fake100, read, version, packing):
    dump = helpers.pickle_like_python3 if version == "python 3" else None
    helpers.assert_equal(read(helpers.pack(tmp_path, packing, fake100.python(dump))), fake100)


@pytest.mark.parametrize("missing", ["train", "test", "meta"])
def test_incomplete_cifar100_names_what_is_missing(tmp_path, helpers, fake100, refused, missing):
    members = {name: data for name, data in fake100.python().items() if name != missing}
    refused(helpers.make_folder(tmp_path / "f", members), f"is not a complete CIFAR-100: {missing} missing")


def test_a_folder_of_both_is_refused(tmp_path, helpers, fake, fake100, refused):
    helpers.make_folder(tmp_path / "data" / "cifar-10-batches-py", fake.python())
    helpers.make_folder(tmp_path / "data" / "cifar-100-python", fake100.python())
    refused(tmp_path / "data", "CIFAR-10 and CIFAR-100. Give the folder of one of them")


def test_other_files_of_the_names_of_cifar100_are_no_part_of_it(tmp_path, helpers, fake, read):
    path = helpers.make_folder(tmp_path / "f", {**fake.python(), "meta": b"notes", "train": b"", "test": b"\x89PNG"})
    helpers.assert_equal(read(path), fake)


def test_cifar100_is_verified_by_its_files(tmp_path, helpers, fake100, read, monkeypatch):
    members = fake100.python()
    path = helpers.pack(tmp_path, "tar.gz", members)
    with pytest.raises(DataError, match="its files train, test, meta are not those of CIFAR-100"):
        verify("cifar100", read(path), path)
    md5 = {name: hashlib.md5(data).hexdigest() for name, data in members.items()}
    monkeypatch.setitem(CIFARS, "cifar100", replace(CIFARS["cifar100"], files_md5=md5))
    verify("cifar100", read(path), path)
    other = helpers.pack(
        tmp_path, "zip", {**members, "test": helpers.FakeCifar100(fake100.classes, 1).python()["test"]}
    )
    with pytest.raises(DataError, match="its files test are not those of CIFAR-100") as caught:
        verify("cifar100", read(other), other)
    assert str(other) in str(caught.value)


def test_images_of_other_files_are_not_verified_as_cifar100(fake, tmp_path):
    data = RawData(fake.classes, fake.train_images, fake.train_labels, fake.test_images, fake.test_labels)
    with pytest.raises(DataError, match="CIFAR-100 is verified by its authors' files only"):
        verify("cifar100", data, tmp_path)


def test_a_cifar100_of_its_true_size_is_read(tmp_path, helpers, read):
    """Its training file has 155 MB, and names of 50,000 images."""
    rng = np.random.default_rng(0)
    members = {}
    for name, rows in (("train", 50_000), ("test", 10_000)):
        labels = rng.integers(0, 100, rows).tolist()
        content = {
            b"filenames": [b"bos_taurus_s_%06d.png" % row for row in range(rows)],
            b"batch_label": b"batch 1 of 1",
            b"fine_labels": labels,
            b"coarse_labels": [label // 5 for label in labels],
            b"data": rng.integers(0, 256, (rows, 3072), np.uint8),
        }
        members[name] = helpers.pickle_like_python3(content)  # which numbers each name: most memory
    names = [b"class %d" % number for number in range(100)]
    members["meta"] = helpers.pickle_like_python2({b"fine_label_names": names, b"coarse_label_names": names[:20]})
    data = read(helpers.make_tar(tmp_path / "cifar-100-python.tar", members))
    assert (data.train_images.shape, len(data.classes)) == ((50_000, 32, 32, 3), 100)
    assert data.test_labels.tolist() == labels
    np.testing.assert_array_equal(data.test_images[-1].transpose(2, 0, 1).ravel(), content[b"data"][-1])


# --- damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["tar", *COMPRESSED])
@pytest.mark.parametrize("part", [0.01, 0.3, 0.6, 0.9])
def test_truncated_archive_is_refused(tmp_path, helpers, fake, refused, packing, part):
    path = helpers.pack(tmp_path, packing, fake.python())
    os.truncate(path, int(path.stat().st_size * part))
    refused(path)


@pytest.mark.parametrize("packing", COMPRESSED)
@pytest.mark.parametrize("cut", [1, 5, 9])
def test_compressed_archive_without_its_last_bytes_is_refused(tmp_path, helpers, fake, refused, packing, cut):
    path = helpers.pack(tmp_path, packing, fake.python())
    os.truncate(path, path.stat().st_size - cut)
    refused(path)


@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize("packing", COMPRESSED)
def test_flipped_bit_in_compressed_data_is_refused(tmp_path, helpers, fake, read, packing, version):
    path = helpers.pack(tmp_path, packing, getattr(fake, version)())
    whole, rng, accepted = path.read_bytes(), random.Random(3), []
    for _ in range(20):
        place, bit = rng.randrange(len(whole) // 10, len(whole) * 9 // 10), 1 << rng.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        try:
            same = same_arrays(read(path), fake)
        except DataError:
            continue
        accepted.append((place, "equal" if same else "wrong"))
    assert not [place for place, result in accepted if result == "wrong"]
    assert len(accepted) <= 2  # a bit may lie in a header that says nothing about the data, such as a time


def mutated(whole: bytes, rng: random.Random) -> bytes:
    """`whole` with one byte changed, or cut short."""
    place = rng.randrange(len(whole))
    if rng.random() < 0.3:
        return whole[:place]
    return whole[:place] + bytes([whole[place] ^ rng.randrange(1, 256)]) + whole[place + 1 :]


def refusals(read, file: Path, contents: Iterator[bytes], path: Path) -> int:
    """Count those of `contents` that, written to `file`, make the source `path` unfit; other errors come through."""
    messages = []
    for content in contents:
        file.write_bytes(content)
        try:
            assert isinstance(read(path), RawData)
        except DataError as error:
            messages.append(str(error))
    assert all(str(path) in message for message in messages)
    return len(messages)


@pytest.mark.parametrize("packing", ["tar", *COMPRESSED])
def test_mutated_archive_gives_data_or_data_error(tmp_path, helpers, fake, read, packing):
    path, rng = helpers.pack(tmp_path, packing, fake.python()), random.Random(4)
    whole = path.read_bytes()
    assert refusals(read, path, (mutated(whole, rng) for _ in range(60)), path) > 10


@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "batches.meta"])
@pytest.mark.parametrize("dump", ["python 2", "python 3"])
def test_mutated_pickle_gives_data_or_data_error(tmp_path, helpers, fake, read, name, dump):
    members = fake.python(helpers.pickle_like_python3 if dump == "python 3" else None)
    path, rng = helpers.make_folder(tmp_path / "batches", members), random.Random(5)
    head, tail = members[name][:400], members[name][400:]
    assert refusals(read, path / name, (mutated(head, rng) + tail for _ in range(60)), path) > 10


@pytest.mark.parametrize("name", ["data_batch_1.bin", "test_batch.bin"])
@pytest.mark.parametrize("rows", [0, 1 / 3073, 1.5, 7 - 1 / 3073, 7 + 1 / 3073])
def test_binary_batch_of_a_wrong_length_is_refused(tmp_path, helpers, fake, refused, name, rows):
    members = fake.binary()
    members[name] = (members[name] * 2)[: round(rows * 3073)]
    refused(helpers.make_folder(tmp_path / "batches", members), "test" if name.startswith("test") else name)


@pytest.mark.parametrize(("name", "split"), [("data_batch_5.bin", "train"), ("test_batch.bin", "test")])
def test_binary_label_outside_the_classes_is_refused(tmp_path, helpers, fake, refused, name, split):
    members = fake.binary()
    members[name] = b"\x03" + members[name][1:]
    refused(helpers.make_folder(tmp_path / "batches", members), f"{split} labels", "3 classes")


@pytest.mark.parametrize(
    "labels", [[3] * 7, [-1] * 7, [0] * 6, [[0]] * 7, [2**70] * 7, [b"a"] * 7, [], 5, {}, [0.5] * 7], ids=repr
)
@pytest.mark.parametrize("bad", [["data_batch_3"], [f"data_batch_{i}" for i in range(1, 6)]], ids=["one", "all"])
def test_invalid_pickled_labels_are_refused(batches, fake, refused, labels, bad):
    members = {name: pickle.loads(fake.python()[name], encoding="bytes") for name in bad}
    refused(batches(**{name: pickle.dumps({**batch, b"labels": labels}, 4) for name, batch in members.items()}))


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((7, 3071), np.uint8),
        np.zeros((6, 3072), np.uint8),
        np.zeros(7 * 3072, np.uint8),
        np.zeros((7, 3072), np.float32),
        np.zeros((7, 3072), np.int8),
        np.asfortranarray(np.eye(7, 3072).astype(np.uint8)),
        np.full((7, 3072), None),
        b"text",
        None,
    ],
    ids=lambda pixels: f"{getattr(pixels, 'dtype', pixels)}-{getattr(pixels, 'shape', '')}",
)
def test_pickled_pixels_of_another_kind_are_refused(batches, fake, refused, pixels):
    batch = pickle.loads(fake.python()["data_batch_2"], encoding="bytes")
    refused(batches(data_batch_2=pickle.dumps({**batch, b"data": pixels}, 4)), "data_batch_2")


@pytest.mark.parametrize(
    "content", [{}, [], b"", {b"label_names": []}, {b"label_names": [5]}, {b"label_names": None}], ids=repr
)
def test_batches_meta_without_class_names_is_refused(batches, refused, content):
    refused(batches(**{"batches.meta": pickle.dumps(content, 4)}))


def test_class_names_that_are_not_utf8_are_refused(tmp_path, helpers, fake, refused):
    members = {**fake.binary(), "batches.meta.txt": b"ant\xff\nbee\ncat"}
    refused(helpers.make_folder(tmp_path / "batches", members), "batches.meta.txt")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (map(str, range(40_000)), "over 32,768 of them"),
        ([2000 * "a", "b", "c"], "names of over 1,000 letters"),
        (["a", "b", "a"], "several classes called 'a'"),
        ([], "no classes"),
    ],
)
def test_class_names_that_no_store_can_have_are_refused(tmp_path, helpers, fake, refused, names, message):
    members = {**fake.binary(), "batches.meta.txt": "\n".join(names).encode()}
    path = helpers.make_folder(tmp_path / "batches", members)
    with limits(sum(map(len, members.values())), seconds=5):
        refused(path, message)


def test_file_of_class_names_without_end_is_refused(tmp_path, helpers, fake, refused):
    path = helpers.make_folder(tmp_path / "batches", {**fake.binary(), "batches.meta.txt": b"a\n" * (1 << 20)})
    with limits(0):
        refused(path, "batches.meta.txt is too large for a file of CIFAR-10")


@pytest.mark.parametrize("version", ["python", "binary", "binary of Windows"])
def test_class_names_may_have_blanks_and_any_letters(tmp_path, helpers, read, version):
    fake = helpers.FakeCifar(("traffic light", "chouette à lunettes", "猫"))
    members = fake.python() if version == "python" else fake.binary()
    if version == "binary of Windows":
        members["batches.meta.txt"] = b"\xef\xbb\xbf" + members["batches.meta.txt"].replace(b"\n", b"\r\n")
    helpers.assert_equal(read(helpers.make_folder(tmp_path / "batches", members)), fake)


def test_two_copies_of_a_batch_are_refused(tmp_path, helpers, fake, refused):
    members = {**fake.binary(), "backup/data_batch_1.bin": fake.binary()["data_batch_2.bin"]}
    refused(helpers.make_zip(tmp_path / "two.zip", members), "two files data_batch_1.bin", "backup/data_batch_1.bin")


@pytest.mark.parametrize("version", ["python", "binary"])
def test_official_files_are_not_split(tmp_path, helpers, fake, version):
    path = helpers.pack(tmp_path, "zip", getattr(fake, version)())
    with pytest.raises(UsageError, match=r"--split 0\.2: .* has test images already"):
        read_source(path, helpers.ignore, split=0.2)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("version", ["python", "binary"])
def test_missing_member_is_named(tmp_path, helpers, fake, refused, version, packing):
    for number, name in enumerate(getattr(fake, version)()):
        members = getattr(fake, version)()
        del members[name]
        (tmp_path / str(number)).mkdir()
        refused(helpers.pack(tmp_path / str(number), packing, members), f"{name} missing")


@pytest.mark.parametrize("kind", ["folder", "broken link"])
def test_member_that_is_no_file_is_refused(batches, refused, kind):
    path = batches()
    (path / "test_batch").unlink()
    (path / "test_batch").mkdir() if kind == "folder" else (path / "test_batch").symlink_to("nowhere")
    refused(path, "test_batch")


@pytest.mark.parametrize("name", ["empty.tar.gz", "text.tar.gz", "text.zip", "words.bin"])
def test_file_that_is_no_archive_is_refused(tmp_path, refused, name):
    path = tmp_path / name
    path.write_text("" if name.startswith("empty") else "This is not an archive.\n" * 100)
    refused(path, "is empty" if name.startswith("empty") else "is text that begins 'This is not an archive.'")


def test_file_of_another_kind_is_described(tmp_path, helpers, refused):
    path = tmp_path / "cifar10.tar.gz"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    refused(path, "is a Git LFS pointer", "git lfs pull")
    refused(helpers.make_zip(path, {"model/data.pkl": b"", "model/data/0": b""}), "is a checkpoint of PyTorch")


def test_archive_without_a_data_set_is_refused(tmp_path, helpers, refused):
    refused(helpers.make_tar(tmp_path / "notes.tar", {"notes/a.txt": b"hello"}), "not a known data set")


def test_empty_folder_is_refused(tmp_path, refused):
    refused(tmp_path, "not a known data set")


@pytest.mark.parametrize("name", ["nowhere", "nowhere/below.tar.gz", "file/below"])
def test_path_that_does_not_exist_is_refused(tmp_path, refused, name):
    (tmp_path / "file").write_text("text")
    refused(tmp_path / name, "does not exist", "--source")


# --- hostile archives --------------------------------------------------------------------------------------------


def test_tar_member_that_claims_a_huge_size_is_refused(tmp_path, refused):
    path, entry = tmp_path / "huge.tar", tarfile.TarInfo("data_batch_1")
    entry.size = 10 << 30
    path.write_bytes(entry.tobuf() + bytes(10240))
    refused(path, "data_batch_1", "10,737,418,240 bytes")


def change_first_zip_entry(path: Path, local: int, central: int, value: bytes) -> None:
    """Overwrite a field of the first member: at `local` in its own header, at `central` in the central directory."""
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")
    content[local : local + len(value)] = value
    content[directory + central : directory + central + len(value)] = value
    path.write_bytes(content)


def test_zip_member_that_claims_a_huge_size_is_refused(tmp_path, helpers, fake, refused):
    path = helpers.make_zip(tmp_path / "huge.zip", fake.python())
    change_first_zip_entry(path, 22, 24, struct.pack("<I", 1 << 30))
    refused(path, "data_batch_1", "1,073,741,824 bytes")


def test_zip_member_that_unpacks_to_more_than_it_claims_is_refused(tmp_path, helpers, fake, refused):
    path = helpers.make_zip(tmp_path / "bomb.zip", {**fake.python(), "data_batch_1": bytes(1 << 20)})
    change_first_zip_entry(path, 22, 24, struct.pack("<I", 1000))
    refused(path)


@pytest.mark.parametrize(
    ("local", "central", "value"), [(6, 8, 1), (8, 10, 97)], ids=["encrypted", "unknown compression"]
)
def test_zip_member_that_cannot_be_unpacked_is_refused(tmp_path, helpers, fake, refused, local, central, value):
    path = helpers.make_zip(tmp_path / "odd.zip", fake.python())
    change_first_zip_entry(path, local, central, struct.pack("<H", value))
    refused(path)


def read_in_child(path: Path) -> tuple[str, int]:
    """Read `path` in a process of its own; return what it raises, and the largest memory of that process in MiB."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom pipelines.sources import read_source\n"
        "try: read_source(Path(sys.argv[1]), lambda *_: None)\n"
        "except Exception as error: print(type(error).__name__)\n"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    child = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=5)
    assert child.returncode == 0, f"killed by signal {-child.returncode}" if child.returncode < 0 else child.stderr
    error, memory = child.stdout.split()
    return error, int(memory) // 1024


def test_tar_member_of_negative_size_causes_no_endless_loop(tmp_path):
    header = bytearray(tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + (65536 - 512).to_bytes(2, "big")  # back to the start of this very header
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path / "loop.tar"
    path.write_bytes(tarfile.TarInfo("first").tobuf() + header + bytes(10240))
    assert read_in_child(path)[0] == "DataError"


def test_zip_member_that_unpacks_to_much_more_than_it_claims_takes_no_memory(tmp_path, helpers):
    path = helpers.make_zip(tmp_path / "bomb.zip", {"data_batch_1": bytes(300 << 20)})
    change_first_zip_entry(path, 22, 24, struct.pack("<I", 1000))
    error, memory = read_in_child(path)
    assert error == "DataError"
    assert memory < 100


@pytest.mark.parametrize(("method", "number"), [(zipfile.ZIP_BZIP2, "12"), (zipfile.ZIP_LZMA, "14")])
def test_zip_of_a_method_whose_memory_has_no_bound_is_refused(tmp_path, refused, method, number):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("data_batch_1", b"x")
    refused(path, f"data_batch_1 is packed by method {number}. Pack it again with deflate")


def tar_header(name: str, size: int, kind: bytes = b"0") -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size, entry.type = size, kind
    return entry.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize(
    "kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME], ids=["pax", "all", "gnu"]
)
@pytest.mark.parametrize("first", [b"", tar_header("first", 0)], ids=["first", "second"])
def test_tar_header_that_claims_a_huge_size_takes_no_memory(tmp_path, kind, first):
    path = tmp_path / "huge.tar"
    path.write_bytes(first + tar_header("x", 1 << 30, kind))
    os.truncate(path, (1 << 30) + 10240)  # sparse: it takes no space
    error, memory = read_in_child(path)
    assert error == "DataError"
    assert memory < 100


def test_xz_that_declares_a_huge_memory_is_refused(tmp_path, helpers, fake, refused):
    path = helpers.pack(tmp_path, "tar.xz", fake.python())
    content = bytearray(path.read_bytes())
    end = 12 + 4 * content[12]  # of the first block's header, without its checksum
    assert content[14:16] == b"\x21\x01"  # LZMA2, with one byte: the size of its dictionary
    content[16] = 38  # 2 GiB
    content[end : end + 4] = struct.pack("<I", zlib.crc32(content[12:end]))
    path.write_bytes(content)
    with pytest.raises(lzma.LZMAError, match="Memory usage limit"):
        lzma.LZMADecompressor(memlimit=1 << 30).decompress(content)
    refused(path, "Memory usage limit")


def test_number_of_files_is_limited(tmp_path, helpers, fake, refused, monkeypatch):
    for kind in ("", "ZIP_"):
        monkeypatch.setattr(f"pipelines.archives._{kind}FILES", 3)
        monkeypatch.setattr(f"pipelines.archives._BYTES_PER_{kind}FILE", 1 << 30)
    for packing in ("zip", "tar.gz"):
        refused(helpers.pack(tmp_path, packing, fake.python()), "lists more files than its size of")


def pax(**records: object) -> bytes:
    """The content of an extended header of a tar."""
    lines = [f" {key}={value}\n" for key, value in records.items()]
    return "".join(f"{len(line) + 2}{line}" for line in lines).encode()  # each is below 100 bytes long


def extended(content: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """A header of a tar that extends the next one."""
    return tar_header("x", len(content), kind) + content + bytes(-len(content) % 512)


SPARSE = {
    "GNU": tar_header("data_batch_1", 512, tarfile.GNUTYPE_SPARSE),
    "0.1": extended(pax(**{"GNU.sparse.map": "a,b", "GNU.sparse.size": "1"})) + tar_header("data_batch_1", 512),
    "1.0": extended(pax(**{"GNU.sparse.major": "1", "GNU.sparse.name": "data_batch_1"})) + tar_header("other", 512),
}


@pytest.mark.parametrize("headers", SPARSE.values(), ids=SPARSE)
def test_sparse_file_in_a_tar_is_refused_and_its_map_is_not_read(tmp_path, refused, headers):
    path = tmp_path / "sparse.tar"
    path.write_bytes(tar_header("first", 0) + headers + b"no map".ljust(512, b"\0") + bytes(1024))
    refused(path, "data_batch_1 is a sparse file. Pack without tar --sparse.")


@pytest.mark.parametrize("record", [b"1 path=x\n", b"99 path=x\n", b"x path=x\n", b"-8 path=x\n", b"0 path=x\n"])
def test_damaged_record_of_a_tar_is_refused(tmp_path, refused, record):
    path = tmp_path / "pax.tar"
    path.write_bytes(extended(record) + tar_header("data_batch_1", 0) + bytes(1024))
    refused(path, "truncated or damaged (invalid header")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_and_sizes_of_all_formats_of_tar_are_read(tmp_path, format):
    """The standard library's own reader is the reference."""
    names = ["train/", "train/cät/", f"{'long/' * 18}{'n' * 90}.png", "train/cät/1.png", "train/\udcff.png"]
    path = tmp_path / "names.tar"
    with tarfile.open(path, "w", format=format, pax_headers={"comment": "for all"}) as archive:
        for name in names:
            entry = tarfile.TarInfo(name.rstrip("/"))
            entry.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            entry.size = 0 if entry.isdir() else 700
            archive.addfile(entry, io.BytesIO(name.encode(errors="surrogateescape").ljust(700, b".")))
    with tarfile.open(path) as archive:
        expected = [(member.name, member.isdir(), not member.isdir() and archive.extractfile(member).read())
                    for member in archive]  # fmt: skip
    read = [
        ("/".join(file.parts), file.is_folder, not file.is_folder and file.open().read()) for file in list_files(path)
    ]
    assert read == expected
    assert [name for name, *_ in read] == [name.rstrip("/") for name in names]


# --- archives that claim too much --------------------------------------------------------------------------------


PACKERS = (bz2.compress, lzma.compress)
BOMBS = {
    "a file that is not read": tar_header("other", 20 << 20) + bytes(20 << 20),
    "a file that is": tar_header("data_batch_1", 20 << 20) + bytes(20 << 20),
    "after the end": bytes(20 << 20),
    "empty files": tar_header("other", 0) * 40_000,
}


@pytest.mark.parametrize(
    ("content", "pack"),
    [*((content, gzip.compress) for content in BOMBS.values()), *((BOMBS["after the end"], pack) for pack in PACKERS)],
    ids=[*BOMBS, *(pack.__module__ for pack in PACKERS)],
)
def test_compressed_tar_is_unpacked_as_far_as_its_size_allows(tmp_path, refused, content, pack):
    (tmp_path / "bomb.tar").write_bytes(pack(content))
    with limits((tmp_path / "bomb.tar").stat().st_size):
        refused(tmp_path / "bomb.tar", "than its size of", "allows. If you trust it, unpack it and give the folder.")


def test_records_of_digits_in_a_tar_take_no_quadratic_time(tmp_path, refused):
    path = tmp_path / "digits.tar"
    path.write_bytes(extended(b"1" * 200_000) + tar_header("data_batch_1", 0))
    with limits(path.stat().st_size):
        refused(path, "invalid header")


def zip_entry(name: str, size: int = 0, packed: int = 0, method: int = 0) -> bytes:
    """An entry of a zip's directory whose data are at the very beginning."""
    head = struct.pack(
        "<4s4B4H3L5H2L", b"PK\1\2", 20, 3, 20, 0, 0, method, 0, 0, 0, packed, size, len(name), *[0] * 4, 0, 0
    )
    return head + name.encode()


def zip_directory(entries: bytes, count: int, start: int = 0) -> bytes:
    return entries + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count & 0xFFFF, count & 0xFFFF, len(entries), start, 0)


def test_zip_of_too_many_entries_is_refused_before_they_are_listed(tmp_path, refused):
    path = tmp_path / "entries.zip"
    path.write_bytes(zip_directory(zip_entry("a") * 200_000, 200_000))
    with limits(path.stat().st_size):
        refused(path, "lists more files than its size of")


SMILE, CAT, KAPPA = "\U0001f600", "\u732b", "\u03ba"
LONG_ENTRIES = {
    "wide names": [(SMILE + "a" * 65_000).encode()] * 300,
    "names with NUL": [(SMILE + "a" * 65_000 + "\0b").encode()] * 300,
    "long names": [(f"train/c/{SMILE}" + "a" * 4050 + ".png").encode()] * 5000,
    "extra fields": [b"a"] * 300,
}


@pytest.mark.parametrize("kind", LONG_ENTRIES)
def test_long_entries_of_a_zip_are_refused(tmp_path, refused, kind):
    extra = struct.pack("<HH", 0x9999, 0) * 16_383 if kind == "extra fields" else b""
    head = struct.pack("<4s4B4H3L", b"PK\1\2", 20, 3, 20, 0, 0x800, 0, 0, 0, 0, 0, 0)
    entries = [head + struct.pack("<5H2L", len(n), len(extra), 0, 0, 0, 0, 0) + n + extra for n in LONG_ENTRIES[kind]]
    path = tmp_path / "long.zip"
    path.write_bytes(zip_directory(b"".join(entries), len(entries)))
    with limits(path.stat().st_size, seconds=3):
        refused(path, "lists longer names than its size of")


@pytest.mark.parametrize("name", [SMILE + "a" * 4000, 30 * f"{SMILE}a/" + "1"], ids=["long", "deep"])
def test_long_names_in_a_compressed_tar_are_refused(tmp_path, refused, name):
    path, headers = tmp_path / "names.tar.gz", io.BytesIO()
    for number in range(9000):
        headers.write(tarfile.TarInfo(f"{name}{number}").tobuf(tarfile.GNU_FORMAT))
    content = headers.getvalue()
    path.write_bytes(gzip.compress(content + bytes(1024) + os.urandom(len(content) // 95)))
    with limits(path.stat().st_size):
        refused(path, "lists more files than its size of")


@pytest.mark.parametrize("packing", ["zip", "tar.gz"])
def test_long_names_of_other_alphabets_are_read(tmp_path, helpers, packing):
    names = [f"train/{40 * KAPPA}/{100 * CAT}{number:05}.png" for number in range(12_000)]
    path = helpers.pack(tmp_path, packing, {name: random.Random(name).randbytes(300) for name in names})
    assert {"/".join(file.parts[1:]) for file in list_files(path)} >= set(names)


def test_entries_of_a_zip_that_share_their_data_are_refused(tmp_path, refused):
    packer, name = zlib.compressobj(wbits=-15), "train/a/1.png"
    data = packer.compress(bytes(8 << 20)) + packer.flush()
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 8, 0, 0, 0, len(data), 8 << 20, len(name), 0)
    start = len(local) + len(name) + len(data)
    entries = zip_entry(name, 8 << 20, len(data), 8) * 1000 + zip_entry("test/a/1.png")
    path = tmp_path / "shared.zip"
    path.write_bytes(local + name.encode() + data + zip_directory(entries, 1001, start))
    with limits(path.stat().st_size):
        refused(path, "unpacks to more bytes than its size of")


@pytest.mark.parametrize("name", ["a" * 60_000, "a/" * 30_000 + "1.png", "train/" * 10_000 + "a/1.png"])
@pytest.mark.parametrize("packing", ["zip", "tar.gz"])
def test_name_that_no_file_has_is_refused(tmp_path, helpers, refused, packing, name):
    path = helpers.pack(tmp_path, packing, {name: b"", "batches.meta.txt": b""})
    with limits(path.stat().st_size):
        refused(path, "too many folders, or with too long a name")


def test_later_stream_of_an_xz_file_has_no_more_memory(tmp_path, refused):
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 200 << 20}]
    path = tmp_path / "two.tar.xz"
    path.write_bytes(lzma.compress(tar_header("a", 0)) + lzma.compress(bytes(1024), filters=filters))
    refused(path, "Memory usage limit")


def test_streams_of_an_xz_file_are_read_as_one(tmp_path, helpers, fake, read):
    content = helpers.pack(tmp_path, "tar", fake.python()).read_bytes()
    parts = [lzma.compress(content[start : start + 5000]) for start in range(0, len(content), 5000)]
    (tmp_path / "parts.tar.xz").write_bytes(b"".join(parts) + bytes(8))
    helpers.assert_equal(read(tmp_path / "parts.tar.xz"), fake)


def test_folders_that_link_to_each_other_are_refused(tmp_path, refused):
    for name in "abcdefghijkl":
        (tmp_path / "links" / name).mkdir(parents=True)
        for other in "abcdefghijkl":
            (tmp_path / "links" / name / f"to_{other}").symlink_to(tmp_path / "links" / other)
    with limits(0):
        refused(tmp_path / "links", "through links. Remove some.")


@pytest.mark.parametrize("target", ["pipe", "/dev/zero"])
@pytest.mark.parametrize("name", ["data_batch_1", "train/a/1.png"])
def test_link_to_a_pipe_or_a_device_is_refused_at_once(tmp_path, refused, name, target):
    folder = tmp_path / "source"
    os.mkfifo(tmp_path / "pipe")
    for inner in (folder / "train" / "a", folder / "test" / "a"):
        inner.mkdir(parents=True)
        (inner / "2.png").touch()
    (folder / name).symlink_to(tmp_path / target)
    with limits(0, seconds=2):
        refused(folder, f"{folder / name} is a pipe or a device. Give a file.")


def test_name_with_a_line_end_is_escaped_where_a_file_cannot_be_read(tmp_path):
    (tmp_path / "a\nb.png").symlink_to("missing")
    (file,) = list_files(tmp_path)
    with pytest.raises(DataError, match=r"a\\nb\.png cannot be read"):
        file.open()


HASHED = sys.hash_info.modulus


def long1(number: int) -> bytes:
    data = number.to_bytes(number.bit_length() // 8 + 1, "little")
    return b"\x8a" + bytes([len(data)]) + data


EXHAUSTING = {
    "tuples in tuples": b"})" + b"\x85" * 1_000_000 + b"K\x01s.",  # hashes a tuple nested a million times
    "sparse memo": b"}r" + struct.pack("<I", 1 << 24) + b".",  # one entry far out in the memo
    "long string": b"]B" + struct.pack("<I", 1 << 30) + b".",  # a string of 1 GiB that is not there
    "long number": b"\x8b" + struct.pack("<i", (1 << 31) - 1) + b".",
    "frame": b"\x95" + struct.pack("<Q", 1 << 60) + b".",
    "lists": b"(" + 4_000_000 * b"]" + b"l.",
    "mappings": b"(" + 4_000_000 * b"}" + b"l.",
    "marks": 4_000_000 * b"(" + b".",
    "memo": b"]" + 4_000_000 * b"\x94" + b".",
    "wide texts": b"(" + 4000 * (b"X" + struct.pack("<I", 4004) + "\U0001f600".encode() + 4000 * b"a") + b"l.",
    "wide text": b"X" + struct.pack("<I", (12 << 20) + 4) + "\U0001f600".encode() + (12 << 20) * b"a" + b".",
    "keys of one hash": b"}(" + b"".join(long1(n * HASHED) + b"N" for n in range(1, 40_000)) + b"u.",
    "numbers of one hash": b"N" + b"".join(b"p%d\n" % (n * HASHED) for n in range(1, 60_000)) + b".",
    "long name": b"c" + (8 << 20) * b"a" + b"\n" + (8 << 20) * b"\x1b" + b"\n.",
    "long name on the stack": 2 * (b"X" + struct.pack("<I", 4 << 20) + (4 << 20) * b"a") + b"\x93.",
    "long decimal": b"F" + (8 << 20) * b"\x01" + b"\n.",
    "kind of pixels that doubles": b"]q\x00" + b"".join(b"](h%ch%ceq%c" % (n, n, n + 1) for n in range(40))
    + b"0}C\x04datacnumpy\nndarray\n)R(K\x01)cnumpy\ndtype\nh\x28\x85R\x89C\x00tbsC\x06labels]s.",
    "long kind of pixels": b"}C\x04datacnumpy\nndarray\n)R(K\x01)cnumpy\ndtype\nB" + struct.pack("<I", 8 << 20)
    + bytes(8 << 20) + b"\x85R\x89C\x00tbsC\x06labels]s.",
    "state of a class": b"cnumpy\nndarray\nN}C\x05arrayNs\x86b.",
    "state of a function": b"cnumpy.core.multiarray\n_reconstruct\n}C\x01aNsb.",
    "copies of arguments": b"(" + 100_000 * b"N" + b"tq\x00" + 30_000 * b"cnumpy\ndtype\nh\x00R" + b".",
    "doubled labels": b"}(C\x04datacnumpy\nndarray\n)R(N(K\x07M\x00\x0c\x86cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85R"
    + b"\x89B" + struct.pack("<I", 7 * 3072) + bytes(7 * 3072) + b"tbC\x06labels]" + 40 * b"2\x86" + b"u.",
}  # fmt: skip


@pytest.mark.parametrize("program", EXHAUSTING.values(), ids=EXHAUSTING)
def test_pickle_that_exhausts_the_interpreter_is_refused(batches, refused, program):
    path = batches(data_batch_1=b"\x80\x04" + program)
    with limits(sum(file.stat().st_size for file in path.iterdir())):
        message = refused(path, "data_batch_1")
    assert len(message) < 500 + len(str(path))


def test_names_of_classes_that_repeat_are_not_copied(batches, refused):
    name = b"B" + struct.pack("<I", 1 << 20) + (1 << 20) * b"a" + b"q\x00"
    program = b"\x80\x04}C\x0blabel_names](" + name + 1000 * b"h\x00" + b"es."
    path = batches(**{"batches.meta": program})
    with limits(sum(file.stat().st_size for file in path.iterdir())):
        refused(path, "batches.meta has over 32,768 classes, or very long names")


@pytest.fixture
def canary(tmp_path, monkeypatch) -> Path:
    """The file that a payload writes if it runs."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here" / "canary"


def call(module: str, name: str, *arguments: object) -> bytes:
    """A pickle that calls `module.name(*arguments)`; `name` may be dotted."""
    stack_global = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name)) + b"\x93"
    return b"\x80\x04" + stack_global + pickle.dumps(arguments, 2)[2:-1] + b"R."


def reduced(module: str, name: str, *arguments: str) -> bytes:
    """Write a pickle that calls `module.name(*arguments)` with the opcodes of Python 2."""
    strings = b"".join(b"U" + bytes([len(text)]) + text.encode() for text in arguments)
    return f"\x80\x02c{module}\n{name}\n(".encode("latin-1") + strings + b"tR."


LIVE = {
    "os.system": reduced("os", "system", "echo > canary"),
    "posix.system": reduced("posix", "system", "echo > canary"),
    "eval": reduced("__builtin__", "eval", "open('canary', 'w').close()"),
    "exec": reduced("builtins", "exec", "open('canary', 'w').close()"),
    "open": reduced("io", "open", "canary", "w"),
    "old instance": b"(S'echo > canary'\nios\nsystem\n.",
    "old object": b"(cos\nsystem\nS'echo > canary'\no.",
    "numpy.memmap": call("numpy", "memmap", "canary", "u1", "w+", 0, (1,)),
    "numpy.lib": call("numpy", "lib.format.open_memmap", "canary", "w+", "u1", (1,)),
    "dotted": call("os", "path.os.system", "echo > canary"),
}


def test_every_payload_would_run_in_the_stock_unpickler(canary):
    for name, payload in LIVE.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            _run_in_stock_unpickler(payload)
        assert canary.exists(), name
        canary.unlink()


def _run_in_stock_unpickler(payload: bytes) -> None:
    try:
        pickle.loads(payload, encoding="latin-1")
    except TypeError as error:
        pytest.fail(f"the payload itself is wrong: {error}")


@pytest.mark.parametrize("member", ["data_batch_1", "test_batch", "batches.meta"])
@pytest.mark.parametrize("payload", LIVE.values(), ids=LIVE)
def test_payload_is_refused_and_never_runs(batches, refused, canary, member, payload):
    refused(batches(**{member: payload}), member)
    assert not canary.exists()


@pytest.mark.parametrize("packing", PACKINGS)
def test_payload_in_any_packing_is_refused(tmp_path, helpers, fake, refused, canary, packing):
    members = {**fake.python(), "data_batch_4": LIVE["os.system"]}
    refused(helpers.pack(tmp_path, packing, members), "data_batch_4", "os.system")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("numpy.core.multiarray", "fromfile"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy.core.multiarray", "_reconstruct.__globals__"),
        ("numpy._core.multiarray", "frombuffer"),
        ("numpy", "ndarray.tofile"),
        ("numpy", "dtype.__init__"),
        ("numpy", "load"),
        ("numpy.dtype", ""),
        ("_codecs", "lookup"),
        ("copyreg", "_reconstructor"),
        ("pipelines.sources", "_CifarUnpickler"),
    ],
)
def test_pickle_with_any_other_global_is_refused(batches, refused, module, name):
    refused(batches(data_batch_1=call(module, name)), "data_batch_1", f"{module}.{name}")


@pytest.mark.parametrize("program", [b"Psomething\n.", b"\x82\x01.", b"K\x01Q."], ids=["name", "extension", "number"])
def test_persistent_and_registered_objects_are_refused(batches, refused, program):
    refused(batches(data_batch_1=b"\x80\x02" + program), "data_batch_1")


def test_hostile_pickle_does_not_affect_later_reads(tmp_path, helpers, fake, batches, read, refused):
    state = b"N}(X\x0c\x00\x00\x00__defaults__NX\x05\x00\x00\x00shapeK\x01X\x04\x00\x00\x00dataNu\x86b"
    names = (b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n")
    for number, name in enumerate(names):
        members = {**fake.python(), "data_batch_1": b"\x80\x02" + name + state + b"."}
        refused(helpers.make_folder(tmp_path / str(number), members), "data_batch_1")
    helpers.assert_equal(read(batches()), fake)


@pytest.mark.parametrize("prefix", ["../../evil/", "{}/evil/", "cifar-10-batches-py/../../"])
@pytest.mark.parametrize("packing", ["tar", "zip"])
def test_member_path_that_leads_outside_is_never_followed(tmp_path, helpers, fake, read, monkeypatch, prefix, packing):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    make = helpers.make_tar if packing == "tar" else helpers.make_zip
    prefix = prefix.format(tmp_path)
    path = make(tmp_path / "a" / "evil.archive", {prefix + name: data for name, data in fake.python().items()})
    before = helpers.tree(tmp_path)
    helpers.assert_equal(read(path), fake)
    assert helpers.tree(tmp_path) == before


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_tar_entry_that_is_no_file_is_not_followed(tmp_path, helpers, fake, refused, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    members = fake.python()
    (tmp_path / "secret").write_bytes(members.pop("test_batch"))
    path = helpers.make_tar(tmp_path / "links.tar", {"secret": b"", **members})
    entry = tarfile.TarInfo("test_batch")
    entry.type, entry.linkname = kind, str(tmp_path / "secret")
    with tarfile.open(path, "a") as archive:
        archive.addfile(entry)
    before = helpers.tree(tmp_path)
    refused(path, "test_batch is a link" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else "test_batch missing")
    assert helpers.tree(tmp_path) == before


@pytest.mark.parametrize("version", ["python", "binary"])
def test_two_classes_of_one_name_are_refused(tmp_path, helpers, fake, refused, version):
    """Accuracies of classes are listed by name."""
    double = type(fake)((*fake.classes[:-1], fake.classes[0]))
    refused(helpers.make_folder(tmp_path / "f", getattr(double, version)()), f"classes called {fake.classes[0]!r}")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_source_that_can_be_read_only_once_is_refused_and_not_read(tmp_path, refused, kind):
    """A pipe would block, and a device may never end."""
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe" if kind == "pipe" else Path("/dev/null"), "is a pipe or a device. Save its content")


# --- the real CIFAR-10 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [("ant", "bee", "cat"), CIFAR10_CLASSES], ids=len)
def test_verification_refuses_other_pixels(tmp_path, helpers, read, classes):
    path = helpers.pack(tmp_path, "tar", helpers.FakeCifar(classes).python())
    with pytest.raises(DataError, match="are not those of CIFAR-10") as caught:
        verify("cifar10", read(path), path)
    assert str(path) in str(caught.value)


@pytest.fixture(scope="module")
def real(cifar10_archive, helpers) -> RawData:
    return read_source(cifar10_archive, helpers.ignore)


@pytest.fixture(scope="module")
def by_torchvision(cifar10_folder) -> RawData:
    """The archive, unpacked by the standard library and read by torchvision."""
    from torchvision.datasets import CIFAR10

    root = cifar10_folder.parent
    train, test = CIFAR10(root, train=True), CIFAR10(root, train=False)
    return RawData(tuple(train.classes), train.data, np.array(train.targets), test.data, np.array(test.targets))


def test_real_archive_equals_torchvision(real, by_torchvision):
    assert real.classes == by_torchvision.classes
    assert same_arrays(real, by_torchvision)


def test_real_archive_is_accepted(real, cifar10_archive):
    verify("cifar10", real, cifar10_archive)


def test_real_archive_has_the_published_counts_and_statistics(real):
    assert np.bincount(real.train_labels).tolist() == [5000] * 10
    assert np.bincount(real.test_labels).tolist() == [1000] * 10
    mean, std = channel_statistics(real.train_images)
    assert mean == pytest.approx([0.49140, 0.48216, 0.44653], abs=1e-5)
    assert std == pytest.approx([0.24703, 0.24349, 0.26159], abs=1e-5)


def test_real_data_in_the_binary_version_and_another_order_is_accepted(tmp_path, by_torchvision, read):
    images, labels = by_torchvision.train_images, by_torchvision.train_labels
    for number, batch in enumerate((3, 0, 4, 2, 1), start=1):
        rows = slice(10_000 * batch, 10_000 * (batch + 1))
        write_records(tmp_path / f"data_batch_{number}.bin", images[rows], labels[rows])
    write_records(tmp_path / "test_batch.bin", by_torchvision.test_images, by_torchvision.test_labels)
    (tmp_path / "batches.meta.txt").write_text("\n".join(by_torchvision.classes) + "\n\n")
    data = read(tmp_path)
    assert data.train_labels[:10_000].tolist() == labels[30_000:40_000].tolist()
    verify("cifar10", data, tmp_path)


def write_records(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    path.write_bytes(np.column_stack([labels.astype(np.uint8), planes]).tobytes())


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("what", ["pixel", "labels"])
def test_real_data_with_one_change_is_refused(real, what, split):
    arrays = {name: getattr(real, name).copy() for name in (f"{split}_images", f"{split}_labels")}
    if what == "pixel":
        arrays[f"{split}_images"][1234, 31, 0, 2] ^= 1
    else:
        labels = arrays[f"{split}_labels"]
        other = int(np.argmax(labels != labels[0]))
        labels[[0, other]] = labels[[other, 0]]
    with pytest.raises(DataError, match=f"{split} images are not those of CIFAR-10"):
        verify("cifar10", replace(real, **arrays), Path("changed"))
