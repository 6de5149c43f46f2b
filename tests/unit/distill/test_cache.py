"""The teacher cache's space is reserved and checked, and what a killed run left is used again or removed."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from components.core.locks import turn
from components.core.walk.walk import Walk
from components.distill import cache as module
from components.distill.cache import STATES, Cache, cache_bytes, remove_caches
from components.distill.stage import run
from components.distill.teacher import compute_states
from tests.conftest import save_tiny, tiny_model
from tests.unit.distill.test_distill import pruned, settings  # noqa: F401 (a fixture)

SHAPE = (5, 16, 64)
ROOT = Path(__file__).parents[3]
USE = """
import sys, time
from pathlib import Path
from components.distill.cache import Cache
cache = Cache(Path(sys.argv[1]), (5, 16, 64))
cache.known[:] = 1
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def user():
    """A function that starts a process with a cache in a folder."""
    started = []

    def start(folder):
        process = subprocess.Popen([sys.executable, "-c", USE, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=20)


def test_the_whole_space_is_reserved_before_anything_is_written(tmp_path):
    Cache(tmp_path / "cache", SHAPE)
    stat = (tmp_path / "cache" / STATES).stat()
    assert stat.st_size == cache_bytes(SHAPE) == 5 * (16 * 64 * 2 + 1)
    assert stat.st_blocks * 512 >= stat.st_size


def test_a_disk_that_is_too_small_refuses_the_cache_and_keeps_nothing_of_it(small_disk):
    with pytest.raises(ValueError, match=r"teacher_cache must have 0\.02 GB of disk at .*: .*No space left on device"):
        Cache(small_disk / "out.teacher-0123456789ab", (100, 128, 640))
    assert list(small_disk.iterdir()) == []


def states(folder: Path, blocks: torch.Tensor, cache: Cache) -> torch.Tensor:
    """What a cache holds after it has been filled."""
    compute_states(folder / "dense", blocks, torch.arange(len(blocks)), cache, torch.float32, torch.device("cpu"), False)
    assert cache.known.all()
    assert [path.name for path in cache.folder.iterdir() if path.is_dir()] == []
    return cache.states.clone()


def test_cached_states_are_the_models_own_rounded_once(tmp_path):
    save_tiny(tmp_path / "dense")
    blocks = torch.randint(256, SHAPE[:2], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = tiny_model().base_model(input_ids=blocks).last_hidden_state.bfloat16()
    torch.testing.assert_close(states(tmp_path, blocks, Cache(tmp_path / "cache", SHAPE)), wanted)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_of_a_machine_share_the_work(tmp_path, monkeypatch, processes):
    save_tiny(tmp_path / "dense")
    blocks = torch.randint(256, SHAPE[:2], generator=torch.Generator().manual_seed(0))
    wanted = states(tmp_path, blocks, Cache(tmp_path / "whole", SHAPE))
    cache, known = Cache(tmp_path / "cache", SHAPE), []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    for rank in range(processes):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        compute_states(tmp_path / "dense", blocks, torch.arange(len(blocks)), cache, torch.float32, torch.device("cpu"), False)
        known.append(int(cache.known.sum()))
    assert known == {2: [3, 5], 3: [2, 4, 5]}[processes]
    torch.testing.assert_close(cache.states, wanted)


def test_a_second_run_waits_for_the_first_and_computes_nothing_again(tmp_path, monkeypatch, capsys):
    save_tiny(tmp_path / "dense")
    blocks = torch.randint(256, SHAPE[:2], generator=torch.Generator().manual_seed(0))
    caches = [Cache(tmp_path / "cache", SHAPE) for _ in range(2)]
    with ThreadPoolExecutor(1) as pool, turn(tmp_path / "cache" / "walk-0-5.lock", "test"):
        second = pool.submit(states, tmp_path, blocks, caches[1])
        while "waiting for another run" not in capsys.readouterr().out:
            assert not second.done()
            time.sleep(0.01)
        caches[0].states[:] = 1.5
        caches[0].known[:] = 1
    assert (second.result() == 1.5).all()
    caches[0].remove()
    assert (tmp_path / "cache").exists()
    caches[1].remove()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("size", [0, 1, cache_bytes(SHAPE) // 2, cache_bytes(SHAPE) + 1])
def test_a_cache_of_another_size_is_made_anew(tmp_path, size):
    """Behind the end of a mapped file, every read would kill the process."""
    blocks = torch.randint(256, SHAPE[:2], generator=torch.Generator().manual_seed(0))
    save_tiny(tmp_path / "dense")
    wanted = states(tmp_path, blocks, Cache(tmp_path / "cache", SHAPE))
    os.truncate(tmp_path / "cache" / STATES, size)
    cache = Cache(tmp_path / "cache", SHAPE)
    assert not cache.known.any()
    assert torch.equal(states(tmp_path, blocks, cache), wanted)


def test_what_a_killed_run_left_is_used_again_and_room_is_asked_for_only_once(tmp_path, user):
    assert module.missing_bytes(tmp_path / "cache", SHAPE) == cache_bytes(SHAPE)
    process = user(tmp_path / "cache")
    process.kill()
    process.wait(20)
    assert module.missing_bytes(tmp_path / "cache", SHAPE) == 0
    assert Cache(tmp_path / "cache", SHAPE).known.all()


def test_caches_of_other_settings_are_removed_once_their_runs_are_dead(tmp_path, user):
    names = [f"out.teacher-{number:012x}" for number in range(3)]
    alive, dead = (user(tmp_path / name) for name in names[:2])
    dead.kill()
    dead.wait(20)
    for name in (names[2], "out", "out.teacher-mine", "other.teacher-000000000000"):
        (tmp_path / name).mkdir()
    remove_caches(tmp_path / "out", keep=tmp_path / names[2])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {names[0], names[2], "out", "out.teacher-mine", "other.teacher-000000000000"}
    alive.kill()
    alive.wait(20)
    remove_caches(tmp_path / "out", keep=None)
    assert left - {path.name for path in tmp_path.iterdir()} == {names[0], names[2]}


def test_a_run_removes_the_cache_of_a_killed_run_of_other_settings(pruned, corpus, tmp_path):  # noqa: F811
    left = tmp_path / "out.teacher-0123456789ab"
    left.mkdir()
    (left / "hidden.bf16").touch()
    run(settings(pruned, corpus, tmp_path / "out", teacher_cache="never", max_steps=1, skip_ppl_eval=True))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_model_and_cache_must_have_room_together_before_any_weights_are_read(pruned, corpus, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("components.core.checkpoint.weights.Weights.load", lambda *_: 1 / 0)
    monkeypatch.setattr("components.core.walk.walk.Walk.disk", lambda *_: 10**15)
    monkeypatch.setattr(module, "cache_bytes", lambda _: 5 * 10**14)
    with pytest.raises(
        ValueError, match=r"output_dir needs about 1500000\.00 GB of disk, 500000\.00 GB of it for teacher_cache,"
    ):
        run(settings(pruned, corpus, tmp_path / "out", teacher_cache="always"))
    assert list(tmp_path.iterdir()) == []


def test_the_student_must_have_room_beside_its_parts_and_the_hidden_states_of_the_evaluation(
    pruned,  # noqa: F811
    corpus,
    tmp_path,
    monkeypatch,
):
    """What lies on the disk at the end of the walk that measures what was written."""
    taken, losses = [], Walk.losses

    def measured(*args):
        taken.append(sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()))
        return losses(*args)

    monkeypatch.setattr(Walk, "losses", measured)
    run(settings(pruned, corpus, tmp_path / "out", max_steps=1, eval_blocks=20))
    monkeypatch.setattr("components.core.files.shutil.disk_usage", lambda _: SimpleNamespace(free=0.95 * taken[-1]))
    monkeypatch.setattr("components.core.checkpoint.weights.Weights.load", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match=r"output_dir needs about .* GB of disk, with its parts and the hidden states"):
        run(settings(pruned, corpus, tmp_path / "again", max_steps=1, eval_blocks=20))
    monkeypatch.setattr("components.core.files.shutil.disk_usage", lambda _: SimpleNamespace(free=1.05 * taken[-1]))
    with pytest.raises(ZeroDivisionError):
        run(settings(pruned, corpus, tmp_path / "again", max_steps=1, eval_blocks=20))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_hidden_states_on_their_way_are_counted(pruned, corpus, tmp_path, monkeypatch):  # noqa: F811
    """Those of each process of the machine, up to a limit; before the model is written they are gone."""
    assert module.walk_bytes((10, 20, 30), torch.float32) == 2 * 4 * 10 * 20 * 30
    monkeypatch.setattr(module, "WALK_BYTES", 1000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert module.walk_bytes((10, 20, 30), torch.float32) == 2 * 3 * 1000
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(module, "WALK_BYTES", 10**18)
    monkeypatch.setattr(module, "cache_bytes", lambda _: 10**14)
    monkeypatch.setattr(module, "walk_bytes", lambda *_: 10**15)
    with pytest.raises(ValueError, match=r"output_dir needs about 1100000\.00 GB of disk"):
        run(settings(pruned, corpus, tmp_path / "out", teacher_cache="always"))


@pytest.mark.parametrize("part", ["open_model", "make_teacher", "Trainer"])
def test_a_run_that_is_stopped_while_it_loads_leaves_no_cache(pruned, corpus, tmp_path, monkeypatch, part):  # noqa: F811
    def stopped(*_):
        assert len(list(tmp_path.iterdir())) == 1
        raise SystemExit(143)

    monkeypatch.setattr(f"components.distill.stage.{part}", stopped)
    with pytest.raises(SystemExit):
        run(settings(pruned, corpus, tmp_path / "out", teacher_cache="always"))
    assert list(tmp_path.iterdir()) == []
