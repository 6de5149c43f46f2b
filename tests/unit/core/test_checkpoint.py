"""The checkpoint contract: it loads with plain transformers and records its history."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from components.core.checkpoint import saving
from components.core.checkpoint.checks import check_checkpoint, check_dense, check_seq_len, empty_model
from components.core.checkpoint.files import INDEX_FILE, QUANTO_FILE, WEIGHTS_FILE, weight_bytes, weight_files
from components.core.checkpoint.loading import load_model, load_tokenizer
from components.core.mask.file import MASK_FILE
from components.core.mask.mask import Mask, save_mask
from tests.conftest import save_tiny, tiny_model, tiny_tokenizer
from tests.walks import save_again

CPU = torch.device("cpu")
IDS = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def changed(checkpoint, tmp_path) -> Path:
    """A copy of the tiny checkpoint that may be changed."""
    return Path(shutil.copytree(checkpoint, tmp_path / "changed"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    tiny_model().save_pretrained(folder, max_shard_size="200KB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def written(model, tmp_path) -> Path:
    """A checkpoint as stages write it."""
    model.save_pretrained(tmp_path / "first")
    tiny_tokenizer().save_pretrained(tmp_path / "first")
    save_again(tmp_path / "first", tmp_path / "written")
    return tmp_path / "written"


def test_transformers_loads_what_was_written_and_computes_the_same(model, written):
    loaded = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32)
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(model))
    assert AutoTokenizer.from_pretrained(written)("a b")["input_ids"] == tiny_tokenizer()("a b")["input_ids"]


def test_load_model_gives_the_same_in_evaluation_mode(model, written):
    loaded = load_model(written, torch.float32, CPU)
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert load_tokenizer(written)("a b")["input_ids"] == tiny_tokenizer()("a b")["input_ids"]


def test_load_model_in_the_dtype_asked_for(checkpoint):
    assert {weight.dtype for weight in load_model(checkpoint, torch.bfloat16, CPU).parameters()} == {torch.bfloat16}


def test_the_index_lists_only_the_weights_though_a_mask_is_beside_them(model, written):
    save_mask(Mask({"model.norm.weight": torch.ones(64, dtype=torch.bool)}), written / MASK_FILE)
    stored = load_file(written / WEIGHTS_FILE)
    index = json.loads((written / INDEX_FILE).read_text())
    assert index["weight_map"] == dict.fromkeys(stored, WEIGHTS_FILE)
    assert index["metadata"]["total_size"] == sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert weight_files(written) == [written / WEIGHTS_FILE]
    assert weight_bytes(written) == (written / WEIGHTS_FILE).stat().st_size
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32)), logits(model))


def test_shards_are_found_by_the_index(sharded):
    shards = weight_files(sharded)
    assert len(shards) > 2
    assert shards == sorted(sharded.glob("*.safetensors"))
    assert weight_bytes(str(sharded)) == sum(shard.stat().st_size for shard in shards)
    save_mask(Mask({"w": torch.ones(8, dtype=torch.bool)}), sharded / MASK_FILE)
    assert weight_files(sharded) == shards
    assert torch.equal(logits(load_model(sharded, torch.float32, CPU)), logits(tiny_model()))


@pytest.mark.parametrize("limit", [1, 150_000, 250_000])
def test_large_parts_become_shards_that_transformers_loads(checkpoint, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(saving, "SHARD_BYTES", limit)
    save_again(checkpoint, tmp_path / "written")
    shards = weight_files(tmp_path / "written")
    assert [shard.name for shard in shards] == [
        f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)
    ]
    assert len(shards) == {1: 3, 150_000: 3, 250_000: 2}[limit]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "written", dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(load_model(checkpoint, torch.float32, CPU)))


def test_a_missing_shard_is_named(sharded, tmp_path):
    folder = Path(shutil.copytree(sharded, tmp_path / "copy"))
    lost = weight_files(folder)[1]
    lost.unlink()
    rule = f"^{folder} must hold every shard that its index names, {lost.name} is missing$"
    for call in (weight_files, weight_bytes, lambda path: check_checkpoint("student_model", path)):
        with pytest.raises(ValueError, match=rule):
            call(folder)


@pytest.mark.parametrize(
    "content",
    ["{", "{}", "[]", '{"weight_map": 1}', '{"weight_map": {"w": "../secret"}}', '{"weight_map": {"w": "/etc/hostname"}}'],
)
def test_an_index_that_names_no_shards_of_the_folder_is_refused(changed, content):
    (changed / WEIGHTS_FILE).rename(changed / "model-00001-of-00001.safetensors")
    (changed / INDEX_FILE).write_text(content)
    (changed.parent / "secret").touch()
    with pytest.raises(ValueError, match=INDEX_FILE):
        check_checkpoint("model_id", changed)


def test_check_checkpoint_returns_the_configuration(checkpoint):
    config = check_checkpoint("model_id", checkpoint)
    assert (config.model_type, config.hidden_size, config.tie_word_embeddings) == ("qwen3", 64, True)


def test_what_is_not_a_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(ValueError, match=f"^model_id must be a folder with a Hugging Face checkpoint, got {path}$"):
            check_checkpoint("model_id", path)


def test_a_folder_without_configuration_is_refused(changed):
    (changed / "config.json").unlink()
    with pytest.raises(ValueError, match=f"^student_model must be a folder with a config.json, got {changed}$"):
        check_checkpoint("student_model", changed)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model_type": "no_such_model"}'])
def test_a_configuration_that_cannot_be_read_is_refused(changed, content):
    (changed / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"^student_model must .*config\.json"):
        check_checkpoint("student_model", changed)


def test_a_checkpoint_with_only_pickled_weights_is_refused_unread(changed):
    trace = changed / "trace"

    class RunsCode:
        def __reduce__(self):
            return open, (str(trace), "w")

    (changed / WEIGHTS_FILE).unlink()
    (changed / "pytorch_model.bin").write_bytes(pickle.dumps(RunsCode()))
    rule = f"must hold safetensors weights \\(pickled ones are never read\\), got {changed}$"
    with pytest.raises(ValueError, match=f"^model_id {rule}"):
        check_checkpoint("model_id", changed)
    with pytest.raises(ValueError, match=rule):
        load_model(changed, torch.float32, CPU)
    assert not trace.exists()


def test_a_missing_tensor_is_named(changed):
    weights = load_file(changed / WEIGHTS_FILE)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, changed / WEIGHTS_FILE, {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"must hold every weight of its model, model\.layers\.1\.mlp\.up_proj\.weight is missing$"
    ):
        load_model(changed, torch.float32, CPU)


def test_a_tensor_of_another_shape_is_refused(changed):
    weights = load_file(changed / WEIGHTS_FILE)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name][:, :32].clone()
    save_file(weights, changed / WEIGHTS_FILE, {"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"^{changed} must hold weights of its model's shapes, {name} is \[128, 32\], not \[128, 64\]$"
    ):
        load_model(changed, torch.float32, CPU)


@pytest.mark.parametrize("kept", [0, 100, 0.5])
def test_truncated_weights_are_refused(changed, kept):
    whole = (changed / WEIGHTS_FILE).read_bytes()
    (changed / WEIGHTS_FILE).write_bytes(whole[: int(kept * len(whole)) if kept < 1 else kept])
    with pytest.raises(ValueError, match=f"^{changed}/model.safetensors must be a safetensors file"):
        load_model(changed, torch.float32, CPU)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_folder_without_tokenizer_is_refused(tmp_path, kind):
    tiny_model(kind).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path} must hold a tokenizer that transformers can read"):
        load_tokenizer(tmp_path)


def test_empty_model_has_names_and_shapes_but_no_memory(checkpoint):
    model = empty_model("model_id", check_checkpoint("model_id", checkpoint))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in tiny_model("qwen3", tied=True).named_parameters()}
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_blocks_longer_than_the_positions_are_refused(checkpoint):
    config = check_checkpoint("model_id", checkpoint)
    check_seq_len("seq_len", 128, config)
    with pytest.raises(ValueError, match="^eval_seq_len must be at most the model's 128 positions, got 129$"):
        check_seq_len("eval_seq_len", 129, config)


def test_quantized_checkpoints_are_not_dense(changed):
    config = check_checkpoint("model_id", changed)
    check_dense("model_id", changed, config)
    (changed / QUANTO_FILE).touch()
    with pytest.raises(ValueError, match=f"^model_id must not be quantized yet, got {changed}$"):
        check_dense("model_id", changed, config)
    (changed / QUANTO_FILE).unlink()
    config.quantization_config = {"quant_method": "compressed-tensors"}
    with pytest.raises(ValueError, match="must not be quantized yet"):
        check_dense("model_id", changed, config)


def test_a_checkpoint_of_each_kind_round_trips_twice(tmp_path):
    for kind, tied in (("llama", False), ("qwen3", True)):
        first = save_tiny(tmp_path / f"{kind}-first", kind, tied)
        second = tmp_path / f"{kind}-second"
        save_again(first, second)
        one, two = load_file(first / WEIGHTS_FILE), load_file(second / WEIGHTS_FILE)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
