"""Checkpoints of training: damaged ones are found and skipped, a failure leaves the older ones, and one run has the folder."""

import json
import re
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint import filesystem

from components.core.locks import LOCK, only_user
from components.distill import backends, resume
from components.distill.stage import run as run_stage
from components.distill.with_deepspeed import DeepSpeed
from tests.unit.distill.test_backends import finished, folder, losses, needs_deepspeed, start, two  # noqa: F401 (a fixture)
from tests.unit.distill.test_distill import curve, pruned, settings, trainer  # noqa: F401 (a fixture)


@pytest.fixture(autouse=True)
def usual_handler():
    """Training leaves its handler of SIGTERM behind."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def begin(pruned, corpus, tmp_path):  # noqa: F811
    """A function that prepares a run of 6 steps with checkpoints after 2, 4 and 6, in the same folder each time."""

    def make(**changes):
        plain = {"max_steps": 6, "checkpoint_dir": str(tmp_path / "checkpoints"), "checkpoint_steps": 2, "keep_checkpoints": 3}
        return trainer(pruned, corpus, tmp_path, **(plain | changes))

    return make


@pytest.fixture
def whole(begin, tmp_path):
    """A run that has ended, with its checkpoints."""
    run = begin()
    run.fit()
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000006"]
    return run


def names(tmp_path):
    return [path.name for path in resume.checkpoints(tmp_path / "checkpoints")]


def check_same(run, whole):
    assert curve(run.progress) == curve(whole.progress)
    for left, right in zip(run.backend.student.parameters(), whole.backend.student.parameters(), strict=True):
        assert torch.equal(left, right)


def data_file(step):
    return next(step.glob("*.distcp"))


def truncate(step):
    with data_file(step).open("r+b") as file:
        file.truncate(data_file(step).stat().st_size // 2)


def flip(step):
    content = bytearray(data_file(step).read_bytes())
    content[len(content) // 2] ^= 1
    data_file(step).write_bytes(content)


def change(step, **changes):
    file = step / resume.MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def make_folder_of_manifest(step):
    (step / resume.MANIFEST).unlink()
    (step / resume.MANIFEST).mkdir()


DAMAGES = {
    "a file is missing": (lambda step: data_file(step).unlink(), r"\.distcp must have \d+ bytes, got no file"),
    "a file is shorter": (truncate, r"\.distcp must have \d+ bytes, got \d+"),
    "a bit is flipped": (flip, r"\.distcp must have the checksum "),
    "the index is missing": (lambda step: (step / ".metadata").unlink(), r"\.metadata must have \d+ bytes, got no file"),
    "empty manifest": (lambda step: (step / resume.MANIFEST).write_text(""), r"manifest\.json must be JSON"),
    "not text": (lambda step: (step / resume.MANIFEST).write_bytes(b"\xff"), r"manifest\.json must be JSON"),
    "a list": (lambda step: (step / resume.MANIFEST).write_text("[]"), r"manifest\.json must be JSON of its form"),
    "wrong types": (lambda step: change(step, files=[1], progress=None, form=6), r"manifest\.json must be as it was written"),
    "another number": (lambda step: change(step, world_size=3), r"manifest\.json must be as it was written"),
    "of before checksums": (lambda step: change(step, crc32c=None), r"manifest\.json must be as it was written"),
    "a folder": (make_folder_of_manifest, r"manifest\.json must be an ordinary file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_by_name_and_the_older_one_is_used(begin, whole, tmp_path, capfd, damage):
    ruin, message = DAMAGES[damage]
    ruin(tmp_path / "checkpoints" / "step-00000006")
    run = begin()
    run.fit()
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith(("skipped", "resuming", "no checkpoint"))]
    assert len(lines) == 2
    assert lines[0].startswith("skipped a damaged checkpoint: ")
    assert "step-00000006/" in lines[0]
    assert re.search(message, lines[0])
    assert lines[1] == f"resuming from {tmp_path}/checkpoints/step-00000004"
    check_same(run, whole)


def test_training_starts_from_the_beginning_if_no_checkpoint_is_whole(begin, whole, tmp_path, capfd):
    for step in (tmp_path / "checkpoints").glob("step-*"):
        flip(step)
    run = begin()
    run.fit()
    printed = capfd.readouterr().out
    assert printed.count("skipped a damaged checkpoint: ") == 3
    assert f"no checkpoint in {tmp_path}/checkpoints is whole: training starts from the beginning\n" in printed
    check_same(run, whole)


def test_a_damaged_checkpoint_of_a_later_step_takes_no_place_of_a_whole_one(begin, whole, tmp_path, monkeypatch):
    flip(tmp_path / "checkpoints" / "step-00000006")
    run = begin(checkpoint_steps=1, keep_checkpoints=1)
    monkeypatch.setattr(run, "_end_epoch", lambda _: 1 / 0)  # after the last step, before its checkpoint
    with pytest.raises(ZeroDivisionError):
        run.fit()
    assert names(tmp_path) == ["step-00000005"]


def test_a_checkpoint_of_another_run_is_refused_even_if_it_is_damaged(begin, whole, tmp_path):
    flip(tmp_path / "checkpoints" / "step-00000006")
    with pytest.raises(ValueError, match=r"checkpoint_dir must hold checkpoints of this run, .*alpha_kd: 0\.7 then, 0\.5 now"):
        begin(alpha_kd=0.5).fit()


def failing_load(monkeypatch, failing):
    plain = backends.load_distributed

    def load(state, checkpoint_id, no_dist):
        plain(state, checkpoint_id=checkpoint_id, no_dist=no_dist)
        if checkpoint_id.name in failing:
            raise RuntimeError("torn\nby the library")

    monkeypatch.setattr(backends, "load_distributed", load)


def test_a_checkpoint_that_the_library_cannot_read_is_skipped(begin, whole, tmp_path, monkeypatch, capfd):
    failing_load(monkeypatch, ["step-00000006"])
    run = begin()
    run.fit()
    printed = capfd.readouterr().out
    assert f"skipped a damaged checkpoint: {tmp_path}/checkpoints/step-00000006 could not be read: torn\n" in printed
    assert f"resuming from {tmp_path}/checkpoints/step-00000004\n" in printed
    check_same(run, whole)


def test_weights_that_were_half_read_are_no_beginning(begin, whole, tmp_path, monkeypatch):
    failing_load(monkeypatch, names(tmp_path)[1:])
    flip(tmp_path / "checkpoints" / "step-00000002")
    with pytest.raises(ValueError, match="checkpoint_dir must hold a checkpoint that can be read, or none: .*step-00000006"):
        begin().fit()
    assert len(names(tmp_path)) == 3


def test_sigterm_while_the_library_reads_ends_the_run(begin, whole, monkeypatch):
    def stopped(*_, **__):
        raise SystemExit(143)

    monkeypatch.setattr(filesystem.FileSystemReader, "read_data", stopped)
    with pytest.raises(SystemExit) as end:
        begin().fit()
    assert end.value.code == 143


@pytest.fixture
def small_disk(disk_of):
    """A disk with room for one checkpoint of the tiny model but not for two, and a function that makes it larger."""
    disk = disk_of("1500k")
    return disk.folder, lambda: disk.enlarge("100m")


BACKENDS = [
    ("--batch_size=4",),
    two("fsdp", port=29650),
    pytest.param(("--backend=deepspeed", "--batch_size=4", "--master_port=29655"), marks=needs_deepspeed),
]


@pytest.mark.parametrize("how", BACKENDS, ids=["none", "fsdp", "deepspeed"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_from_the_checkpoint_before(folder, corpus, small_disk, how):  # noqa: F811
    place, enlarge = small_disk
    more = (*how, f"--checkpoint_dir={place}/checkpoints", "--checkpoint_steps=3", "--max_steps=8", "--skip_ppl_eval")
    name = f"full-{place.parent.name}"
    printed = finished(start(folder, corpus, name, *more), code=2)
    errors = {line for line in printed.splitlines() if line.startswith("error: ")}
    assert len(errors) == 1
    assert f"error: {place}/checkpoints/step-00000006 could not be written: " in errors.pop()
    assert "Traceback" not in printed
    assert sorted(path.name for path in (place / "checkpoints").iterdir()) == [LOCK, "step-00000003"]
    assert not (folder / name).exists()
    enlarge()
    assert f"resuming from {place}/checkpoints/step-00000003\n" in finished(start(folder, corpus, name, *more))


@pytest.mark.parametrize("how", [(), two("fsdp", port=29657)], ids=["python", "torchrun"])
def test_a_second_run_is_refused_at_once_by_the_name_of_the_first(folder, corpus, tmp_path, how):  # noqa: F811
    with only_user("checkpoint_dir", tmp_path / "checkpoints", "output_dir of the first"):
        printed = finished(start(folder, corpus, "second", f"--checkpoint_dir={tmp_path}/checkpoints", *how), code=2)
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert line.startswith(
        f"error: checkpoint_dir must not be in use by another run, {tmp_path}/checkpoints is used by process "
    )
    assert line.endswith(", output_dir of the first")
    assert "torchrun" not in printed
    assert not (folder / "second").exists()


def test_the_stage_gives_the_folder_back(pruned, corpus, tmp_path):  # noqa: F811
    config = settings(pruned, corpus, tmp_path / "out", max_steps=2, checkpoint_dir=str(tmp_path / "checkpoints"))
    run_stage(config)
    shutil.rmtree(tmp_path / "out")
    run_stage(config)


def test_all_processes_skip_the_same_checkpoint(folder, corpus, tmp_path):  # noqa: F811
    more = (*two("fsdp", port=29660), f"--checkpoint_dir={tmp_path}/checkpoints", "--checkpoint_steps=3", "--max_steps=6")
    more += ("--skip_ppl_eval",)
    finished(start(folder, corpus, "agree", *more))
    wanted = losses(folder, "agree")
    shutil.rmtree(folder / "agree")
    manifest = json.loads((tmp_path / "checkpoints" / "step-00000006" / resume.MANIFEST).read_text())
    assert {name.split("_")[2] for name in manifest["files"] if name.startswith("__")} == {"0", "1"}  # those of both processes
    flip(tmp_path / "checkpoints" / "step-00000006")
    printed = finished(start(folder, corpus, "agree", *more))
    assert printed.count("skipped a damaged checkpoint: ") == 1
    assert f"resuming from {tmp_path}/checkpoints/step-00000003\n" in printed
    assert losses(folder, "agree") == wanted


@pytest.mark.parametrize("found", [(None, None), RuntimeError("torn")], ids=["nothing", "an error"])
def test_what_deepspeed_cannot_read_is_an_error(tmp_path, found):
    def load_checkpoint(*_, **__):
        if isinstance(found, Exception):
            raise found
        return found

    backend = object.__new__(DeepSpeed)
    backend.world_size, backend.engine = 1, SimpleNamespace(load_checkpoint=load_checkpoint)
    with pytest.raises(OSError, match=f"{tmp_path} could not be read: (the engine finds no checkpoint in it|torn)"):
        backend.load_state(tmp_path, same_processes=True, has_best=False)
