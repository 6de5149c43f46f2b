"""A tensor as one record of bytes, as README.md in this folder specifies it: packed weights, or plain numbers.

Of packed weights, the mask and the kept values alone are stored: integers of 8 or 4 bits, with a 16-bit scale for the kept
values of a row in each span of columns. Rows lie four at a time, and of these 64 columns at a time, so that one stream of masks
and one of values is read. All is computed for a whole matrix at a time.
"""

import math
import struct
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

MAGIC, VERSION = b"SPKD", 1
HEADER = struct.Struct("<4sIIHH8sII4Q")  # magic, version, checksum, bits, masked, number type, dimensions, span, shape
CHECKED = 12  # where what the checksum is of begins
ROWS, COLUMNS = 4, 64  # that are stored together
ALIGNMENT = 64  # bytes, of a section
DIMENSIONS = 4  # the most of a plain tensor
MOST_BYTES = 2**32 - 1  # of the values of a matrix
SCALES = "BF16"
NUMBERS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
WRITTEN = {kind: name for name, kind in NUMBERS.items()}


@dataclass(frozen=True)
class Packed:
    """A matrix of integers with scales; a weight is integer · scale.

    Attributes:
        integers: int8 [out, in], zero outside the mask.
        kept: bool [out, in], True = stored; None = all.
        scales: bfloat16 [out, ceil(in / span)].
        bits: of an integer, 8 or 4.
        span: columns of which a row has one scale, a multiple of 64.
    """

    integers: Tensor
    kept: Tensor | None
    scales: Tensor
    bits: int
    span: int

    def dense(self) -> Tensor:
        """The weights, float32 [out, in]."""
        wide = self.scales.float().repeat_interleave(self.span, 1)[:, : self.integers.shape[1]]
        return self.integers * wide


@dataclass(frozen=True)
class Sizes:
    """How a matrix [out, in] is divided.

    Attributes:
        out: rows.
        width: columns.
        span: see `Packed`.
        bits: see `Packed`.
    """

    out: int
    width: int
    span: int
    bits: int

    @property
    def groups(self) -> int:
        """Groups of four rows."""
        return -(-self.out // ROWS)

    @property
    def chunks(self) -> int:
        """Chunks of 64 columns."""
        return -(-self.width // COLUMNS)

    @property
    def spans(self) -> int:
        """Scales of a row."""
        return -(-self.width // self.span)

    def sections(self, masked: bool) -> tuple[int, int, int]:
        """Bytes of the offsets, of the scales and of the masks, each with its padding."""
        lengths = (4 * (self.groups + 1), 2 * ROWS * self.groups * self.spans, 8 * ROWS * self.groups * self.chunks * masked)
        first, second, third = (-(-length // ALIGNMENT) * ALIGNMENT for length in lengths)
        return first, second, third

    def whole(self) -> int:
        """Bytes of the values, if all are kept."""
        full, rest = divmod(self.width, COLUMNS)
        return self.out * (full * COLUMNS * self.bits // 8 + -(-rest * self.bits // 8))

    def tiles(self, matrix: Tensor) -> Tensor:
        """[out, in] → [groups, chunks, 4, 64], in the order in which weights are stored; what is beyond the matrix is zero."""
        right, below = self.chunks * COLUMNS - self.width, self.groups * ROWS - self.out
        wide = functional.pad(matrix, (0, right, 0, below))
        return wide.view(self.groups, ROWS, self.chunks, COLUMNS).transpose(1, 2).contiguous()

    def matrix(self, tiles: Tensor) -> Tensor:
        """The inverse of `tiles`."""
        wide = tiles.transpose(1, 2).reshape(self.groups * ROWS, self.chunks * COLUMNS)
        return wide[: self.out, : self.width].contiguous()

    def inside(self) -> Tensor:
        """Which places of the tiles are those of the matrix, bool [groups, chunks, 4, 64]."""
        return self.tiles(torch.ones(self.out, self.width, dtype=torch.bool))


def pack(matrix: Packed) -> Tensor:
    """The record of a matrix, uint8 [bytes].

    Raises:
        ValueError: its values take more than four gigabytes.
    """
    sizes = Sizes(matrix.integers.shape[0], matrix.integers.shape[1], matrix.span, matrix.bits)
    places = sizes.inside() if matrix.kept is None else sizes.tiles(matrix.kept.cpu())
    assert not (matrix.integers.cpu()[~matrix.kept.cpu()].any() if matrix.kept is not None else False)
    values = _to_bytes(sizes.tiles(matrix.integers.cpu()), places, matrix.bits)
    if len(values) > MOST_BYTES:
        raise ValueError(f"a matrix to be packed must have at most {MOST_BYTES} bytes of values, got {len(values)}")
    scales = functional.pad(matrix.scales.cpu(), (0, 0, 0, sizes.groups * ROWS - sizes.out))
    scales = scales.view(sizes.groups, ROWS, sizes.spans).transpose(1, 2).contiguous()
    sections = [_offsets(places, matrix.bits).to(torch.uint32), scales]
    if matrix.kept is not None:
        powers = 2 ** torch.arange(8, dtype=torch.uint8)
        sections.append((places.view(-1, 8) * powers).sum(1, dtype=torch.uint8))
    parts = [_padded(section.view(torch.uint8).flatten()) for section in sections]
    masked = int(matrix.kept is not None)
    shape = (sizes.out, sizes.width, 0, 0)
    return _sealed([*parts, _padded(values, ALIGNMENT)], matrix.bits, masked, SCALES, 2, matrix.span, *shape)


def pack_plain(tensor: Tensor) -> Tensor:
    """The record of a plain tensor of at most four dimensions, uint8 [bytes]."""
    shape = list(tensor.shape) + [0] * (DIMENSIONS - tensor.ndim)
    data = _padded(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8))
    return _sealed([data], 0, 0, WRITTEN[tensor.dtype], tensor.ndim, 0, *shape)


class Header(NamedTuple):
    """The fields of a record's header, see README.md."""

    checksum: int
    bits: int
    masked: int
    numbers: str
    shape: list[int]
    span: int


def header_of(start: Tensor) -> Header:
    """The header of a record.

    Args:
        start: its first bytes, uint8 [at least 64].

    Raises:
        ValueError: it is not a record of this version.
    """
    if start.dtype != torch.uint8 or start.ndim != 1 or len(start) < HEADER.size:
        raise ValueError(f"a record must have at least {HEADER.size} bytes, got {list(start.shape)} of {start.dtype}")
    magic, version, checksum, bits, masked, kind, dimensions, span, *shape = HEADER.unpack(bytes(start[: HEADER.size].numpy()))
    if magic != MAGIC:
        raise ValueError(f"a record must begin with {MAGIC!r}, got {magic!r}")
    if version != VERSION:
        raise ValueError(f"a record must have version {VERSION} of the layout, got {version}")
    if dimensions > DIMENSIONS:
        raise ValueError(f"a record must have at most {DIMENSIONS} dimensions, got {dimensions}")
    return Header(checksum, bits, masked, kind.rstrip(b"\0").decode("ascii", "replace"), shape[:dimensions], span)


def checked(record: Tensor) -> Header:
    """The header of a whole record, uint8 [bytes], whose checksum is right. Raises ValueError."""
    head = header_of(record)
    if (found := zlib.crc32(record[CHECKED:].numpy().data)) != head.checksum:
        raise ValueError(f"a record must have its checksum {head.checksum:08x}, got {found:08x}")
    return head


def unpack(record: Tensor) -> Packed | Tensor:
    """What a record holds; all of it is checked.

    Args:
        record: uint8 [bytes], on the CPU.

    Raises:
        ValueError: it is not a record of this version, or damaged.
    """
    head = checked(record)
    if head.bits == 0:
        return _unpack_plain(record, head)
    spans = head.span and not head.span % COLUMNS
    if head.bits not in (4, 8) or head.masked not in (0, 1) or head.numbers != SCALES or len(head.shape) != 2 or not spans:
        raise ValueError(
            f"a record must have 4 or 8 bits, {SCALES} scales, two dimensions and a span of whole chunks, got {head}"
        )
    if 0 in head.shape:
        raise ValueError(f"a record must have rows and columns, got {head.shape}")
    out, width = head.shape
    return _unpack_matrix(record[HEADER.size :], Sizes(out, width, head.span, head.bits), bool(head.masked))


def _unpack_plain(record: Tensor, head: Header) -> Tensor:
    if head.numbers not in NUMBERS:
        raise ValueError(f"a record must have numbers of a known type, got {head.numbers!r}")
    kind = NUMBERS[head.numbers]
    size = math.prod(head.shape) * kind.itemsize
    if len(record) != HEADER.size + -(-size // ALIGNMENT) * ALIGNMENT:
        raise ValueError(f"a record must have the bytes of its shape {head.shape}, got {len(record)}")
    return record[HEADER.size : HEADER.size + size].clone().view(kind).view(head.shape)


def _unpack_matrix(body: Tensor, sizes: Sizes, masked: bool) -> Packed:
    shape = [sizes.out, sizes.width]
    lengths = sizes.sections(masked)
    if len(body) < sum(lengths) + (0 if masked else sizes.whole()):  # before anything of that size is made
        raise ValueError(f"a record must have the bytes of its shape {shape}, got {len(body)}")
    offsets, scales, masks, values = body.split([*lengths, len(body) - sum(lengths)])
    places = sizes.inside()
    if masked:
        bits = masks[: 8 * ROWS * sizes.groups * sizes.chunks, None] >> torch.arange(8, dtype=torch.uint8) & 1
        stored = bits.bool().view_as(places)
        if (stored & ~places).any():
            raise ValueError(f"a record must keep weights of its shape {shape} alone")
        places = stored
    wanted = _offsets(places, sizes.bits)
    if not torch.equal(offsets[: 4 * len(wanted)].clone().view(torch.uint32).long(), wanted):
        raise ValueError("a record must have the offsets that its masks give")
    end = int(wanted[-1])
    if len(values) != -(-end // ALIGNMENT) * ALIGNMENT + ALIGNMENT:
        raise ValueError(f"a record must have {end} bytes of values and their padding, got {len(values)}")
    steps = scales[: 2 * ROWS * sizes.groups * sizes.spans].clone().view(torch.bfloat16)
    steps = steps.view(sizes.groups, sizes.spans, ROWS).transpose(1, 2).reshape(-1, sizes.spans)[: sizes.out].contiguous()
    if not torch.isfinite(steps).all():
        raise ValueError("a record must have finite scales")
    integers = sizes.matrix(_from_bytes(values[:end], places, sizes.bits))
    return Packed(integers, sizes.matrix(places) if masked else None, steps, sizes.bits, sizes.span)


def _offsets(places: Tensor, bits: int) -> Tensor:
    """Where the values of each group of rows begin, and where the last one's end: int64 [groups + 1], in bytes."""
    used = (places.sum(-1) * bits + 7) // 8  # [groups, chunks, 4]
    return functional.pad(used.sum((1, 2)).cumsum(0), (1, 0))


def _with_filling(places: Tensor) -> Tensor:
    """Places [groups, chunks, 4, 64] of four-bit values, and one more for the filling of an odd number: [.., 65]."""
    return torch.cat([places, (places.sum(-1, keepdim=True) % 2).bool()], -1)


def _to_bytes(tiles: Tensor, places: Tensor, bits: int) -> Tensor:
    """Int8 [groups, chunks, 4, 64] at its places → uint8 [bytes]."""
    if bits == 8:
        return tiles[places].view(torch.uint8)
    halves = functional.pad(tiles, (0, 1))[_with_filling(places)].view(torch.uint8) & 15
    return halves[0::2] | halves[1::2] << 4


def _from_bytes(data: Tensor, places: Tensor, bits: int) -> Tensor:
    """The inverse of `_to_bytes`; zero outside the places."""
    if bits == 8:
        return torch.zeros(places.shape, dtype=torch.int8).masked_scatter_(places, data.view(torch.int8))
    halves = torch.stack([data & 15, data >> 4], -1).flatten()
    filled = _with_filling(places)
    integers = (halves ^ 8).view(torch.int8) - 8  # two's complement
    return torch.zeros(filled.shape, dtype=torch.int8).masked_scatter_(filled, integers)[..., :COLUMNS]


def _padded(data: Tensor, more: int = 0) -> Tensor:
    """Bytes, filled up with zeros to a multiple of 64, and with `more` of them."""
    return functional.pad(data, (0, -len(data) % ALIGNMENT + more))


def _sealed(parts: list[Tensor], *header: int | str) -> Tensor:
    """A record of sections, with its header and checksum."""
    fields = [field.encode("ascii") if isinstance(field, str) else field for field in header]
    record = torch.cat([torch.zeros(HEADER.size, dtype=torch.uint8), *parts])
    head = record[: HEADER.size].numpy()
    head[:] = memoryview(HEADER.pack(MAGIC, VERSION, 0, *fields))
    checksum = zlib.crc32(record[CHECKED:].numpy().data)
    head[:] = memoryview(HEADER.pack(MAGIC, VERSION, checksum, *fields))
    return record
