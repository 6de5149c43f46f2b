"""The packed formats in the quantize stage: what is stored, roundings, killed runs, and models that cannot be packed."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from components.core.checkpoint.files import WEIGHTS_FILE
from components.core.checkpoint.loading import load_model
from components.core.history import read_history
from components.core.mask.integrity import SparsityError, integrity
from components.core.mask.mask import Mask, load_mask, save_mask
from components.core.packed.grid import Grid, grid_of, nearest
from components.core.walk.walk import ReplayError, Walk
from components.prune.conditioning import inverse_factor
from components.quantize import blocks, rounding
from components.quantize.config import PACKED, QuantizeConfig
from components.quantize.rounding import gptq
from components.quantize.stage import run
from tests.conftest import save_pruned, save_tiny
from tests.unit.core.packed import reader
from tests.unit.test_architectures import MIXTURES, save

CPU = torch.device("cpu")
EVALUATION = {"eval_blocks": 4, "eval_seq_len": 32}
CALIBRATION = {"nsamples": 8, "seq_len": 32}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("packed")
    save_pruned(folder, corpus)
    return folder / "pruned"


def settings(pruned, output, corpus, **changes):
    texts = {"calibration_data": str(corpus), "eval_data": str(corpus)}
    paths = {"model_dir": str(pruned), "output_dir": str(output), "mask_file": str(pruned)}
    return QuantizeConfig(**{**paths, **texts, **EVALUATION, **CALIBRATION, **changes})


@pytest.mark.parametrize("format", PACKED)
def test_a_fresh_process_measures_the_same_perplexity(pruned, corpus, tmp_path, format):
    record = run(settings(pruned, tmp_path / "out", corpus, format=format))
    assert record.measured["engine"] == "packed"
    assert record.measured["rounding"] == ("gptq" if format == "packed-int4" else "nearest")
    assert record.sparse_integrity_check["passed"]
    assert record.measured["sparsity"] == pytest.approx(0.7, abs=1e-3)
    assert read_history(tmp_path / "out")["steps"][-1]["parameters"]["format"] == format
    command = [sys.executable, "-m", "components.evaluate", "--model_dir", str(tmp_path / "out"), "--eval_data", str(corpus)]
    command += ["--eval_blocks", "4", "--eval_seq_len", "32"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert f"[PPL] perplexity={record.measured['perplexity']:.4f}" in printed
    with torch.no_grad():
        ids = torch.arange(32)[None]
        wanted = load_model(pruned, torch.float32, CPU)(input_ids=ids).logits
        found = load_model(tmp_path / "out", torch.float32, CPU)(input_ids=ids).logits
    assert 0 < (found - wanted).norm() / wanted.norm() < (0.02 if format == "packed-int8" else 0.4)


@pytest.mark.parametrize("format", PACKED)
def test_the_weights_of_the_mask_are_stored_and_no_others(pruned, corpus, tmp_path, format):
    run(settings(pruned, tmp_path / "out", corpus, format=format, skip_ppl_eval=True))
    records = reader.records(tmp_path / "out" / WEIGHTS_FILE)
    mask = load_mask(pruned)
    for name, kept in mask.tensors.items():
        assert reader.fields(records[name])[:2] == (8 if format == "packed-int8" else 4, 1)
        assert reader.matrix(records[name])[1] == kept.tolist()
    whole = {name for name in records if name not in mask.tensors}
    assert {reader.fields(records[name])[:2] for name in whole if "norm" not in name} == {(8, 0)}  # the embedding
    assert all(reader.fields(records[name])[2] == "BF16" for name in whole)


def test_an_embedding_of_16_bits(pruned, corpus, tmp_path):
    run(settings(pruned, tmp_path / "out", corpus, format="packed-int8", embedding="16bit", skip_ppl_eval=True))
    bits, masked, kind, *_ = reader.fields(reader.records(tmp_path / "out" / WEIGHTS_FILE)["model.embed_tokens.weight"])
    assert (bits, masked, kind) == (0, 0, "F16")  # in which random numbers in float32 lose less than in bfloat16


def test_a_kept_weight_that_is_zero_is_stored(pruned, corpus, tmp_path):
    mask = load_mask(pruned)
    name = "model.layers.0.mlp.up_proj.weight"
    kept = mask.tensors[name].clone()
    row, column = (~kept).nonzero()[0].tolist()
    kept[row, column] = True
    save_mask(Mask(dict(mask.tensors) | {name: kept}), tmp_path / "mask.safetensors")
    changes = {"format": "packed-int8", "mask_file": str(tmp_path / "mask.safetensors"), "skip_ppl_eval": True}
    run(QuantizeConfig(model_dir=str(pruned), output_dir=str(tmp_path / "out"), **changes))
    integers, places, _ = reader.matrix(reader.records(tmp_path / "out" / WEIGHTS_FILE)[name])
    assert places == kept.tolist()
    assert integers[row][column] == 0


@pytest.mark.parametrize("format", PACKED)
def test_a_weight_outside_the_mask_fails_the_stage(pruned, corpus, tmp_path, format):
    mask = load_mask(pruned)
    name = "model.layers.0.mlp.up_proj.weight"
    kept = mask.tensors[name].clone()
    kept[tuple(kept.nonzero()[0])] = False
    save_mask(Mask(dict(mask.tensors) | {name: kept}), tmp_path / "mask.safetensors")
    with pytest.raises(SparsityError, match=r"1 weights are not.*up_proj"):
        run(settings(pruned, tmp_path / "out", corpus, format=format, mask_file=str(tmp_path / "mask.safetensors")))
    assert not (tmp_path / "out").exists()


def test_places_that_are_not_those_of_the_mask_are_a_fault():
    kept = torch.tensor([[True, False, True]])
    weights, mask = {"w": torch.tensor([[1.0, 0.0, 0.0]])}, Mask({"w": kept})
    assert integrity(weights, mask, places={"w": kept})["passed"]
    for stored, fault in (
        ([True, True, True], {"stored_outside": 1, "not_stored": 0}),
        ([True, False, False], {"stored_outside": 0, "not_stored": 1}),
    ):
        check = integrity(weights, mask, places={"w": torch.tensor([stored])})
        assert not check["passed"]
        assert check["tensors"] == {"w": fault}


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(pruned, corpus, tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(settings(pruned, whole, corpus, format="packed-int4", skip_ppl_eval=True))
    real = blocks.write_part

    def killed_at(part):
        def write_part(walk, work, *args):
            if len(work.results) == part:
                raise KeyboardInterrupt
            return real(walk, work, *args)

        return write_part

    for part in (1, 2):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(blocks, "write_part", killed_at(part))
            run(settings(pruned, killed, corpus, format="packed-int4", skip_ppl_eval=True))
    run(settings(pruned, killed, corpus, format="packed-int4", skip_ppl_eval=True))
    assert (killed / WEIGHTS_FILE).read_bytes() == (whole / WEIGHTS_FILE).read_bytes()


def test_gptq_needs_text_that_is_not_that_of_the_evaluation(pruned, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("alpha beta " * 500)
    changes = {"format": "packed-int4", "calibration_data": str(text), "eval_data": str(text)}
    with pytest.raises(ValueError, match="eval_data must be other text than calibration_data"):
        run(QuantizeConfig(model_dir=str(pruned), output_dir=str(tmp_path / "out"), **changes))


@pytest.mark.parametrize("format", PACKED)
def test_experts_cannot_be_packed(tmp_path, format):
    folder = tmp_path / "mixture"
    save(folder, "Mixtral", MIXTURES["Mixtral"])
    with pytest.raises(ValueError, match=f"^format must be int8 for a model with experts, got {format}"):
        run(QuantizeConfig(model_dir=str(folder), output_dir=str(tmp_path / "out"), format=format, skip_ppl_eval=True))


def test_blocks_that_cannot_be_run_one_by_one_are_rounded_to_the_nearest_alone(pruned, corpus, tmp_path, monkeypatch):
    def refuse(self):
        raise ReplayError("its blocks share keys")

    monkeypatch.setattr(Walk, "check", refuse)
    with pytest.raises(ValueError, match="^rounding must be nearest for this model, got gptq: its blocks share keys"):
        run(settings(pruned, tmp_path / "out", corpus, format="packed-int4", skip_ppl_eval=True))
    run(settings(pruned, tmp_path / "out", corpus, format="packed-int4", rounding="nearest", skip_ppl_eval=True))


def literal_gptq(weights, kept, hessian, grid, sweeps):
    """GPTQ with the inverse Hessian of the columns that are left, then coordinate descent, one weight at a time; float64."""
    now, integers = weights.double().clone(), torch.zeros_like(weights, dtype=torch.float64)
    scales = []
    for column in range(weights.shape[1]):
        if column % grid.span == 0:
            part = slice(column, column + grid.span)
            scales.append(nearest((now[:, part] * kept[:, part]).float(), None, grid).scales[:, :1])
        scale = scales[-1][:, 0].double()
        whole = torch.where(scale == 0, 0, now[:, column] / scale).round().clamp(grid.lowest, grid.highest) * kept[:, column]
        integers[:, column] = whole
        inverse = torch.linalg.inv(hessian[column:, column:])
        error = (now[:, column] - whole * scale) / inverse[0, 0]
        now[:, column:] -= error[:, None] * inverse[0]
    chosen = torch.cat(scales, 1).double()
    for _ in range(sweeps):
        for row in range(len(weights)):
            for column in kept[row].nonzero()[:, 0].tolist():
                scale = chosen[row, column // grid.span]
                dense = integers[row] * chosen[row].repeat_interleave(grid.span)[: weights.shape[1]]
                gradient = (dense - weights[row]) @ hessian[:, column]
                best = (dense[column] - gradient / hessian[column, column]) / scale if scale else torch.tensor(0.0)
                integers[row, column] = best.round().clamp(grid.lowest, grid.highest)
    return integers, torch.cat(scales, 1)


@pytest.mark.parametrize("bits", [8, 4])
def test_gptq_is_that_of_a_literal_reference(bits, monkeypatch):
    monkeypatch.setattr(rounding, "SWEEPS", 2)
    generator = torch.Generator().manual_seed(3)
    kept = torch.rand(6, 100, generator=generator) >= 0.6
    weights = torch.randn(6, 100, generator=generator) * kept
    inputs = torch.randn(200, 100, generator=generator) @ torch.randn(100, 100, generator=generator)
    factor = inverse_factor(inputs.T @ inputs / 200, 0.01, "test")
    found = gptq(weights, kept, factor, Grid(bits, 64))
    integers, scales = literal_gptq(weights, kept, factor.damped.double(), Grid(bits, 64), sweeps=2)
    # what lies halfway between two integers may fall the other way, and others follow it
    assert (found.integers == integers).float().mean() > (0.95 if bits == 8 else 0.99)
    assert torch.equal(found.scales, scales)
    assert not found.integers[~kept].any()


@pytest.mark.parametrize("bits", [8, 4])
def test_gptq_changes_the_outputs_less_than_rounding_to_the_nearest(bits):
    generator = torch.Generator().manual_seed(3)
    kept = torch.rand(64, 300, generator=generator) >= 0.7
    weights = torch.randn(64, 300, generator=generator) * kept
    inputs = torch.randn(600, 30, generator=generator) @ torch.randn(30, 300, generator=generator)
    inputs += 0.3 * torch.randn(600, 300, generator=generator)  # activations depend on each other
    grid = grid_of(bits, 300, 0.3)
    found = gptq(weights, kept, inverse_factor(inputs.T @ inputs / 600, 0.01, "test"), grid)
    errors = [((packed.dense() - weights) @ inputs.T).norm() for packed in (found, nearest(weights, kept, grid))]
    assert errors[0] < 0.75 * errors[1]


def test_an_input_that_is_always_zero_keeps_its_weights_near():
    inputs = torch.randn(300, 70)
    inputs[:, 5] = 0
    weights = torch.randn(8, 70)
    found = gptq(weights, None, inverse_factor(inputs.T @ inputs, 0.01, "test"), Grid(8, 128))
    assert (found.dense() - weights)[:, 5].abs().max() < 0.02


def test_without_correlations_gptq_is_rounding_to_the_nearest():
    kept = torch.rand(10, 130) >= 0.5
    weights = torch.randn(10, 130) * kept
    grid = grid_of(4, 130, 0.5)
    found = gptq(weights, kept, inverse_factor(torch.eye(130), 0.01, "test"), grid)
    wanted = nearest(weights, kept, grid)
    assert torch.equal(found.integers, wanted.integers)
    assert torch.equal(found.scales, wanted.scales)


def test_a_model_with_untied_head_and_biases_is_packed(corpus, tmp_path):
    folder = save_tiny(tmp_path / "dense", "qwen3", tied=False, attention_bias=True)
    run(settings_of_dense(folder, tmp_path / "out", corpus))
    found = load_model(tmp_path / "out", torch.float32, CPU).state_dict()
    wanted = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name] - tensor).abs().max() <= 0.005 * tensor.abs().max(), name


def settings_of_dense(folder, output, corpus):
    return QuantizeConfig(
        model_dir=str(folder), output_dir=str(output), format="packed-int8", eval_data=str(corpus), **EVALUATION
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rounding": "up"}, "rounding must be one of auto, nearest, gptq, got 'up'"),
        ({"embedding": "fp8"}, "embedding must be one of int8, 16bit, got 'fp8'"),
        ({"nsamples": 0}, "nsamples must be at least 1, got 0"),
    ],
)
def test_a_wrong_value_is_named_with_its_rule(setting, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        QuantizeConfig(model_dir="model", output_dir="out", format="packed-int4", **setting)


@pytest.mark.parametrize(
    ("format", "rounding", "expected"),
    [
        ("packed-int4", "auto", True),
        ("packed-int4", "nearest", False),
        ("packed-int8", "auto", False),
        ("packed-int8", "gptq", True),
        ("int8", "gptq", False),
    ],
)
def test_which_formats_are_rounded_by_gptq(format, rounding, expected):
    assert QuantizeConfig(model_dir="model", output_dir="out", format=format, rounding=rounding).by_gptq() == expected
