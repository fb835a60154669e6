"""`fastresnet prepare`: prepare a data set."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

from fastresnet.arguments import PositionalOrFlag, parse
from fastresnet.terminal import progress_line, say
from pipelines.errors import Note, UsageError
from pipelines.formats import Subsampling


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Prepare a data set once: verified, in plain NumPy files. Intact existing files are kept."""

    data: PositionalOrFlag[str] = "cifar10"
    """Name: cifar10 or cifar100 (downloaded unless --source is given), shapes10 (drawn), or your own for --source."""
    source: Path | None = None
    """Folder, archive (.tar, .tar.gz, .tar.xz, .tar.bz2 or .zip) or file: CIFAR-10's or CIFAR-100's files, images (PNG,
    JPEG, BMP, GIF, PPM, TIFF or WebP) by class or with the labels of Kaggle or Tiny-ImageNet, SVHN (.mat), Parquet
    files of the Hugging Face hub, or arrays of NumPy (.npz)."""
    split: float | None = None
    """Fraction of the images of --source to test on, if it has no test images, such as 0.2. Only its own pixels decide
    where an image goes."""
    resize: bool = False
    """Crop images of another size than 32x32 to a square, and resize them. Without it such images are an error."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read, and list them."""
    root: Path | None = None
    """Folder of all data sets. Without it: $FASTRESNET_DATA, else ./data."""
    train_images: int = 50_000
    """Number of training images of shapes10 to draw."""
    test_images: int = 10_000
    """Number of test images of shapes10 to draw."""
    formats: str = "raw"
    """Formats to write besides the store itself (raw), separated by commas: beton (for FFCV), jpeg (for DALI)."""
    jpeg_quality: int = 95
    """Quality of the JPEG files, 1..100."""
    jpeg_subsampling: Subsampling = "4:4:4"
    """Colour resolution of the JPEG files: 4:4:4 (full), 4:2:2 or 4:2:0."""

    def __post_init__(self) -> None:
        for name in ("train_images", "test_images"):
            if not 1 <= getattr(self, name) <= 1_000_000:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)} is not in 1..1000000.")


def run(arguments: list[str]) -> int:
    options: Options = parse(Options, "prepare", arguments)
    from pipelines.formats import JpegSettings, facts_text, read_manifest
    from pipelines.prepare import SHAPES10, data_root, prepare

    formats = [name.strip() for name in options.formats.split(",")]
    with progress_line() as report:
        dataset, made = prepare(
            options.data,
            data_root(options.root),
            report,
            source=options.source,
            split=options.split,
            resize=options.resize,
            skip_unreadable=options.skip_unreadable,
            train_images=options.train_images,
            test_images=options.test_images,
            formats=formats,
            jpeg=JpegSettings(quality=options.jpeg_quality, subsampling=options.jpeg_subsampling),
        )
    counts = f"{len(dataset.train):,} training and {len(dataset.test):,} test images, {len(dataset.classes)} classes"
    say(f"{dataset.name}: {counts}, {'prepared' if made else 'already prepared,'} and verified in {dataset.folder}")
    if "jpeg" in formats:
        print(
            f"JPEG against the original training images: {facts_text(read_manifest(dataset, 'jpeg')['facts']['train'])}"
        )
    requested = (options.train_images, options.test_images)
    other_size = dataset.name == SHAPES10 and requested != (len(dataset.train), len(dataset.test))
    if not made and (options.source is not None or other_size):
        warnings.warn(f"nothing was read or drawn; remove {dataset.folder} to prepare it again.", Note, stacklevel=2)
    return 0
