"""How the command line of a stage exits."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from components.core.process import run_to_end

ROOT = Path(__file__).parents[3]
STAGE = """
import sys, time, types
from components.core import cli
from components.core.files import new_directory, new_file
from components.fetch.config import FetchConfig

def run(config):
    with new_directory(config.output_dir) as scratch, new_file(config.output_dir + ".json") as file:
        (scratch / "model.safetensors").touch()
        file.touch()
        print("writing", flush=True)
        time.sleep(60)

sys.modules["slow"] = types.SimpleNamespace(run=run)
cli.main(FetchConfig, "slow")
"""


def test_a_stage_that_is_stopped_leaves_nothing(tmp_path):
    arguments = ["--model_id", "owner/name", "--output_dir", str(tmp_path / "output")]
    with subprocess.Popen([sys.executable, "-c", STAGE, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True) as stage:
        assert stage.stdout.readline() == "writing\n"
        assert len(list(tmp_path.iterdir())) == 2
        stage.terminate()
        assert stage.wait(30) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


LOST = """
import os, signal, types, sys
from components.core import cli
from components.fetch.config import FetchConfig

def run(config):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    except SystemExit as error:  # as numpy does while it is being imported
        raise ImportError("initialization failed") from error

sys.modules["lost"] = types.SimpleNamespace(run=run)
cli.main(FetchConfig, "lost")
"""


def test_a_stage_that_is_stopped_within_an_import_ends_as_stopped(tmp_path):
    arguments = ["--model_id", "owner/name", "--output_dir", str(tmp_path / "output")]
    ended = subprocess.run([sys.executable, "-c", LOST, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGTERM, "")


SLOW_SETTINGS = """
import dataclasses, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as for the first process of a container
from components.core import cli

@dataclasses.dataclass
class Config:
    x: int = 1
    def __post_init__(self):
        print("checking", flush=True)
        time.sleep(60)

cli.main(Config, "none")
"""
FORWARD = """
import os, sys
from components.core.process import run_to_end
run_to_end([sys.executable, "-c", sys.argv[1]], os.environ)
"""
LIKE_TORCHRUN = """
import signal, sys, time
def stop(*_):
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
print("running", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("code", "arguments", "line"), [(SLOW_SETTINGS, [], "checking\n"), (FORWARD, [LIKE_TORCHRUN], "running\n")]
)
def test_sigterm_while_settings_are_read_or_a_launcher_runs_is_the_exit_code(code, arguments, line):
    with subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == line
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM


def test_a_command_that_is_started_at_the_moment_of_sigterm_is_ended_too(monkeypatch):
    class Slow(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(subprocess, "Popen", Slow)
    start = time.monotonic()
    with pytest.raises(SystemExit) as end:
        run_to_end([sys.executable, "-c", "import time; time.sleep(60)"], os.environ)
    assert end.value.code == 128 + signal.SIGTERM
    assert time.monotonic() - start < 30
