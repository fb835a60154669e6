"""Files made from a store for FFCV (.beton) and DALI (JPEG shards).

Independent readers find them right; they are bound to their store, and complete or absent.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import formats
from pipelines.errors import DataError, Note, UsageError
from pipelines.formats import JpegSettings, open_derived, open_shard, read_manifest, write_shard
from pipelines.prepare import prepare
from pipelines.store import open_store
from tests.limits import limits

torchvision_io = pytest.importorskip("torchvision.io")

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")

FILES = {
    "beton": ["train.beton", "test.beton"],
    "jpeg": ["train.tar", "train.idx", "test.tar", "test.idx"],
}
ALL_FILES = [(kind, file) for kind, files in FILES.items() for file in files]
RAW_FILES = {"meta.json", "pixel_mean.npy"} | {
    f"{split}_{array}.npy" for split in ("train", "test") for array in ("images", "labels")
}


def ignore(*_):
    """Ignore a progress report."""


def names(folder):
    return {path.name for path in folder.iterdir()}


def flip_bit(path, position=-1000):
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1
    path.write_bytes(content)


@pytest.fixture(params=list(FILES))
def kind(request, need):
    need({"beton": "ffcv", "jpeg": "dali"}[request.param])
    return request.param


@pytest.fixture
def folder(dataset, tmp_path) -> Path:
    """A copy of the common store, with all its files."""
    return shutil.copytree(dataset.folder, tmp_path / "data" / "shapes10")


@pytest.fixture
def bare(folder) -> Path:
    """A copy of the common store without derived files."""
    for name in names(folder) - RAW_FILES:
        (folder / name).unlink()
    return folder


@pytest.fixture(scope="session")
def other(tmp_path_factory, dataset) -> Path:
    """A store of other images, of the same number, with all its files."""
    root = tmp_path_factory.mktemp("other")
    prepare("shapes10", root / "large", ignore, train_images=400, test_images=50)
    large = open_store(root / "large" / "shapes10")
    from pipelines.store import RawData, write_store

    rows = slice(400 - 171, 400)
    data = RawData(
        large.classes, large.train.images[rows], large.train.labels[rows], large.test.images, large.test.labels
    )
    write_store(root / "shapes10", data, source="drawn", version="0")
    formats = [kind for kind in FILES if (dataset.folder / f"{kind}.json").exists()]
    prepare("shapes10", root, ignore, formats=formats)
    return root / "shapes10"


def prepare_again(folder, **settings):
    return prepare(folder.name, folder.parent, ignore, **settings)


def open_files(folder, kind, helpers):
    """Open both splits with the pipeline that reads files of this kind, as a user would."""
    name, decode = {"beton": ("ffcv", "raw"), "jpeg": ("dali", "jpeg")}[kind]
    for train in (True, False):
        helpers.open_small(name, open_store(folder), train=train, decode=decode).close()


def assert_refused(folder, kind, helpers, *messages):
    """Assert that opening fails with `messages` and a remedy; return the command of the remedy."""
    with pytest.raises(DataError) as caught:
        open_files(folder, kind, helpers)
    message = str(caught.value)
    assert caught.value.exit_code == 3
    for part in messages:
        assert part in message
    assert len(message.splitlines()) == 1
    command = message.partition("Make them: ")[2]
    assert command == f"fastresnet prepare --data shapes10 --root {folder.parent} --formats {kind}"
    return shlex.split(command)[1:]


# --- damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "file"), ALL_FILES, indirect=["kind"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: os.truncate(path, path.stat().st_size // 2), "bytes, not"),
        (lambda path: os.truncate(path, path.stat().st_size + 1), "bytes, not"),
        (lambda path: path.write_bytes(b""), "has 0 bytes, not"),
        (lambda path: flip_bit(path, 0), "is damaged"),
        (lambda path: flip_bit(path, -1), "is damaged"),
    ],
    ids=["missing", "truncated", "longer", "empty", "first bit", "last bit"],
)
def test_a_damaged_file_is_named_with_its_remedy(folder, helpers, kind, file, damage, message):
    damage(folder / file)
    assert_refused(folder, kind, helpers, str(folder / file), message)


def test_remedy_rebuilds_the_files(folder, helpers, run, kind):
    intact = {file: (folder / file).read_bytes() for file in FILES[kind]}
    flip_bit(folder / FILES[kind][0])
    code, out, err = run(*assert_refused(folder, kind, helpers))
    assert (code, err) == (0, "")
    assert "prepared and verified" in out
    open_files(folder, kind, helpers)
    assert {file: (folder / file).read_bytes() for file in FILES[kind]} == intact


def test_a_store_without_the_files_gives_the_command_that_makes_them(bare, helpers, run, kind):
    command = assert_refused(bare, kind, helpers, f"{bare} has no {kind} files")
    assert run(*command)[0] == 0
    open_files(bare, kind, helpers)


def without(manifest, *keys):
    """`manifest` without the entry that `keys` lead to."""
    copy = inner = json.loads(json.dumps(manifest))
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return copy


MANIFESTS = {
    "empty": lambda _: b"",
    "cut short": lambda manifest: json.dumps(manifest).encode()[:-2],
    "no JSON": lambda _: b"not JSON",
    "no text": lambda _: b"\xff\xfe\x00",
    "deep": lambda _: b"[" * 200_000,
    "null": lambda _: b"null",
    "list": lambda _: b"[]",
    "number": lambda _: b"7",
    "string": lambda _: b'"schema"',
    "other schema": lambda manifest: manifest | {"schema": 2},
    "schema of another type": lambda manifest: manifest | {"schema": "1"},
    "no schema": lambda manifest: without(manifest, "schema"),
    "no data_sha256": lambda manifest: without(manifest, "data_sha256"),
    "no settings": lambda manifest: without(manifest, "settings"),
    "no facts": lambda manifest: without(manifest, "facts"),
    "no files": lambda manifest: without(manifest, "files"),
    "files is null": lambda manifest: manifest | {"files": None},
    "files is a list": lambda manifest: manifest | {"files": list(manifest["files"])},
    "a file is missing": lambda manifest: without(manifest, "files", min(manifest["files"])),
    "a file is null": lambda manifest: manifest | {"files": dict.fromkeys(manifest["files"])},
    "a file is a string": lambda manifest: manifest | {"files": dict.fromkeys(manifest["files"], "bytes sha256")},
    "no size": lambda manifest: without(manifest, "files", min(manifest["files"]), "bytes"),
    "no sha256": lambda manifest: without(manifest, "files", min(manifest["files"]), "sha256"),
}


@pytest.mark.parametrize("damage", MANIFESTS.values(), ids=MANIFESTS)
def test_invalid_manifest_is_refused_and_replaced(folder, helpers, kind, damage):
    path = folder / f"{kind}.json"
    intact = json.loads(path.read_bytes())
    content = damage(intact)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert_refused(folder, kind, helpers, f"{path} is damaged")
    if kind == "jpeg":  # the code is the same for both, and this one takes a tenth of the time
        assert prepare_again(folder, formats=[kind])[1]
        assert json.loads(path.read_bytes()) == intact


@pytest.mark.parametrize("key", ["bytes", "sha256"])
@pytest.mark.parametrize("value", [None, "many", -1, [], 1.5], ids=repr)
def test_invalid_size_or_checksum_is_refused(folder, helpers, kind, key, value):
    path = folder / f"{kind}.json"
    manifest = json.loads(path.read_bytes())
    manifest["files"][FILES[kind][0]][key] = value
    path.write_text(json.dumps(manifest))
    assert_refused(folder, kind, helpers, str(folder / FILES[kind][0]))


def test_a_flipped_bit_in_the_manifest_never_changes_what_is_opened(folder, kind):
    path, dataset = folder / f"{kind}.json", open_store(folder)
    content = path.read_bytes()
    refused = 0
    for position in range(0, len(content), 5):
        flip_bit(path, position)
        try:
            files = open_derived(dataset, kind, "test")
        except DataError:
            refused += 1
        else:
            assert files == [folder / file for file in FILES[kind] if file.startswith("test")]
        path.write_bytes(content)
    assert refused > 20


@pytest.mark.parametrize("facts", [None, [], {}, {"train": {}}, {"train": {"psnr_db": "high", "exact_pixels": 0}}])
def test_invalid_facts_in_the_manifest_cause_no_traceback(folder, run, facts):
    path = folder / "jpeg.json"
    manifest = json.loads(path.read_bytes())
    path.write_text(json.dumps(manifest | {"facts": facts}))
    code, out, _ = run("prepare", "--data", "shapes10", "--root", folder.parent, "--formats", "jpeg")
    assert code == 0
    assert "PSNR" in out
    assert json.loads(path.read_bytes())["facts"] == manifest["facts"]


# --- another data set --------------------------------------------------------------------------------------------


def test_files_made_from_another_data_set_are_refused_and_replaced(folder, other, helpers, kind):
    for file in [f"{kind}.json", *FILES[kind]]:
        shutil.copy(other / file, folder / file)
    assert_refused(folder, kind, helpers, str(folder / f"{kind}.json"), "another data set")
    assert prepare_again(folder, formats=[kind])[1]
    open_files(folder, kind, helpers)


def test_the_manifest_of_another_data_set_is_refused(folder, other, helpers, kind):
    shutil.copy(other / f"{kind}.json", folder / f"{kind}.json")
    assert_refused(folder, kind, helpers, "another data set")


def test_files_of_another_data_set_under_the_own_manifest_are_refused(folder, other, helpers, kind):
    for file in FILES[kind]:
        shutil.copy(other / file, folder / file)
    assert_refused(folder, kind, helpers, str(folder / FILES[kind][0]))


def test_swapped_splits_are_refused(folder, helpers, kind):
    train, test = folder / FILES[kind][0], folder / FILES[kind][0].replace("train", "test")
    train.rename(folder / "between")
    test.rename(train)
    (folder / "between").rename(test)
    assert_refused(folder, kind, helpers, str(train))


# --- making them -------------------------------------------------------------------------------------------------


def test_preparing_twice_changes_nothing(folder, helpers, kind):
    before = helpers.tree(folder)
    dataset, made = prepare_again(folder, formats=["raw", kind])
    assert not made
    assert dataset.digest == open_store(folder).digest
    assert helpers.tree(folder) == before


def test_all_formats_are_made_together_with_the_store(tmp_path, helpers, need):
    need("ffcv")
    need("dali")
    arguments = {"train_images": 60, "test_images": 50, "formats": ["beton", "raw", "jpeg"]}
    _, made = prepare("shapes10", tmp_path, ignore, **arguments)
    assert made
    assert names(tmp_path / "shapes10") == RAW_FILES | {"beton.json", "jpeg.json"} | {file for _, file in ALL_FILES}
    for kind in FILES:
        open_files(tmp_path / "shapes10", kind, helpers)


def test_an_unknown_format_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(UsageError, match="unknown format 'jpg': did you mean 'jpeg'"):
        prepare("shapes10", tmp_path / "data", ignore, formats=["raw", "jpg"])
    assert not (tmp_path / "data").exists()


def test_the_same_store_gives_the_same_files(folder, kind):
    before = {file: (folder / file).read_bytes() for file in [f"{kind}.json", *FILES[kind]]}
    (folder / f"{kind}.json").unlink()
    assert prepare_again(folder, formats=[kind])[1]
    assert {file: (folder / file).read_bytes() for file in before} == before


def test_other_settings_rebuild_only_the_shards(folder, helpers):
    def others():
        return {
            name: entry for name, entry in helpers.tree(folder).items() if name not in ["jpeg.json", *FILES["jpeg"]]
        }

    untouched, size = others(), (folder / "train.tar").stat().st_size
    settings = JpegSettings(quality=50, subsampling="4:2:0")
    assert prepare_again(folder, formats=["jpeg"], jpeg=settings)[1]
    assert read_manifest(open_store(folder), "jpeg")["settings"] == {"quality": 50, "subsampling": "4:2:0"}
    assert (folder / "train.tar").stat().st_size < size
    assert not prepare_again(folder, formats=["jpeg"], jpeg=settings)[1]
    assert prepare_again(folder, formats=["jpeg"])[1]
    assert (folder / "train.tar").stat().st_size == size
    assert others() == untouched


@pytest.mark.parametrize("formats", [["raw"], ["raw", "jpeg"]], ids="+".join)
def test_damaged_store_with_derived_files_is_rebuilt(folder, formats):
    flip_bit(folder / "train_images.npy")
    with pytest.warns(Note, match="preparing .* again"):
        dataset, made = prepare_again(folder, train_images=171, test_images=50, formats=formats)
    assert made
    assert names(folder) == RAW_FILES | ({"jpeg.json", *FILES["jpeg"]} if "jpeg" in formats else set())
    if "jpeg" in formats:
        open_derived(dataset, "jpeg", "train")


def test_leftovers_of_a_killed_writer_are_removed(bare, kind):
    left = bare / ".fastresnet-0123456789abcdef.tmp"
    left.mkdir()
    (left / FILES[kind][0]).write_bytes(b"half")
    dataset, _ = prepare_again(bare, formats=[kind])
    open_derived(dataset, kind, "train")
    assert names(bare) == RAW_FILES | {f"{kind}.json", *FILES[kind]}


KILLED_PROCESS = """
import os, signal, sys
from pathlib import Path
from pipelines.prepare import prepare

os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
prepare("shapes10", Path(sys.argv[1]), lambda *_: None, formats=[sys.argv[2]])
"""


def test_damaged_store_with_leftovers_of_a_killed_writer_is_rebuilt(python, bare, kind):
    command = [python, "-c", KILLED_PROCESS, str(bare.parent), kind]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == -signal.SIGKILL
    assert names(bare) > RAW_FILES
    flip_bit(bare / "train_images.npy")
    with pytest.warns(Note, match="preparing .* again"):
        assert prepare_again(bare, train_images=171, test_images=50)[1]
    assert names(bare) == RAW_FILES


# --- failing to make them ----------------------------------------------------------------------------------------


@pytest.fixture(params=["train", "test"])
def failing(request, kind, monkeypatch, bare):
    """Make writing the files fail within this split, as on a full disk."""
    from_row = {"train": 0, "test": 171}[request.param] + 20
    written = []

    def fail_later(original):
        def write(*arguments):
            written.append(arguments)
            if len(written) > from_row:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*arguments)

        return write

    if kind == "beton":
        from pipelines import ffcv

        monkeypatch.setattr(ffcv, "handle_sample", fail_later(ffcv.handle_sample))
    else:
        monkeypatch.setattr(formats, "_encode", fail_later(formats._encode))
    return request.param


def shared_memory():
    """Segments that Python's `SharedMemory` made: by FFCV's writer, here or in a test that runs beside this one."""
    return {name for name in os.listdir("/dev/shm") if name.startswith("psm_")}


def left_over(segments):
    """Return the segments beyond `segments` that remain after up to ten seconds."""
    for _ in range(100):
        if not (remaining := shared_memory() - segments):
            break
        time.sleep(0.1)
    return remaining


def test_failed_writer_leaves_no_files_and_an_unchanged_store(bare, kind, failing, helpers, monkeypatch):
    before, segments = helpers.tree(bare), shared_memory()
    with pytest.raises(OSError, match="No space left"):
        prepare_again(bare, formats=[kind])
    assert helpers.tree(bare) == before
    assert not left_over(segments)
    with pytest.raises(DataError, match=f"has no {kind} files"):
        open_derived(open_store(bare), kind, "train")
    monkeypatch.undo()
    assert prepare_again(bare, formats=[kind])[1]
    open_files(bare, kind, helpers)


def test_full_disk_is_a_one_line_error_that_names_the_folder(bare, kind, failing, run):
    code, _, err = run("prepare", "--data", "shapes10", "--root", bare.parent, "--formats", kind)
    assert code == 1
    assert "No space left" in err
    assert str(bare) in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), KeyboardInterrupt()], ids=["error", "interruption"])
def test_failed_replacement_invalidates_the_old_files(folder, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(formats, "_encode", fail)
    with pytest.raises(type(error)):
        prepare_again(folder, formats=["jpeg"], jpeg=JpegSettings(quality=10))
    assert not [name for name in names(folder) if name.endswith(".tmp")]
    with pytest.raises(DataError, match="has no jpeg files"):
        open_derived(open_store(folder), "jpeg", "train")


@pytest.mark.parametrize("number", range(5))
def test_failed_rename_leaves_no_manifest(bare, monkeypatch, number):
    """Each of the four files is renamed once, and then the manifest."""
    calls = []
    original = os.replace

    def fail_once(*arguments):
        calls.append(arguments)
        if len(calls) == number + 1:
            raise OSError(errno.EIO, "I/O error")
        return original(*arguments)

    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(OSError, match="I/O error"):
        prepare_again(bare, formats=["jpeg"])
    assert not (bare / "jpeg.json").exists()
    assert not [name for name in names(bare) if name.endswith(".tmp")]
    assert open_store(bare)
    monkeypatch.undo()
    assert prepare_again(bare, formats=["jpeg"])[1]
    open_derived(open_store(bare), "jpeg", "train")


# --- .beton ------------------------------------------------------------------------------------------------------

HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("allocations", "<u8")]
)
FIELD = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "V1024")])
SAMPLE = np.dtype(
    {
        "names": ["mode", "width", "height", "pointer", "label"],
        "formats": ["u1", "<u2", "<u2", "<u8", "<i8"],
        "offsets": [0, 1, 3, 5, 16],
        "itemsize": 24,
    }
)
ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
INTEGER, RGB_IMAGE, RAW = 1, 2, 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_beton_holds_the_pixels_and_labels_of_the_store(dataset, need, split):
    need("ffcv")
    content = (dataset.folder / f"{split}.beton").read_bytes()
    assert (HEADER.itemsize, FIELD.itemsize) == (24, 1041)
    header = np.frombuffer(content, HEADER, 1)[0]
    expected = getattr(dataset, split)
    count = len(expected)
    assert (header["version"], header["fields"], header["samples"]) == (2, 2, count)
    fields = np.frombuffer(content, FIELD, 2, offset=24)
    assert [(field["type"], field["name"]) for field in fields] == [(RGB_IMAGE, b"image"), (INTEGER, b"label")]
    samples = np.frombuffer(content, SAMPLE, count, offset=24 + 2 * 1041)
    assert {(sample["mode"], sample["width"], sample["height"]) for sample in samples} == {(RAW, 32, 32)}
    assert np.array_equal(samples["label"], expected.labels)
    images = [np.frombuffer(content, np.uint8, 3072, offset=int(pointer)) for pointer in samples["pointer"]]
    assert np.array_equal(np.reshape(images, (count, 32, 32, 3)), expected.images)
    allocations = np.frombuffer(content, ALLOCATION, offset=int(header["allocations"]))
    assert np.array_equal(allocations["sample"], np.arange(count))
    assert np.array_equal(allocations["pointer"], samples["pointer"])
    assert set(allocations["size"]) == {3072}


# --- JPEG shards -------------------------------------------------------------------------------------------------


def read_tar(path):
    """The files of a tar: name and content, in their order."""
    with tarfile.open(path) as archive:
        return [(member.name, archive.extractfile(member).read()) for member in archive]


def decode(encoded):
    """uint8 [32, 32, 3], by torchvision."""
    buffer = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    return torchvision_io.decode_jpeg(buffer, torchvision_io.ImageReadMode.RGB).permute(1, 2, 0).numpy()


def quality_loss(images, tar):
    """Return PSNR in dB and the share of exact pixels, as decoded by torchvision."""
    decoded = np.stack([decode(content) for name, content in read_tar(tar) if name.endswith(".jpg")])
    error = decoded.astype(np.float64) - images
    return 20 * np.log10(255) - 10 * np.log10((error**2).mean()), (error == 0).all(axis=-1).mean()


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_shard_is_a_tar_of_images_and_labels_in_the_order_of_the_store(dataset, split):
    expected = getattr(dataset, split)
    files = read_tar(dataset.folder / f"{split}.tar")
    assert [name for name, _ in files] == [
        f"{row:08}.{kind}" for row in range(len(expected)) for kind in ("jpg", "cls")
    ]
    assert [int(content) for name, content in files if name.endswith(".cls")] == expected.labels.tolist()
    for name, content in files:
        if name.endswith(".jpg"):
            with Image.open(io.BytesIO(content)) as image:
                assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 32))


@pytest.mark.parametrize("split", ["train", "test"])
def test_index_equals_that_of_dalis_wds2idx(dataset, tmp_path, need, split):
    need("dali")
    from wds2idx import IndexCreator

    with IndexCreator(str(dataset.folder / f"{split}.tar"), str(tmp_path / "index"), verbose=False) as creator:
        creator.create_index()
    assert (dataset.folder / f"{split}.idx").read_text() == (tmp_path / "index").read_text()


def test_dalis_own_reader_finds_every_sample_in_order(dataset, need):
    need("dali")
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=50, num_threads=1, device_id=None)
    def graph():
        tar, index = str(dataset.folder / "test.tar"), str(dataset.folder / "test.idx")
        return tuple(fn.readers.webdataset(paths=[tar], index_paths=[index], ext=["jpg", "cls"]))

    reader = graph()
    reader.build()
    images, labels = reader.run()
    files = [content for name, content in read_tar(dataset.folder / "test.tar") if name.endswith(".jpg")]
    assert [images.at(row).tobytes() for row in range(50)] == files
    assert [int(labels.at(row).tobytes()) for row in range(50)] == dataset.test.labels.tolist()


@pytest.mark.parametrize("split", ["train", "test"])
def test_quality_loss_in_the_manifest_matches_an_independent_decoder(dataset, split):
    facts = read_manifest(dataset, "jpeg")["facts"][split]
    psnr, exact = quality_loss(getattr(dataset, split).images, dataset.folder / f"{split}.tar")
    assert facts["psnr_db"] == pytest.approx(psnr, rel=1e-12)
    assert facts["exact_pixels"] == pytest.approx(exact, rel=1e-12)


@pytest.fixture
def psnr(dataset, tmp_path):
    """The PSNR of the test images after compression, measured by another decoder than the writer's."""

    def measure(**settings):
        write_shard(dataset.test, tmp_path / "tar", tmp_path / "idx", JpegSettings(**settings), ignore)
        return quality_loss(dataset.test.images, tmp_path / "tar")[0]

    return measure


def test_psnr_grows_with_quality_and_chroma_resolution(psnr):
    by_quality = [psnr(quality=quality) for quality in (1, 50, 95, 100)]
    assert by_quality == sorted(set(by_quality))
    by_subsampling = [psnr(subsampling=subsampling) for subsampling in ("4:2:0", "4:2:2", "4:4:4")]
    assert by_subsampling == sorted(set(by_subsampling))


@pytest.mark.parametrize(("subsampling", "factors"), [("4:4:4", (1, 1)), ("4:2:2", (2, 1)), ("4:2:0", (2, 2))])
def test_the_subsampling_is_the_one_in_the_files(dataset, tmp_path, subsampling, factors):
    settings = JpegSettings(subsampling=subsampling)
    write_shard(dataset.test, tmp_path / "tar", tmp_path / "idx", settings, ignore)
    with Image.open(io.BytesIO(read_tar(tmp_path / "tar")[0][1])) as image:
        assert [component[1:3] for component in image.layer] == [factors, (1, 1), (1, 1)]


def test_lossless_compression_has_infinite_psnr(dataset, tmp_path):
    grey = replace(dataset.test, images=np.full((50, 32, 32, 3), 128, np.uint8))
    facts = write_shard(grey, tmp_path / "tar", tmp_path / "idx", JpegSettings(), ignore)
    assert facts == {"psnr_db": float("inf"), "exact_pixels": 1.0}
    assert formats.facts_text(facts) == "PSNR inf dB, 100.0 % of the pixels exact"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quality": 0}, "JPEG quality 0 is not in 1..100"),
        ({"quality": 101}, "JPEG quality 101 is not in 1..100"),
        ({"quality": -5}, "JPEG quality -5"),
        ({"subsampling": "444"}, "unknown subsampling '444': did you mean '4:4:4'"),
        ({"subsampling": "4:1:1"}, "Valid: 4:4:4, 4:2:2, 4:2:0"),
    ],
)
def test_impossible_jpeg_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        JpegSettings(**settings)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: text.replace("v1.2", "v1.1"),
        lambda text: text.replace("v1.2 50", "v1.2 49"),
        lambda text: text.replace("jpg 512 ", "jpg -512 ", 1),
        lambda text: text.replace("jpg 512 ", "jpg 99999999 ", 1),
        lambda text: text.replace("jpg 512 ", "jpg here ", 1),
        lambda text: text.replace("jpg", "png", 1),
        lambda text: text.replace("\n", "\n\n", 1),
    ],
    ids=["empty", "version", "count", "negative", "beyond the end", "no number", "no JPEG", "empty line"],
)
def test_an_index_that_does_not_fit_its_tar_is_refused(dataset, tmp_path, change):
    text = (dataset.folder / "test.idx").read_text()
    assert change(text) != text
    (tmp_path / "test.idx").write_text(change(text))
    with pytest.raises(DataError, match=r"test\.idx is not an index of .*test\.tar"):
        open_shard(dataset.folder / "test.tar", tmp_path / "test.idx")


@pytest.mark.parametrize(
    "text",
    ["v1.2 2000000\n" + 2_000_000 * "jpg 0 0 x\n", "v1.2 1\njpg 0 0 " + 2_000_000 * "a ", 4_000_000 * "\n"],
    ids=["lines", "words", "empty lines"],
)
def test_a_hostile_index_is_refused(dataset, tmp_path, text):
    (tmp_path / "idx").write_text(text)
    with limits(len(text)), pytest.raises(DataError, match="is not an index"):
        open_shard(dataset.folder / "test.tar", tmp_path / "idx")


def test_the_schema_is_written_into_every_manifest(dataset):
    for kind in FILES:
        if (dataset.folder / f"{kind}.json").exists():
            manifest = json.loads((dataset.folder / f"{kind}.json").read_bytes())
            assert manifest["schema"] == formats.SCHEMA
            assert manifest["data_sha256"] == dataset.digest
            assert set(manifest["files"]) == set(FILES[kind])
