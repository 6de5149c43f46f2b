"""Fetching a checkpoint from a folder: what is copied, what is not, and what is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from components.core.mask.file import MASK_FILE
from components.core.mask.mask import Mask, save_mask
from components.core.models import resolve_model
from components.fetch.config import FetchConfig
from components.fetch.stage import run
from tests.conftest import tiny_model, tiny_tokenizer

ADDED = {"compression.json", "fetch_stats.json"}


@pytest.fixture
def source(checkpoint, tmp_path) -> Path:
    """A copy of the tiny checkpoint that may be changed."""
    return Path(shutil.copytree(checkpoint, tmp_path / "source"))


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "output"


def fetch(source: Path, output: Path, revision: str = ""):
    return run(FetchConfig(model_id=str(source), output_dir=str(output), revision=revision))


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def refused(source: Path, output: Path, rule: str, revision: str = "") -> None:
    """Check that the fetch is refused and leaves nothing behind."""
    before = names(output.parent)
    with pytest.raises(ValueError, match=rule):
        fetch(source, output, revision)
    assert names(output.parent) == before


def test_a_folder_is_copied_byte_by_byte(source, output):
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    fetch(source, output)
    assert names(output) == set(before) | ADDED
    assert {name: (output / name).read_bytes() for name in before} == before
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    assert not any(file.is_symlink() for file in output.iterdir())


def test_the_record_tells_source_bytes_and_settings(source, output):
    record = fetch(source, output)
    assert record.measured["bytes"] == (source / "model.safetensors").stat().st_size
    history = json.loads((output / "compression.json").read_text())
    assert history["source"] == {"model_id": str(source), "revision": resolve_model(str(source))[1]}
    assert history["steps"] == [json.loads(json.dumps(record.summary()))]
    assert history["steps"][0]["parameters"] == {
        "model_id": str(source),
        "output_dir": str(output),
        "revision": "",
        "trust_remote_code": False,
    }


def test_a_history_that_the_model_has_is_carried_on(source, output):
    steps = [{"stage": "elsewhere", "parameters": {}}]
    history = {"format": 1, "source": {"model_id": "owner/name", "revision": "abc"}, "steps": steps}
    (source / "compression.json").write_text(json.dumps(history))
    fetch(source, output)
    found = json.loads((output / "compression.json").read_text())
    assert found["source"] == history["source"]
    assert [step["stage"] for step in found["steps"]] == ["elsewhere", "fetch"]


def test_other_formats_masks_and_folders_stay_behind(source, output):
    before = names(source)
    for name in ("pytorch_model.bin", "model.gguf", "model.onnx", "flax_model.msgpack", "optimizer.pt", ".hidden"):
        (source / name).touch()
    save_mask(Mask({"w": torch.ones(8, dtype=torch.bool)}), source / MASK_FILE)
    save_file({"w": torch.zeros(2)}, source / "adapter.safetensors")
    (source / "onnx").mkdir()
    (source / "onnx" / "config.json").touch()
    fetch(source, output)
    assert names(output) == before | ADDED


def test_files_that_belong_to_a_model_come_along(source, output):
    wanted = {"LICENSE", "LICENSE.txt", "README.md", "tokenizer.model", "vocab.tiktoken", "chat_template.jinja", "modeling.py"}
    for name in wanted:
        (source / name).write_text(name)
    fetch(source, output)
    assert wanted <= names(output)


def test_shards_are_copied_with_their_index(tmp_path, output):
    source = tmp_path / "sharded"
    tiny_model().save_pretrained(source, max_shard_size="200KB")
    tiny_tokenizer().save_pretrained(source)
    (source / "model-00099-of-00099.safetensors").touch()  # from another upload
    fetch(source, output)
    shards = set(json.loads((source / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(shards) > 2
    assert {name for name in names(output) if name.endswith(".safetensors")} == shards
    assert "model.safetensors.index.json" in names(output)


def test_the_copy_is_readable_by_others(source, output):
    for file in source.iterdir():
        file.chmod(0o600)
    umask = os.umask(0o022)
    try:
        fetch(source, output)
    finally:
        os.umask(umask)
    assert {oct(file.stat().st_mode & 0o777) for file in output.iterdir()} == {"0o644"}
    assert output.stat().st_mode & 0o777 == 0o755


def test_the_revision_that_was_resolved_is_fetched(source, output):
    fetch(source, output, resolve_model(str(source))[1])
    assert "model.safetensors" in names(output)


def test_a_stale_revision_is_refused(source, output):
    revision = resolve_model(str(source))[1]
    os.utime(source / "model.safetensors", ns=(1, 1))
    refused(source, output, f"^revision must still be that of {source}: it was {revision}, it is .*; start anew$", revision)


def test_a_folder_that_is_not_a_checkpoint_is_refused(tmp_path, source, output):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", output, "^model_id must be a folder with a config.json")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refused(source, output, r"^model_id must hold safetensors weights \(pickled ones are never read\)")


def test_a_missing_shard_is_refused(tmp_path, output):
    source = tmp_path / "sharded"
    tiny_model().save_pretrained(source, max_shard_size="200KB")
    next(source.glob("*.safetensors")).unlink()
    refused(source, output, r"must hold every shard that its index names, model-\d+-of-\d+\.safetensors is missing$")


@pytest.mark.parametrize("absolute", [True, False])
def test_an_index_that_names_a_file_outside_its_folder_is_refused(source, output, tmp_path, absolute):
    secret = tmp_path / "secret"
    secret.write_text("not the model's")
    (source / "model.safetensors").unlink()
    name = str(secret) if absolute else "../secret"
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    refused(source, output, "index")


def test_a_quantized_model_is_refused(source, output):
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "dense"}
    (source / "config.json").write_text(json.dumps(config))
    refused(source, output, "^model_id must not be quantized yet")


def test_a_disk_that_is_too_full_is_refused(source, output, monkeypatch):
    usage = shutil.disk_usage(source)
    size = (source / "model.safetensors").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=size - 1))
    refused(source, output, "^output_dir needs about .* GB of disk")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=size))
    fetch(source, output)


def test_a_copy_that_fails_half_way_leaves_nothing(source, output, monkeypatch):
    copied, original = [], shutil.copyfile

    def copyfile(file, target):
        copied.append(original(file, target))
        if len(copied) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    before = names(output.parent)
    with pytest.raises(OSError, match="No space left on device"):
        fetch(source, output)
    assert len(copied) == 2
    assert names(output.parent) == before


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"model_id": ""}, "^model_id must be given, got ''$"),
        ({"output_dir": " "}, "^output_dir must be given, got ' '$"),
        ({"model_id": "/no/such"}, "^model_id must be an existing folder or a hub id"),
        ({"output_dir": "/tmp"}, "^output_dir must not exist yet, got /tmp$"),
    ],
)
def test_wrong_settings_are_refused(output, settings, rule):
    with pytest.raises(ValueError, match=rule):
        FetchConfig(**{"model_id": "owner/name", "output_dir": str(output), **settings}).check_environment()
