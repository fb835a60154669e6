"""Checkpoints of other programs: wrappers, prefixes, objects beside the tensors, and hostile pickles."""

import argparse
import collections
import datetime
import decimal
import enum
import functools
import io
import json
import math
import os
import pickle
import pickletools
import re
import struct
import subprocess
import sys
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fastresnet.models import MODELS, create_model
from fastresnet.weights import load_weights
from pipelines.errors import DataError, Note
from tests.limits import limits

pytestmark = [
    pytest.mark.usefixtures("one_thread", "known_shapes"),
    pytest.mark.filterwarnings("ignore::pipelines.errors.Note"),
]


def network(seed=0, name="resnet20", **options):
    torch.manual_seed(seed)
    return create_model(name, **options).eval()


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def assert_loaded(path, expected):
    """Assert that the file has the values of network `expected`, and nothing but a network of its kind."""
    state = load_weights(path).model.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())


def assert_refused(path, message=""):
    with pytest.raises(DataError) as caught:
        load_weights(path)
    assert str(path) in str(caught.value)
    assert "MemoryError" not in str(caught.value)
    assert re.search(message, str(caught.value))
    assert len(str(caught.value)) < 700


def notes(path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_weights(path)
    return [str(warning.message) for warning in caught if "same shapes" not in str(warning.message)]


# --- wrappers and prefixes ---------------------------------------------------------------------------------------

PREFIXES = (
    "model.",
    "net.",
    "backbone.",
    "module.",
    "module.model.",
    "model.module.",
    "ema_model.",
    "_orig_mod.",
    "_forward_module.model._orig_mod.",
    "layer1.",
    "",
)


@pytest.mark.parametrize("saved", ["torch", "safetensors"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_common_prefix_of_all_names_is_taken_off(tmp_path, prefix, saved):
    expected = network()
    state = prefixed(prefix, expected.state_dict())
    path = tmp_path / "w.bin"
    torch.save(state, path) if saved == "torch" else safetensors.torch.save_file(state, path)
    assert_loaded(path, expected)
    assert notes(path) == []


WRAPPERS = (
    *("ema", "params", "weights", "model_state", "network", "state"),
    *("net_state_dict", "best_model", "net", "state_dict", "model_ema"),
)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_any_wrapper_is_opened(tmp_path, wrapper):
    expected = network()
    optimizer = torch.optim.Adam(network(1).parameters())
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.save({"epoch": 3, "optimizer": optimizer.state_dict(), wrapper: expected.state_dict()}, tmp_path / "w.pt")
    assert_loaded(tmp_path / "w.pt", expected)
    assert notes(tmp_path / "w.pt") == []


def test_a_state_dict_may_have_other_entries_beside_its_tensors(tmp_path):
    expected = network()
    torch.save({"epoch": 3, "step": torch.tensor(7), **expected.state_dict()}, tmp_path / "w.pt")
    assert_loaded(tmp_path / "w.pt", expected)


def test_a_lightning_checkpoint_is_opened(tmp_path):
    expected = network()
    content = {
        "epoch": 9,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {**prefixed("model.", expected.state_dict()), "criterion.weight": torch.ones(10)},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 10}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val_acc'}": {"best_model_score": torch.tensor(0.9)}},
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.zeros(16, 3, 3, 3)}}, "param_groups": [{}]}],
        "hyper_parameters": argparse.Namespace(lr=np.float64(0.1), root=Path("data"), decay=decimal.Decimal("0.1")),
    }
    torch.save(content, tmp_path / "last.ckpt")
    assert_loaded(tmp_path / "last.ckpt", expected)
    (note,) = notes(tmp_path / "last.ckpt")
    assert "criterion.weight" in note


def test_an_averaged_model_of_swa_is_opened(tmp_path):
    averaged = AveragedModel(network())
    averaged.update_parameters(network(1))
    torch.save({"swa": averaged.state_dict()}, tmp_path / "w.pt")
    assert_loaded(tmp_path / "w.pt", averaged.module)
    assert notes(tmp_path / "w.pt") == []


@pytest.mark.parametrize(
    ("raw", "averaged"),
    [
        ("state_dict", "state_dict_ema"),
        ("model", "model_ema"),
        ("net", "ema"),
        ("model", "swa_model"),
        ("schema", "ema_state"),
    ],
)
def test_of_raw_and_averaged_weights_the_averaged_are_taken_with_a_note(tmp_path, raw, averaged):
    path, expected, other = tmp_path / "w.pt", network(0), network(1)
    for content in (
        {raw: other.state_dict(), averaged: expected.state_dict()},
        {averaged: expected.state_dict(), raw: other.state_dict()},
        {**prefixed(f"{raw}.", other.state_dict()), **prefixed(f"{averaged}.", expected.state_dict())},
    ):
        torch.save(content, path)
        assert_loaded(path, expected)
        (note,) = notes(path)
        assert f"{averaged!r} is taken, averaged weights" in note
        assert raw in note


def test_of_swa_and_raw_weights_under_one_name_the_averaged_are_taken(tmp_path):
    averaged = AveragedModel(network())
    torch.save({"a": network(1).state_dict(), "b": averaged.state_dict()}, tmp_path / "w.pt")
    assert_loaded(tmp_path / "w.pt", averaged.module)


def test_of_equal_networks_the_first_and_of_others_the_largest_is_taken_with_a_note(tmp_path):
    path, first = tmp_path / "w.pt", network(0)
    torch.save({"model": first.state_dict(), "best": network(1).state_dict()}, path)
    assert_loaded(path, first)
    assert "('model', 'best'): 'model' is taken, the first" in notes(path)[0]
    teacher = network(2, "resnet32")
    torch.save({"student": first.state_dict(), "teacher": teacher.state_dict()}, path)
    assert_loaded(path, teacher)
    assert "'teacher' is taken, the largest" in notes(path)[0]


def test_moments_kept_by_name_are_not_taken_for_a_network(tmp_path):
    path, expected = tmp_path / "w.pt", network()
    moments = {f"{kind}.{name}": value for name, value in expected.named_parameters() for kind in ("m", "v", "z")}
    torch.save({"optimizer": moments, "a": expected.state_dict()}, path)
    assert_loaded(path, expected)
    assert notes(path) == []


def test_names_that_would_become_the_same_are_kept(tmp_path):
    state = {**network().state_dict(), "linear.weight": torch.zeros(10, 64), "linear.bias": torch.zeros(10)}
    torch.save(state, tmp_path / "w.pt")
    assert_refused(tmp_path / "w.pt", "linear.weight is unknown; linear.bias is unknown")


def test_notes_stay_notes_where_warnings_are_errors(tmp_path):
    torch.save({"a": network().state_dict(), "b": network().state_dict()}, tmp_path / "w.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Note, match="several networks"):
            load_weights(tmp_path / "w.pt")


def test_very_many_networks_are_refused(tmp_path):
    state = {f"{n}.{key}.weight": torch.zeros(1) for n in range(2000) for key in ("conv1", "fc")}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    assert_refused(tmp_path / "w.safetensors", "has 2000 networks")


# --- objects beside the tensors ----------------------------------------------------------------------------------

NESTED = collections.defaultdict(list, {"a": [1, 2]})
OBJECTS = {
    "numpy scalar": np.float64(0.9),
    "numpy array": np.arange(6.0).reshape(2, 3),
    "numpy random state": np.random.RandomState(0).get_state(),
    "namespace": argparse.Namespace(lr=0.1, path=Path("a"), nested=argparse.Namespace(x=None)),
    "simple namespace": types.SimpleNamespace(a=1),
    "path": Path("/a/b"),
    "time": datetime.datetime(2024, 1, 2, tzinfo=datetime.timezone.utc),
    "ordered": collections.OrderedDict(a=1),
    "default": NESTED,
    "counter": collections.Counter("abc"),
    "deque": collections.deque([1, 2], 5),
    "sets": [{1, 2}, frozenset("ab")],
    "complex": 1j,
    "bytes": b"abc",
    "bytearray": bytearray(b"abc"),
    "tuple keys": {(1, 2): 3},
    "device": torch.device("cpu"),
    "dtype": torch.bfloat16,
    "size": torch.Size([1, 2]),
    "version": torch.torch_version.TorchVersion("2.0"),
    "generator": torch.get_rng_state(),
    "parameter": nn.Parameter(torch.zeros(2)),
    "sparse": torch.eye(3).to_sparse(),
    "large int": 10**40,
    "types": [int, str, dict, Any],
    "method": collections.Counter.most_common,
}


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_harmless_objects_beside_the_tensors_are_passed_over(tmp_path, protocol, zipped):
    expected = network()
    content = {"before": OBJECTS, "net": expected.state_dict(), "after": [OBJECTS, {"x": OBJECTS}]}
    torch.save(content, tmp_path / "w.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    assert_loaded(tmp_path / "w.pt", expected)


class Mode(enum.Enum):
    ON = 1


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (functools.partial(print, 1), r"functools\.partial"),
        (Mode.ON, r"test_foreign\.Mode"),
        (nn.Linear(1, 1), r"torch\.nn\.modules\.linear\.Linear"),
        (print, r"builtins\.print"),
        (torch.load, r"torch\.serialization\.load"),
        (subprocess.run, r"subprocess\.run"),
    ],
)
def test_other_objects_are_refused_by_name(tmp_path, value, name, protocol):
    torch.save({"net": network().state_dict(), "x": value}, tmp_path / "w.pt", pickle_protocol=protocol)
    assert_refused(tmp_path / "w.pt", f"{name}.*could run code")


def test_parameters_of_all_kinds_are_tensors(tmp_path):
    expected = network()
    state = {**expected.state_dict(), **dict(expected.named_parameters())}
    state["fc.weight"] = nn.Parameter(state["fc.weight"].detach().clone())
    state["fc.weight"].note = "an attribute"
    state["fc.bias"] = state["fc.bias"].detach().clone()
    state["fc.bias"].note = "an attribute"
    torch.save(state, tmp_path / "w.pt")
    assert_loaded(tmp_path / "w.pt", expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool])
@pytest.mark.parametrize("saved", ["torch", "safetensors"])
def test_weights_that_are_no_floats_are_refused(tmp_path, dtype, saved):
    """Quantised ones have a scale somewhere else."""
    state = {name: (20 * value).to(dtype) for name, value in network().state_dict().items()}
    path = tmp_path / "w.bin"
    torch.save(state, path) if saved == "torch" else safetensors.torch.save_file(state, path)
    assert_refused(path, rf"[\w.]+ has values of type {dtype}\. Save weights as floats\.")


def test_a_pipe_or_device_is_refused_and_not_read(tmp_path):
    os.mkfifo(tmp_path / "w.pt")
    for path in (tmp_path / "w.pt", Path("/dev/null")):
        assert_refused(path, r"is a pipe or a device\. Save its content as a file")


@pytest.mark.parametrize("content", [torch.zeros(3), 3, "text", None])
def test_a_file_of_something_else_than_a_container_has_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    assert_refused(tmp_path / "w.pt", "contains no state dict")


def test_tensors_that_are_parts_of_one_are_read(tmp_path):
    expected = network()
    flat = torch.cat([value.flatten() for value in expected.parameters()])
    parts = flat.split([value.numel() for value in expected.parameters()])
    state = expected.state_dict()
    for (name, value), part in zip(expected.named_parameters(), parts, strict=True):
        state[name] = part.view(value.shape)
    state["conv1.weight"] = state["conv1.weight"].to(memory_format=torch.channels_last)
    for zipped in (True, False):
        torch.save(state, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
        assert_loaded(tmp_path / "w.pt", expected)


def test_an_ordered_dict_of_python_2_is_read(tmp_path):
    """Python 2 pickled it as a list of pairs with names in bytes."""
    expected, buffer = network(), io.BytesIO()
    torch.save([[name, value] for name, value in expected.state_dict().items()], buffer)
    with zipfile.ZipFile(buffer) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    key = next(name for name in entries if name.endswith("data.pkl"))
    assert entries[key].startswith(b"\x80\x02]")
    entries[key] = b"\x80\x02ccollections\nOrderedDict\n" + entries[key][2:-1] + b"\x85R."
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    assert_loaded(tmp_path / "w.pt", expected)


# --- hostile pickles ---------------------------------------------------------------------------------------------


def write_pickle(path, program, **entries):
    """Write a file of torch.save with this pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", b"\x80\x02" + program + b".")
        for name, content in entries.items():
            archive.writestr(f"w/data/{name}", content)


def word(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def storage(kind, count, key="0"):
    """A program that leaves a storage of `count` values on the stack."""
    size = struct.pack("<q", count)
    return b"(" + word("storage") + b"ctorch\n" + kind + b"\n" + word(key) + word("cpu") + b"\x8a\x08" + size + b"tQ"


def tensor(storage, size, stride):
    def number(value):
        return b"\x8a\x08" + struct.pack("<q", value)

    shape, steps = (b"(" + b"".join(map(number, values)) + b"t" for values in (size, stride))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + shape + steps + b"\x89NtR"


def mapping(**entries):
    return b"}" + b"".join(word(name.replace("__", ".")) + value + b"s" for name, value in entries.items())


SMALL = tensor(storage(b"FloatStorage", 1), (1,), (1,))
HUGE = b"\x8a\x08" + struct.pack("<q", 1 << 40)

HOSTILE = {
    "code in reduce": b"cos\nsystem\n" + word("touch canary") + b"\x85R",
    "code through getattr": b"c__builtin__\ngetattr\ncos\nsystem\n" + word("x") + b"\x86R",
    "evaluated": b"c__builtin__\neval\n" + word("1") + b"\x85R",
    "call of the result of a stand-in": b"c__builtin__\ngetattr\n)R" + word("x") + b"\x85R",
    "call of a string": word("print") + b")R",
    "call of a tensor": SMALL + b")R",
    "class that is a string": word("print") + b")\x81",
    "state of a stand-in": b"cargparse\nNamespace\n)\x81" + mapping(__class__=word("x")) + b"b",
    "state of a list": b"]" + mapping(append=word("x")) + b"b",
    "state of a number": b"K\x01}b",
    "state of a function": b"ctorch._utils\n_rebuild_tensor_v2\n" + mapping(__code__=word("x")) + b"b",
    "bytearray of a claim": b"c__builtin__\nbytearray\n" + HUGE + b"\x85R",
    "range as a tuple": b"c__builtin__\ntuple\nc__builtin__\nrange\n" + HUGE + b"\x85R\x85R",
    "bytearray opcode": b"\x96" + struct.pack("<Q", 1 << 40),
    "text of a claim": b"X\xff\xff\xff\xff",
    "bytes of a claim": b"\x8e" + struct.pack("<Q", 1 << 60),
    "frame of a claim": b"\x95" + struct.pack("<Q", 1 << 60),
    "number of a claim": b"\x8b" + struct.pack("<i", (1 << 31) - 1),
    "memo of a claim": b"K\x01r\xff\xff\xff\xff",
    "tensor class with a claim": b"ctorch\nFloatTensor\n" + HUGE + b"\x85R",
    "storage class with a claim": b"ctorch\nFloatStorage\n" + HUGE + b"\x85R",
    "numpy array of a claim": b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + HUGE + b"\x85c_\n_\n\x87R",
    "storage of a claim": mapping(conv1__weight=tensor(storage(b"FloatStorage", 1 << 40), (1 << 40,), (1,))),
    "size of a claim": mapping(conv1__weight=tensor(storage(b"FloatStorage", 1), (1 << 40,), (1,))),
    "expanded": mapping(conv1__weight=SMALL, fc__weight=tensor(storage(b"FloatStorage", 1), (1 << 22, 64), (0, 0))),
    "overflowing": mapping(
        conv1__weight=SMALL, fc__weight=tensor(storage(b"FloatStorage", 1), (1 << 32, 1 << 32), (0, 0))
    ),
    "negative stride": mapping(conv1__weight=SMALL, fc__weight=tensor(storage(b"FloatStorage", 1), (1, 1), (-1, 1))),
    "strings as sizes": mapping(fc__weight=b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNtR"),
    "tensor of a tensor": mapping(fc__weight=b"ctorch._utils\n_rebuild_tensor_v2\n(" + SMALL + b"K\x00NNtR"),
    "many arguments": b"ctorch._utils\n_rebuild_parameter\n(" + 100_000 * b"N" + b"tR",
    "extension": b"\x82\x01",
    "persistent text": b"Pabc\n",
    "persistent number": b"K\x01Q",
    "empty stack": b"0000",
    "mark alone": b"(",
    "unhashable key": b"}]K\x01s",
    "nested lists": 300_000 * b"]" + 299_999 * b"a",
    "nested tuples": b")" + 300_000 * b"\x85",
    "nested tuples as a key": b"})" + 300_000 * b"\x85" + b"K\x01s",
    "doubled tuples as a key": b"}" + b")" + 100 * b"2\x86" + b"K\x01s",
    "doubled tuples in a set": b"\x8f(" + b")" + 100 * b"2\x86" + b"\x90",
    "doubled lists": b"]" + 100 * b"2\x86",
    "nested stand-ins": 100_000 * b"ccollections\nOrderedDict\n" + b")" + 100_000 * b"R\x85",
    "nested subclasses": 5000 * b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._tensor\n_rebuild_from_type_v2\nN"
    + b")"
    + 5000 * b"NtR",
    "copies of a large mapping": b"("
    + b"}q\x00("
    + b"".join(word(str(n)) + b"N" for n in range(20_000))
    + b"u"
    + 40_000 * b"ccollections\nOrderedDict\nh\x00\x85R"
    + b"t",
    "lists": 4_000_000 * b"]",
    "mappings": 4_000_000 * b"}",
    "marks": 4_000_000 * b"(",
    "sets": b"]q\x00(" + 4_000_000 * b"\x8f",
    "memo": b"]" + 4_000_000 * b"\x94",
    "lists in lists": b"](" + 1000 * (b"]q\x00(" + 4000 * b"]" + b"eh\x00") + b"e",
    "short texts": b"(" + 1_000_000 * b"\x8c\x02ab",
    "long text": b"(X" + struct.pack("<I", (40 << 20) + 4) + "\U0001f600".encode() + (40 << 20) * b"a",
    "long number": b"\x8b" + struct.pack("<i", 8 << 20) + (8 << 20) * b"a",
    "long decimal number": b"L" + 5000 * b"9" + b"L\n",
    "entries": b"}(" + b"".join(b"M" + struct.pack("<H", n % 65536) + b"N" for n in range(900_000)) + b"u",
    "a list of one list": b"]q\x00](" + 1_000_000 * b"h\x00" + b"e",
    "deep mappings": b"X\x01\x00\x00\x00aq\x00" + 200_000 * b"}h\x00" + b"]" + 200_000 * b"s",
    "names of objects": b"\x8c\xffdatetime" + 247 * b"x" + b"q\x00" + 500_000 * b"h\x00h\x00\x93",
    "line of a claim": b"c" + 20_000_000 * b"a",
    "keys of one hash": b"}("
    + b"".join(b"\x8a\x0b" + (n * sys.hash_info.modulus).to_bytes(11, "little") + b"N" for n in range(1, 80_000))
    + b"u",
    "subclass of many arguments": b"ctorch._tensor\n_rebuild_from_type_v2\nq\x02ctorch\nSize\nq\x03]("
    + 500_000 * b"N"
    + b"eq\x010h\x03Nh\x01\x87q\x0500"
    + 20_000 * b"h\x02h\x05R0"
    + b"N",
    "copies of large arguments": b"("
    + b"("
    + 20_000 * b"N"
    + b"tq\x00"
    + 40_000 * b"ccollections\ndeque\nh\x00R"
    + b"t",
}


@pytest.mark.filterwarnings("error::DeprecationWarning")
@pytest.mark.parametrize("program", HOSTILE.values(), ids=HOSTILE)
def test_hostile_pickles_are_refused(tmp_path, monkeypatch, program):
    monkeypatch.chdir(tmp_path)
    write_pickle(tmp_path / "w.pt", program, **{"0": bytes(4)})
    with limits((tmp_path / "w.pt").stat().st_size):
        assert_refused(tmp_path / "w.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["w.pt"]


def test_hostile_programs_are_valid_pickles():
    """Those that should be, are: a typing error would be refused too."""
    for name, program in HOSTILE.items():
        if not re.search("claim|bytearray opcode|decimal", name) and len(program) < 1 << 20:
            list(pickletools.genops(b"\x80\x02" + program + b"."))


def test_a_tensor_of_one_value_that_claims_many_classes_is_refused(tmp_path):
    state = {**network().state_dict(), "fc.weight": torch.zeros(1, 1).expand(1 << 22, 64)}
    state["fc.bias"] = torch.zeros(1).expand(1 << 22)
    torch.save(state, tmp_path / "w.pt")
    assert (tmp_path / "w.pt").stat().st_size < 2 << 20
    assert_refused(tmp_path / "w.pt", r"\(4194304, 64\) claims more values than it has")


@pytest.mark.parametrize("claim", [-1, 1 << 40, (1 << 63) - 1])
def test_a_legacy_storage_that_claims_more_than_the_file_is_refused(tmp_path, claim):
    buffer = io.BytesIO()
    torch.save(network().state_dict(), buffer, _use_new_zipfile_serialization=False)
    data, first = buffer.getvalue(), network().conv1.weight.detach().numpy().tobytes()
    place = data.index(first) - 8
    assert struct.unpack("<q", data[place : place + 8]) == (432,)
    (tmp_path / "w.pt").write_bytes(data[:place] + struct.pack("<q", claim) + data[place + 8 :])
    assert_refused(tmp_path / "w.pt")


DOUBLED = b")q\x00" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(60)) + b"0"


@pytest.mark.parametrize(
    "parts", [(b"](" + DOUBLED + b"h\x3cK\x01\x86e",), (b"}(\x8c\x0dlittle_endian\x88u", b"}", DOUBLED + b"](h\x3ce")]
)
def test_keys_of_a_legacy_file_that_take_forever_to_hash_are_refused(tmp_path, parts):
    head = [pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2)]
    content = b"".join([*head, *(b"\x80\x02" + part + b"." for part in parts), bytes(8)])
    (tmp_path / "w.pt").write_bytes(content)
    with limits(len(content)):
        assert_refused(tmp_path / "w.pt")


def test_a_zip_whose_entries_overlap_or_are_compressed_is_refused(tmp_path):
    buffer = io.BytesIO()
    torch.save({"net": network().state_dict()}, buffer)
    with zipfile.ZipFile(buffer) as archive, zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in archive.infolist():
            packed.writestr(entry.filename, archive.read(entry))
    assert_refused(tmp_path / "w.pt", "compressed")
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("w/data.pkl", bytes(1000))
        archive.filelist *= 50
    assert_refused(tmp_path / "w.pt", "claim more bytes")


def shapes(name, **options):
    with torch.device("meta"):
        return {key: value.shape for key, value in create_model(name, **options).state_dict().items()}


def test_a_network_whose_tensors_are_all_the_same_values_is_refused(tmp_path):
    found = shapes("wrn28-10")
    values = torch.zeros(max(map(math.prod, found.values())), dtype=torch.half)
    state = {key: values[: math.prod(shape)].view(shape) for key, shape in found.items()}
    torch.save(state, tmp_path / "w.pt")
    size = (tmp_path / "w.pt").stat().st_size
    assert size < 10 << 20
    with limits(size):
        assert_refused(tmp_path / "w.pt", "claim more values than it has")


def test_a_network_of_half_precision_takes_twice_its_file(tmp_path):
    """Its tensors are parts of one storage, which is not read whole."""
    found = shapes("wrn16-8", num_classes=30_000)
    flat = torch.zeros(sum(map(math.prod, found.values())), dtype=torch.half)
    parts = flat.split(list(map(math.prod, found.values())))
    torch.save({key: part.view(shape) for (key, shape), part in zip(found.items(), parts, strict=True)}, tmp_path / "w")
    del flat, parts
    with limits((tmp_path / "w").stat().st_size):
        assert load_weights(tmp_path / "w").num_classes == 30_000


def test_weights_of_one_byte_are_refused(tmp_path):
    state = {key: torch.zeros(shape, dtype=torch.float8_e4m3fn) for key, shape in shapes("wrn28-10").items()}
    for save in (torch.save, safetensors.torch.save_file):
        save(state, tmp_path / "w")
        with limits((tmp_path / "w").stat().st_size):
            assert_refused(tmp_path / "w", "float8|F8_E4M3")


@pytest.mark.parametrize("kind", ["zip", "safetensors", "legacy"])
def test_a_long_history_beside_a_network_is_read(tmp_path, kind):
    expected = network()
    history = [{"loss": n / 7, "accuracy": n / 3, "lr": 0.1 + n, "step": n, "split": "train"} for n in range(20_000)]
    content = {"net": expected.state_dict(), "losses": [n / 7 for n in range(100_000)], "history": history}
    if kind == "safetensors":
        safetensors.torch.save_file(expected.state_dict(), tmp_path / "w", {"history": json.dumps(history)})
    else:
        torch.save(content, tmp_path / "w", _use_new_zipfile_serialization=kind == "zip")
    with limits((tmp_path / "w").stat().st_size):
        assert_loaded(tmp_path / "w", expected)


# --- inference of the network ------------------------------------------------------------------------------------

NETWORKS = [
    (name, shortcut)
    for name, spec in MODELS.items()
    if not name.startswith("plain") and spec.depth < 1000
    for shortcut in (spec.shortcuts if spec.uses_shortcut else "B")
]


@pytest.mark.parametrize(("name", "shortcut"), NETWORKS)
def test_every_network_is_inferred_from_its_names_and_shapes(tmp_path, name, shortcut):
    """With 7 classes. The values are zeros, so that nothing large is written or drawn."""
    with torch.device("meta"):
        shapes = create_model(name, num_classes=7, shortcut=shortcut).state_dict()
    state = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in shapes.items()}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    weights = load_weights(tmp_path / "w.safetensors")
    assert (weights.name, weights.shortcut, weights.num_classes) == (name, shortcut, 7)


def test_networks_of_the_same_shapes_are_named(tmp_path):
    torch.save(network(shortcut="A").state_dict(), tmp_path / "w.pt")
    with pytest.warns(Note, match="is taken for resnet20; it has the same shapes as --model plain20"):
        load_weights(tmp_path / "w.pt")
    assert load_weights(tmp_path / "w.pt", "plain20").name == "plain20"
    torch.save(network(shortcut="B").state_dict(), tmp_path / "w.pt")
    assert notes(tmp_path / "w.pt") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.bias": None}, "nearest is resnet20 with shortcut B, but fc.bias is missing"),
        ({10_000 * "x": torch.zeros(1)}, "nearest is resnet20 with shortcut B, but xxx"),
        ({"head.x": torch.zeros(1)}, "nearest is resnet20 with shortcut B, but head.x is unknown"),
        ({"conv1.weight": torch.zeros(16, 3, 7, 7)}, r"conv1.weight is \(16, 3, 7, 7\), not \(16, 3, 3, 3\)"),
    ],
)
def test_the_first_differences_from_the_nearest_network_are_named(tmp_path, change, message):
    state = {key: value for key, value in {**network().state_dict(), **change}.items() if value is not None}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    assert_refused(tmp_path / "w.safetensors", message)


def test_a_classifier_of_a_claim_allocates_nothing(tmp_path):
    path = tmp_path / "w.safetensors"
    state = {key: value for key, value in network().state_dict().items() if key != "fc.weight"}
    safetensors.torch.save_file({**state, "fc.weight": torch.zeros(40_000_000, 0)}, path)
    with limits(path.stat().st_size):
        assert_refused(path, "40,000,000 classes")
