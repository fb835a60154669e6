"""Sources of other packages: the one in the documents, broken ones, and files of several kinds."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import numpy as np
import pytest

from pipelines.errors import DataError, RunError
from pipelines.sources import read_source

DOCUMENT = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()


def block(language: str, containing: str) -> str:
    """The code in `language` of the document that contains a text."""
    (found,) = (code for code in re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL) if containing in code)
    return found


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a package with a module and an entry point, which is that of the document unless another is given."""

    def write(code: str, module: str = "raw_files", entry: str | None = None) -> None:
        site = tmp_path / "site"
        information = site / f"{module}-1.0.dist-info"
        information.mkdir(parents=True)
        (site / f"{module}.py").write_text(textwrap.dedent(code))
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        group, line = block("toml", "fastresnet.sources").strip().splitlines()
        group = group.removeprefix('[project.entry-points."').removesuffix('"]')
        (information / "entry_points.txt").write_text(f"[{group}]\n{entry or line.replace(chr(34), '')}\n")
        monkeypatch.syspath_prepend(site)

    return write


@pytest.fixture
def raw(tmp_path):
    """Two records to train on and one to test on, and their pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    records = [bytes([label]) + image.tobytes() for label, image in zip((0, 1, 1), pixels, strict=True)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.raw").write_bytes(b"".join(records[:2]))
    (tmp_path / "data" / "test.raw").write_bytes(records[2])
    return tmp_path / "data", pixels


@pytest.mark.parametrize("packing", ["folder", "zip", "tar"])
def test_source_in_the_document_reads_its_files(install, raw, helpers, tmp_path, packing):
    path, pixels = raw
    members = {file.name: file.read_bytes() for file in path.iterdir()}
    if packing != "folder":
        path = (helpers.make_zip if packing == "zip" else helpers.make_tar)(tmp_path / f"data.{packing}", members)
    with pytest.raises(DataError, match="is not a known data set"):
        read_source(path, helpers.ignore)
    install(block("python", "SOURCE = Source("))
    data = read_source(path, helpers.ignore)
    assert data.classes == ("cat", "dog")
    np.testing.assert_array_equal(data.train_images, pixels[:2])
    np.testing.assert_array_equal(data.test_images, pixels[2:])
    assert (data.train_labels.tolist(), data.test_labels.tolist()) == ([0, 1], [1])


SOURCE = "from pipelines.sources import RawData, Source\nSOURCE = Source('raw files', {}, {})"
BROKEN = {
    "no module": ("import nowhere", "failed: ModuleNotFoundError: No module named 'nowhere'"),
    "no attribute": ("", "failed: AttributeError"),
    "no source": ("SOURCE = print", "gave builtin_function_or_method, not Source"),
    "no answer": (SOURCE.format("lambda listing: None", "print"), "gave NoneType, not bool"),
    "an error": (SOURCE.format("lambda listing: 1 / 0", "print"), "failed: ZeroDivisionError: division by zero"),
    "no data": (SOURCE.format("lambda listing: True", "lambda *_: [1]"), "gave list, not RawData"),
    "damaged files": (SOURCE.format("lambda listing: True", "lambda *_: {}[5]"), "failed: KeyError: 5"),
}


@pytest.mark.parametrize(("code", "words"), BROKEN.values(), ids=BROKEN)
def test_broken_source_is_named(install, raw, helpers, code, words):
    module = raw[0].parent.name
    install(code, module, f"raw = {module}:SOURCE")
    with pytest.raises(RunError) as caught:
        read_source(raw[0], helpers.ignore)
    message = str(caught.value)
    assert message.startswith(f"source 'raw' of package {module} {words}")
    assert message.endswith("Update or uninstall that package.")


IMAGES, LABELS = "np.zeros((2, 32, 32, 3), np.uint8)", "np.zeros(2, np.int64)"


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (IMAGES.replace("uint8", "float32"), LABELS, "images are float32 [2, 32, 32, 3], not uint8 [2, 32, 32, 3]"),
        (IMAGES, "np.zeros(3, np.int64)", "images are uint8 [2, 32, 32, 3], not uint8 [3, 32, 32, 3]"),
        (IMAGES, "[0, 1]", "labels are list [2], not int64 [2]"),
        (IMAGES.replace("((2", "((1"), "None", "labels are NoneType [], not int64 [1]"),
        ("None", LABELS, "images are NoneType [], not uint8 [2, 32, 32, 3]"),
    ],
)
def test_data_of_another_shape_or_type_are_refused(install, raw, helpers, images, labels, words):
    code = SOURCE.format("lambda _: True", f"lambda *_: RawData(('a',), *[{images}, {labels}] * 2)")
    module = raw[0].parent.name
    install(f"import numpy as np\n{code}", module, f"raw = {module}:SOURCE")
    with pytest.raises(DataError) as caught:
        read_source(raw[0], helpers.ignore)
    assert f"{raw[0]}: train {words}" in str(caught.value)


def test_files_of_two_kinds_are_refused(raw, helpers, install):
    path, pixels = raw
    np.save(path / "x_train.npy", pixels)
    (path / "cat").mkdir()
    (path / "cat" / "1.png").touch()
    with pytest.raises(DataError, match="has both NumPy arrays and images"):
        read_source(path, helpers.ignore)
    install(SOURCE.format("lambda listing: True", "lambda *_: RawData((), *[None] * 4)"), "ours", "raw = ours:SOURCE")
    with pytest.raises(DataError, match="has no classes"):  # a source of another package comes first
        read_source(path, helpers.ignore)


def test_cifar10_is_read_though_a_source_is_broken(tmp_path, helpers, fake, install):
    install("import nowhere", "broken", "raw = broken:SOURCE")
    helpers.assert_equal(read_source(helpers.pack(tmp_path, "folder", fake.python()), helpers.ignore), fake)
