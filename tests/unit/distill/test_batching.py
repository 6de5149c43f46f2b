"""How many training blocks go through the models at a time."""

from types import SimpleNamespace

import pytest
import torch

from components.core.device import DeviceMemory
from components.distill import batching
from components.distill.batching import BatchSize
from components.distill.config import DistillConfig

PLACES = {"teacher_model": "t", "student_model": "s", "mask_file": "m", "output_dir": "o"}


def sizes(monkeypatch, capsys, usable, steps=6, others=False, **settings):
    """Sizes of the steps on a device where weights take 100 bytes, a block 50 more, and what was logged."""
    batch: BatchSize | None = None
    memory = lambda _: DeviceMemory(used=100, peak=100 + 50 * batch.size if batch else 100, usable=usable)  # noqa: E731
    monkeypatch.setattr(batching, "device_memory", memory)
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", lambda _: None)
    backend = SimpleNamespace(device=torch.device("cuda"), any=lambda flag: flag or others)
    batch = BatchSize(DistillConfig(**PLACES, **settings), backend)
    found = []
    for _ in range(steps):
        found.append(batch.size)
        with batch.measured():
            pass
    return found, capsys.readouterr().out


@pytest.mark.parametrize(
    ("usable", "expected"),
    [(10_000, [1, 2, 4, 8, 8, 8]), (500, [1, 2, 4, 4, 4, 4]), (200, [1] * 6)],
)
def test_grows_as_long_as_it_fits(monkeypatch, capsys, usable, expected):
    found, said = sizes(monkeypatch, capsys, usable)
    assert found == expected
    assert said.count("\n") == 1
    assert f"training blocks per forward pass: {expected[-1]} of a step's 8" in said
    assert ("since" in said) == (expected[-1] < 8)


def test_grows_only_if_all_processes_have_room(monkeypatch, capsys):
    assert sizes(monkeypatch, capsys, 10_000, others=True)[0] == [1] * 6


def test_only_sizes_that_divide_a_step_are_used(monkeypatch, capsys):
    """Forward passes of different sizes would weigh their tokens differently."""
    assert sizes(monkeypatch, capsys, 10_000, grad_accum_steps=12)[0] == [1, 2, 4, 4, 4, 4]
    assert sizes(monkeypatch, capsys, 10_000, grad_accum_steps=3)[0] == [1] * 6


def test_a_size_that_is_set_stays(monkeypatch, capsys):
    found, said = sizes(monkeypatch, capsys, 10_000, batch_size=3)
    assert (found, said) == ([3] * 6, "")


def test_on_a_cpu_one_block_at_a_time():
    backend = SimpleNamespace(device=torch.device("cpu"))
    assert BatchSize(DistillConfig(**PLACES), backend, size=8).size == 1


def test_goes_on_with_the_size_of_before(monkeypatch):
    monkeypatch.setattr(batching, "device_memory", lambda _: DeviceMemory(1, 1, 1))
    backend = SimpleNamespace(device=torch.device("cuda"))
    assert BatchSize(DistillConfig(**PLACES), backend, size=8).size == 8
    assert BatchSize(DistillConfig(**PLACES, grad_accum_steps=4), backend, size=8).size == 4
