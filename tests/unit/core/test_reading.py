"""Reading small files: limits, and shapes of JSON."""

import math
import os
from typing import Any

import pytest
from typing_extensions import TypedDict

from components.core.reading import parse_json, read_json, read_limited


class Point(TypedDict):
    x: float
    names: list[str]


def test_json_of_its_shape_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"x": 1, "names": ["ü", "b"]}')
    assert read_json(tmp_path / "a.json", Point) == {"x": 1, "names": ["ü", "b"]}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"x": NaN}', b'{"x": "\\ud800"}', b"9" * 5000])
def test_what_is_not_json_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json must be JSON"):
        read_json(tmp_path / "a.json", Point)


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ("[]", "it: Input should be an object"),
        ('{"x": "1", "names": []}', "x: Input should be a valid number, got '1'"),
        ('{"x": 1, "names": [1]}', "names.0: Input should be a valid string, got 1"),
        ('{"x": 1}', "names: Field required"),
    ],
)
def test_json_of_another_shape_is_refused_by_place(content, where):
    with pytest.raises(ValueError, match=rf"the file must be JSON of its form, {where}"):
        parse_json(content, "the file", Point)


@pytest.mark.parametrize("text", ["\udcff\udcfe", '{"x": "\udcff"}', "\ud800"])
def test_an_argument_that_is_not_utf_8_is_refused(text):
    with pytest.raises(ValueError, match="^inputs must be JSON: "):
        parse_json(text, "inputs", dict[str, str])


def test_numbers_that_json_reads_as_infinite_are_refused():
    assert math.isinf(float("1e999"))
    with pytest.raises(ValueError, match="numbers must be finite, got inf"):
        parse_json('{"a": [{"b": 1e999}]}', "the file", dict[str, Any])


def test_a_message_does_not_repeat_a_long_value():
    with pytest.raises(ValueError, match="must be JSON of its form") as refused:
        parse_json('{"x": "' + "9" * 100_000 + '", "names": []}', "the file", Point)
    assert len(str(refused.value)) < 300


def test_only_ordinary_files_of_limited_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for endless in ("/dev/zero", tmp_path / "pipe"):
        with pytest.raises(ValueError, match="must be an ordinary file"):
            read_limited(endless)
    (tmp_path / "large").write_bytes(b"12345")
    assert read_limited(tmp_path / "large", 5) == b"12345"
    with pytest.raises(ValueError, match="must have at most 4 bytes, it has 5"):
        read_limited(tmp_path / "large", 4)
