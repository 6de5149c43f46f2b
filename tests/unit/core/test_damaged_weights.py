"""Weight files that lie, and configurations that do not fit them, are told from the headers alone."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from components.core.checkpoint.checks import check_checkpoint
from components.core.checkpoint.files import WEIGHTS_FILE, weight_files
from tests.conftest import save_tiny, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[3]
ROOM = 500 * 2**20  # bytes of address space beyond what the imports take; an embedding of three million words has 768 MB
WORDS = 3_000_000
PROGRAM = """
import resource, runpy, sys
import components.evaluate.stage, components.core.cli, optimum.quanto
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = taken + int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
runpy.run_module("components.evaluate", run_name="__main__", alter_sys=False)
"""


def evaluate(folder: Path, corpus: Path) -> subprocess.CompletedProcess[str]:
    """Evaluate a checkpoint in a process that may not take more memory than `ROOM`."""
    command = [sys.executable, "-c", PROGRAM, str(ROOM), "--model_dir", str(folder), "--eval_data", str(corpus)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    command += ["--eval_blocks", "2", "--eval_seq_len", "16"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.skipif(sys.platform != "linux", reason="the address space is limited on Linux alone")
@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_of_three_million_words_costs_no_memory(tmp_path, corpus, tied):
    folder = save_tiny(tmp_path / "model", "qwen3", tied)
    assert evaluate(folder, corpus).returncode == 0  # the model itself has room
    file = folder / "config.json"
    config = json.loads(file.read_text())
    assert WORDS * config["hidden_size"] * 4 > ROOM
    file.write_text(json.dumps(config | {"vocab_size": WORDS}))
    ended = evaluate(folder, corpus)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: model_dir must have a config.json that fits its ")
    assert ended.stderr.count("\n") == 1


@pytest.fixture
def sharded(tmp_path) -> Path:
    """A tiny checkpoint of several shards."""
    folder = tmp_path / "sharded"
    tiny_model().save_pretrained(folder, max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kept", ["none", "half of its header", "its header", "all but a byte"])
def test_one_truncated_shard_of_several_is_named(sharded, kept):
    files = weight_files(sharded)
    assert len(files) > 3
    damaged = files[2]
    whole = damaged.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    sizes = {"none": 0, "half of its header": 8 + length // 2, "its header": 8 + length, "all but a byte": len(whole) - 1}
    damaged.write_bytes(whole[: sizes[kept]])
    with pytest.raises(ValueError, match=rf"^{damaged} must be a safetensors file: [^\n]+$"):
        check_checkpoint("model_dir", sharded)


def beyond_the_end(entry: dict, other: dict) -> None:
    entry["data_offsets"] = [offset + 2**40 for offset in entry["data_offsets"]]


def backwards(entry: dict, other: dict) -> None:
    entry["data_offsets"] = entry["data_offsets"][::-1]


def negative(entry: dict, other: dict) -> None:
    entry["data_offsets"] = [-entry["data_offsets"][1], entry["data_offsets"][0]]


def over_another(entry: dict, other: dict) -> None:
    entry |= other


def too_short(entry: dict, other: dict) -> None:
    entry["data_offsets"][1] -= 4


def larger_shape(entry: dict, other: dict) -> None:
    entry["shape"] = [2**40, 64]


def shape_beyond_integers(entry: dict, other: dict) -> None:
    entry["shape"] = [2**62, 2**62]


def other_numbers(entry: dict, other: dict) -> None:
    entry["dtype"] = "F64"


LIES = [
    beyond_the_end,
    backwards,
    negative,
    over_another,
    too_short,
    larger_shape,
    shape_beyond_integers,
    other_numbers,
]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_a_header_that_lies_about_its_data_is_refused(checkpoint, tmp_path, lie):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "changed"))
    file = folder / WEIGHTS_FILE
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    names = sorted(name for name in header if name.endswith("_proj.weight"))
    lie(header[names[1]], header[names[2]])
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])
    with pytest.raises(ValueError, match=rf"^{file} must be a safetensors file: [^\n]+$"):
        check_checkpoint("model_dir", folder)


@pytest.mark.parametrize("length", [2**20, 2**40, 2**63, 2**64 - 1])
def test_a_header_that_lies_about_its_own_length_is_refused(checkpoint, tmp_path, length):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "changed"))
    file = folder / WEIGHTS_FILE
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    with pytest.raises(ValueError, match=rf"^{file} must be a safetensors file: [^\n]+$"):
        check_checkpoint("model_dir", folder)
