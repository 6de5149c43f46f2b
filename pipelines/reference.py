"""The tables of parameters in the documentation, generated from the settings by `python pipelines/reference.py`."""

import re
from collections.abc import Iterable
from pathlib import Path

from components.core.files import new_file
from components.distill.config import NOT_IN_PIPELINES as NOT_OF_DISTILL
from components.distill.config import DistillConfig
from components.prune.config import NOT_IN_PIPELINES as NOT_OF_PRUNE
from components.prune.config import PruneConfig
from pipelines import compress, compress_distributed
from pipelines.parameters import GROUPS, Parameter, help_of, parameters

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- {} begins; written by `make compile` -->", "<!-- {} ends -->"
TITLES = {
    "": "Shared by several stages",
    "prune": "Prune",
    "distill": "Distil",
    "quantize": "Quantize",
    "publish": "Publish",
    "pods": "Pods",
}


def table(entries: Iterable[Parameter]) -> str:
    """Parameters as a Markdown table."""
    lines = ["| parameter | type | default | |", "|---|---|---|---|"]
    for entry in entries:
        kind = entry.type.__name__ if isinstance(entry.type, type) else entry.type
        default = "" if entry.default == "" else f"`{entry.default!r}`"
        lines.append(f"| `{entry.name}` | {kind} | {default} | {_cell(entry.help)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def important() -> str:
    """The parameters that matter most, with their defaults."""
    made = {entry.name: entry for entry in parameters(GROUPS["compress"], model_id=compress.MODEL_ID)}
    shown = [(name, made[name].default) for name in compress.IMPORTANT]
    return ", ".join(f"`{name}`" if default == "" else f"`{name}` ({default})" for name, default in shown) + "."


def reference() -> str:
    """All parameters of both pipelines by stage, and the settings that only a stage's own command line has."""
    one_pod = parameters(GROUPS["compress"], model_id=compress.MODEL_ID)
    many_nodes = parameters(GROUPS["compress-distributed"], **compress_distributed.defaults())
    both = {entry.name for entry in one_pod} & {entry.name for entry in many_nodes}
    assert {entry.stage for entry in one_pod} <= TITLES.keys()
    parts = []
    for stage, title in TITLES.items():
        parts += [f"### {title}", table(entry for entry in one_pod if entry.stage == stage and entry.name in both)]
    parts += ["### Only `compress`: distillation in one pod", table(entry for entry in one_pod if entry.name not in both)]
    parts += [
        "### Only `compress-distributed`: distillation on many nodes",
        table(entry for entry in many_nodes if entry.name not in both),
    ]
    rows = ["| stage | setting | | why pipelines do not offer it |", "|---|---|---|---|"]
    for stage, config, left_out in (("prune", PruneConfig, NOT_OF_PRUNE), ("distill", DistillConfig, NOT_OF_DISTILL)):
        for name, reason in left_out.items():
            rows.append(f"| {stage} | `{name}` | {_cell(help_of(config, name))} | {reason} |")
    parts += ["### Only on a stage's own command line", "\n".join(rows)]
    return "\n\n".join(parts)


def rewritten(text: str, name: str, content: str) -> str:
    """The document, with the content between the markers for `name` replaced."""
    begin, end = BEGIN.format(name), END.format(name)
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    assert pattern.search(text), f"{begin} … {end} is missing"
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)


def documents() -> dict[Path, str]:
    """Path → up-to-date text of each document with tables of parameters."""
    made = {ROOT / "README.md": ("parameters", important()), ROOT / "pipelines" / "README.md": ("reference", reference())}
    return {path: rewritten(path.read_text(encoding="utf-8"), *content) for path, content in made.items()}


def main() -> None:
    """Write the documents."""
    for path, text in documents().items():
        with new_file(path) as scratch:
            scratch.write_text(text, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
