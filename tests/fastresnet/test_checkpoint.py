"""Checkpoint files: exact round trips, and rejection of damaged files."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fastresnet import checkpoint
from fastresnet.checkpoint import load_tensors, save_tensors, take_prefix, with_prefix
from pipelines.errors import DataError
from tests.limits import limits

DESCRIPTION = {"config": {"model": "resnet20", "lr": 0.1, "milestones": [0.5, 0.75]}, "note": 'é "\\ \n', "best": None}


def example_tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "single": torch.randn(3, 2, generator=generator),
        "brain": torch.randn(2, generator=generator).bfloat16(),
        "half": torch.randn(2, 1, generator=generator).half(),
        "count": torch.tensor([-1, 2**40]),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "channels_last": torch.randn(1, 2, 2, 2, generator=generator).to(memory_format=torch.channels_last),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def bits(tensor):
    """Identity of a tensor: type, shape and every bit, NaN and the sign of zero included."""
    return tensor.dtype, tuple(tensor.shape), bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def all_bits(tensors):
    return {name: bits(tensor) for name, tensor in tensors.items()}


def saved(path):
    save_tensors(path, example_tensors(), DESCRIPTION)
    return path


# --- round trip --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", example_tensors())
def test_tensor_round_trip_is_bit_exact(tmp_path, name):
    tensor = example_tensors()[name]
    save_tensors(tmp_path / "x.ckpt", {name: tensor}, {})
    tensors, _ = load_tensors(tmp_path / "x.ckpt")
    assert all_bits(tensors) == {name: bits(tensor)}


def test_round_trip_keeps_all_tensors_and_the_description(tmp_path):
    tensors, description = load_tensors(saved(tmp_path / "x.ckpt"))
    assert all_bits(tensors) == all_bits(example_tensors())
    assert description == {"schema": 1, **DESCRIPTION}


def test_parameters_and_views_are_saved_by_value(tmp_path):
    whole = torch.arange(6.0).reshape(2, 3)
    save_tensors(tmp_path / "x.ckpt", {"parameter": torch.nn.Parameter(whole), "column": whole[:, 1]}, {})
    tensors, _ = load_tensors(tmp_path / "x.ckpt")
    assert all_bits(tensors) == all_bits({"parameter": whole, "column": torch.tensor([1.0, 4.0])})


def test_safetensors_library_reads_the_file(tmp_path):
    read = safetensors.torch.load_file(saved(tmp_path / "x.ckpt"))
    assert all_bits(read) == all_bits(example_tensors())


def test_writing_into_loaded_tensors_does_not_change_the_file(tmp_path):
    path = saved(tmp_path / "x.ckpt")
    tensors, _ = load_tensors(path)
    for tensor in tensors.values():
        tensor.zero_()
    assert all_bits(load_tensors(path)[0]) == all_bits(example_tensors())


def test_prefix_is_added_to_every_name_and_removed():
    tensors = example_tensors()
    prefixed = with_prefix("model", tensors)
    assert sorted(prefixed) == sorted(f"model.{name}" for name in tensors)
    others = {"models.single": torch.zeros(1), "optimizer.model.single": torch.zeros(1), "model": torch.zeros(1)}
    assert all_bits(take_prefix("model", {**prefixed, **others})) == all_bits(tensors)


# --- foreign files, other versions -------------------------------------------------------------------------------


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_foreign_file_has_no_description(tmp_path, metadata):
    safetensors.torch.save_file({"x": torch.arange(3)}, tmp_path / "x.safetensors", metadata=metadata)
    tensors, description = load_tensors(tmp_path / "x.safetensors")
    assert all_bits(tensors) == {"x": bits(torch.arange(3))}
    assert description is None


def test_a_file_of_a_newer_schema_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as newer:
        newer.setattr(checkpoint, "SCHEMA", 2)
        path = saved(tmp_path / "x.ckpt")
    with pytest.raises(DataError, match=r"x\.ckpt was written by another version \(schema 2\)"):
        load_tensors(path)


def below_a_file(folder):
    (folder / "file").touch()
    return folder / "file" / "x.ckpt"


def as_folder(folder):
    (folder / "x.ckpt").mkdir()
    return folder / "x.ckpt"


def with_header(header, size):
    """A safetensors file with that header before `size` bytes of zeros."""
    text = header.encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


def holding(content):
    def write(folder):
        (folder / "x.ckpt").write_bytes(content)
        return folder / "x.ckpt"

    return write


NO_CHECKPOINTS = {
    "absent": lambda folder: folder / "x.ckpt",
    "below a file": below_a_file,
    "folder": as_folder,
    "empty": holding(b""),
    "text": holding(b"epoch,loss\n1,2.3\n" * 100),
    "json": holding(b'{"schema": 1}'),
    "a header that is no JSON": holding(with_header('{"x":', 8)),
    "a tensor beyond the end": holding(with_header('{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', 8)),
    "a type that torch lacks": holding(with_header('{"x":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}', 3)),
    "a description without a digest": holding(with_header('{"__metadata__":{"fastresnet":"{}"}}', 0)),
}


@pytest.mark.parametrize("make", NO_CHECKPOINTS.values(), ids=NO_CHECKPOINTS)
def test_invalid_checkpoint_is_refused_with_its_path(tmp_path, make):
    path = make(tmp_path)
    with pytest.raises(DataError) as caught:
        load_tensors(path)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 3


# --- hostile headers ---------------------------------------------------------------------------------------------


def described(text):
    """A header whose description is `text`, with the right digest."""
    metadata = {"fastresnet": text, "fastresnet.sha256": hashlib.sha256(text.encode()).hexdigest()}
    return json.dumps({"__metadata__": metadata})


def entries(count):
    return "{" + ",".join(f'"{n}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for n in range(count)) + "}"


HOSTILE = {
    "lists": '{"x":[' + 1_000_000 * "[]," + "0]}",
    "open lists": '{"x":' + 5_000_000 * "[",
    "mappings": '{"x":[' + 100_000 * (15 * '{"":' + "0" + 15 * "}" + ",") + "0]}",
    "a wide text": '{"x":"' + 7_000_000 * "a" + '\U0001f600"}',
    "a longer header": '{"x":"' + (9 << 20) * "a" + '"}',
    "very many tensors": entries(100_000),
    "a description of lists": described('{"schema":1,"x":[' + 1_000_000 * "[]," + "0]}"),
    "a description that is nested": described('{"schema":1,"x":' + 500 * "[" + 500 * "]" + "}"),
    "an overlap": '{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}, "b":'
    '{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}',
    "a negative size": '{"a":{"dtype":"U8","shape":[-8],"data_offsets":[0,8]}}',
    "a negative place": '{"a":{"dtype":"U8","shape":[16],"data_offsets":[-8,8]}}',
    "a huge size": '{"a":{"dtype":"U8","shape":[1' + 4000 * "0" + '],"data_offsets":[0,8]}}',
    "half a character as a name": '{"\\ud800":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}',
    "half a character as a description": '{"__metadata__":{"fastresnet":"\\ud800"},"a":'
    '{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}',
    "fractions as places": '{"a":{"dtype":"U8","shape":[8],"data_offsets":[0.0,8.0]}}',
    "a fraction": '{"a":{"dtype":"U8","shape":[8.0],"data_offsets":[0,8]}}',
    "very many sizes": '{"a":{"dtype":"U8","shape":[8' + 100 * ",1" + '],"data_offsets":[0,8]}}',
    "a type that is a list": '{"a":{"dtype":["U8"],"shape":[8],"data_offsets":[0,8]}}',
    "a list": "[]",
}  # fmt: skip


@pytest.mark.parametrize("header", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_is_refused(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_header(header, 8))
    with limits(path.stat().st_size), pytest.raises(DataError) as caught:
        load_tensors(path)
    assert len(str(caught.value)) < 500 + len(str(path))


# --- damage ------------------------------------------------------------------------------------------------------


def is_refused_or_whole(path):
    """Return True if loading raises `DataError` or gives exactly the saved tensors. Other exceptions come through."""
    try:
        tensors, description = load_tensors(path)
    except DataError as error:
        return str(path) in str(error)
    return all_bits(tensors) == all_bits(example_tensors()) and description == {"schema": 1, **DESCRIPTION}


def test_every_flipped_bit_is_refused_or_harmless(tmp_path):
    content = saved(tmp_path / "whole.ckpt").read_bytes()
    damaged = tmp_path / "damaged.ckpt"
    undetected = []
    for position in range(len(content)):
        for bit in range(8):
            flipped = bytes([content[position] ^ 1 << bit])
            damaged.write_bytes(content[:position] + flipped + content[position + 1 :])
            if not is_refused_or_whole(damaged):
                undetected.append(f"byte {position}: {content[position : position + 1]} became {flipped}")
    assert undetected == []


def test_file_truncated_at_any_length_is_refused(tmp_path):
    content = saved(tmp_path / "whole.ckpt").read_bytes()
    damaged = tmp_path / "damaged.ckpt"
    undetected = []
    for length in range(len(content)):
        damaged.write_bytes(content[:length])
        if not is_refused_or_whole(damaged):
            undetected.append(length)
    assert undetected == []


@pytest.mark.parametrize("extra", [b"\0", b"more", bytes(4096)])
def test_trailing_bytes_are_refused(tmp_path, extra):
    path = saved(tmp_path / "x.ckpt")
    path.write_bytes(path.read_bytes() + extra)
    with pytest.raises(DataError, match=r"x\.ckpt is damaged"):
        load_tensors(path)


# --- writing that fails ------------------------------------------------------------------------------------------


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_half(path, data):
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])
    no_space()


FAILURES = {
    "write": (Path, "write_bytes", write_half),
    "sync": (os, "fsync", no_space),
    "rename": (os, "replace", no_space),
}


@pytest.mark.parametrize(("module", "function", "failing"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("exists", [True, False])
def test_a_failed_write_changes_nothing(tmp_path, monkeypatch, module, function, failing, exists):
    path = tmp_path / "x.ckpt"
    if exists:
        saved(path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with monkeypatch.context() as full_disk:
        full_disk.setattr(module, function, failing)
        with pytest.raises(OSError, match="No space left") as caught:
            save_tensors(path, {"other": torch.ones(1000)}, {})
    assert caught.value.errno == errno.ENOSPC
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
