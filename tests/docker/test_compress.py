"""The whole pipeline in the images on a tiny random model, not as root and without a network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from components.images import CPU_IMAGE, LAUNCHER_IMAGE
from tests.conftest import save_tiny
from tests.docker.compress import COMPILED, SECRETS

ROOT = Path(__file__).parents[2]
CANARY = "canary-7f1c0e5a-never-to-be-seen"
USER = os.getuid() or 1000  # can read and delete what the containers write, as they run as the tests' user unless it is root


@pytest.fixture(scope="module")
def finished(built, tmp_path_factory, corpus):
    for image in (CPU_IMAGE, LAUNCHER_IMAGE):
        built(image)
    folder = tmp_path_factory.mktemp("docker")
    save_tiny(folder / "dense", "qwen3", tied=True)
    shutil.copytree(corpus, folder / "corpus")
    (folder / "workspace").mkdir()
    for path in (folder, *folder.rglob("*")):
        os.chown(path, USER, -1)
    command = [sys.executable, "-m", "tests.docker.compress", str(folder), str(USER)]
    environment = os.environ | dict.fromkeys(SECRETS, CANARY)
    return folder, subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_run_ends_with_a_report_and_published_models(finished):
    folder, done = finished
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(next(folder.glob("compress-*/report/report_files/summary.json")).read_text())["rows"]
    assert {row["name"] for row in rows} == {"dense", "pruned", "distilled", "int8", "fp8"}
    assert all(abs(row["sparsity"] - 0.7) < 1e-3 for row in rows[1:])
    assert (folder / "published" / "latest.json").is_file()


def test_every_stage_ran_in_its_image_and_nothing_as_root(finished):
    folder, done = finished
    assert done.stdout.count(f"Found image {CPU_IMAGE!r}") == 7  # two formats
    assert done.stdout.count(f"Found image {LAUNCHER_IMAGE!r}") == 3  # resolve, the removal of checkpoints, publish
    written = [path for place in ("compress-*", "published") for path in folder.glob(f"{place}/**/*") if path.is_file()]
    assert len(written) > 20
    assert {path.stat().st_uid for path in written} == {USER}


def test_no_secret_of_the_environment_is_left_anywhere(finished):
    folder, done = finished
    assert CANARY not in done.stdout + done.stderr
    files = [path for place in (folder, COMPILED) for path in place.rglob("*") if path.is_file()]
    assert COMPILED / "compress.yaml" in files
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
