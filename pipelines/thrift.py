"""Thrift's compact protocol, as far as Parquet's footer and the headers of its pages need it, within limits.

pyarrow believes the sizes in them, and ends the process on some damaged ones that are asked for.
"""

from __future__ import annotations

import io
from typing import Any

_TRUE, _FALSE, _BYTE, _DOUBLE, _TEXT, _STRUCTURE = 1, 2, 3, 7, 8, 12
_INTEGERS, _LISTS = (4, 5, 6), (9, 10)
_MOST_VALUES, _DEEPEST, _LONGEST = 300_000, 16, 64  # a thousand groups of three columns have 75,000; bits


class ThriftReader:
    """Reader of the structures in some bytes. All methods raise `ValueError` if these are damaged."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)
        self._values = 0

    @property
    def place(self) -> int:
        """Bytes that have been read."""
        return self._data.tell()

    def read(self, depth: int = 0) -> dict[int, Any]:
        """Read a structure: its integers, lists and structures by the numbers of their fields, None for others."""
        fields: dict[int, Any] = {}
        number = 0
        while (head := self._byte()) != 0:
            number = number + (head >> 4) if head >> 4 else self._integer()
            kind = head & 15
            fields[number] = None if kind in (_TRUE, _FALSE) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        self._values += 1
        if self._values > _MOST_VALUES or depth > _DEEPEST:
            raise ValueError("it has too many values")
        if kind in _INTEGERS:
            return self._integer()
        if kind in _LISTS:
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._varint()
            return [self._value(head & 15, depth + 1) for _ in range(count)]
        if kind == _STRUCTURE:
            return self.read(depth + 1)
        if kind not in (_TRUE, _FALSE, _BYTE, _DOUBLE, _TEXT):
            raise ValueError(f"it has a value of type {kind}")
        self._data.seek(self._varint() if kind == _TEXT else 8 if kind == _DOUBLE else 1, io.SEEK_CUR)
        return None

    def _byte(self) -> int:
        if not (byte := self._data.read(1)):
            raise ValueError("it ends too early")
        return byte[0]

    def _varint(self) -> int:
        number = 0
        for shift in range(0, _LONGEST, 7):
            byte = self._byte()
            number |= (byte & 127) << shift
            if byte < 128:
                return number
        raise ValueError("it has too long a number")

    def _integer(self) -> int:
        number = self._varint()
        return number >> 1 ^ -(number & 1)
