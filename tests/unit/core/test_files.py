"""Outputs appear whole or not at all."""

import contextlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from components.core.files import (
    UNFINISHED,
    check_new,
    new_directory,
    new_directory_and_work,
    new_file,
    resumable_directory,
    stat_fingerprint,
    write_json,
)

FAILURES = [ValueError("no"), OSError(28, "No space left on device"), KeyboardInterrupt(), SystemExit(1)]


@pytest.fixture
def usual_umask():
    umask = os.umask(0o022)
    yield
    os.umask(umask)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_directory_appears_whole_at_the_end(tmp_path):
    target = tmp_path / "deep" / "out"
    with new_directory(target) as scratch:
        (scratch / "a.txt").write_text("a")
        assert scratch.parent.parent == target.parent  # beside it, so that the rename stays on one disk
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert (target / "a.txt").read_text() == "a"


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_directory_is_gone_after_a_failure(tmp_path, failure):
    def write() -> None:
        with new_directory(tmp_path / "out") as scratch:
            (scratch / "nested").mkdir()
            (scratch / "nested" / "half.txt").write_text("ha")
            raise failure

    with pytest.raises(type(failure)):
        write()
    assert list(tmp_path.iterdir()) == []


def test_directory_is_gone_when_the_name_was_taken_meanwhile(tmp_path):
    def write() -> None:
        with new_directory(tmp_path / "out") as scratch:
            (scratch / "mine").touch()
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").touch()

    with pytest.raises(OSError, match="not empty"):
        write()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/theirs"]


def test_directory_of_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with new_directory("out") as scratch:
        (scratch / "a").touch()
        monkeypatch.chdir("/")
    assert (tmp_path / "out" / "a").is_file()


def test_directory_and_its_files_are_readable_by_others(tmp_path, usual_umask):
    with new_directory(tmp_path / "out") as scratch:
        save_file({"w": torch.zeros(2)}, scratch / "private.safetensors")
        (scratch / "nested").mkdir(mode=0o700)
        (scratch / "nested" / "a.txt").touch(mode=0o600)
    found = {str(path.relative_to(tmp_path)): mode(path) for path in tmp_path.rglob("*")}
    assert found == {"out": 0o755, "out/private.safetensors": 0o644, "out/nested": 0o755, "out/nested/a.txt": 0o644}


def test_directory_keeps_to_the_umask_and_leaves_it_as_it_was(tmp_path):
    umask = os.umask(0o027)
    try:
        with new_directory(tmp_path / "out") as scratch:
            (scratch / "a.txt").touch()
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(umask)
    assert (mode(tmp_path / "out"), mode(tmp_path / "out" / "a.txt")) == (0o750, 0o640)


def test_file_appears_whole_and_replaces_the_old_one(tmp_path):
    target = tmp_path / "deep" / "a.txt"
    target.parent.mkdir()
    target.write_text("old")
    with new_file(target) as scratch:
        scratch.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_file_is_as_before_after_a_failure(tmp_path, failure):
    (tmp_path / "a.txt").write_text("old")

    def write() -> None:
        with new_file(tmp_path / "a.txt") as scratch:
            scratch.write_text("ne")
            raise failure

    with pytest.raises(type(failure)):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_file_is_readable_by_others_whoever_wrote_it(tmp_path, usual_umask):
    with new_file(tmp_path / "w.safetensors") as scratch:
        save_file({"w": torch.zeros(2)}, scratch)  # creates private files
    write_json(tmp_path / "a.json", {})
    assert {path.name: mode(path) for path in tmp_path.iterdir()} == {"w.safetensors": 0o644, "a.json": 0o644}


def test_json_round_trip(tmp_path):
    value = {"sign": "ü", "numbers": [1, 2.5, None, True]}
    write_json(tmp_path / "deep" / "a.json", value)
    assert json.loads((tmp_path / "deep" / "a.json").read_text()) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_refuses_what_is_not_json(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": value})
    assert list(tmp_path.iterdir()) == []


def test_check_new_takes_a_new_name_in_new_folders(tmp_path):
    check_new("output_dir", tmp_path / "new")
    check_new("output_dir", tmp_path / "a" / "b" / "new")
    assert list(tmp_path.iterdir()) == []


def test_check_new_refuses_what_exists(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "file", "dangling"):
        with pytest.raises(ValueError, match=f"output_dir must not exist yet, got {tmp_path / name}"):
            check_new("output_dir", tmp_path / name)


def test_check_new_refuses_a_place_under_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="mask_file must lie in a folder that can be written"):
        check_new("mask_file", tmp_path / "file" / "new")


@contextlib.contextmanager
def ordinary_user():
    """Become nobody for a while, since root may write anywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.fixture
def open_to_all():
    """A folder that every user can look into, unlike `tmp_path`."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("closed", [0o555, 0o000], ids=["read only", "not even readable"])
def test_check_new_refuses_a_place_that_cannot_be_written(open_to_all, closed):
    place = open_to_all / "closed"
    place.mkdir()
    place.chmod(closed)
    with ordinary_user(), pytest.raises(ValueError, match="output_dir must lie in a folder that can be written"):
        check_new("output_dir", place / "new")
    place.chmod(0o755)


def test_check_new_asks_for_room_on_the_disk_of_the_output(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path).free
    check_new("output_dir", tmp_path / "a" / "new", 1)
    with pytest.raises(ValueError, match=f"output_dir needs about .* GB of disk, {tmp_path} has .* GB free"):
        check_new("output_dir", tmp_path / "a" / "new", 2 * free)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    check_new("output_dir", tmp_path / "new", 1000)
    with pytest.raises(ValueError, match="output_dir needs about"):
        check_new("output_dir", tmp_path / "new", 1001)


def test_stat_fingerprint_changes_with_name_size_and_time(tmp_path):
    file = tmp_path / "a"
    file.write_text("one")
    first = stat_fingerprint([file])
    assert stat_fingerprint([file]) == first
    os.utime(file, ns=(1, 1))
    second = stat_fingerprint([file])
    file.write_text("three")
    os.utime(file, ns=(1, 1))
    third = stat_fingerprint([file])
    fourth = stat_fingerprint([file.rename(tmp_path / "b")])
    assert len({first, second, third, fourth}) == 4


def test_written_json_is_indented_and_ends_its_line(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    assert (tmp_path / "a.json").read_text() == json.dumps({"a": 1}, indent=2) + "\n"


@pytest.mark.parametrize("end", [None, OSError("full"), SystemExit(143)])
@pytest.mark.parametrize("name", ["mask", "out"])
def test_a_folder_and_a_file_beside_it_appear_together_or_not_at_all(tmp_path, end, name):
    """And the work on the way there never."""
    made = new_directory_and_work(tmp_path / "out", str(tmp_path / "masks" / name))
    with contextlib.suppress(OSError, SystemExit), made as (output, work):
        (output / "file").write_text("x")
        (work / name).write_text("mask")
        (work / "other").write_text("y")
        if end:
            raise end
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == (set() if end else {"out/file", f"masks/{name}"})
    assert {path.name for path in tmp_path.iterdir()} == (set() if end else {"out", "masks"})


class TestResumableDirectory:
    """Work that is finished in part is kept, and found again by its key."""

    def start(self, target, key, finished=True, end=None, beside=""):
        with resumable_directory("output_dir", target, key, beside) as (output, work):
            found = sorted(path.name for path in work.iterdir())
            (output / "file").write_text("x")
            if beside:
                (work / Path(beside).name).write_text("mask")
            if finished:
                (work / "finished-00000.json").touch()
            if end:
                raise end
        return found

    def test_a_block_that_succeeds_leaves_the_folder_alone(self, tmp_path):
        self.start(tmp_path / "out", "a")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]

    @pytest.mark.parametrize("end", [KeyboardInterrupt(), SystemExit(143), OSError("full")])
    def test_finished_work_is_kept_for_the_same_key(self, tmp_path, capsys, end):
        with pytest.raises(type(end)):
            self.start(tmp_path / "out", "a", end=end)
        assert [path.name for path in tmp_path.iterdir()] == [f".out.a{UNFINISHED}"]
        assert "what has been finished is kept beside" in capsys.readouterr().out
        assert self.start(tmp_path / "out", "a") == ["finished-00000.json"]
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize(("finished", "end"), [(True, ValueError("wrong")), (False, OSError("full"))])
    def test_what_would_be_the_same_again_or_is_nothing_is_not_kept(self, tmp_path, finished, end):
        with pytest.raises(type(end)):
            self.start(tmp_path / "out", "a", finished, end)
        assert list(tmp_path.iterdir()) == []

    def test_the_work_of_another_key_is_removed_and_told(self, tmp_path, capsys):
        with pytest.raises(SystemExit):
            self.start(tmp_path / "out", "a", end=SystemExit(143))
        with pytest.raises(SystemExit):
            self.start(tmp_path / "other", "a", end=SystemExit(143))
        assert self.start(tmp_path / "out", "b") == []
        assert "output_dir: what a run with other settings or inputs left unfinished is removed" in capsys.readouterr().out
        assert sorted(path.name for path in tmp_path.iterdir()) == [f".other.a{UNFINISHED}", "out"]

    def test_a_file_beside_appears_with_the_folder(self, tmp_path, usual_umask):
        self.start(tmp_path / "out", "a", beside=str(tmp_path / "masks" / "mask"))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["masks", "out"]
        assert [path.name for path in (tmp_path / "masks").iterdir()] == ["mask"]
        assert (tmp_path / "masks" / "mask").read_text() == "mask"
        assert mode(tmp_path / "masks" / "mask") == 0o644

    @pytest.mark.parametrize("end", [OSError("full"), SystemExit(143)])
    @pytest.mark.parametrize("moment", ["replace", "rename", "copy", "after"])
    def test_whenever_it_ends_there_are_both_or_neither(self, tmp_path, monkeypatch, end, moment):
        def fail(*arguments):
            if moment == "after":
                rename(*arguments)
            raise end

        rename = Path.rename
        monkeypatch.setattr(*{"replace": (Path, "replace"), "copy": (shutil, "copyfile")}.get(moment, (Path, "rename")), fail)
        with pytest.raises(type(end)):
            self.start(tmp_path / "out", "a", beside=str(tmp_path / "mask"))
        found = {path.name for path in tmp_path.iterdir()} - {f".out.a{UNFINISHED}"}
        assert found == ({"out", "mask"} if moment == "after" else set())

    def test_a_second_process_is_refused(self, tmp_path):
        refused = pytest.raises(ValueError, match="^output_dir must not be in use by another run, ")
        with resumable_directory("output_dir", tmp_path / "out", "a"), refused:
            self.start(tmp_path / "out", "a")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


PROGRAM = """
import shutil, signal, sys
from components.core import files
from components.core.cli import stop_at_sigterm
stop_at_sigterm()
moment, target = sys.argv[1:]
owner = {"mkdir": files.Path, "use": files, "rmtree": shutil}[moment]
original = getattr(owner, moment)

def interrupted(*args, **kwargs):
    if files.PARTIAL in str(args[0]):
        setattr(owner, moment, original)
        if moment != "rmtree":
            original(*args, **kwargs)
        signal.raise_signal(signal.SIGTERM)
    return original(*args, **kwargs)

setattr(owner, moment, interrupted)
with files.new_file(target) as scratch:
    scratch.write_text("x")
"""


@pytest.mark.parametrize("moment", ["mkdir", "use", "rmtree"])
def test_sigterm_amid_making_or_removing_a_folder_leaves_nothing(tmp_path, moment):
    command = [sys.executable, "-c", PROGRAM, moment, str(tmp_path / "out")]
    assert subprocess.run(command, cwd=Path(__file__).parents[3], timeout=60).returncode == 143
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if moment == "rmtree" else [])
