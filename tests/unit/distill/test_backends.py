"""Every backend and launcher gives the same result, and killed runs resume; with real processes over gloo."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from components.core.mask.file import MASK_FILE
from components.core.mask.integrity import integrity
from components.core.mask.mask import load_mask
from components.distill.config import DistillConfig
from components.distill.launch import command
from components.distill.resume import checkpoints as complete
from components.quantize.config import QuantizeConfig
from components.quantize.stage import run as quantize
from tests.conftest import save_pruned

INFINITE = Path(__file__).with_name("infinite_gradient.py")
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or shutil.which("g++") is None,
    reason="DeepSpeed and g++ (it builds its CPU communication at first use) are not installed",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus):
    """A folder with a tiny dense and a tiny pruned model and a single-process run to compare with."""
    folder = tmp_path_factory.mktemp("backends")
    save_pruned(folder, corpus)
    finished(start(folder, corpus, "one", "--batch_size=4"))
    return folder


def start(folder, corpus, name, *more, program=("-m", "components.distill")):
    """Start the stage as a command: 20 steps, a global batch of 8 blocks unless `more` says otherwise."""
    flags = {
        "teacher_model": folder / "dense",
        "student_model": folder / "pruned",
        "mask_file": folder / "pruned" / MASK_FILE,
        "output_dir": folder / name,
        "train_data": corpus,
        "eval_data": corpus,
        "seq_len": 32,
        "eval_seq_len": 32,
        "eval_blocks": 7,
        "grad_accum_steps": 2,
        "max_steps": 20,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
    }
    line = [sys.executable, *program, *(f"--{key}={value}" for key, value in flags.items()), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def finished(process, code=0):
    """Wait for a run to end; return its output."""
    try:
        printed = process.communicate(timeout=180)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, printed
    return printed


def stop_after_a_checkpoint(process, number):
    """Send a signal to the run once it has written a checkpoint: SIGKILL to all, SIGTERM to the first process."""
    for line in process.stdout:
        if line.startswith("checkpoint:"):
            # torchrun's workers have sessions of their own, so the whole tree is killed process by process
            parent = psutil.Process(process.pid)
            for one in [parent, *parent.children(recursive=True)] if number == signal.SIGKILL else [parent]:
                one.send_signal(number)
            break
    process.communicate(timeout=60)
    return process.returncode


def losses(folder, name):
    return [step["loss"] for step in json.loads((folder / name / "distill_stats.json").read_text())["details"]["steps"]]


def two(backend, launcher="torchrun", port=29600, batch=2):
    return (
        f"--backend={backend}",
        f"--launcher={launcher}",
        "--nproc_per_node=2",
        f"--master_port={port}",
        f"--batch_size={batch}",
    )


def check_like_one(folder, name):
    """Check for the same loss curve as with one process, nearly the same weights, and exact zeros."""
    assert losses(folder, name) == pytest.approx(losses(folder, "one"), rel=1e-3)
    wanted, found = (load_file(folder / run / "model.safetensors") for run in ("one", name))
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-2, atol=1e-3)
    stats = json.loads((folder / name / "distill_stats.json").read_text())
    assert stats["sparse_integrity_check"]["violations"] == 0
    assert integrity(found, load_mask(folder / "pruned"))["passed"]


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_fsdp_is_like_one_process(folder, corpus, launcher):
    printed = finished(start(folder, corpus, f"fsdp-{launcher}", *two("fsdp", launcher)))
    check_like_one(folder, f"fsdp-{launcher}")
    assert printed.count("[PPL] epoch=1 eval_ppl=") == 1  # only one process prints


@pytest.mark.parametrize("sync", ["always", "never"])
def test_fsdp_with_four_processes_is_like_one(folder, corpus, sync):
    """With gradients that are added up over the processes after each forward pass, or once a step."""
    name = f"fsdp-four-{sync}"
    four = ("--backend=fsdp", "--launcher=torchrun", "--nproc_per_node=4", "--master_port=29605", "--batch_size=1")
    finished(start(folder, corpus, name, *four, f"--sync_each_batch={sync}"))
    check_like_one(folder, name)


def test_a_quantized_teacher_is_not_sharded_but_may_run_before_training(folder, corpus):
    teacher = folder / "int8"
    quantize(QuantizeConfig(model_dir=str(folder / "dense"), output_dir=str(teacher), skip_ppl_eval=True))
    how = (f"--teacher_model={teacher}", "--max_steps=4", "--teacher_cache=always")
    said = finished(start(folder, corpus, "refused", *how[:2], *two("fsdp", port=29602)), code=2)
    assert said == f"error: teacher_model must not be quantized for backend fsdp without teacher_cache, got {teacher}\n"
    finished(start(folder, corpus, "int8-one", *how, "--batch_size=4"))
    finished(start(folder, corpus, "int8-fsdp", *how, *two("fsdp", port=29602)))
    wanted = losses(folder, "int8-one")
    assert losses(folder, "int8-fsdp") == pytest.approx(wanted, rel=1e-3)
    assert wanted != pytest.approx(losses(folder, "one")[:4], rel=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_infinite_gradient_of_one_process_concerns_all(folder, corpus, dtype):
    """In float16 all skip the step, as loss scaling means it; otherwise all end, and the weights are as before."""
    name = f"infinite-{dtype}"
    program = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4", str(INFINITE), "2"]
    how = ("--backend=fsdp", "--batch_size=1", "--max_steps=5", f"--dtype={dtype}")
    process = start(folder, corpus, name, *how, program=program)
    if dtype == "float32":
        said = finished(process, code=1)
        assert "error: the gradient must be finite, its norm is inf: lower learning_rate or use another dtype" in said
        assert not (folder / name).exists()
        return
    finished(process)
    steps = json.loads((folder / name / "distill_stats.json").read_text())["details"]["steps"]
    assert [number for number, step in enumerate(steps, start=1) if "grad_norm" not in step] == [3]
    found = load_file(folder / name / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in found.values())
    assert integrity(found, load_mask(folder / "pruned"))["passed"]


@needs_deepspeed
@pytest.mark.parametrize(("stage", "launcher"), [(0, "torchrun"), (1, "torchrun"), (2, "accelerate")])
def test_deepspeed_is_like_one_process(folder, corpus, stage, launcher):
    config = folder / f"zero{stage}.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    finished(start(folder, corpus, f"zero{stage}", *two("deepspeed", launcher, 29610), f"--deepspeed_config={config}"))
    check_like_one(folder, f"zero{stage}")


@needs_deepspeed
def test_without_the_mask_on_master_weights_the_check_fails_under_deepspeed(folder, corpus):
    """The fault that the check is meant to find: gradients reach pruned weights and nothing resets them."""
    code = (
        "from components.distill import with_deepspeed; with_deepspeed.mask_weights = lambda *_: None;"
        "with_deepspeed.DeepSpeed.step = lambda self: None;"
        "import torch; torch.Tensor.register_hook = lambda *_: None;"
        "from components.distill.config import DistillConfig; from components.distill.stage import run; import sys, json;"
        "run(DistillConfig(**json.loads(sys.argv[1])))"
    )
    config = {
        "teacher_model": str(folder / "dense"),
        "student_model": str(folder / "pruned"),
        "mask_file": str(folder / "pruned"),
        "output_dir": str(folder / "fault"),
        "train_data": str(corpus),
        "seq_len": 32,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "skip_ppl_eval": True,
        "backend": "deepspeed",
        "master_port": 29615,
    }
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(config)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode != 0
    assert "zero outside its mask" in done.stderr
    assert not (folder / "fault").exists()


def checkpointed(folder, name):
    return f"--checkpoint_dir={folder / name}.checkpoints", "--checkpoint_steps=3"


@pytest.mark.parametrize(("backend", "number"), [("none", signal.SIGKILL), ("none", signal.SIGTERM), ("fsdp", signal.SIGKILL)])
def test_a_killed_run_goes_on_and_ends_bit_for_bit(folder, corpus, backend, number):
    name = f"{backend}-{number.name}"
    how = ("--batch_size=4",) if backend == "none" else two("fsdp", port=29620)
    whole = "one" if backend == "none" else f"{name}-whole"
    if backend == "fsdp":
        finished(start(folder, corpus, whole, *how))
    code = stop_after_a_checkpoint(start(folder, corpus, name, *how, *checkpointed(folder, name)), number)
    assert code == (143 if number == signal.SIGTERM else -9)
    assert not (folder / name).exists()
    printed = finished(start(folder, corpus, name, *how, *checkpointed(folder, name)))
    assert "resuming from" in printed
    assert losses(folder, name) == losses(folder, whole)
    wanted, found = (load_file(folder / run / "model.safetensors") for run in (whole, name))
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


def test_fsdp_goes_on_with_another_number_of_processes(folder, corpus):
    more = checkpointed(folder, "reshard")
    stop_after_a_checkpoint(start(folder, corpus, "reshard", *two("fsdp", port=29630), *more), signal.SIGKILL)
    one = ("--backend=fsdp", "--launcher=torchrun", "--batch_size=4", "--master_port=29631")
    assert "resuming from" in finished(start(folder, corpus, "reshard", *one, *more))
    check_like_one(folder, "reshard")


def test_an_incomplete_checkpoint_is_never_read_and_old_ones_go(folder, corpus):
    more = (*checkpointed(folder, "count"), "--keep_checkpoints=2", "--batch_size=4")
    finished(start(folder, corpus, "count", *more))
    checkpoints = folder / "count.checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-00000015", "step-00000018"]
    (checkpoints / "step-00000099").mkdir()
    assert complete(checkpoints)[-1].name == "step-00000018"


def test_checkpoints_of_another_run_are_refused(folder, corpus):
    more = (*checkpointed(folder, "other"), "--batch_size=4")
    stop_after_a_checkpoint(start(folder, corpus, "other", *more), signal.SIGKILL)
    printed = finished(start(folder, corpus, "other", *more, "--alpha_kd=0.5"), code=2)
    assert "error: checkpoint_dir must hold checkpoints of this run" in printed
    assert "alpha_kd: 0.7 then, 0.5 now" in printed


def test_commands_of_the_launchers(folder, corpus, tmp_path):
    plain = {
        "teacher_model": str(folder / "dense"),
        "student_model": str(folder / "pruned"),
        "mask_file": str(folder / "pruned"),
        "output_dir": str(tmp_path / "out"),
        "skip_ppl_eval": True,
        "backend": "fsdp",
        "nproc_per_node": 8,
        "master_port": 1234,
    }
    torchrun = command(DistillConfig(**plain, launcher="torchrun"), cuda=True)
    assert torchrun[1:3] == ["-m", "components.core.torchrun"]
    assert torchrun[torchrun.index("--nproc_per_node") + 1] == "8"
    accelerate = command(DistillConfig(**plain, launcher="accelerate"), cuda=True)
    assert accelerate[1:3] == ["-m", "accelerate.commands.launch"]
    for line in (torchrun, accelerate):
        assert line[line.index("components.distill") - 1] == "-m"
        assert "--skip_ppl_eval=True" in line
        assert "1234" in line


def test_stage_3_and_unknown_backends_are_refused(folder, tmp_path):
    stage3 = tmp_path / "zero3.json"
    stage3.write_text('{"zero_optimization": {"stage": 3}}')
    plain = {
        "teacher_model": str(folder / "dense"),
        "student_model": str(folder / "pruned"),
        "mask_file": str(folder / "pruned"),
        "output_dir": str(tmp_path / "out"),
        "skip_ppl_eval": True,
    }
    for changes, message in (
        ({"backend": "deepspeed", "deepspeed_config": str(stage3)}, r"stage 0, 1 or 2, got 3"),
        ({"backend": "horovod"}, "backend must be one of"),
        ({"launcher": "mpirun"}, "launcher must be one of"),
        ({"nproc_per_node": 2}, "nproc_per_node must be 1 for backend none"),
        ({"master_port": 0}, "master_port must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            DistillConfig(**plain, **changes).check_environment()
