"""The commands, links, files and parameters in the documentation are valid."""

import re
from pathlib import Path

import pytest

from components.core.cli import parse
from components.distill.config import DistillConfig
from components.evaluate.config import EvaluateConfig
from components.fetch.config import FetchConfig
from components.prune.config import PruneConfig
from components.publish.config import PublishConfig
from components.quantize.config import QuantizeConfig
from components.report.config import ReportConfig
from pipelines.cron import six_fields
from pipelines.package import read_package, read_parameters
from pipelines.parameters import GROUPS, parameters

ROOT = Path(__file__).parents[1]
NAMES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "components/README.md", "pipelines/README.md", "manifests/README.md")
DOCUMENTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
README = DOCUMENTS["README.md"]
FOLDERS = (".ci", "components", "docker", "manifests", "pipelines", "tests")
STAGES = {
    "fetch": FetchConfig,
    "prune": PruneConfig,
    "distill": DistillConfig,
    "quantize": QuantizeConfig,
    "evaluate": EvaluateConfig,
    "report": ReportConfig,
    "publish": PublishConfig,
}


def commands(text: str) -> list[str]:
    """The lines of all shell blocks, with continued lines joined and comments removed."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    return [line.split(" #")[0].strip() for line in blocks.splitlines() if line.strip()]


def anchors(path: Path) -> set[str]:
    """What a link can point to within a document, by GitHub's rule."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("stage", STAGES)
def test_the_stages_commands_are_understood(stage, tmp_path, monkeypatch):
    lines = commands(DOCUMENTS["pipelines/README.md"])
    first = next(line for line in lines if line.startswith(f"python -m components.{stage} "))
    command = first.split()[3:]
    made_here = command[command.index("--output_dir") + 1] if "--output_dir" in command else None
    for folder in {"dense", "pruned", "distilled", "int8", "report"} - {made_here}:
        (tmp_path / folder).mkdir()
        for file in ("sparsity_mask.safetensors", "compression.json", "report.html", "summary.json"):
            (tmp_path / folder / file).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [stage, *command])
    config = parse(STAGES[stage])
    assert isinstance(config, STAGES[stage])
    config.check_environment()


@pytest.mark.parametrize("name", NAMES)
def test_every_linked_file_and_heading_is_there(name):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", DOCUMENTS[name]):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("name", NAMES)
def test_every_file_that_is_named_is_there(name):
    known = {f"/{path.relative_to(ROOT)}" for folder in FOLDERS for path in (ROOT / folder, *(ROOT / folder).rglob("*"))}
    for path in re.findall(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.py)`", DOCUMENTS[name]):
        assert any(there.endswith(f"/{path.rstrip('/')}") for there in known), path


@pytest.mark.parametrize("name", NAMES)
def test_every_make_target_is_there(name):
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`|&& )make ([a-z][\w-]+)", DOCUMENTS[name], re.MULTILINE):
        assert f"\n{target}:" in makefile, target


def test_the_readme_has_the_two_commands():
    assert [line for line in commands(README) if line.startswith("make ")][:2] == ["make demo", "make test"]


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_that_is_named_is_there(name):
    known = {entry.name for groups in GROUPS.values() for entry in parameters(groups)}
    named = re.findall(r"`((?:prune|distill|quantize|publish)_[a-z_]+)(?=[`=])", DOCUMENTS[name])
    assert {*named} - known <= {"distill_distributed"}  # the stage


def test_the_runs_that_are_submitted_are_accepted():
    submitted = [line for text in DOCUMENTS.values() for line in commands(text) if "pipelines/submit.py" in line]
    assert len(submitted) == 2
    for command in submitted:
        name = re.search(r"--pipeline \S*/([\w-]+)\.yaml", command)[1]
        assignments = command.partition("--set ")[2].split()
        assert len(read_parameters(read_package(name), "", assignments)) == len(assignments) > 0


def test_manifests_and_schedules_are_named_as_they_are():
    text = "\n".join(DOCUMENTS.values())
    for folder in re.findall(r"kubectl apply -k (\S+)", text):
        assert (ROOT / folder / "kustomization.yaml").is_file()
    for cron in re.findall(r"--cron '([^']+)'", text):
        assert six_fields(cron) == cron
