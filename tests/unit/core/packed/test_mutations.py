"""Damaged packed files end in one line that names the file, and never in a model with other weights."""

import os
import shutil
from random import Random

import pytest
import torch

from components.core.checkpoint.files import WEIGHTS_FILE
from components.core.packed.loading import load_packed
from components.quantize.config import QuantizeConfig
from components.quantize.stage import run
from tests.conftest import save_tiny
from tests.hostile.mutations import mutate

MUTATIONS = int(os.environ.get("MUTATIONS", "150"))  # of each format


@pytest.fixture(scope="module", params=["packed-int8", "packed-int4"])
def packed(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("mutations")
    small = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    dense = save_tiny(place / "dense", "qwen3", tied=True, **small)
    settings = {"format": request.param, "rounding": "nearest", "skip_ppl_eval": True}
    run(QuantizeConfig(model_dir=str(dense), output_dir=str(place / "packed"), **settings))
    return place / "packed"


def fresh(folder, content):
    """Put a new file in place of the last one, which a thread of the loader that was not waited for may still be reading."""
    (folder / WEIGHTS_FILE).unlink()
    (folder / WEIGHTS_FILE).write_bytes(content)


def outcome(folder):
    """The model's tensors, or the line that refuses it; other errors pass."""
    try:
        return load_packed(folder).state_dict()
    except ValueError as error:
        return str(error)


def test_every_mutation_is_refused_in_one_line_or_changes_nothing(packed, tmp_path):
    wanted = load_packed(packed).state_dict()
    folder = shutil.copytree(packed, tmp_path / "packed")
    for seed in range(MUTATIONS):
        fresh(folder, (packed / WEIGHTS_FILE).read_bytes())
        how = mutate(folder / WEIGHTS_FILE, Random(seed))
        found = outcome(folder)
        if isinstance(found, str):
            assert "\n" not in found
            assert len(found) < 600
            assert str(folder) in found or WEIGHTS_FILE in found, (seed, how, found)
        else:
            assert found.keys() == wanted.keys(), (seed, how)
            assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items()), (seed, how)


def test_a_file_cut_anywhere_is_refused(packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "packed")
    content = (packed / WEIGHTS_FILE).read_bytes()
    for length in sorted(
        {0, 1, 7, 8, 9, 100, len(content) - 64, len(content) - 1, *range(0, len(content), len(content) // 40)}
    ):
        fresh(folder, content[:length])
        found = outcome(folder)
        assert isinstance(found, str), length
        assert WEIGHTS_FILE in found
