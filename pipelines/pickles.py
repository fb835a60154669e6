"""Unpickler for files from outside: what it makes is bounded in memory and time, and nothing in the file runs.

A byte of a pickle can ask for a hundred bytes of memory. So each opcode is charged before it runs, and a pickle that
needs more than its budget is refused. What a name, a call or a state means is up to the subclasses.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, ClassVar

# The unpickler in C allocates memory by claims, and cannot be told what to leave out.
_Python: Any = pickle._Unpickler

_KEYS = (str, bytes, int, float, type(None))
"""Kinds of keys that are kept: hashing a tuple of tuples may take forever."""

_LARGEST_KEY, _LARGEST_MEMO = 1 << 60, 1 << 32
"""Larger numbers as keys could all have the same hash; a dict of them takes quadratic time."""

_MOST_MARKS, _SHORT = 1000, 4096
_MOST_ITEMS = 100_000
"""Most values of a container in one piece: pickle writes pieces of a thousand. A list that grows is copied again and
again, which takes several times its memory."""

# Bytes that an opcode takes in the end, at most. The contents of long texts and numbers are charged when they are read.
_MEMO, _ENTRY, _OBJECT, _TEXT, _NUMBER, _OTHER = 128, 300, 200, 80, 40, 16
_MEMOS = (pickle.MEMOIZE, pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT)
_OBJECTS = (
    *(pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.LIST, pickle.DICT),
    *(pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.REDUCE, pickle.NEWOBJ, pickle.PERSID, pickle.BINPERSID, pickle.GLOBAL, pickle.STACK_GLOBAL),
)
_TEXTS = (
    *(pickle.STRING, pickle.BINSTRING, pickle.SHORT_BINSTRING),
    *(pickle.UNICODE, pickle.BINUNICODE, pickle.BINUNICODE8, pickle.SHORT_BINUNICODE),
    *(pickle.BINBYTES, pickle.BINBYTES8, pickle.SHORT_BINBYTES, pickle.BYTEARRAY8),
)
_NUMBERS = (
    *(pickle.INT, pickle.LONG, pickle.LONG1, pickle.LONG4, pickle.BININT, pickle.BININT2),
    *(pickle.FLOAT, pickle.BINFLOAT),
)
_UNUSED = (
    *(pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ),
    *(pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.NEWOBJ_EX),
)


class _BoundedReader(_Python):
    """Unpickler whose opcodes are charged, and whose texts and numbers of objects are bounded."""

    readline: Callable[[], bytes]

    def __init__(self, file: BinaryIO, memory: int, *, longest: int, **options: Any) -> None:
        """Read from `file` what takes at most `memory` bytes. Texts of more than `longest` bytes become empty."""
        self._pieces = _Pieces(file, longest, self.charge)
        super().__init__(self._pieces, **options)
        self._left, self._longest = memory, longest

    def load(self) -> Any:
        """Read the next pickle of the file."""
        self.memo.clear()
        return super().load()

    def charge(self, memory: int) -> None:
        """Raise `UnpicklingError` if nothing is left for another `memory` bytes."""
        self._left -= memory
        if self._left < 0:
            raise pickle.UnpicklingError("its structure would take too much memory")

    def load_frame(self) -> None:
        self.read(8)  # a frame only says how much to read at once

    def load_binunicode(self) -> None:
        self._load_text(*struct.unpack("<I", self.read(4)))

    def load_binunicode8(self) -> None:
        self._load_text(*struct.unpack("<Q", self.read(8)))

    def _load_text(self, size: int) -> None:
        if _SHORT < size <= self._longest:
            self.charge(3 * size)
        self.append(str(self.read(size), "utf-8", "surrogatepass"))

    def load_string(self) -> None:
        readline, self.readline = self.readline, self._pieces.read_text
        super().load_string()
        self.readline = readline

    def load_unicode(self) -> None:
        text = self._pieces.read_text()[:-1]
        self.charge(3 * len(text))
        self.append(str(text, "raw-unicode-escape"))

    load_bytearray8 = _Python.load_binbytes8

    def load_put(self) -> None:
        self.memo[self._memo_number()] = self.stack[-1]

    def load_get(self) -> None:
        self.append(self.memo[self._memo_number()])

    def _memo_number(self) -> int:
        number = int(self.readline())
        if not 0 <= number < _LARGEST_MEMO:
            raise pickle.UnpicklingError("it refers to a very large number of an object")
        return number

    def load_mark(self) -> None:
        if len(self.metastack) > _MOST_MARKS:
            raise pickle.UnpicklingError("it is nested too deeply")
        super().load_mark()


class BoundedUnpickler(_BoundedReader):
    """Unpickler of plain values; other opcodes call methods that subclasses define."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]]

    def make(self, call: Any, arguments: Any) -> Any:
        """Return what stands for the result of `call(*arguments)`."""
        raise pickle.UnpicklingError("it makes objects")

    def set_state(self, target: Any, state: Any) -> None:
        """Keep of `state` what is needed in `target`."""
        raise pickle.UnpicklingError("it changes objects")

    def set_item(self, target: Any, key: Any, value: Any) -> None:
        """Keep an entry of `target`, usually a dict."""
        self.charge(_ENTRY)
        target[key] = value

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, _KEYS) and not (isinstance(key, int | float) and not abs(key) < _LARGEST_KEY):
                self.set_item(self.stack[-1], key, value)

    def load_empty_set(self) -> None:
        self.append(None)  # nothing that is needed is in a set

    load_additems = _Python.load_pop_mark

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.append(None)

    def load_reduce(self) -> None:
        arguments, call = self.stack.pop(), self.stack.pop()
        self.append(self.make(call, arguments))

    load_newobj = load_reduce

    def load_build(self) -> None:
        state = self.stack.pop()
        self.set_state(self.stack[-1], state)


def _charged(code: int, load: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return `load` of an opcode, with its charge."""
    charges = {_MEMOS: _MEMO, _OBJECTS: _OBJECT, _TEXTS: _TEXT, _NUMBERS: _NUMBER}
    memory = next((charge for opcodes, charge in charges.items() if bytes([code]) in opcodes), _OTHER)

    def charged(self: BoundedUnpickler) -> None:
        self.charge(memory)
        if len(self.stack) > _MOST_ITEMS:
            raise pickle.UnpicklingError("it has a very long list in one piece")
        load(self)

    return charged


def _find_loads() -> Iterator[tuple[int, Callable[[Any], None]]]:
    """Find the method of each opcode that is read: pickle's, or the one of this name here."""
    for code, load in _Python.dispatch.items():
        if bytes([code]) not in _UNUSED:
            yield code, _charged(code, getattr(BoundedUnpickler, load.__name__))


BoundedUnpickler.dispatch = dict(_find_loads())


class _Pieces:
    """File in pieces of a limited length, whose memory is charged."""

    def __init__(self, file: BinaryIO, longest: int, charge: Callable[[int], None]) -> None:
        self._file, self._longest, self._charge = file, longest, charge

    def read(self, size: int) -> bytes:
        if size > self._longest:
            self._skip(size)
            return b""
        if size > 8:
            self._charge(4 * size if size <= _SHORT else size)  # of text, a byte may become four
        return self._file.read(size)

    def readline(self) -> bytes:
        return self._read_line(_SHORT)

    def read_text(self) -> bytes:
        """Read a line that may be as long as other texts."""
        return self._read_line(self._longest)

    def _read_line(self, longest: int) -> bytes:
        line = self._file.readline(longest)
        if not line.endswith(b"\n"):
            raise pickle.UnpicklingError("it ends within a line, or has a very long one")
        self._charge(4 * len(line) if len(line) <= _SHORT else len(line))
        return line

    def _skip(self, size: int) -> None:
        while size:
            piece = self._file.read(min(size, 1 << 16))
            if not piece:
                raise EOFError("it ends within a text")
            size -= len(piece)
