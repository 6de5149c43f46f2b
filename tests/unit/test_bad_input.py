"""What a stage does with wrong input: one line that names the parameter, exit code 2, nothing left behind, no weights read.

The stages run as with `python -m`, but in this process; a few in a separate process.
"""

import runpy
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from components.core.files import UNFINISHED
from components.core.mask.file import MASK_FILE
from components.core.mask.mask import Mask, save_mask
from tests.conftest import SMALL, save_tiny, tiny_tokenizer

ROOT = Path(__file__).parents[2]
LOADING = ("prune", "distill", "quantize", "evaluate")  # the stages that read weights
MASKED = "model.layers.0.mlp.up_proj.weight"  # [128, 64] in the tiny models
Ended = namedtuple("Ended", "code out err")


@pytest.fixture(scope="module")
def inputs(checkpoint, corpus, tmp_path_factory) -> dict[str, str]:
    """Good and bad files by name, to be inserted into arguments."""
    place = tmp_path_factory.mktemp("inputs")
    files = {"model": checkpoint, "corpus": corpus, "train": corpus / "train.txt"}
    for name, mask in {
        "mask": {MASKED: torch.ones(128, 64, dtype=torch.bool)},
        "half_mask": {MASKED: torch.arange(128 * 64).view(128, 64) % 2 == 0},
        "shape_mask": {MASKED: torch.ones(64, 128, dtype=torch.bool)},
        "name_mask": {"model.layers.9.mlp.up_proj.weight": torch.ones(128, 64, dtype=torch.bool)},
        "no_linear_mask": {"model.embed_tokens.weight": torch.ones(256, 64, dtype=torch.bool)},
    }.items():
        files[name] = place / name / MASK_FILE
        save_mask(Mask(mask), files[name])
    files["garbage"] = place / "garbage.safetensors"
    files["garbage"].write_bytes(b"garbage")
    files["empty"] = place / "empty.txt"
    files["empty"].write_text(" \n")
    files["short"] = place / "short.txt"
    files["short"].write_text("x" * 20)
    files["empty_folder"] = place / "nothing"
    files["empty_folder"].mkdir()
    files["words"] = place / "words"
    AutoModelForCausalLM.from_config(LlamaConfig(**SMALL | {"vocab_size": 300})).save_pretrained(files["words"])
    tiny_tokenizer().save_pretrained(files["words"])
    files["pickled"] = save_tiny(place / "pickled")
    (files["pickled"] / "model.safetensors").rename(files["pickled"] / "pytorch_model.bin")
    return {name: str(path) for name, path in files.items()}


EVALUATION = {"eval_data": "{corpus}", "eval_seq_len": "32", "eval_blocks": "4"}
GOOD = {
    "resolve": {"model_id": "{model}", "train_data": "{corpus}", "eval_data": "{corpus}"},
    "fetch": {"model_id": "{model}", "output_dir": "{output}"},
    "tokenize": {
        "model_dir": "{model}",
        "output_dir": "{output}",
        "train_data": "{corpus}",
        "nsamples": "4",
        "seq_len": "32",
        **EVALUATION,
    },
    "prune": {
        "dense_model": "{model}",
        "output_dir": "{output}",
        "sparsity": "0.5",
        "calibration_data": "{corpus}",
        "nsamples": "4",
        "seq_len": "32",
        **EVALUATION,
    },
    "distill": {
        "teacher_model": "{model}",
        "student_model": "{model}",
        "mask_file": "{mask}",
        "output_dir": "{output}",
        "train_data": "{corpus}",
        "seq_len": "32",
        "max_steps": "1",
        **EVALUATION,
    },
    "quantize": {"model_dir": "{model}", "output_dir": "{output}", **EVALUATION},
    "evaluate": {"model_dir": "{model}", **EVALUATION},
}


def command(stage: str, changes: dict[str, str], inputs: dict[str, str], place: Path) -> list[str]:
    """The arguments of a good run of a stage, with some changed."""
    known = {**inputs, "output": str(place / "output"), "place": str(place)}
    settings = GOOD[stage] | changes
    return [part for name, value in settings.items() for part in (f"--{name}", value.format(**known))]


@pytest.fixture
def start(inputs, tmp_path, monkeypatch, capfd):
    """Run a stage as `python -m components.<stage>` does, in this process."""

    def started(stage: str, changes: dict[str, str] | None = None, place: Path = tmp_path) -> Ended:
        monkeypatch.setattr(sys, "argv", [stage, *command(stage, changes or {}, inputs, place)])
        code = 0
        capfd.readouterr()
        try:
            runpy.run_module(f"components.{stage}", run_name="__main__")
        except SystemExit as end:
            code = end.code
        return Ended(code, *capfd.readouterr())

    return started


@pytest.fixture
def no_weights(monkeypatch):
    """Make reading weights fail the test: a wrong value must be reported before that."""

    def load(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr("components.core.checkpoint.weights.Weights.load", load)


def assert_refused(ended: Ended, line: str, place: Path, left: tuple[str, ...] = ()) -> None:
    """Check for one line, exit code 2, and nothing in `place` except what was `left` there."""
    assert ended.code == 2
    assert ended.err.endswith("\n")
    assert len(ended.err.splitlines()) == 1
    assert ended.err.startswith("error: " + line)
    assert sorted(path.name for path in place.iterdir()) == sorted(left)


def unfinished(place: Path) -> tuple[str, ...]:
    """Names of folders with finished blocks that the same command goes on with."""
    return tuple(path.name for path in place.glob(".*") if path.name.endswith(UNFINISHED))


@pytest.mark.parametrize("stage", GOOD)
def test_a_good_run_of_each_stage_ends_well(start, stage, tmp_path):
    """Otherwise the cases below would be refused for another reason."""
    ended = start(stage)
    assert ended.code == 0
    assert "error" not in ended.err
    writes = "output_dir" in GOOD[stage]
    assert [path.name for path in tmp_path.iterdir()] == (["output"] if writes else [])


def test_the_watch_for_weights_sees_each_stage_that_reads_them(start, no_weights):
    for stage in LOADING:
        with pytest.raises(AssertionError, match="weights were read"):
            start(stage)


WRONG_VALUES = [
    ("prune", {"sparsity": "1.0"}, "sparsity must be in [0, 1), got 1.0"),
    ("prune", {"sparsity": "1.3"}, "sparsity must be in [0, 1), got 1.3"),
    ("prune", {"sparsity": "-0.1"}, "sparsity must be in [0, 1), got -0.1"),
    ("prune", {"sparsity": "nan"}, "sparsity must be in [0, 1), got nan"),
    ("prune", {"pattern": "3:2"}, "pattern must be 'unstructured' or N:M with 0 < N < M, got '3:2'"),
    ("prune", {"pattern": "0:4"}, "pattern must be 'unstructured' or N:M with 0 < N < M, got '0:4'"),
    ("prune", {"pattern": "half"}, "pattern must be 'unstructured' or N:M with 0 < N < M, got 'half'"),
    ("prune", {"pattern": "2:4", "sparsity": "0.7"}, "sparsity must be 0.5 for pattern 2:4, got 0.7"),
    ("prune", {"pattern": "2:4", "block_size": "6"}, "block_size must be a multiple of 4 for pattern 2:4, got 6"),
    ("prune", {"effort": "worst"}, "effort must be one of fast, balanced, best, got 'worst'"),
    ("prune", {"method": "obs"}, "method must be one of auto, sparsegpt, alps, wanda, magnitude, got 'obs'"),
    ("prune", {"order": "random"}, "order must be one of auto, block, sequential, got 'random'"),
    ("prune", {"target": "sparse"}, "target must be one of auto, pruned, dense, got 'sparse'"),
    ("prune", {"reconstruct": "model"}, "reconstruct must be one of auto, none, block, got 'model'"),
    ("prune", {"refit": "-2"}, "refit must be at least -1, got -2"),
    ("prune", {"swaps": "-2"}, "swaps must be at least -1, got -2"),
    ("prune", {"reconstruct_epochs": "0"}, "reconstruct_epochs must be at least 1, got 0"),
    ("prune", {"dtype": "int8"}, "dtype must be one of auto, float32, float16, bfloat16, got 'int8'"),
    ("prune", {"nsamples": "0"}, "nsamples must be at least 1, got 0"),
    ("prune", {"block_size": "0"}, "block_size must be at least 1, got 0"),
    ("prune", {"nproc_per_node": "0"}, "nproc_per_node must be at least 1, got 0"),
    ("prune", {"nproc_per_node": "5", "nsamples": "4"}, "nproc_per_node must be at most nsamples = 4, got 5"),
    ("prune", {"damping": "0"}, "damping must be above 0, got 0.0"),
    ("prune", {"damping": "nan"}, "damping must be above 0, got nan"),
    ("prune", {"damping": "inf"}, "damping must be finite, got inf"),
    ("prune", {"output_dir": " "}, "output_dir must be given, got ' '"),
    ("distill", {"learning_rate": "nan"}, "learning_rate must be above 0, got nan"),
    ("distill", {"learning_rate": "inf"}, "learning_rate must be finite, got inf"),
    ("distill", {"learning_rate": "0"}, "learning_rate must be above 0, got 0.0"),
    ("distill", {"learning_rate": "-0.1"}, "learning_rate must be above 0, got -0.1"),
    ("distill", {"alpha_kd": "1.5"}, "alpha_kd must be in [0, 1], got 1.5"),
    ("distill", {"alpha_kd": "-0.5"}, "alpha_kd must be in [0, 1], got -0.5"),
    ("distill", {"alpha_kd": "nan"}, "alpha_kd must be in [0, 1], got nan"),
    ("distill", {"temperature": "0"}, "temperature must be above 0, got 0.0"),
    ("distill", {"alpha_hidden": "-1"}, "alpha_hidden must be at least 0, got -1.0"),
    ("distill", {"alpha_hidden": "1", "teacher_cache": "always"}, "alpha_hidden must be 0 for teacher_cache always, got 1.0"),
    ("distill", {"temperature": "inf"}, "temperature must be finite, got inf"),
    ("distill", {"weight_decay": "inf"}, "weight_decay must be finite, got inf"),
    ("distill", {"sparse_check_eps": "inf"}, "sparse_check_eps must be finite, got inf"),
    ("distill", {"sparse_check_eps": "-1"}, "sparse_check_eps must be at least 0, got -1.0"),
    ("distill", {"warmup_ratio": "2"}, "warmup_ratio must be in [0, 1], got 2.0"),
    ("distill", {"epochs": "0"}, "epochs must be at least 1, got 0"),
    ("distill", {"batch_size": "-1"}, "batch_size must be at least 0, got -1"),
    ("distill", {"sync_each_batch": "once"}, "sync_each_batch must be one of auto, always, never, got 'once'"),
    ("quantize", {"format": "int4"}, "format must be one of int8, fp8, packed-int8, packed-int4, got 'int4'"),
    ("quantize", {"dtype": "float64"}, "dtype must be one of auto, float32, float16, bfloat16, got 'float64'"),
    ("evaluate", {"eval_seq_len": "1"}, "eval_seq_len must be at least 2, got 1"),
    ("evaluate", {"eval_blocks": "-1"}, "eval_blocks must be at least 0, got -1"),
    ("tokenize", {"nsamples": "0"}, "nsamples must be at least 1, got 0"),
    ("tokenize", {"seq_len": "1"}, "seq_len must be at least 2, got 1"),
]
WRONG_TEXTS = [
    ("tokenize", {"train_data": "{empty}"}, "train_data must hold train text, {empty} is empty"),
    ("tokenize", {"eval_data": "{empty}"}, "eval_data must hold eval text, {empty} is empty"),
    (
        "tokenize",
        {"train_data": "{short}"},
        "train_data must have at least 33 tokens for its calibration blocks of 32, {short} has 20",
    ),
    ("tokenize", {"eval_data": "{short}"}, "eval_data must have at least 128 tokens for its eval blocks of 32, {short} has 20"),
    (
        "tokenize",
        {"train_data": "{train}", "eval_data": "{train}"},
        "eval_data must be other text than train_data, got {train}",
    ),
    ("tokenize", {"train_data": "/no/such.txt"}, "train_data must be an existing file or folder"),
    *(
        (stage, {parameter: "{train}", "eval_data": "{train}"}, f"eval_data must be other text than {parameter}, got {{train}}")
        for stage, parameter in (("prune", "calibration_data"), ("distill", "train_data"))
    ),
    ("prune", {"calibration_data": "{empty}"}, "calibration_data must hold train text, {empty} is empty"),
    ("prune", {"calibration_data": "{short}"}, "calibration_data must have at least 33 tokens"),
    ("prune", {"calibration_data": "/no/such.txt"}, "calibration_data must be an existing file or folder"),
    ("prune", {"eval_data": "{empty}"}, "eval_data must hold eval text, {empty} is empty"),
    ("prune", {"eval_data": "{short}"}, "eval_data must have at least 128 tokens"),
    ("distill", {"train_data": "{empty}"}, "train_data must hold train text, {empty} is empty"),
    ("distill", {"train_data": "{short}"}, "train_data must have at least 32 tokens"),
    (
        "distill",
        {"train_data": "{corpus}", "batch_size": "9999"},
        "train_data must have at least the",
    ),
    ("quantize", {"eval_data": "{empty}"}, "eval_data must hold eval text, {empty} is empty"),
    ("evaluate", {"eval_data": "{empty}"}, "eval_data must hold eval text, {empty} is empty"),
    ("evaluate", {"eval_data": "{short}"}, "eval_data must have at least 128 tokens"),
]
POSITIONS = "must be at most the model's 128 positions, got 129"
WRONG_MODELS = [
    ("tokenize", {"seq_len": "129"}, f"seq_len {POSITIONS}"),
    ("tokenize", {"eval_seq_len": "129"}, f"eval_seq_len {POSITIONS}"),
    ("prune", {"seq_len": "129"}, f"seq_len {POSITIONS}"),
    ("prune", {"eval_seq_len": "129"}, f"eval_seq_len {POSITIONS}"),
    ("distill", {"seq_len": "129"}, f"seq_len {POSITIONS}"),
    ("distill", {"eval_seq_len": "129"}, f"eval_seq_len {POSITIONS}"),
    ("quantize", {"eval_seq_len": "129"}, f"eval_seq_len {POSITIONS}"),
    ("evaluate", {"eval_seq_len": "129"}, f"eval_seq_len {POSITIONS}"),
    ("fetch", {"model_id": "{empty_folder}"}, "model_id must be a folder with a config.json, got {empty_folder}"),
    ("tokenize", {"model_dir": "{empty_folder}"}, "model_dir must be a folder with a config.json, got {empty_folder}"),
    ("prune", {"dense_model": "{empty_folder}"}, "dense_model must be a folder with a config.json, got {empty_folder}"),
    ("distill", {"teacher_model": "{empty_folder}"}, "teacher_model must be a folder with a config.json, got {empty_folder}"),
    ("distill", {"student_model": "{empty_folder}"}, "student_model must be a folder with a config.json, got {empty_folder}"),
    ("distill", {"student_model": "owner/name"}, "student_model must be a folder with a checkpoint, got owner/name"),
    ("distill", {"teacher_model": "/no/such"}, "teacher_model must be an existing folder or a hub id"),
    ("distill", {"teacher_model": "owner/name"}, "teacher_model is not on this machine, and the hub is off"),
    ("quantize", {"model_dir": "{empty_folder}"}, "model_dir must be a folder with a config.json, got {empty_folder}"),
    ("evaluate", {"model_dir": "{empty_folder}"}, "model_dir must be a folder with a config.json, got {empty_folder}"),
    ("evaluate", {"model_dir": "/no/such"}, "model_dir must be a folder with a Hugging Face checkpoint, got /no/such"),
    ("fetch", {"model_id": "{pickled}"}, "model_id must hold safetensors weights (pickled ones are never read), got {pickled}"),
    (
        "prune",
        {"dense_model": "{pickled}"},
        "dense_model must hold safetensors weights (pickled ones are never read), got {pickled}",
    ),
    ("prune", {"dense_model": "/no/such"}, "dense_model must be an existing folder or a hub id"),
    ("resolve", {"model_id": "/no/such"}, "model_id must be an existing folder or a hub id"),
    ("fetch", {"revision": "abc"}, "revision must still be that of {model}: it was abc"),
    ("distill", {"teacher_model": "{words}"}, "teacher_model must have the student's vocabulary of 256 words, got 300"),
]
WRONG_MASKS = [
    (stage, {"mask_file": file}, line)
    for stage in ("distill", "quantize")
    for file, line in (
        ("{name_mask}", "mask_file must match the model: it masks model.layers.9.mlp.up_proj.weight, which the model does not"),
        ("{shape_mask}", f"mask_file must match the model: {MASKED} is [128, 64] there and [64, 128] in the mask"),
        ("{garbage}", "mask_file must be a safetensors file, got {garbage}"),
        ("{empty_folder}", "mask_file must be a sparsity_mask.safetensors or a folder that holds one, got {empty_folder}"),
        ("/no/such", "mask_file must exist, got /no/such"),
    )
]
# in pipelines the number is that of the pod
WRONG_GPUS = [(stage, {"gpus": "-2"}, "gpus must be at least -1, got -2") for stage in LOADING]
CASES = WRONG_VALUES + WRONG_GPUS + WRONG_TEXTS + WRONG_MODELS + WRONG_MASKS


@pytest.mark.parametrize(
    ("stage", "changes", "line"), CASES, ids=[" ".join([stage, *map("=".join, changes.items())]) for stage, changes, _ in CASES]
)
@pytest.mark.usefixtures("no_weights")
def test_wrong_input_is_one_line_before_any_weights(start, inputs, tmp_path, stage, changes, line):
    assert_refused(start(stage, changes), line.format(**inputs), tmp_path)


@pytest.mark.parametrize("stage", [stage for stage in GOOD if "output_dir" in GOOD[stage]])
@pytest.mark.usefixtures("no_weights")
def test_an_output_that_exists_is_left_alone(start, tmp_path, stage):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "precious").write_text("mine")
    ended = start(stage)
    assert_refused(ended, f"output_dir must not exist yet, got {tmp_path}/output", tmp_path, left=("output",))
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["precious"]
    assert (tmp_path / "output" / "precious").read_text() == "mine"


@pytest.mark.usefixtures("no_weights")
def test_a_mask_file_that_exists_is_left_alone(start, tmp_path):
    (tmp_path / "mask").write_text("mine")
    ended = start("prune", {"mask_file": "{place}/mask"})
    assert_refused(ended, f"mask_file must not exist yet, got {tmp_path}/mask", tmp_path, left=("mask",))
    assert (tmp_path / "mask").read_text() == "mine"


@pytest.mark.parametrize("place", ["{output}/the_mask.safetensors", "{output}", "{place}/else/../output/mask"])
@pytest.mark.usefixtures("no_weights")
def test_a_mask_file_inside_the_output_is_refused_at_once(start, tmp_path, place):
    ended = start("prune", {"mask_file": place})
    assert_refused(ended, f"mask_file must lie outside output_dir {tmp_path}/output, got ", tmp_path)


@pytest.mark.parametrize("parameter", ["checkpoint_dir", "tensorboard_dir"])
@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("{output}", "must lie outside output_dir {place}/output, got {place}/output"),
        ("{output}/inside", "must lie outside output_dir {place}/output, got {place}/output/inside"),
        ("{place}/else/../output", "must lie outside output_dir {place}/output, got "),
        ("{place}/file", "must be a folder that can be written, got {place}/file"),
        ("{place}/file/inside", "must lie in a folder that can be written, got {place}/file/inside"),
    ],
)
@pytest.mark.usefixtures("no_weights")
def test_a_folder_that_training_cannot_write_to_is_refused_at_once(start, tmp_path, parameter, folder, line):
    (tmp_path / "file").touch()
    ended = start("distill", {parameter: folder})
    assert_refused(ended, f"{parameter} {line.format(place=tmp_path)}", tmp_path, left=("file",))


@pytest.mark.parametrize("stage", [stage for stage in GOOD if "output_dir" in GOOD[stage]])
@pytest.mark.usefixtures("no_weights")
def test_an_output_with_too_long_a_name_is_refused_at_once(start, tmp_path, stage):
    """A temporary name beside it is longer than its own."""
    ended = start(stage, {"output_dir": "{place}/" + "x" * 240})
    assert_refused(ended, "output_dir must have names of at most 207 bytes, got ", tmp_path)


@pytest.mark.usefixtures("no_weights")
def test_an_output_below_a_file_is_refused(start, tmp_path):
    (tmp_path / "file").touch()
    ended = start("prune", {"output_dir": "{place}/file/output"})
    assert_refused(ended, "output_dir must lie in a folder that can be written", tmp_path, left=("file",))


WRITERS = ("fetch", "prune", "distill", "quantize")


@pytest.mark.parametrize("stage", WRITERS)
@pytest.mark.usefixtures("no_weights")
def test_a_disk_that_says_it_is_full_is_refused_before_any_weights(start, tmp_path, monkeypatch, stage):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    assert_refused(start(stage), "output_dir needs about 0.00 GB of disk", tmp_path)


@pytest.mark.parametrize("stage", WRITERS)
@pytest.mark.usefixtures("no_weights")
def test_a_disk_that_is_too_small_is_refused_before_any_weights(start, small_disk, stage):
    assert_refused(start(stage, place=small_disk), "output_dir needs about 0.00 GB of disk", small_disk)


@pytest.mark.parametrize("stage", [*WRITERS, "tokenize"])
def test_a_disk_that_fills_up_while_writing_leaves_no_output(start, small_disk, monkeypatch, stage):
    usage = shutil.disk_usage("/")._replace(free=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)  # as if another program took the space meanwhile
    ended = start(stage, {"nsamples": "2000"} if stage == "tokenize" else {}, small_disk)
    kept = unfinished(small_disk)
    assert len(kept) <= (stage in ("prune", "quantize"))
    assert_refused(ended, "", small_disk, left=kept)
    assert str(small_disk) in ended.err
    assert "No space left on device" in ended.err


def test_a_disk_that_fills_up_under_the_mask_leaves_neither_mask_nor_model(start, small_disk, tmp_path):
    (small_disk / "filler").write_bytes(b"x" * 120 * 1024)
    ended = start("prune", {"mask_file": f"{small_disk}/mask.safetensors"})
    assert_refused(ended, "", small_disk, left=("filler",))
    assert sorted(path.name for path in tmp_path.iterdir()) == [*unfinished(tmp_path), "disk"]


def test_a_student_that_is_not_zero_outside_its_mask_is_refused_by_name(start, tmp_path):
    ended = start("distill", {"mask_file": "{half_mask}"})
    assert_refused(ended, "the model must be finite, and zero outside its mask: 4096 weights are not", tmp_path)
    assert MASKED in ended.err


def test_a_checkpoint_that_is_not_zero_outside_its_mask_is_not_quantized(start, tmp_path):
    ended = start("quantize", {"mask_file": "{half_mask}"})
    assert_refused(ended, "the model must be finite, and zero outside its mask: ", tmp_path)
    assert MASKED in ended.err


@pytest.mark.usefixtures("no_weights")
def test_a_mask_over_what_cannot_be_quantized_is_refused_by_name(start, tmp_path):
    ended = start("quantize", {"mask_file": "{no_linear_mask}"})
    assert_refused(ended, "mask_file must mask matrices other than the head, got model.embed_tokens.weight", tmp_path)


def test_weights_that_are_not_finite_are_reported_as_such(start, inputs, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(inputs["model"], broken)
    weights = load_file(broken / "model.safetensors")
    weights[MASKED][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    for stage, parameter in (("prune", "dense_model"), ("distill", "student_model"), ("evaluate", "model_dir")):
        ended = start(stage, {parameter: str(broken)})
        assert_refused(ended, "", tmp_path, left=("broken",))
        assert "finite" in ended.err


def test_damaged_weights_are_one_line(start, inputs, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(inputs["model"], damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for stage, parameter in (("prune", "dense_model"), ("quantize", "model_dir"), ("evaluate", "model_dir")):
        ended = start(stage, {parameter: str(damaged)})
        assert_refused(ended, f"{damaged}/model.safetensors must be a safetensors file", tmp_path, left=("damaged",))


@pytest.mark.parametrize(
    ("stage", "changes", "line"),
    [
        ("prune", {"sparsity": "1.3"}, "sparsity must be in [0, 1), got 1.3"),
        ("distill", {"mask_file": "{shape_mask}"}, f"mask_file must match the model: {MASKED} is [128, 64] there"),
    ],
    ids=["prune", "distill"],
)
def test_wrong_input_to_a_process_of_its_own(inputs, tmp_path, stage, changes, line):
    arguments = command(stage, changes, inputs, tmp_path)
    run = subprocess.run(
        [sys.executable, "-m", f"components.{stage}", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert_refused(Ended(run.returncode, run.stdout, run.stderr), line.format(**inputs), tmp_path)
