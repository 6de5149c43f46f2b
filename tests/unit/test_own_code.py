"""Models that bring their own code: they go through all stages, and only their own code is run."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from components.core.mask.mask import load_mask
from components.evaluate.config import EvaluateConfig
from components.evaluate.stage import run as evaluate
from components.prune.config import PruneConfig
from components.prune.stage import run as prune
from components.quantize.config import QuantizeConfig
from components.quantize.stage import run as quantize
from tests.conftest import save_tiny

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
AUTO_MAP = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}


@pytest.fixture
def own(tmp_path) -> Path:
    """A checkpoint with code of its own."""
    folder = save_tiny(tmp_path / "own")
    (folder / "own.py").write_text(CODE)
    change(folder / "config.json", model_type="own", architectures=["OwnModel"], auto_map=AUTO_MAP)
    return folder


def change(file: Path, **entries) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def common(corpus) -> dict:
    return {"eval_data": str(corpus), "eval_blocks": 4, "eval_seq_len": 32, "trust_remote_code": True}


def test_a_model_with_code_of_its_own_is_pruned_quantized_and_loads_again(own, corpus, tmp_path):
    pruned, quantized = tmp_path / "pruned", tmp_path / "int8"
    text = {"calibration_data": str(corpus), "nsamples": 4, "seq_len": 32}
    record = prune(PruneConfig(dense_model=str(own), output_dir=str(pruned), **text, **common(corpus)))
    assert (pruned / "own.py").is_file()
    model = AutoModelForCausalLM.from_pretrained(pruned, trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    weights = dict(model.named_parameters())
    assert all((weights[name][~kept] == 0).all() for name, kept in load_mask(pruned).tensors.items())
    made = quantize(QuantizeConfig(model_dir=str(pruned), output_dir=str(quantized), **common(corpus)))
    assert made.measured["engine"] == "compressed-tensors"
    assert made.measured["perplexity"] == pytest.approx(record.measured["perplexity"], rel=0.02)
    again = evaluate(EvaluateConfig(model_dir=str(quantized), **common(corpus)))
    assert again.measured["perplexity"] == pytest.approx(made.measured["perplexity"])
    with torch.no_grad():
        AutoModelForCausalLM.from_pretrained(quantized, trust_remote_code=True)(input_ids=torch.arange(8)[None])


def test_a_format_whose_loader_runs_no_code_is_refused_before_any_work(own, corpus, tmp_path):
    with pytest.raises(ValueError, match="^format must be int8 for a model with code of its own, got fp8"):
        quantize(QuantizeConfig(model_dir=str(own), output_dir=str(tmp_path / "out"), format="fp8", **common(corpus)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_another_repository_is_refused_by_name(own, corpus, file):
    change(own / file, auto_map={"AutoTokenizer": ["owner/other--own.OwnTokenizer", None]})
    rule = f"^model_dir must bring its own code, auto_map in {own / file} names 'owner/other--own.OwnTokenizer'$"
    with pytest.raises(ValueError, match=rule):
        evaluate(EvaluateConfig(model_dir=str(own), **common(corpus)))


def test_without_permission_no_code_is_run(own, corpus):
    (own / "own.py").write_text("raise SystemExit('code was run')")
    with pytest.raises(ValueError, match="^model_dir must have a config.json that transformers can read"):
        evaluate(EvaluateConfig(model_dir=str(own), **(common(corpus) | {"trust_remote_code": False})))
