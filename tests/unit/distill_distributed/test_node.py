"""Nodes as real processes on this machine, with the variables that an operator sets; the handover is a folder."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from components.core import storage
from components.core.history import read_history
from components.core.mask.file import MASK_FILE, find_mask, fingerprint_of_file
from components.core.reading import read_json
from components.distill_distributed import node, watch
from tests.conftest import save_pruned

FLAGS = ["--backend=fsdp", "--launcher=torchrun", "--seq_len=32", "--max_steps=2", "--batch_size=1", "--grad_accum_steps=1"]
FLAGS += ["--global_batch=4", "--skip_ppl_eval=True"]
INPUTS = ("teacher_model", "student_model", "mask_file", "train_data")


@pytest.fixture(scope="module")
def models(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("models")
    save_pruned(folder, corpus)
    return folder


@pytest.fixture
def place(models, corpus, tmp_path):
    """A folder with all inputs as KFP stores artifacts: the files alone."""
    folders = {"teacher_model": models / "dense", "student_model": models / "pruned", "mask_file": models / "pruned"}
    for name in INPUTS:
        shutil.copytree(folders.get(name, corpus), tmp_path / "place" / "inputs" / name)
    return f"{tmp_path}/place"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(place: str, scratch: Path, rank: int = 0, nodes: int = 1, port: int = 0, flags=FLAGS) -> subprocess.Popen:
    scratch.mkdir()
    told = {
        "PET_NNODES": str(nodes),
        "PET_NODE_RANK": str(rank),
        "PET_NPROC_PER_NODE": "1",
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(port or free_port()),
        "TMPDIR": str(scratch),
    }
    command = [sys.executable, "-m", "components.distill_distributed.node", "--result", f"{place}/result"]
    command += ["--result_mask", f"{place}/mask"]
    command += ["--inputs", json.dumps({name: f"{place}/inputs/{name}" for name in INPUTS}), "--flags", json.dumps(flags)]
    return subprocess.Popen(command, env=os.environ | told, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_nodes_train_together_and_one_hands_over(place, models, tmp_path):
    port = free_port()
    nodes = [start(place, tmp_path / f"scratch{rank}", rank, 2, port) for rank in (0, 1)]
    logs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], logs
    assert ["uploaded" in log for log in logs] == [True, False]
    storage.download(f"{place}/result", tmp_path / "result")
    storage.download(f"{place}/mask", tmp_path / "mask")
    stats = read_json(tmp_path / "result" / "distill_stats.json", dict)
    assert not (tmp_path / "result" / MASK_FILE).exists()
    assert [path.name for path in (tmp_path / "mask").iterdir()] == [MASK_FILE]
    assert fingerprint_of_file(tmp_path / "mask" / MASK_FILE) == stats["measured"]["mask"] == stats["details"]["inputs"]["mask"]
    assert stats["sparse_integrity_check"]["passed"]
    assert stats["details"]["inputs"]["mask"] == fingerprint_of_file(find_mask(models / "pruned"))
    assert stats["parameters"]["grad_accum_steps"] == 2  # 4 blocks per step over two processes
    assert [entry["stage"] for entry in read_history(tmp_path / "result")["steps"]][-1] == "distill"


def test_the_mask_of_a_node_that_was_lost_before_the_result_is_replaced(place, models, tmp_path):
    """And it can be another than the one that was given."""
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / MASK_FILE).write_bytes(b"of an attempt before")
    storage.upload(tmp_path / "before", f"{place}/mask")
    node = start(place, tmp_path / "scratch", flags=[*FLAGS, "--mask=admm", "--admm_interval=1"])
    log = node.communicate(timeout=300)[0]
    assert node.returncode == 0, log
    storage.download(f"{place}/result", tmp_path / "result")
    storage.download(f"{place}/mask", tmp_path / "mask")
    found = fingerprint_of_file(tmp_path / "mask" / MASK_FILE)
    measured = read_json(tmp_path / "result" / "distill_stats.json", dict)["measured"]
    assert measured["mask"] == found != fingerprint_of_file(find_mask(models / "pruned"))
    assert measured["mask_overlap"] < 1


def test_a_node_that_comes_too_late_does_nothing(place, models, tmp_path):
    storage.upload(models / "pruned", f"{place}/result")
    node = start(place, tmp_path / "scratch")
    log = node.communicate(timeout=120)[0]
    assert node.returncode == 0, log
    assert "the result is there already" in log
    assert list((tmp_path / "scratch").iterdir()) == []  # it has read no input


def test_a_failure_of_the_training_is_that_of_the_node(place, tmp_path):
    node = start(place, tmp_path / "scratch", flags=[*FLAGS, "--seq_len=1000000"])
    log = node.communicate(timeout=120)[0]
    assert node.returncode == 2, log
    assert "error: seq_len must be" in log
    assert "Traceback" not in log
    assert not storage.is_complete(f"{place}/result")


def test_an_input_that_is_not_there_stops_a_node(place, tmp_path):
    shutil.rmtree(Path(place, "inputs", "student_model"))
    node = start(place, tmp_path / "scratch")
    log = node.communicate(timeout=120)[0]
    assert node.returncode == 2, log
    assert f"error: place must hold an artifact, there is nothing at {place}/inputs/student_model" in log


@pytest.mark.parametrize(
    ("end", "code", "slept"),
    [
        (SystemExit(1), 1, [node.LAST_WORDS]),
        (ValueError("no such input"), 2, [node.LAST_WORDS]),
        (SystemExit(128 + signal.SIGTERM), 143, []),
    ],
    ids=["torchrun fails", "the node fails", "stopped"],
)
def test_a_node_that_failed_stays_until_its_log_can_have_been_read(monkeypatch, end, code, slept):
    def fail(_):
        raise end

    stays = []
    monkeypatch.setattr(node, "run", fail)
    monkeypatch.setattr(node.time, "sleep", stays.append)
    monkeypatch.setattr(node, "stop_at_sigterm", lambda: None)
    inputs = json.dumps(dict.fromkeys(INPUTS, "/place"))
    monkeypatch.setattr("sys.argv", ["node", "--result", "/result", "--inputs", inputs, "--flags", "[]"])
    with pytest.raises(SystemExit) as ended:
        node.main()
    assert ended.value.code == code
    assert stays == slept
    assert node.LAST_WORDS > 2 * watch.POLL_SECONDS
