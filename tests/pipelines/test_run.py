"""The whole pipeline on a tiny random model under kfp.local, as `pipelines/run.py` runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from components.core.history import StageRecord, stats_file
from components.report.stage import load
from tests.conftest import save_tiny

ROOT = Path(__file__).parents[2]
SMALL = ["--nsamples", "4", "--seq_len", "32", "--eval_blocks", "4", "--eval_seq_len", "32", "--distill_max_steps", "4"]
SMALL += ["--distill_batch_size", "2", "--distill_grad_accum_steps", "1", "--distill_learning_rate", "1e-3"]

# what the models before the formats are called, in the order of the pipeline, and which stage made each
MODELS = {"dense_model": "fetch", "pruned_model": "prune", "distilled_model": "distill"}


def run(*flags, folder):
    """Run the pipeline in `folder`, without a terminal or access to the hub."""
    command = [sys.executable, str(ROOT / "pipelines" / "run.py"), *map(str, flags)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("run")
    save_tiny(folder / "dense", "qwen3", tied=True)
    data = ["--train_data", corpus, "--eval_data", corpus]
    return folder, run("--model_id", "dense", "--run_dir", "artifacts", *data, *SMALL, folder=folder)


def test_the_run_ends_with_the_table_and_the_report(finished):
    folder, done = finished
    assert done.returncode == 0, done.stdout + done.stderr
    closing = done.stdout[done.stdout.rindex("Compressed") :]
    for stage in ("dense", "pruned", "distilled", "int8", "fp8"):
        assert stage in closing
    page = Path(closing.split("report:")[1].strip())
    assert page.is_relative_to(folder / "artifacts")
    assert "<html" in page.read_text()


def test_the_log_has_the_lines_people_look_for(finished):
    _, done = finished
    for line in (
        "[PPL] before_pruning=",
        "[PPL] after_pruning=",
        "[PPL] finetune_start=",
        "[PPL] epoch=1 eval_ppl=",
        "[PPL] after_quantization=",
    ):
        assert line in done.stdout


def test_a_log_without_a_terminal_has_no_control_characters(finished):
    _, done = finished
    assert not [line for line in (done.stdout + done.stderr).splitlines() if "\x1b" in line or "\r" in line]


def test_the_terminal_gets_the_stages_own_lines_and_the_log_file_everything(finished):
    folder, done = finished
    assert len(done.stdout.splitlines()) < 120
    for stage in ("resolve", "fetch", "tokenize", "prune", "distill", "quantize", "report", "publish"):
        assert f"== {stage}\n" in done.stdout
    noise = "[KFP Executor", "executor_input", "finished with status", "Streamed logs"
    assert not [line for line in done.stdout.splitlines() if any(part in line for part in noise)]
    log = (folder / "artifacts" / "run.log").read_text()
    assert all(part in log for part in noise)
    assert "[PPL] after_pruning=" in log


def test_a_stage_that_fails_is_heard(tmp_path):
    save_tiny(tmp_path / "dense")
    (tmp_path / "short.txt").write_text("x" * 20)
    done = run(
        "--model_id", "dense", "--train_data", "short.txt", "--eval_data", "builtin:python-docs", *SMALL, folder=tmp_path
    )
    assert done.returncode == 2
    assert "ValueError: train_data must have at least 33 tokens for its calibration blocks of 32" in done.stdout
    assert "== tokenize\n" in done.stdout
    assert "== prune\n" not in done.stdout
    assert len(done.stderr.splitlines()) == 1
    (log_file,) = tmp_path.glob("runs/*/run.log")
    assert done.stderr.startswith("error: ")
    assert str(log_file) in done.stderr
    assert not (log_file.parent / "tmp").exists()


def test_a_place_that_cannot_be_written_is_told_by_the_first_stage(tmp_path, corpus):
    """So are wrong values; here the number of processes is not that of a pod's GPUs, whatever their default."""
    save_tiny(tmp_path / "dense")
    (tmp_path / "file").touch()
    processes = ["--distill_backend", "fsdp", "--distill_launcher", "torchrun", "--distill_nproc_per_node", "2"]
    place = ["--publish_to", tmp_path / "file" / "models"]
    data = ["--model_id", "dense", "--train_data", corpus, "--eval_data", corpus]
    done = run(*data, *processes, *place, *SMALL, folder=tmp_path)
    assert done.returncode == 2
    assert f"ValueError: publish_to must be a place that can be written, got {tmp_path}/file/models: " in done.stdout
    assert "== resolve\n" in done.stdout
    assert "== fetch\n" not in done.stdout


def test_sparsity_holds_to_the_end(finished):
    folder, _ = finished
    rows = json.loads(next(folder.glob("artifacts/*/report*/**/summary.json")).read_text())["rows"]
    sparse = [row["sparsity"] for row in rows if row["name"] != "dense"]
    assert len(sparse) == 4
    assert all(abs(sparsity - 0.7) < 1e-3 for sparsity in sparse)


def test_the_report_has_every_stages_whole_record_from_the_quantized_models_alone(finished):
    """Each stage's record as it wrote it, layers, losses and all."""
    folder, _ = finished
    made = {stage: next(folder.glob(f"artifacts/*/*/{name}")) for name, stage in MODELS.items()}
    whole = [StageRecord.load(place / stats_file(stage)) for stage, place in made.items()]
    assert [{*record.details} for record in whole] == [set(), {"layers", "allocations"}, {"inputs", "steps", "epochs"}]
    formats = {}
    for place in folder.glob("artifacts/*/quantize/quantized_model"):
        record = StageRecord.load(place / stats_file("quantize"))
        formats[record.parameters["format"]] = str(place), record
    (int8, int8_record), (fp8, fp8_record) = formats["int8"], formats["fp8"]
    assert load([int8, fp8]) == [*whole, fp8_record, int8_record]
    page = next(folder.glob("artifacts/*/report/compression_report")).read_text()
    for figure in ("Reconstruction error by layer", "Sparsity by layer", "Loss while distilling", "Learning rate"):
        assert f"<h3>{figure}</h3>" in page


def test_metrics_of_quantized_models_name_the_format(finished):
    folder, _ = finished
    logged = [json.loads(file.read_text())["artifacts"] for file in folder.glob("artifacts/*/quantize/executor_output.json")]
    names = [{*artifacts["metrics"]["artifacts"][0]["metadata"]} for artifacts in logged]
    kinds = {name.partition("_")[2] for name in {*names[0], *names[1]}}
    assert {"perplexity", "sparsity", "bytes", "seconds"} <= kinds
    assert sorted(names, key=min) == [{f"{format}_{kind}" for kind in kinds} for format in ("fp8", "int8")]


def test_the_distilled_model_loads_without_the_projects_code(finished):
    folder, _ = finished
    model = AutoModelForCausalLM.from_pretrained(next(folder.glob("artifacts/*/distill*/distilled_model")))
    weight = model.model.layers[0].mlp.up_proj.weight
    assert (weight == 0).float().mean() == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prune_sparsity", "1.3"], "prune_sparsity must be in [0, 1), got 1.3"),
        (
            ["--quantize_formats", "int8", "int3"],
            "quantize_formats must be one of int8, fp8, packed-int8, packed-int4, got 'int3'",
        ),
        (["--distill_learning_rate", "0"], "distill_learning_rate must be above 0, got 0.0"),
        (["--model_id", "./missing"], "model_id must be an existing folder"),
        (["--train_data", "missing.txt"], "train_data must be an existing file"),
        (["--eval_seq_len", "1"], "eval_seq_len must be at least 2, got 1"),
        (["--publish_to", '/models/"x"'], "publish_to must have no quotation mark, backslash or line break, got "),
    ],
)
def test_bad_input_ends_at_once_with_one_line(tmp_path, corpus, flags, message):
    done = run("--model_id", "builtin:smollm2-135m", "--train_data", corpus, "--eval_data", corpus, *flags, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
