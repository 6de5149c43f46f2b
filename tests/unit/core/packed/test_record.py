"""Packing loses nothing, takes the space that it should, and is what the specification says; damaged records are refused."""

import random
import struct
import zlib

import pytest
import torch

from components.core.packed.grid import grid_of, nearest, scales_of
from components.core.packed.record import HEADER, MAGIC, NUMBERS, VERSION, Packed, Sizes, pack, pack_plain, unpack
from tests.unit.core.packed import reader

SHAPES = [(1, 1), (1, 63), (3, 64), (4, 65), (5, 100), (7, 8), (8, 31), (9, 128), (13, 200), (4, 576), (2, 1000)]
SPARSITIES = [0.0, 0.3, 0.5, 0.7, 0.95]


def random_matrix(shape, sparsity, bits, span, seed=0) -> Packed:
    """Integers from the whole range, some of the kept ones zero; the first row is empty, the last one kept whole."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(shape, generator=generator) >= sparsity
    if shape[0] > 2 and sparsity:
        kept[0], kept[-1] = False, True
    low, high = (-127, 128) if bits == 8 else (-8, 8)
    integers = torch.randint(low, high, shape, generator=generator, dtype=torch.int8)
    integers[torch.rand(shape, generator=generator) < 0.1] = 0
    scales = torch.randn(shape[0], -(-shape[1] // span), generator=generator).bfloat16()
    return Packed(integers * kept, kept if sparsity else None, scales, bits, span)


def assert_equal(found: Packed, wanted: Packed) -> None:
    assert torch.equal(found.integers, wanted.integers)
    assert torch.equal(found.scales, wanted.scales)
    assert (found.bits, found.span) == (wanted.bits, wanted.span)
    assert (found.kept is None) == (wanted.kept is None)
    assert wanted.kept is None or torch.equal(found.kept, wanted.kept)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpacking_gives_what_was_packed(shape, bits, sparsity):
    for span in (64, 128, 1024):
        wanted = random_matrix(shape, sparsity, bits, span, seed=span)
        record = pack(wanted)
        assert len(record) % 64 == 0
        assert_equal(unpack(record), wanted)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(1, 1), (5, 100), (8, 64), (6, 193)], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.7])
def test_a_reader_written_from_the_specification_reads_it(shape, bits, sparsity):
    wanted = random_matrix(shape, sparsity, bits, 64)
    integers, kept, weights = reader.matrix(bytes(pack(wanted).numpy()))
    assert integers == wanted.integers.tolist()
    assert kept == (torch.ones(shape, dtype=torch.bool) if wanted.kept is None else wanted.kept).tolist()
    assert torch.equal(torch.tensor(weights), wanted.dense())


@pytest.mark.parametrize("kind", NUMBERS.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 1, 3, 7), (0, 4)], ids=str)
def test_plain_tensors_are_kept_to_the_bit(shape, kind):
    tensor = (torch.randn(shape) * 50).to(kind)
    record = pack_plain(tensor)
    found = unpack(record)
    assert found.dtype == kind
    assert torch.equal(found, tensor)
    assert reader.fields(bytes(record.numpy()))[-1] == list(shape)
    assert reader.plain(bytes(record.numpy())) == tensor.flatten().tolist()


@pytest.mark.parametrize(("bits", "most"), [(8, 3.45), (4, 2.45)])
@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (1536, 576), (576, 1536), (1024, 3072)], ids=str)
def test_a_pruned_weight_takes_few_bits(shape, bits, most):
    """The narrowest matrix of SmolLM2-135M may take a little more: its average over all may not."""
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(0)) >= 0.7
    packed = nearest(torch.randn(shape) * kept, kept, grid_of(bits, shape[1], 0.3))
    assert 8 * len(pack(packed)) / kept.numel() < most + (0.02 if shape == (192, 576) else 0)


def test_a_whole_matrix_has_no_mask():
    packed = nearest(torch.randn(64, 640), None, grid_of(8, 640, 1.0))
    assert len(pack(packed)) == HEADER.size + 128 + 128 + 64 * 640 + 64
    assert unpack(pack(packed)).kept is None


@pytest.mark.parametrize("bits", [8, 4])
def test_any_changed_byte_is_noticed(bits):
    record = pack(random_matrix((5, 100), 0.7, bits, 64))
    for place in range(len(record)):
        changed = record.clone()
        changed[place] ^= 1 << place % 8
        with pytest.raises(ValueError, match="^a record must "):
            unpack(changed)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_truncated_record_is_refused(bits):
    record = pack(random_matrix((5, 100), 0.7, bits, 64))
    for length in (0, 1, 63, 64, 65, len(record) // 2, len(record) - 1):
        with pytest.raises(ValueError, match="^a record must "):
            unpack(record[:length])


def resealed(record: torch.Tensor) -> torch.Tensor:
    """A record with the checksum that it would have if someone meant it."""
    content = bytearray(record.numpy())
    struct.pack_into("<I", content, 8, zlib.crc32(content[12:]))
    return torch.frombuffer(content, dtype=torch.uint8)


def changed(record: torch.Tensor, form: str, place: int, *values) -> torch.Tensor:
    content = bytearray(record.numpy())
    struct.pack_into(form, content, place, *values)
    return resealed(torch.frombuffer(content, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("form", "place", "value", "message"),
    [
        ("<4s", 0, b"ZIP4", "begin with b'SPKD', got b'ZIP4'"),
        ("<I", 4, 2, "version 1 of the layout, got 2"),
        ("<H", 12, 3, "4 or 8 bits"),
        ("<H", 14, 2, "4 or 8 bits"),
        ("<8s", 16, b"F32", "4 or 8 bits"),
        ("<I", 24, 5, "at most 4 dimensions, got 5"),
        ("<I", 24, 3, "two dimensions"),
        ("<I", 28, 0, "span of whole chunks"),
        ("<I", 28, 65, "span of whole chunks"),
        ("<Q", 32, 0, "rows and columns"),
        ("<Q", 32, 2**63, "bytes of its shape"),
        ("<Q", 40, 2**64 - 1, "bytes of its shape"),
        ("<Q", 40, 99, "keep weights of its shape"),
        ("<I", 64, 1, "offsets that its masks give"),
        ("<H", 128, 0x7FC0, "finite scales"),
        ("<Q", 200, 2**64 - 1, "offsets that its masks give"),
    ],
)
def test_fields_that_do_not_fit_are_refused_before_memory_is_taken(form, place, value, message):
    kept = torch.ones(5, 100, dtype=torch.bool)
    kept[1, 1] = False
    record = pack(Packed(torch.ones(5, 100, dtype=torch.int8) * kept, kept, torch.ones(5, 2).bfloat16(), 8, 64))
    assert_equal(unpack(resealed(record)), unpack(record))
    with pytest.raises(ValueError, match=f"^a record must (have )?.*{message}"):
        unpack(changed(record, form, place, value))


def test_sizes_of_another_shape_are_refused_without_a_mask():
    record = pack(random_matrix((5, 100), 0.0, 8, 64))
    for place in (32, 40):
        for size in (1, 2**20, 2**40, 2**64 - 1):
            with pytest.raises(ValueError, match="^a record must have "):
                unpack(changed(record, "<Q", place, size))


def ending(record: torch.Tensor) -> str:
    """The fault that is found, or nothing; other errors pass."""
    try:
        unpack(record)
    except ValueError as error:
        return str(error)
    return ""


def test_random_damage_with_a_right_checksum_never_crashes():
    generator = random.Random(0)
    for bits in (8, 4, 0):
        record = pack(random_matrix((5, 100), 0.7, bits, 64)) if bits else pack_plain(torch.randn(5, 7))
        for _ in range(1000):
            content = bytearray(record.numpy())
            for _ in range(generator.randint(1, 4)):
                content[generator.choice((generator.randrange(12, 64), generator.randrange(len(content))))] = (
                    generator.randrange(256)
                )
            outcome = ending(resealed(torch.frombuffer(content, dtype=torch.uint8)))
            assert outcome == "" or outcome.startswith("a record must ")


def test_the_header_is_that_of_the_specification():
    header = bytes(pack(random_matrix((5, 100), 0.7, 4, 128))[: HEADER.size].numpy())
    assert header[:8] == MAGIC + struct.pack("<I", VERSION)
    assert header[12:] == struct.pack("<HH8sII4Q", 4, 1, b"BF16", 2, 128, 5, 100, 0, 0)


def test_tiles_are_four_rows_of_64_columns():
    sizes = Sizes(5, 100, 128, 8)
    matrix = torch.arange(500).view(5, 100)
    tiles = sizes.tiles(matrix)
    assert tiles.shape == (2, 2, 4, 64)
    assert torch.equal(tiles[0, 1, 2, :36], matrix[2, 64:])
    assert not tiles[0, 1, :, 36:].any()
    assert torch.equal(sizes.matrix(tiles), matrix)


def literal_scale(values: list[float], bits: int) -> float:
    """The scale of some kept values, one candidate after another."""
    largest = max(values, key=abs)
    if bits == 8:
        exact = abs(largest) / 127
        scale = torch.tensor(exact).bfloat16()
        while float(scale) < exact:
            scale = torch.nextafter(scale, torch.tensor(torch.inf).bfloat16())
        return float(scale)
    best = (float("inf"), 0.0)
    for step in range(18, 38):
        scale = float(torch.tensor(-largest / 8 * step / 32).bfloat16())
        error = sum((value - scale * max(-8, min(7, round(value / scale)))) ** 2 for value in values)
        best = min(best, (error, scale), key=lambda entry: entry[0])
    return best[1]


@pytest.mark.parametrize("bits", [8, 4])
def test_scales_are_those_of_a_literal_search(bits):
    weights = torch.randn(20, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    weights[torch.rand(20, 64, generator=torch.Generator().manual_seed(2)) < 0.7] = 0
    found = scales_of(weights, grid_of(bits, 64, 0.3))
    wanted = [literal_scale([value for value in row if value], bits) for row in weights.double().tolist()]
    assert found.tolist() == wanted


def test_nothing_but_zeros_has_scale_zero():
    for bits in (8, 4):
        packed = nearest(torch.zeros(3, 100), torch.zeros(3, 100, dtype=torch.bool), grid_of(bits, 100, 0.3))
        assert not packed.scales.any()
        assert torch.isfinite(packed.dense()).all()
        assert_equal(unpack(pack(packed)), packed)


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_is_within_half_a_step_and_what_is_on_the_grid_stays(bits):
    kept = torch.rand(40, 300) >= 0.5
    weights = torch.randn(40, 300) * kept
    packed = nearest(weights, kept, grid_of(bits, 300, 0.5))
    if bits == 8:
        steps = packed.scales.float().repeat_interleave(packed.span, 1)[:, :300]
        assert ((packed.dense() - weights).abs() <= 0.5001 * steps).all()
        assert not torch.equal(packed.dense(), weights)
    assert not packed.integers[~kept].any()
    assert (packed.dense() - weights).norm() / weights.norm() < (0.01 if bits == 8 else 0.12)
