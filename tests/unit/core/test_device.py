"""Which number format is picked, and that narrowing is told."""

import pytest
import torch
from safetensors.torch import save_file

from components.core import device
from components.core.device import cpu_quota, factors_in, pick_device, pick_dtype
from components.core.settings import ANY_GPUS

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_auto_is_the_widest_format_that_is_fast_on_the_device(checkpoint, monkeypatch, has_bfloat16):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bfloat16)
    assert pick_dtype("auto", CPU, checkpoint) is torch.float32
    assert pick_dtype("auto", GPU, checkpoint) is (torch.bfloat16 if has_bfloat16 else torch.float16)


@pytest.mark.parametrize(
    ("stored", "dtype", "told"),
    [
        (torch.bfloat16, "bfloat16", ""),
        (torch.bfloat16, "float32", ""),
        (torch.float16, "float32", ""),
        (torch.bfloat16, "float16", "dtype float16: weights that are stored as BF16 are rounded to float16\n"),
        (torch.float16, "bfloat16", "dtype bfloat16: weights that are stored as F16 are rounded to bfloat16\n"),
        (torch.float32, "bfloat16", "dtype bfloat16: weights that are stored as F32 are rounded to bfloat16\n"),
        (torch.int8, "float16", ""),
    ],
)
def test_rounding_what_is_stored_is_told(tmp_path, capsys, stored, dtype, told):
    save_file({"weight": torch.ones(2, dtype=stored)}, tmp_path / "model.safetensors")
    assert pick_dtype(dtype, CPU, tmp_path) is getattr(torch, dtype)
    assert capsys.readouterr().out == told


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (["200000 100000\n"], 2),
        (["150000 100000"], 2),
        (["max 100000"], None),
        (["-1", "100000"], None),
        (["50000", "100000"], 1),
    ],
)
def test_the_quota_of_a_container_is_read(tmp_path, monkeypatch, content, expected):
    files = [tmp_path / str(number) for number in range(len(content))]
    for file, text in zip(files, content, strict=True):
        file.write_text(text)
    monkeypatch.setattr(device, "QUOTA_FILES", ((tmp_path / "missing",), tuple(files)))
    assert cpu_quota() == expected


def test_threads_are_as_many_as_the_container_may_use(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        for allowed, expected in ((None, before), (before + 1, before), (1, 1)):
            monkeypatch.setattr(device, "cpu_quota", lambda allowed=allowed: allowed)
            pick_device(ANY_GPUS)
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("wanted", "visible", "expected"),
    [(ANY_GPUS, 0, "cpu"), (ANY_GPUS, 2, "cuda"), (0, 0, "cpu"), (0, 2, "cpu"), (1, 2, "cuda"), (2, 2, "cuda")],
)
def test_gpus_are_used_as_asked(monkeypatch, wanted, visible, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert pick_device(wanted).type == expected


@pytest.mark.parametrize(("wanted", "visible"), [(1, 0), (3, 2)])
def test_a_missing_gpu_is_an_error(monkeypatch, wanted, visible):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    with pytest.raises(ValueError, match=f"^gpus must be at most the {visible} GPUs that can be used here, got {wanted}$"):
        pick_device(wanted)


@pytest.mark.parametrize("rounded", [torch.bfloat16, None])
def test_factors_may_be_rounded_and_sums_are_not(rounded):
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    exact = x.double().T @ x.double()
    rough = x.bfloat16().double().T @ x.bfloat16().double()

    def error(wanted):
        return float((x.T @ x - wanted).abs().max())

    with factors_in(rounded):
        found = min(error(exact), error(rough if rounded else exact))  # a CPU without bfloat16 rounds nothing
        in_sixteen_bits = float((rough.bfloat16() - rough).abs().max())
        assert found < 0.01 < in_sixteen_bits
    assert error(exact) < 0.01
