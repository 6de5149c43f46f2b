"""Packed checkpoints: loaded here and by transformers, and refused in one line if they are not what they should be."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import components.core.packed.with_transformers  # noqa: F401 (registers the format)
from components.core.checkpoint.files import INDEX_FILE, WEIGHTS_FILE
from components.core.packed.loading import load_packed
from components.core.packed.record import HEADER
from components.quantize.config import QuantizeConfig
from components.quantize.stage import run
from tests.conftest import save_pruned
from tests.unit.core.packed import reader

IDS = torch.arange(32)[None]
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("packed")
    save_pruned(folder, corpus)
    return folder / "pruned"


@pytest.fixture(scope="module", params=["packed-int8", "packed-int4"])
def packed(request, pruned):
    folder = pruned.parent / request.param
    settings = {"mask_file": str(pruned), "format": request.param, "rounding": "nearest", "skip_ppl_eval": True}
    run(QuantizeConfig(model_dir=str(pruned), output_dir=str(folder), **settings))
    return folder


@pytest.fixture
def copied(packed, tmp_path):
    """A copy that may be changed, and a function that changes its tensors."""
    folder = shutil.copytree(packed, tmp_path / "copied")

    def change(edit):
        tensors = load_file(folder / WEIGHTS_FILE)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
        index = json.loads((folder / INDEX_FILE).read_text())
        (folder / INDEX_FILE).write_text(json.dumps(index | {"weight_map": dict.fromkeys(tensors, WEIGHTS_FILE)}))

    return folder, change


def weights_of(model):
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def test_every_weight_is_what_a_reader_written_from_the_specification_finds(packed):
    records = reader.records(packed / WEIGHTS_FILE)
    model = load_packed(packed)
    weights = weights_of(model)
    assert weights.keys() == records.keys()
    for name, record in records.items():
        bits, *_ = reader.fields(record)
        wanted = reader.matrix(record)[2] if bits else reader.plain(record)
        assert torch.equal(weights[name], torch.tensor(wanted).view_as(weights[name])), name
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_the_same_model(packed, dtype):
    ours = load_packed(packed, dtype)
    theirs = AutoModelForCausalLM.from_pretrained(packed, dtype=dtype)
    assert type(theirs) is type(ours)
    assert not hasattr(theirs.config, "quantization_config")
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(theirs.state_dict()[name], tensor), name
    assert torch.equal(theirs(input_ids=IDS).logits, ours(input_ids=IDS).logits)


def test_one_import_is_enough(packed):
    code = f"""
import components.core.packed.with_transformers
from transformers import AutoModelForCausalLM
print(AutoModelForCausalLM.from_pretrained({str(packed)!r}).lm_head.weight.sum().item())
"""
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert float(printed) == pytest.approx(load_packed(packed).lm_head.weight.sum().item())


def test_what_is_loaded_can_be_saved_as_a_dense_model(packed, tmp_path):
    for number, model in enumerate((AutoModelForCausalLM.from_pretrained(packed), load_packed(packed))):
        model.save_pretrained(tmp_path / str(number))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_missing_tensor_is_named(copied):
    folder, change = copied
    change(lambda tensors: tensors.pop(NAME))
    for load in (load_packed, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=f"must hold every weight of its model, {NAME} is missing"):
            load(folder)


def test_an_unexpected_tensor_is_named(copied):
    folder, change = copied
    change(lambda tensors: tensors.update(stranger=tensors[NAME].clone()))
    for load in (load_packed, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match="must hold only weights of its model, stranger is not one of them"):
            load(folder)


def test_the_tensor_of_another_layer_is_refused_by_its_shape(copied):
    folder, change = copied
    change(lambda tensors: tensors.update({NAME: tensors[NAME.replace("up", "down")].clone()}))
    with pytest.raises(ValueError, match=rf"{NAME} is \[64, 128\], not \[128, 64\]"):
        load_packed(folder)


@pytest.mark.parametrize(("place", "fault"), [(HEADER.size + 1, "checksum"), (5, "version 1 of the layout"), (0, "begin with")])
def test_a_damaged_record_is_named_with_its_file(copied, place, fault):
    folder, change = copied

    def damage(tensors):
        tensors[NAME][place] += 1

    change(damage)
    for load in (load_packed, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=f"{WEIGHTS_FILE} must hold .*records.* {NAME} is .*{fault}") as raised:
            load(folder)
        assert "\n" not in str(raised.value)


def test_a_plain_tensor_in_place_of_a_record_is_refused(copied):
    folder, change = copied
    change(lambda tensors: tensors.update({"model.norm.weight": torch.ones(64)}))
    with pytest.raises(ValueError, match="must hold records of a packed format, model.norm.weight is none"):
        load_packed(folder)


def test_another_version_of_the_layout_is_refused(copied):
    folder, _ = copied
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["version"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    for load in (load_packed, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match="version must be 1, that of the layout which is known here, got 2"):
            load(folder)


def test_a_dense_model_is_not_taken_for_a_packed_one(pruned):
    with pytest.raises(ValueError, match="folder must hold a model in a packed format, .* has quant_method None"):
        load_packed(pruned)
