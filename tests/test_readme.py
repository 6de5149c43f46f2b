"""What the README says can be run, can be run."""

import re
from pathlib import Path

import pytest

from components.core.cli import parse
from components.distill.config import DistillConfig
from components.evaluate.config import EvaluateConfig
from components.fetch.config import FetchConfig
from components.prune.config import PruneConfig
from components.quantize.config import QuantizeConfig
from pipelines.cron import six_fields
from pipelines.package import read_package, read_parameters

README = (Path(__file__).parents[1] / "README.md").read_text()
STAGES = {
    "fetch": FetchConfig,
    "prune": PruneConfig,
    "distill": DistillConfig,
    "quantize": QuantizeConfig,
    "evaluate": EvaluateConfig,
}


@pytest.mark.parametrize("stage", STAGES)
def test_the_commands_of_the_readme_are_understood(stage, tmp_path, monkeypatch):
    command = re.search(rf"python -m components\.{stage} +((?:.*\\\n)*.*)", README)[1].replace("\\\n", " ").split()
    made_here = command[command.index("--output_dir") + 1] if "--output_dir" in command else None
    for folder in {"dense", "pruned", "distilled", "int8"} - {made_here}:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "sparsity_mask.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [stage, *command])
    assert isinstance(parse(STAGES[stage]), STAGES[stage])


def test_every_linked_file_is_there():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (Path(__file__).parents[1] / path).exists(), path


def test_the_make_targets_are_there():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    targets = re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert f"\n{target}:" in makefile, target


def test_the_runs_that_are_submitted_are_accepted():
    commands = [part.replace("\\\n", " ") for part in re.findall(r"pipelines/submit\.py ((?:.*\\\n)*.*)", README)]
    assert len(commands) == 2
    for command in commands:
        name = re.search(r"--pipeline \S*/([\w-]+)\.yaml", command)[1]
        assignments = [word for word in command.partition("--set ")[2].split("#")[0].split() if "=" in word]
        assert len(read_parameters(read_package(name), "", assignments)) == len(assignments) > 0


def test_manifests_and_schedules_are_named_as_they_are():
    for overlay in re.findall(r"kubectl apply -k (\S+)", README):
        assert (Path(__file__).parents[1] / overlay / "kustomization.yaml").is_file()
    for cron in re.findall(r"--cron '([^']+)'", README):
        assert six_fields(cron) == cron
