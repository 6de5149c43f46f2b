"""How the command line of a stage exits."""

import signal
import subprocess
import sys
from pathlib import Path

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
