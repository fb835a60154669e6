"""usage: python -m tests.faults.fuzz [--inputs N] [--seed N] [--json FILE]

Damage every kind of file that the program reads, and read it: that must give the right content or a `UserError`,
within limits of time and memory. With `python -m tests.faults.fuzz --atheris KIND [libFuzzer options]`, the
coverage-guided fuzzer atheris (`pip install atheris`) chooses the damage.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import inspect
import io
import json
import os
import pickle
import random
import re
import shutil
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from benchmarks.__main__ import CompareOptions, ShowOptions, compare, show
from benchmarks.tables import RESULTS
from fastresnet import checkpoint, config, foreign, tensors, weights
from fastresnet.checkpoint import load_tensors, save_tensors
from fastresnet.config import TrainConfig, from_dict, from_toml
from fastresnet.models import create_model
from fastresnet.provenance import environment
from fastresnet.run_folder import Progress, RunFolder, read_run
from fastresnet.weights import load_weights
from pipelines import (
    archives,
    contents,
    formats,
    image_limits,
    images,
    numpy_arrays,
    parquet,
    pickles,
    sources,
    store,
    svhn,
    texts,
    thrift,
)
from pipelines.archives import file_at
from pipelines.base import is_installed
from pipelines.cifar import CIFAR10_CLASSES
from pipelines.errors import UserError
from pipelines.files import write_json
from pipelines.formats import open_derived, open_shard
from pipelines.images import read_image
from pipelines.prepare import prepare
from pipelines.sources import read_source
from pipelines.store import DERIVED_FILES, open_store
from tests.limits import Defect, limits
from tests.pipelines.conftest import FakeCifar, pack

READERS = (
    *(
        archives,
        contents,
        formats,
        image_limits,
        images,
        numpy_arrays,
        parquet,
        pickles,
        sources,
        store,
        svhn,
        texts,
        thrift,
    ),
    *(checkpoint, config, foreign, tensors, weights),
)
"""Modules whose coverage guides atheris."""


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """Files that the program reads together, and their reader."""

    name: str
    folder: Path
    """The files, undamaged."""
    damaged: tuple[str, ...]
    """Names of the files to damage."""
    read: Callable[[Path], Any]
    """Reader of a folder of such files; its result identifies their content."""
    verified: bool = True
    """Protection of the content by a checksum: then reading must not return another content."""

    @property
    def undamaged_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.folder.iterdir())


def kinds(folder: Path) -> dict[str, Kind]:
    """Make all kinds that can be made here, in `folder`."""
    fake = FakeCifar(("ant", "bee", "cat"))
    made = []
    for packing in ("tar.gz", "tar.xz", "zip", "tar"):
        place = folder / f"archive {packing}"
        name = pack(_new(place), packing, fake.python()).name
        made.append(Kind(place.name, place, (name,), lambda f, n=name: _pixels(f / n), packing != "tar"))
    place = pack(_new(folder / "batches"), "folder", fake.binary()).rename(folder / "binary batches")
    names = tuple(sorted(file.name for file in place.iterdir() if file.suffix != ".html"))
    made.append(Kind("binary batches", place, names, _pixels, verified=False))
    made += _arrays(folder)
    made += _stores(folder)
    made += _images(folder)
    made += _weights(folder)
    made += _texts(folder)
    return {kind.name: kind for kind in made}


def _arrays(folder: Path) -> Iterator[Kind]:
    """Make the kinds that hold arrays, or images in columns: of Keras, SVHN, and Parquet files of a hub."""
    choose = np.random.default_rng(0)
    images = {
        split: choose.integers(0, 256, (count, 32, 32, 3), np.uint8) for split, count in (("train", 6), ("test", 4))
    }
    labels = {split: np.arange(len(pixels)) % 2 for split, pixels in images.items()}
    place = _new(folder / "npz")
    named = {f"{letter}_{split}": part[split] for letter, part in (("x", images), ("y", labels)) for split in images}
    np.savez_compressed(place / "data.npz", **named)
    yield Kind(place.name, place, ("data.npz",), lambda f: _pixels(f / "data.npz"), verified=False)
    if is_installed("scipy"):
        from scipy.io import savemat

        place = _new(folder / "mat")
        for split, pixels in images.items():
            variables = {"X": pixels.transpose(1, 2, 3, 0), "y": 1 + labels[split][:, None].astype(np.uint8)}
            savemat(place / f"{split}_32x32.mat", variables, do_compression=True)
        yield Kind(place.name, place, tuple(f"{split}_32x32.mat" for split in images), _pixels, verified=False)
    if is_installed("pyarrow"):
        import pyarrow
        import pyarrow.parquet

        place = _new(folder / "parquet")
        for split, pixels in images.items():
            column = [{"bytes": _png(image), "path": None} for image in pixels]
            rows = pyarrow.table({"img": column, "label": labels[split]})
            pyarrow.parquet.write_table(rows, place / f"{split}-00000-of-00001.parquet")
        names = tuple(f"{split}-00000-of-00001.parquet" for split in images)
        yield Kind(place.name, place, names, _pixels, verified=False)


def _png(pixels: np.ndarray) -> bytes:
    Image.fromarray(pixels).save(written := io.BytesIO(), "png")
    return written.getvalue()


def _images(folder: Path) -> Iterator[Kind]:
    choose = np.random.default_rng(0)
    noisy = Image.fromarray(choose.integers(0, 256, (40, 48, 4), np.uint8))
    flat = noisy.resize((12, 10)).resize((48, 40), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: lying on its side
    drawn = flat.convert("RGB")
    for name, image, options in (
        ("png", flat, {"exif": exif}),
        ("jpg", drawn, {"progressive": True, "exif": exif}),
        ("gif", drawn.quantize(32), {"save_all": True, "append_images": [noisy.convert("RGB").quantize(32)]}),
        ("bmp", drawn, {}),
        ("tiff", flat, {"compression": "tiff_lzw"}),
        ("webp", flat, {"lossless": True}),
        ("ppm", drawn, {}),
    ):
        place = _new(folder / f"image {name}")
        image.save(place / f"image.{name}", **options)
        yield Kind(place.name, place, (f"image.{name}",), lambda f, n=name: _image(f / f"image.{n}"), verified=False)


def _stores(folder: Path) -> Iterator[Kind]:
    formats = {kind: (f"{kind}.json", *names) for kind, names in DERIVED_FILES.items()}
    if not is_installed("ffcv"):
        del formats["beton"]
    dataset, _ = prepare("shapes10", folder, _ignore, train_images=24, test_images=10, formats=("raw", *formats))
    raw = {file.name for file in dataset.folder.iterdir()} - {name for names in formats.values() for name in names}
    yield Kind("store", dataset.folder, tuple(sorted(raw)), _store)
    place = _new(folder / "meta.json")
    for name in raw:
        shutil.copyfile(dataset.folder / name, place / name)
    yield Kind(place.name, place, ("meta.json",), _signed_store, verified=False)
    for kind, names in formats.items():
        yield Kind(kind, dataset.folder, names, lambda f, k=kind: _derived(f, k))


def _weights(folder: Path) -> Iterator[Kind]:
    torch.manual_seed(0)
    state = create_model("resnet20").state_dict()
    place = _new(folder / "checkpoint")
    config = TrainConfig(precision="fp32", threads=1)
    facts = {"data": "cifar10", "data_sha256": 64 * "0", "classes": list(CIFAR10_CLASSES)}
    constants = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    figures = {f"{split}_{figure}": 1.5 for split in ("train", "test") for figure in ("loss", "accuracy")}
    row = {"epoch": 1, "step": 3, "lr": 0.1, **figures, "overflows": 0}
    progress = dataclasses.asdict(Progress(3, 1, [row], 10.0, 1.5, 2.5))
    description = {"config": config.to_dict(), **facts, **constants, "progress": progress, "scaler": {}}
    save_tensors(place / "last.ckpt", state, description)
    yield Kind("checkpoint", place, ("last.ckpt",), lambda f: _tensors(load_tensors(f / "last.ckpt")[0]))
    for name, new_format in (("state dict (zip)", True), ("state dict (pickle)", False)):
        place = _new(folder / name)
        torch.save(state, place / "weights.pt", _use_new_zipfile_serialization=new_format)
        yield Kind(name, place, ("weights.pt",), lambda f: _network(f / "weights.pt"), verified=new_format)
    # The same, with valid checksums of what is damaged: as somebody makes it, not as a disk damages it.
    place = _new(folder / "description")
    with safetensors.safe_open(folder / "checkpoint" / "last.ckpt", framework="pt") as file:
        (place / "description").write_text(file.metadata()["fastresnet"])
    yield Kind(place.name, place, ("description",), lambda f: _described(f / "description", state), verified=False)
    place = _new(folder / "pickle")
    shutil.copyfile(folder / "state dict (zip)" / "weights.pt", place / "weights.pt")
    with zipfile.ZipFile(place / "weights.pt") as archive:
        (place / "data.pkl").write_bytes(archive.read("weights/data.pkl"))
    yield Kind(place.name, place, ("data.pkl",), _unpickled, verified=False)


def _texts(folder: Path) -> Iterator[Kind]:
    place = _new(folder / "config")
    (place / "config.toml").write_text(TrainConfig(epochs=3, milestones=(0.25, 0.5), cutout=8).to_toml())
    yield Kind("config", place, ("config.toml",), lambda f: from_toml(f / "config.toml"), verified=False)
    place, name = _new(folder / "run"), "fast-plain20-seed0"
    for suffix, file in ((".json", "summary.json"), (".csv", "metrics.csv")):
        shutil.copyfile(RESULTS / "accuracy" / f"{name}{suffix}", place / file)
    yield Kind("run", place, ("summary.json", "metrics.csv"), _run, verified=False)
    place = _new(folder / "benchmark result")
    shutil.copyfile(RESULTS / "train-2-cores.json", place / "result.json")
    yield Kind(place.name, place, ("result.json",), lambda f: _shown(f / "result.json"), verified=False)


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _ignore(*_: Any) -> None:
    pass


def _hash(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _pixels(path: Path) -> str:
    data = read_source(path, _ignore)
    arrays = (data.train_images, data.train_labels, data.test_images, data.test_labels)
    return _hash(repr(data.classes).encode(), *(array.tobytes() for array in arrays))


def _store(folder: Path) -> str:
    dataset = open_store(folder)
    splits = [np.asarray(array).tobytes() for s in (dataset.train, dataset.test) for array in (s.images, s.labels)]
    return _hash(*splits, dataset.pixel_mean.tobytes(), repr((dataset.mean, dataset.std, dataset.classes)).encode())


def _derived(folder: Path, kind: str) -> str:
    """The bytes that a pipeline would read; of a shard, JPEG by JPEG."""
    dataset, contents = open_store(folder), []
    for split in ("train", "test"):
        paths = open_derived(dataset, kind, split)
        if kind == "jpeg":
            shard = open_shard(*paths)
            contents += [shard.encoded(row).tobytes() for row in range(len(shard.offsets))]
        else:
            contents += [path.read_bytes() for path in paths]
    return _hash(*contents)


def _tensors(tensors: dict[str, torch.Tensor]) -> str:
    return _hash(*(name.encode() + tensor.numpy().tobytes() for name, tensor in sorted(tensors.items())))


def _network(path: Path) -> str:
    return _tensors(load_weights(path).model.state_dict())


def _image(path: Path) -> str:
    return _hash(read_image(file_at(path))[0].tobytes())


def _described(path: Path, state: dict[str, torch.Tensor]) -> Any:
    """Read a checkpoint with the text in `path`, as weights and as a run's."""
    text = path.read_text(errors="replace")
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    metadata = {"fastresnet": text, "fastresnet.sha256": digest.hexdigest()}
    with tempfile.TemporaryDirectory() as run:
        safetensors.torch.save_file(state, Path(run, "last.ckpt"), metadata)
        found, checkpoint = load_weights(Path(run, "last.ckpt")), RunFolder(Path(run)).read_checkpoint(resume=True)
    config = from_dict(checkpoint.config, "the checkpoint")
    return config, found.classes, found.mean.tolist(), found.std.tolist(), checkpoint.progress


def _unpickled(folder: Path) -> str:
    """Read the network in a file of torch.save with the pickle in `folder`."""
    with tempfile.TemporaryDirectory() as place, zipfile.ZipFile(folder / "weights.pt") as archive:
        path = Path(place, "weights.pt")
        with zipfile.ZipFile(path, "w") as changed:
            for name in archive.namelist():
                changed.writestr(name, (folder / "data.pkl").read_bytes() if "pkl" in name else archive.read(name))
        return _network(path)


def _signed_store(folder: Path) -> str:
    """Read the store with the SHA-256 of its meta.json as it is."""
    path = folder / "meta.json"
    with contextlib.suppress(ValueError, RecursionError):
        meta = json.loads(path.read_bytes())
        if isinstance(meta, dict):
            unsigned = {key: value for key, value in meta.items() if key != "sha256"}
            digest = hashlib.sha256(json.dumps(unsigned, sort_keys=True).encode()).hexdigest()
            path.write_text(json.dumps({**unsigned, "sha256": digest}))
    return _store(folder)


def _run(folder: Path) -> Any:
    run = read_run(folder)
    return run.rows, run.evaluated_on, run.summary


def _shown(path: Path) -> str:
    """Return the tables of a result, and of its comparison with itself."""
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        show(ShowOptions(result=path))
        compare(CompareOptions(before=path, after=path))
    return shown.getvalue()


# --- damage ------------------------------------------------------------------------------------------------------

_VALUE = re.compile(rb'"[^"\\]*"|-?[0-9][0-9.e+-]*|true|false|null')
VALUES = (b"null", b"-1", b"0", b"1e999", b"NaN", b'""', b'"\\u001b"', b"[]", b"{}", b"true", b"123456789012345678901")
INTERESTING = (b"\x00", b"\xff", b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"99999999999", b"-1", b"null", b"\x80\x04.")


def damage(data: bytes, choose: random.Random) -> bytes:
    """`data` with one to four changes: bits, bytes, lengths, values, and parts that are gone, doubled or elsewhere.

    Of most texts only values are changed: nearly every other change is refused by the parser of JSON or TOML.
    """
    changed = bytearray(data)
    only_values = data.isascii() and choose.random() < 0.7
    for _ in range(choose.randint(1, 4)):
        if not changed:
            break
        place = choose.randrange(len(changed)) if choose.random() < 0.6 else choose.randrange(min(512, len(changed)))
        length = min(choose.choice((1, 2, 8, 64, 512)), len(changed) - place)
        match 8 if only_values else choose.randrange(9):
            case 0:
                changed[place] ^= 1 << choose.randrange(8)
            case 1:
                changed[place : place + length] = choose.randbytes(length)
            case 2:
                del changed[place : place + length]
            case 3:
                changed[place:place] = changed[place : place + length]
            case 4:
                piece = choose.choice(INTERESTING)
                changed[place : place + len(piece)] = piece
            case 5:
                del changed[place:]
            case 6:
                source = choose.randrange(len(changed))
                changed[place : place + length] = changed[source : source + length]
            case 7:
                changed += choose.randbytes(length)
            case 8 if value := _VALUE.search(changed, place):
                changed[slice(*value.span())] = choose.choice(VALUES)
    return bytes(changed)


# --- reading what is damaged -------------------------------------------------------------------------------------


def try_input(kind: Kind, name: str, data: bytes, place: Path, expected: Any) -> str:
    """Read `kind` with `data` in file `name`; `right`, `refused` or, without a checksum, `other`."""
    for file in kind.folder.iterdir():
        target = place / file.name
        if file.name != name:
            shutil.copyfile(file, target)
    (place / name).write_bytes(data)
    with limits(kind.undamaged_bytes + len(data)):
        try:
            outcome = "right" if kind.read(place) == expected else "other"
        except UserError as error:
            if not str(error).strip():
                raise Defect("an error without a message") from error
            outcome = "refused"
    if outcome == "other" and kind.verified:
        raise Defect("another content, without an error")
    return outcome


def try_inputs(kind: Kind, seeds: range, scratch: Path) -> Counter[str]:
    """Outcomes of one input for each of `seeds`. Raises `Defect` with the seed."""
    expected, outcomes = kind.read(kind.folder), Counter[str]()
    for seed in seeds:
        choose = random.Random(f"{kind.name} {seed}")
        name = choose.choice(kind.damaged)
        place = scratch / "damaged"
        place.mkdir()
        try:
            data = damage((kind.folder / name).read_bytes(), choose)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcomes[try_input(kind, name, data, place, expected)] += 1
        except Exception as error:
            raise Defect(f"{kind.name}, seed {seed}, {name}: {type(error).__name__}: {error}") from error
        finally:
            shutil.rmtree(place)
    return outcomes


def try_inputs_in_child(kind: Kind, seeds: range, scratch: Path) -> Counter[str]:
    """Run `try_inputs` in a child process, whose crash is reported as a `Defect`."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            answer: Any = dict(try_inputs(kind, seeds, scratch))
        except Defect:
            answer = traceback.format_exc()
        with open(writer, "wb") as pipe:
            pickle.dump(answer, pipe)
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        received = pipe.read()
    if status := os.waitpid(child, 0)[1]:
        raise Defect(f"{kind.name}, seeds {seeds}: the process died (status {status})")
    answer = pickle.loads(received)
    if isinstance(answer, str):
        raise Defect(answer)
    return Counter(answer)


def campaign(inputs: int, seed: int, folder: Path) -> dict[str, Counter[str]]:
    """Outcomes of `inputs` damaged inputs, shared among all kinds."""
    every, outcomes = kinds(folder), {}
    for number, kind in enumerate(every.values()):
        count = inputs * (number + 1) // len(every) - inputs * number // len(every)
        outcomes[kind.name] = Counter()
        for start in range(seed, seed + count, 100):
            outcomes[kind.name] += try_inputs_in_child(kind, range(start, min(start + 100, seed + count)), folder)
        print(f"{kind.name}: {dict(outcomes[kind.name])}", flush=True)
    return outcomes


def with_atheris(name: str, options: list[str]) -> None:
    """Fuzz the reader of one kind with libFuzzer. Ends the process."""
    import atheris

    folder = Path(tempfile.mkdtemp())
    kind = kinds(folder)[name]
    expected, corpus, scratch = kind.read(kind.folder), _new(folder / "corpus"), folder / "damaged"
    file = kind.damaged[0]
    shutil.copyfile(kind.folder / file, corpus / file)

    def one_input(data: bytes) -> None:
        try_input(kind, file, data, _new(scratch), expected)
        shutil.rmtree(scratch)

    warnings.simplefilter("ignore")
    for module in READERS:  # instrumenting everything would take minutes
        owners = [module, *(value for value in vars(module).values() if inspect.isclass(value))]
        for owner in owners:
            for function in filter(inspect.isfunction, [*vars(owner).values()]):
                if function.__module__ == module.__name__:
                    atheris.instrument_func(function)
    atheris.Setup([sys.argv[0], *options, str(corpus)], one_input)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--atheris", metavar="KIND")
    options, rest = parser.parse_known_args()
    if options.atheris:
        with_atheris(options.atheris, rest)
    facts = environment(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        outcomes = campaign(options.inputs, options.seed, Path(folder))
    report = {
        "schema": 1,
        "report": "fuzz",
        "environment": facts,
        "seed": options.seed,
        "inputs": sum(outcome.total() for outcome in outcomes.values()),
        "outcomes": {name: dict(outcome) for name, outcome in outcomes.items()},
    }
    if options.json is not None:
        write_json(options.json, report)


if __name__ == "__main__":
    main()
