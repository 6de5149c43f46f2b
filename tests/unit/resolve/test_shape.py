"""A model's sizes from the headers of its weight files are those of the model itself."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from components.core.blocks import find_blocks
from components.core.checkpoint.files import INDEX_FILE, WEIGHTS_FILE
from components.core.models import SMOLLM2, SMOLLM2_PACKAGE, _smollm2_file
from components.resolve.shape import Shape, llama_tensors, model_shape, shape_of
from tests.conftest import SMALL, save_tiny

ATTENTION = [SMALL[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")]
TINY = [SMALL["num_hidden_layers"], SMALL["hidden_size"], SMALL["intermediate_size"], *ATTENTION, SMALL["vocab_size"]]


def shape_of_model(model, number_bytes):
    """The sizes of a model, by its modules."""
    _, blocks = find_blocks("model", model)
    everything, inside = (sum(weight.numel() for weight in part.parameters()) for part in (model, blocks))
    layers = [module.weight for module in blocks[0].modules() if isinstance(module, nn.Linear)]  # all blocks are alike
    words = model.get_input_embeddings().weight
    return Shape(
        parameters=everything,
        stored=number_bytes * everything,
        blocks=len(blocks),
        block=inside // len(blocks),
        matrix=max(weight.numel() for weight in layers),
        hessians=sum(weight.shape[1] ** 2 for weight in layers),
        widest=max(weight.shape[1] for weight in layers),
        features=sum(sum(weight.shape) for weight in layers),
        outside=everything - inside,
        vocabulary=words.shape[0],
        width=words.shape[1],
    )


def matrices(tensors):
    """Name → shape, of the tensors that have two dimensions."""
    return {name: list(shape) for name, shape in tensors if len(shape) == 2}


def test_a_folders_headers_tell_what_the_model_has(model, tmp_path):
    model.bfloat16().save_pretrained(tmp_path)
    assert model_shape(str(tmp_path), "") == shape_of_model(model, number_bytes=2)


def test_a_model_in_several_files_has_the_sizes_of_the_same_in_one(tmp_path):
    save_tiny(tmp_path)
    whole = model_shape(str(tmp_path), "")
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    (tmp_path / WEIGHTS_FILE).unlink()
    for number in (0, 1):
        save_file(dict(list(tensors.items())[number::2]), tmp_path / f"{number}.safetensors")
    files = {name: f"{number % 2}.safetensors" for number, name in enumerate(tensors)}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": files}))
    assert model_shape(str(tmp_path), "") == whole


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_built_like_llama_has_the_matrices_of_llama(tied, tmp_path):
    save_tiny(tmp_path, "llama", tied)
    stored = load_file(tmp_path / WEIGHTS_FILE)
    made = llama_tensors(*TINY, tied=tied, kind="F32")
    assert matrices((name, shape) for name, (shape, _) in made.items()) == matrices(
        (name, tensor.shape) for name, tensor in stored.items()
    )


@pytest.mark.skipif(importlib.util.find_spec(SMOLLM2_PACKAGE) is None, reason=f"{SMOLLM2_PACKAGE} is not installed")
def test_the_built_in_models_sizes_are_known_without_reading_it():
    file = _smollm2_file()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(file.parent, gguf_file=file.name))
    weights = {name: (list(weight.shape), "F32") for name, weight in model.named_parameters() if weight.ndim == 2}
    assert model_shape(SMOLLM2, "") == shape_of(weights)


def test_of_several_lists_the_one_with_the_most_weights_is_the_decoder():
    decoder = {f"model.layers.{block}.up.{expert}.weight": ([8, 4], "F32") for block in range(3) for expert in range(2)}
    vision = {f"visual.blocks.{block}.up.weight": ([4, 4], "F32") for block in range(5)}
    other = {"model.embed_tokens.weight": ([100, 4], "F32"), "model.layers.0.norm.weight": ([4], "F32")}
    found = shape_of(decoder | vision | other)
    assert (found.blocks, found.block, found.matrix) == (3, 2 * 8 * 4 + 4, 8 * 4)
    assert found.outside == 100 * 4 + 5 * 4 * 4  # loaded with what lies outside the blocks
    assert (found.vocabulary, found.width) == (100, 4)


def test_experts_in_one_tensor_are_counted_as_if_they_were_stored_one_by_one():
    other = {"model.embed_tokens.weight": ([100, 4], "F32")}
    apart = {f"model.layers.0.{expert}.up.weight": ([8, 4], "F32") for expert in range(3)}
    assert shape_of(other | {"model.layers.0.up": ([3, 8, 4], "F32")}) == shape_of(other | apart)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"embed.weight": ([100, 4], "F32")},
        {"embed.weight": ([100, 4], "F32"), "layers.0.norm.weight": ([4], "F32")},
        {"layers.0.up.weight": ([8, 4], "F32")},
        {"embed.weight": ([100, 4], "F32"), "layers.0.up.weight": ([0, 4], "F32")},
        {"embed.weight": ([100, 0], "F32"), "layers.0.up.weight": ([8, 4], "F32")},
    ],
)
def test_what_is_no_decoder_is_told(tensors):
    with pytest.raises(ValueError, match="^its tensors are not those of a decoder"):
        shape_of(tensors)
