"""Weights in files of other programs: the network among the contents of a checkpoint that `torch.save` wrote.

Nothing in a file runs, and no claim in it allocates memory. A name in its pickle becomes a description of a tensor, or
a stand-in that does nothing; other names than those of data are refused. Only the tensors of the network are read.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import re
import struct
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fastresnet.tensors import StoredTensor, check_distinct, place
from pipelines.archives import open_zip
from pipelines.errors import DataError, Note, list_some, reason_of
from pipelines.pickles import BoundedUnpickler

# --- pickles -----------------------------------------------------------------------------------------------------

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}

_DATA = re.compile(
    r"(numpy|datetime|pathlib|collections|decimal|fractions|uuid|omegaconf|addict|easydict|yacs|mmcv|mmengine"
    r"|lightning|lightning_fabric|pytorch_lightning|typing)\..*"
    r"|argparse\.Namespace|types\.SimpleNamespace|_codecs\.encode|copyreg\._reconstructor"
    r"|builtins\.(object|bool|int|float|complex|str|bytes|bytearray|dict|list|tuple|set|frozenset|slice|range|getattr)"
    r"|torch\.(Size|device|Generator|\w*Tensor|\w+_format|channels_last\w*|((cuda|storage)\.)?\w*Storage"
    r"|_utils\._rebuild_\w+|_tensor\._rebuild_\w+|serialization\._get_layout|torch_version\.TorchVersion)"
)
"""Names of data, which checkpoints have beside tensors: those of Python, NumPy, and libraries of configurations."""

_MOST_ARGUMENTS, _LONGEST_NAME = 16, 200
_STRUCTURE, _MORE_STRUCTURE = 32 << 20, 64 << 20
"""Memory for what a file has beside the values of its tensors: always, and at most as much more as the file has."""


class _Inert:
    """Stand-in for an object beside the tensors, which does nothing.

    It refers to what the file says of the object. A copy could be made again and again by three bytes of the file.
    """

    __slots__ = ("entries", "parts")

    def __init__(self, *parts: Any) -> None:
        self.parts: list[Any] = list(parts)
        self.entries: dict[Any, Any] = {}

    def append(self, _: Any) -> None:
        pass

    extend = append


@dataclasses.dataclass(frozen=True, slots=True)
class _Storage:
    """Values of tensors, described by a file."""

    dtype: torch.dtype
    key: str
    start: int
    """Number of the first value; only files of before PyTorch 1.0 have others than 0."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Described:
    """Tensor, described by a file: nothing is known to be true."""

    storage: _Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
    """Describe a tensor as `torch._utils._rebuild_tensor_v2` makes it; with a dtype at the end, as `_v3` does."""
    if not isinstance(storage, _Storage):
        return _Inert()
    dtype = rest[-1] if rest and isinstance(rest[-1], torch.dtype) else storage.dtype
    return _Described(storage, dtype, offset, size, stride)


def _first(data: Any, *_: Any) -> Any:
    return data


def _subclass(rebuild: Any, _: Any, arguments: Any, *__: Any) -> Any:
    if rebuild is _subclass or type(arguments) is not tuple or len(arguments) > _MOST_ARGUMENTS:
        raise pickle.UnpicklingError("a tensor in it has impossible properties")
    return rebuild(*arguments) if any(rebuild is known for known in _TORCH.values()) else _Inert()


_TORCH: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.nn.parameter.Parameter": _first,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch.Size": _first,
}


class _Unpickler(BoundedUnpickler):
    """Unpickler that makes only plain values, descriptions of tensors and stand-ins."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        memory = _STRUCTURE + min(size, _MORE_STRUCTURE)
        super().__init__(file, memory, longest=4096, encoding="utf-8", errors="replace")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if self.proto < 3:  # with Python 2's names
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        if len(module) + len(name) > _LONGEST_NAME:
            raise pickle.UnpicklingError("it has a very long name of an object")
        full = f"{module}.{name}"
        if full in _TORCH:
            return _TORCH[full]
        if module.partition(".")[0] == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if _DATA.fullmatch(full):
            return _Inert
        raise _Refused(full[:100])

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or not 5 <= len(pid) <= 6 or pid[0] != "storage" or not isinstance(pid[2], str):
            raise pickle.UnpicklingError("it refers to something else than the values of tensors")
        _, dtype, key, _, _, *view = pid
        if not isinstance(dtype, torch.dtype):
            return _Inert()
        self.storages.setdefault(key, _Storage(dtype, key, 0))
        return _Storage(dtype, key, view[0][1] if view and view[0] else 0)

    def make(self, call: Any, arguments: Any) -> Any:
        if call is _Inert:
            return _Inert(arguments)
        if not any(call is known for known in _TORCH.values()):
            raise pickle.UnpicklingError("it calls something else than a function")
        if len(arguments) > _MOST_ARGUMENTS:
            raise pickle.UnpicklingError("a tensor in it has too many properties")
        return call(*arguments)

    def set_state(self, target: Any, state: Any) -> None:
        if isinstance(target, _Inert):
            target.parts.append(state)

    def set_item(self, target: Any, key: Any, value: Any) -> None:
        if type(value) not in (int, float):  # histories have very many, and none is needed
            super().set_item(target.entries if isinstance(target, _Inert) else target, key, value)


class _Refused(Exception):
    """Name of something that is not data."""


# --- files of torch.save -----------------------------------------------------------------------------------------

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


def open_network(file: BinaryIO, path: Path) -> dict[str, StoredTensor]:
    """Find the network in `file`, open at `path`, that `torch.save` wrote: its tensors, under this program's names.

    Raises `DataError` if the file is damaged, is of another kind, has no state dict, or more than data.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    is_zip = file.read(2) == b"PK"
    file.seek(0)
    try:
        content, find = _open_zip(file, size, path) if is_zip else _open_legacy(file, size)
        network = select_network(content, path)
        del content
        places = {key: find(key) for key in {described.storage.key for described in network.values()}}
        tensors = {name: _place(file, described, *places[described.storage.key]) for name, described in network.items()}
        check_distinct(tensors.values(), size)
    except (DataError, Note):
        raise
    except _Refused as error:
        raise DataError(
            f"{path} contains {error}, which is not loaded because it could run code. Save the network's state_dict() "
            "and load that."
        ) from None
    except Exception as error:  # noqa: BLE001  a damaged pickle can raise nearly anything
        raise DataError(f"{path} is damaged or not a file of torch.save: {reason_of(error)}.") from None
    return tensors


_Find = Callable[[str], tuple[int, int]]
"""Function that checks the storage with this key, and returns where it begins and ends in the file."""


def _open_zip(file: BinaryIO, size: int, path: Path) -> tuple[Any, _Find]:
    """Unpickle the content of a zip, and return it and the places of its storages, whose checksums are compared."""
    archive = open_zip(file)
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise zipfile.BadZipFile("its entries are compressed, and those of torch.save are not")
    if sum(entry.file_size for entry in entries) > size:
        raise zipfile.BadZipFile("its entries claim more bytes than it has")
    names = {entry.filename for entry in entries}
    roots = [name.removesuffix("data.pkl") for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(roots) != 1:
        raise zipfile.BadZipFile("it has no data.pkl")
    (root,) = roots
    if f"{root}constants.pkl" in names:
        raise DataError(f"{path} is a TorchScript program. Save the network's state_dict() and load that.")
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
        raise DataError(f"{path} was written on a big-endian machine. Save it on another.")
    content = _Unpickler(io.BytesIO(archive.read(f"{root}data.pkl")), size).load()
    return content, lambda key: _find_entry(archive, file, f"{root}data/{key}")


def _find_entry(archive: zipfile.ZipFile, file: BinaryIO, name: str) -> tuple[int, int]:
    entry = archive.getinfo(name)
    with archive.open(entry) as stream:
        while stream.read(1 << 20):  # it compares the checksum at the end
            pass
    file.seek(entry.header_offset + 26)
    lengths = struct.unpack("<HH", file.read(4))  # of the name and of the rest of the header
    begin = entry.header_offset + 30 + sum(lengths)
    return begin, begin + entry.file_size


def _open_legacy(file: BinaryIO, size: int) -> tuple[Any, _Find]:
    """Unpickle the content of a file of before PyTorch 1.6, and return it and the places of its storages."""
    unpickler = _Unpickler(file, size)
    if unpickler.load() != _MAGIC or unpickler.load() != _PROTOCOL:
        raise pickle.UnpicklingError("it does not begin as they do")
    system = unpickler.load()
    if type(system) is not dict or system.get("little_endian") is not True:
        raise pickle.UnpicklingError("it was written on a big-endian machine")
    content, keys, places = unpickler.load(), unpickler.load(), {}
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise pickle.UnpicklingError("it has no list of storages")
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        begin = file.tell()
        places[key] = begin, begin + count * unpickler.storages[key].dtype.itemsize
        if not begin <= places[key][1] <= size:
            raise EOFError(f"it ends within storage {key}")
        file.seek(places[key][1])
    return content, places.__getitem__


def _place(file: BinaryIO, described: _Described, begin: int, end: int) -> StoredTensor:
    start = described.storage.start  # in values
    return place(file, begin, end, described.dtype, start + described.offset, described.shape, described.stride)


# --- the network in a checkpoint ---------------------------------------------------------------------------------

_STEM, _CLASSIFIERS = "conv1.weight", ("fc.weight", "linear.weight")
_WRAPPED = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_RENAMED = ((re.compile(r"^linear\."), "fc."), (re.compile(r"\.shortcut\."), ".downsample."))
_AVERAGED = re.compile(r"(?<![a-z])ema|averag|swa|shadow", re.IGNORECASE)
_MOST_NETWORKS, _MOST_LEVELS = 16, 100
_CONTAINERS = (dict, list, tuple, _Inert)


@dataclasses.dataclass(frozen=True, slots=True)
class _Network:
    """State dict of a network somewhere in a checkpoint."""

    place: str
    """Keys on the way to it, and the prefix of its names."""
    state: dict[str, Any]
    """Tensors, under this program's names."""
    others: tuple[str, ...]
    """Names of tensors beside it, which have not its prefix."""

    @property
    def size(self) -> int:
        return sum(not name.endswith("num_batches_tracked") for name in self.state)

    @property
    def averaged(self) -> bool:
        return _AVERAGED.search(self.place) is not None or any(name.endswith("n_averaged") for name in self.others)

    @property
    def complete(self) -> bool:
        """Presence of statistics, which the moments that an optimiser keeps by names do not have."""
        return any(name.endswith("running_var") for name in self.state)


def select_network(content: Any, path: Path) -> dict[str, Any]:
    """Select the largest network in `content`: its tensors, or descriptions of them, under this program's names.

    A network is what shares the prefix of a first convolution and a classifier, in any mapping. Of several of the same
    size, the averaged weights are taken, else the first; a `Note` says so. Raises `DataError` if there are no tensors.
    """
    mappings = list(_mappings(content))
    networks = [network for place, state in mappings for network in _networks(place, state, path)]
    if not networks:
        if not mappings:
            raise DataError(f"{path} contains no state dict: expected a mapping of names to tensors, in any wrapper.")
        return max((state for _, state in mappings), key=len)
    chosen = max(networks, key=lambda network: (network.size, network.averaged))
    if len(places := [network.place for network in networks if network.complete]) > 1:
        same = [network for network in networks if network.complete and network.size == chosen.size]
        reason = "the largest" if len(same) == 1 else "averaged weights" if chosen.averaged else "the first"
        warnings.warn(f"{path} has several networks ({_some(places)}): {chosen.place!r} is taken, {reason}", Note, 4)
    if others := [name for name in chosen.others if not name.endswith("n_averaged")]:
        warnings.warn(f"{path}: tensors beside the network are ignored: {_some(others)}", Note, 4)
    return chosen.state


def _some(names: list[str]) -> str:
    return list_some([repr(name[:60]) for name in names])


def _mappings(content: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Find all mappings of names to tensors in `content`, each once, with the keys on the way to it.

    Other entries are left out, and so are tensors of a single number: counters, which no network has as weights.
    """
    seen: dict[int, Any] = {}  # the objects too: another one could get the number of one that is gone
    ways = [iter([("", content)] if isinstance(content, _CONTAINERS) else [])]
    while ways:
        place, value = next(ways[-1], ("", None))
        if value is None:
            ways.pop()
        elif id(value) not in seen and len(ways) < _MOST_LEVELS:
            seen[id(value)] = value
            if isinstance(value, dict) and (tensors := _tensors(value)):
                yield place, tensors
            ways.append(_within(place, value))


def _within(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Find the containers in a container, with the keys on the way to them."""
    for key, item in _parts(value):
        if isinstance(item, _CONTAINERS):
            yield (f"{place}.{key[:60]}".strip(".")[-200:] if isinstance(key, str) else place), item


def _tensors(mapping: dict[Any, Any]) -> dict[str, Any]:
    return {_WRAPPED.sub("", key): value for key, value in mapping.items() if _is_tensor(key, value)}


def _is_tensor(key: Any, value: Any) -> bool:
    if not isinstance(key, str) or not isinstance(value, _Described | StoredTensor):
        return False
    return len(value.shape) > 0 or key.endswith(("num_batches_tracked", "n_averaged"))


def _parts(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, dict):
        return value.items()
    if isinstance(value, _Inert):
        return ((None, part) for part in (value.entries, *value.parts))
    if value and all(map(_is_pair, value)):  # Python 2 wrote an OrderedDict as a list of pairs
        return [(None, dict(value))]
    return ((None, part) for part in value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], str)


def _networks(place: str, state: dict[str, Any], path: Path) -> Iterator[_Network]:
    """Find the networks in a mapping: the names with the prefix of a first convolution and a classifier."""
    stems = sorted(name.removesuffix(_STEM) for name in state if f".{name}".endswith(f".{_STEM}"))
    prefixes: list[str] = []
    for stem in stems:  # in this order, an outer prefix comes before those within it
        if any(stem + name in state for name in _CLASSIFIERS) and not (prefixes and stem.startswith(prefixes[-1])):
            prefixes.append(stem)
    if len(prefixes) > _MOST_NETWORKS:
        raise DataError(f"{path} has {len(prefixes)} networks. Save the one that you mean.")
    for prefix in prefixes:
        inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        others = tuple(name for name in state if not any(map(name.startswith, prefixes)))
        renamed = {_renamed(name): value for name, value in inside.items()}
        distinct = len(renamed) == len(inside)  # else another network, with both names
        yield _Network(f"{place}.{prefix}".strip("."), renamed if distinct else inside, others)


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name)
    return name
