"""A killed quantize goes on after its last finished part, and takes over no work of other settings, models or texts."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.core.checkpoint import saving
from components.core.mask.mask import Mask, save_mask
from components.core.walk.walk import Walk
from components.core.walk.work import Work
from components.quantize import stage, with_quanto
from components.quantize.config import QuantizeConfig
from components.quantize.stage import run
from tests.conftest import save_tiny

BLOCKS = 3
PARTS = 1 + BLOCKS  # the first is what lies outside the blocks


class KilledError(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def settings(tmp_path, corpus):
    """A function that makes settings, of a tiny model of three blocks."""
    save_tiny(tmp_path / "sparse", "qwen3", tied=True, num_hidden_layers=BLOCKS)

    def make(output: str, **changes) -> QuantizeConfig:
        plain = {"model_dir": str(tmp_path / "sparse"), "eval_data": str(corpus), "eval_blocks": 2, "eval_seq_len": 16}
        return QuantizeConfig(**(plain | {"output_dir": str(tmp_path / output)} | changes))

    return make


@pytest.fixture
def done(monkeypatch):
    """What is quantized, and through which blocks text goes, in order."""
    done: list[str] = []

    def noted(owner, name, what):
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **named: done.append(what) or call(*args, **named))

    noted(with_quanto, "quantize", "part")
    noted(Walk, "advance", "block")
    return done


@pytest.fixture
def killed_at(monkeypatch):
    """A function that runs a stage and ends it before or after a moment at which something is written."""

    def kill(config: QuantizeConfig, moment: int) -> None:
        left = [moment]

        def watched(call):
            def wrapper(*args, **named):
                if left[0] == 0:
                    raise KilledError
                result = call(*args, **named)
                left[0] -= 2
                if left[0] == -1:
                    raise KilledError
                return result

            return wrapper

        with monkeypatch.context() as patch:
            for owner, name in ((stage, "finish_checkpoint"), (saving, "save_file"), (Work, "commit")):
                patch.setattr(owner, name, watched(getattr(owner, name)))
            with pytest.raises(KilledError):
                run(config)

    return kill


def contents(folder):
    """Name → hash of each file but the records, which have times in them."""
    files = [file for file in folder.iterdir() if not file.name.endswith("_stats.json") and file.name != "compression.json"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("moment", range(4 * PARTS + 2 + 2 * BLOCKS))
def test_a_killed_run_goes_on_and_ends_as_it_would_have(tmp_path, settings, done, killed_at, moment):
    """Each part is written, then committed; then the checkpoint is, and after it each block of the walk that measures."""
    wanted = run(settings("wanted"))
    assert done == ["part"] * PARTS + ["block"] * BLOCKS
    done.clear()
    killed_at(settings("out"), moment)
    found = run(settings("out"))
    again = {"part": moment < 4 * PARTS and moment % 4 != 3, "block": moment >= 4 * PARTS + 2 and moment % 2 == 0}
    for what, count in (("part", PARTS), ("block", BLOCKS)):
        assert done.count(what) == count + again[what], what
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")
    for measured in ("perplexity", "sparsity", "engine"):
        assert found.measured[measured] == wanted.measured[measured]
    assert found.sparse_integrity_check == wanted.sparse_integrity_check
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "sparse", "wanted"]


@pytest.mark.parametrize("changed", ["format", "dtype", "eval_blocks", "model", "mask"])
def test_the_work_of_other_settings_models_or_masks_is_not_taken_over(tmp_path, settings, done, killed_at, capsys, changed):
    killed_at(settings("out"), 4 * PARTS)
    done.clear()
    changes = {"format": {"format": "fp8"}, "dtype": {"dtype": "bfloat16"}, "eval_blocks": {"eval_blocks": 3}}.get(changed, {})
    if changed == "model":
        file = tmp_path / "sparse" / "model.safetensors"
        weights = load_file(file)
        weights["model.norm.weight"][0] += 1
        save_file(weights, file, {"format": "pt"})
    if changed == "mask":
        everything = {"model.layers.0.mlp.up_proj.weight": torch.ones(128, 64, dtype=torch.bool)}
        save_mask(Mask(everything), tmp_path / "mask.safetensors")
        changes = {"mask_file": str(tmp_path / "mask.safetensors")}
    run(settings("out", **changes))
    assert done.count("part") == PARTS
    assert "what a run with other settings or inputs left unfinished is removed" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*"))
