"""A reader of packed files in plain Python, written from components/core/packed/README.md alone, slow and literal."""

import json
import struct
import zlib
from pathlib import Path

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
LETTERS = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "I16": "h", "I8": "b", "U8": "B", "BOOL": "?"}


def records(file: Path) -> dict[str, bytes]:
    """The records of a safetensors file, by name."""
    content = file.read_bytes()
    (length,) = struct.unpack_from("<Q", content, 0)
    header = json.loads(content[8 : 8 + length])
    found = {}
    assert (8 + length) % 64 == 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        assert entry["dtype"] == "U8"
        start, end = entry["data_offsets"]
        assert entry["shape"] == [end - start]
        assert start % 64 == 0
        found[name] = content[8 + length + start : 8 + length + end]
    return found


def bfloat16(content: bytes, place: int) -> float:
    return struct.unpack("<f", b"\0\0" + content[place : place + 2])[0]


def fields(record: bytes) -> tuple:
    """(bits, whether there is a mask, type, span, shape), after checking the rest."""
    assert len(record) % 64 == 0
    assert record[:4] == b"SPKD"
    version, checksum = struct.unpack_from("<II", record, 4)
    assert version == 1
    assert checksum == zlib.crc32(record[12:])
    bits, masked = struct.unpack_from("<HH", record, 12)
    kind = record[16:24].rstrip(b"\0").decode("ascii")
    dimensions, span = struct.unpack_from("<II", record, 24)
    shape = struct.unpack_from("<4Q", record, 32)
    assert shape[dimensions:] == (0,) * (4 - dimensions)
    return bits, masked, kind, span, list(shape[:dimensions])


def plain(record: bytes) -> list:
    """The numbers of a plain tensor, in row-major order."""
    _, _, kind, _, shape = fields(record)
    count = 1
    for size in shape:
        count *= size
    if kind == "BF16":
        return [bfloat16(record, 64 + 2 * place) for place in range(count)]
    return list(struct.unpack_from(f"<{count}{LETTERS[kind]}", record, 64))


def matrix(record: bytes) -> tuple[list[list[int]], list[list[bool]], list[list[float]]]:
    """The integers, which are kept, and the weights of a matrix, as rows."""
    bits, masked, kind, span, (rows, columns) = fields(record)
    assert kind == "BF16"
    assert span % 64 == 0
    groups, chunks, spans = -(-rows // 4), -(-columns // 64), -(-columns // span)
    place = 64
    offsets = struct.unpack_from(f"<{groups + 1}I", record, place)
    place += -(-4 * (groups + 1) // 64) * 64
    scales = [bfloat16(record, place + 2 * number) for number in range(groups * spans * 4)]
    place += -(-2 * groups * spans * 4 // 64) * 64
    masks = []
    if masked:
        masks = struct.unpack_from(f"<{groups * chunks * 4}Q", record, place)
        place += -(-8 * groups * chunks * 4 // 64) * 64
    integers = [[0] * columns for _ in range(rows)]
    kept = [[False] * columns for _ in range(rows)]
    weights = [[0.0] * columns for _ in range(rows)]
    values = record[place:]
    at = 0
    for group in range(groups):
        assert offsets[group] == at
        for chunk in range(chunks):
            for inner in range(4):
                row = 4 * group + inner
                places = []
                for k in range(64):
                    column = 64 * chunk + k
                    there = row < rows and column < columns
                    if masked:
                        bit = masks[(group * chunks + chunk) * 4 + inner] >> k & 1
                        assert there or not bit
                        there = bool(bit)
                    if there:
                        places.append(column)
                segment = values[at : at + -(-len(places) * bits // 8)]
                at += len(segment)
                for number, column in enumerate(places):
                    value = segment[number] if bits == 8 else segment[number // 2] >> 4 * (number % 2) & 15
                    value -= (1 << bits) * (value >= 1 << bits - 1)
                    integers[row][column] = value
                    kept[row][column] = True
                    weights[row][column] = value * scales[(group * spans + column // span) * 4 + inner]
                if bits == 4 and len(places) % 2:
                    assert segment[-1] >> 4 == 0
    assert offsets[groups] == at
    assert len(values) == -(-at // 64) * 64 + 64
    assert not any(values[at:])
    return integers, kept, weights
