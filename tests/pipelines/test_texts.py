"""Texts from outside: limits of size, memory and depth."""

import json
import os

import pytest

from pipelines.texts import LONGEST_TEXT, parse_json, read_text
from tests.limits import limits

HONEST = {
    "unicode": {"classes": ["猫", "\U0001f600", "a\\b"], "x": [1.5, None, True, -(2**70)]},
    "22,000 classes": {"classes": [f"n{number:08} some animal" for number in range(22_000)]},
    "7,000 tensors": {
        f"layer3.{n}.bn1.w": {"dtype": "F32", "shape": [1, 2], "data_offsets": [n, n]} for n in range(7000)
    },
    "deep": json.loads(90 * "[" + 90 * "]"),
}


@pytest.mark.parametrize("contents", HONEST.values(), ids=HONEST)
def test_honest_json_is_parsed(contents):
    for ascii_only in (True, False):
        data = json.dumps(contents, ensure_ascii=ascii_only).encode()
        with limits(len(data)):
            assert parse_json(data) == contents


HOSTILE = {
    "lists": b"[" + 2_000_000 * b"[]," + b"1]",
    "mappings": b"[" + 1_000_000 * b"{}," + b"1]",
    "nested mappings": b"[" + 50_000 * (15 * b'{"":' + b"1" + 15 * b"}" + b",") + b"1]",
    "numbers": b"[" + 3_000_000 * b"1," + b"1]",
    "open lists": 4_000_000 * b"[",
    "nested lists": 900 * b"[" + 900 * b"]",
    "wide text": b'"' + 5_000_000 * b"a" + '\U0001f600"'.encode(),
    "text that is written longer": b'"' + 8_000_000 * b"\x7f" + b'"',
    "many digits": 1_000_000 * b"9",
    "no text": b'"\xff"',
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_json_is_refused(data):
    with limits(len(data)), pytest.raises(ValueError, match=r"nested|memory|digits|decode"):
        parse_json(data)


def test_a_large_file_is_not_read(tmp_path):
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(1 << 40)
    with limits(LONGEST_TEXT), pytest.raises(ValueError, match="more than 8,388,608 bytes"):
        read_text(tmp_path / "large.json")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_a_device_is_refused_at_once(tmp_path, kind):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "meta.json").symlink_to(tmp_path / "pipe" if kind == "pipe" else "/dev/zero")
    with limits(0, seconds=2), pytest.raises(ValueError, match="is a pipe or a device"):
        read_text(tmp_path / "meta.json")
