"""What is in use is told by locks, which end with their processes."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from components.core.files import check_new, new_directory, new_file
from components.core.locks import LOCK, only_user, remove_unused, use

ROOT = Path(__file__).parents[3]
WRITE = """
import sys, time
from components.core.files import new_directory, new_file
make = {"folder": new_directory, "file": new_file}[sys.argv[1]]
with make(sys.argv[2]) as scratch:
    print(scratch, flush=True)
    time.sleep(60)
"""
HAVE = """
import sys, time
from pathlib import Path
from components.core.locks import only_user
with only_user("checkpoint_dir", Path(sys.argv[1]), "output_dir mine"):
    print("mine", flush=True)
    time.sleep(60)
"""


def start(code, *arguments):
    """Start a process that sleeps once it has printed one line; return it with the line."""
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def end(process, number=signal.SIGKILL):
    process.send_signal(number)
    process.communicate(timeout=20)


def write(target, kind):
    with (new_directory if kind == "folder" else new_file)(target) as scratch:
        (scratch / "whole" if kind == "folder" else scratch).write_text("whole")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_a_killed_process_left_is_removed_by_the_next_for_the_same_output_and_no_sooner(tmp_path, kind):
    target = tmp_path / "new" / "out"
    process, scratch = start(WRITE, kind, target)
    write(target, kind)  # at the same time
    assert Path(scratch).parent.is_dir()
    target.rename(tmp_path / "first")
    end(process)
    write(tmp_path / "new" / "another", kind)
    assert Path(scratch).parent.is_dir()
    write(target, kind)
    assert sorted(path.name for path in target.parent.iterdir()) == ["another", "out"]


def test_the_check_of_an_output_makes_room_first(tmp_path):
    process, _ = start(WRITE, "folder", tmp_path / "out")
    check_new("output_dir", tmp_path / "out")
    assert len(list(tmp_path.iterdir())) == 1
    end(process)
    check_new("output_dir", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_lock_is_a_dead_ones(tmp_path):
    folder = tmp_path / ".out.abc.partial"
    folder.mkdir()
    (folder / "model.safetensors").touch()
    with new_directory(tmp_path / "out"):
        assert not folder.exists()


def test_a_folder_that_is_removed_at_this_moment_cannot_be_used(tmp_path):
    assert use(tmp_path / "none") is None
    (tmp_path / "folder").mkdir()
    with only_user("x", tmp_path / "folder", ""):  # as the one who removes it
        assert use(tmp_path / "folder") is None


def test_a_folder_with_several_users_is_in_use_until_the_last_has_ended(tmp_path):
    (tmp_path / "folder").mkdir()
    for lock in (use(tmp_path / "folder"), use(tmp_path / "folder")):
        remove_unused([tmp_path / "folder"])
        assert (tmp_path / "folder").is_dir()
        lock.close()
    remove_unused([tmp_path / "folder", tmp_path / "none"])
    assert list(tmp_path.iterdir()) == []


def test_without_locks_nothing_is_removed_and_a_second_run_is_possible_but_told(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    (tmp_path / ".out.abc.partial").mkdir()
    write(tmp_path / "out", "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.abc.partial", "out"]
    with only_user("checkpoint_dir", tmp_path / "checkpoints", ""):
        assert "cannot be locked, so a second run there would not be noticed" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_second_user_is_refused_by_the_name_of_the_first_until_that_has_ended(tmp_path, number):
    process, _ = start(HAVE, tmp_path / "deep" / "folder")
    folder = tmp_path / "deep" / "folder"
    with (
        pytest.raises(ValueError, match=rf"checkpoint_dir must not be in use.*process {process.pid} on .*, output_dir mine"),
        only_user("checkpoint_dir", folder, ""),
    ):
        pass
    end(process, number)
    with only_user("checkpoint_dir", folder, "output_dir other"):
        assert (folder / LOCK).read_text().endswith("output_dir other")


def test_the_lock_does_not_pass_to_children(tmp_path):
    """A launcher's or a compiler's child may outlive a killed run."""
    with only_user("checkpoint_dir", tmp_path, ""):
        code = "print(flush=True); input()"
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, close_fds=False
        )
        child.stdout.readline()
    with only_user("checkpoint_dir", tmp_path, ""):
        assert child.poll() is None
    child.communicate("\n", timeout=20)
