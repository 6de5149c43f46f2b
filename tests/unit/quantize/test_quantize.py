"""Quantized checkpoints: reload in a fresh process, zeros, both engines."""

import json
import re
import subprocess
import sys

import pytest
import torch
from optimum.quanto import QuantizedModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from components.core.checkpoint.files import INDEX_FILE, WEIGHTS_FILE
from components.core.checkpoint.loading import load_model
from components.core.history import read_history
from components.core.mask.integrity import SparsityError
from components.core.mask.mask import Mask, save_mask
from components.quantize import stage
from components.quantize.config import QuantizeConfig
from components.quantize.stage import run
from tests.conftest import save_tiny

CPU = torch.device("cpu")
COMMON = {"eval_blocks": 4, "eval_seq_len": 32}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def sparse(request, tmp_path_factory):
    """A tiny checkpoint with half of its weights zero, including a whole row."""
    folder = save_tiny(tmp_path_factory.mktemp("quantize") / "sparse", "qwen3", request.param)
    model = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "layers" in name:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) < 0.5)
                parameter[3] = 0
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def no_quanto(monkeypatch):
    """A machine without optimum-quanto."""
    real = stage.importlib.util.find_spec
    monkeypatch.setattr(stage.importlib.util, "find_spec", lambda name: None if name.startswith("optimum") else real(name))


def check(folder, dense, record, corpus):
    """Check that the reloaded model is close to the dense one, and that a fresh process measures the same perplexity."""
    ids = torch.arange(32)[None]
    with torch.no_grad():
        wanted = load_model(dense, torch.float32, CPU)(input_ids=ids).logits
        found = load_model(folder, torch.float32, CPU)(input_ids=ids).logits
    assert torch.isfinite(found).all()
    assert (found - wanted).norm() / wanted.norm() < 0.1
    assert not torch.equal(found, wanted)
    command = [sys.executable, "-m", "components.evaluate", "--model_dir", str(folder), "--eval_data", str(corpus)]
    command += ["--eval_blocks", "4", "--eval_seq_len", "32"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert f"[PPL] perplexity={record.measured['perplexity']:.4f}" in printed


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_reloads_equal_in_a_fresh_process(sparse, corpus, tmp_path, capsys, format):
    record = run(
        QuantizeConfig(model_dir=str(sparse), output_dir=str(tmp_path / "out"), format=format, eval_data=str(corpus), **COMMON)
    )
    assert f"[PPL] after_quantization={record.measured['perplexity']:.4f}" in capsys.readouterr().out
    assert record.measured["engine"] == "optimum-quanto"
    assert record.sparse_integrity_check["passed"]
    assert read_history(tmp_path / "out")["steps"][-1]["parameters"]["format"] == format
    check(tmp_path / "out", sparse, record, corpus)


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_loaded_here_it_is_the_model_that_quanto_loads(sparse, tmp_path, format):
    run(QuantizeConfig(model_dir=str(sparse), output_dir=str(tmp_path / "out"), format=format, skip_ppl_eval=True))
    model, ids = load_model(tmp_path / "out", torch.float32, CPU), torch.arange(32)[None]
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    with torch.no_grad():
        wanted = QuantizedModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-3, atol=1e-3)


def test_int8_works_without_quanto(sparse, corpus, tmp_path, no_quanto):
    config = QuantizeConfig(model_dir=str(sparse), output_dir=str(tmp_path / "out"), eval_data=str(corpus), **COMMON)
    record = run(config)
    assert record.measured["engine"] == "compressed-tensors"
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors"
    assert "sparsity_config" not in quantization
    check(tmp_path / "out", sparse, record, corpus)


def test_fp8_without_quanto_says_so(sparse, tmp_path, no_quanto):
    with pytest.raises(ValueError, match="format must be int8.*optimum-quanto"):
        run(QuantizeConfig(model_dir=str(sparse), output_dir=str(tmp_path / "out"), format="fp8", skip_ppl_eval=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_a_weight_outside_the_mask_fails_the_stage(sparse, tmp_path, format):
    weight = AutoModelForCausalLM.from_pretrained(sparse).model.layers[0].mlp.up_proj.weight
    kept = weight != 0
    kept[tuple((weight.abs() == weight.abs().max()).nonzero()[0])] = False  # the mask excludes the largest weight
    save_mask(Mask({"model.layers.0.mlp.up_proj.weight": kept}), tmp_path / "mask.safetensors")
    with pytest.raises(SparsityError, match=r"1 weights are not.*up_proj"):
        run(
            QuantizeConfig(
                model_dir=str(sparse),
                output_dir=str(tmp_path / "out"),
                format=format,
                mask_file=str(tmp_path / "mask.safetensors"),
                skip_ppl_eval=True,
            )
        )
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_is_not_quantized_again(sparse, tmp_path):
    run(QuantizeConfig(model_dir=str(sparse), output_dir=str(tmp_path / "out"), skip_ppl_eval=True))
    with pytest.raises(ValueError, match="must not be quantized"):
        run(QuantizeConfig(model_dir=str(tmp_path / "out"), output_dir=str(tmp_path / "twice"), skip_ppl_eval=True))


@pytest.mark.parametrize("engine", ["optimum-quanto", "compressed-tensors"])
@pytest.mark.parametrize(
    ("change", "message"),
    [("removed", "must hold every weight of its model, "), ("added", "must hold only weights of its model, stranger is not")],
)
def test_a_quantized_checkpoint_with_other_weights_is_refused_by_name(
    request, sparse, corpus, tmp_path, engine, change, message
):
    """optimum-quanto itself would leave what is missing as raw memory."""
    if engine == "compressed-tensors":
        request.getfixturevalue("no_quanto")
    record = run(QuantizeConfig(model_dir=str(sparse), output_dir=str(tmp_path / "int8"), skip_ppl_eval=True))
    assert record.measured["engine"] == engine
    folder = tmp_path / "int8"
    assert load_model(folder, torch.float32, CPU)
    weights = load_file(folder / WEIGHTS_FILE)
    name = next(name for name in weights if re.search(r"up_proj\.weight(\._data|_packed)?$", name))
    if change == "removed":
        del weights[name]
        message += name.removesuffix("._data").removesuffix("_packed")
    else:
        weights["stranger"] = torch.zeros(2)
    save_file(weights, folder / WEIGHTS_FILE, {"format": "pt"})
    index = json.loads((folder / INDEX_FILE).read_text())
    (folder / INDEX_FILE).write_text(json.dumps(index | {"weight_map": dict.fromkeys(weights, WEIGHTS_FILE)}))
    with pytest.raises(ValueError, match=message):
        load_model(folder, torch.float32, CPU)
