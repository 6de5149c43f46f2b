"""Run the whole pipeline on this machine, without a cluster: `python pipelines/run.py --model_id …`.

The very pipeline function that is compiled for clusters runs under `kfp.local`, one process a stage.
"""

import dataclasses
import inspect
import sys
import warnings
from dataclasses import field, make_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from docstring_parser import parse as parse_docstring
from kfp import local
from kfp.local import logging_utils
from rich.console import Console
from rich.table import Table

from components.core.cli import fail, parse
from components.core.files import check_new, read_json
from components.distill.config import DistillConfig
from components.distill_distributed.config import DistillDistributedConfig
from components.prune.config import PruneConfig
from components.publish.config import DestinationConfig
from components.quantize.config import QuantizeConfig
from components.resolve.config import ResolveConfig
from components.tokenize.config import TokenizeConfig
from pipelines.compress import compress

ON_CLUSTERS = ("gpu_type", "_gpus", "_cpu", "_memory")  # parameters that size pods


def settings_class() -> type:
    """A settings class with the pipeline's own parameters, defaults and help; those that size pods are left out."""
    function = compress.pipeline_func
    described = {entry.arg_name: entry.description for entry in parse_docstring(inspect.getdoc(function) or "").params}
    fields: list[Any] = [
        (
            "run_dir",
            str,
            field(default="", metadata={"help": "Folder to create for all artifacts; empty = runs/<date and time>."}),
        )
    ]
    for name, parameter in inspect.signature(function).parameters.items():
        if not name.endswith(ON_CLUSTERS):
            default = parameter.default
            made = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
            fields.append((name, parameter.annotation, field(**made, metadata={"help": described[name]})))
    return make_dataclass("Compress", fields, frozen=True, kw_only=True)


def check_parameters(values: dict[str, Any], run_dir: Path) -> None:
    """Check every parameter by the stages' own rules before the first stage starts.

    Raises:
        ValueError: names parameter, rule and value.
    """
    if not values["formats"]:
        raise ValueError(f"formats must name at least one format, got {values['formats']}")
    if values["skip_ppl_eval"] and values["max_ppl_ratio"]:
        raise ValueError(f"max_ppl_ratio must be 0 with skip_ppl_eval, got {values['max_ppl_ratio']}")
    if values["min_sparsity"] > values["sparsity"]:
        raise ValueError(f"min_sparsity must be at most sparsity = {values['sparsity']}, got {values['min_sparsity']}")
    # "." stands for folders that earlier stages will have made
    made_before = {"model_dir": ".", "output_dir": str(run_dir), "student_model": ".", "mask_file": "."}
    for config_class, more in (
        (ResolveConfig, {}),
        (TokenizeConfig, {}),
        (PruneConfig, {"mask_file": ""}),
        (DistillDistributedConfig if "handover" in values else DistillConfig, {"teacher_model": values["model_id"]}),
        (DestinationConfig, {}),
        *((QuantizeConfig, {"format": format}) for format in values["formats"]),
    ):
        names = {entry.name for entry in dataclasses.fields(config_class)}
        config_class(**{name: value for name, value in (made_before | values | more).items() if name in names})
    if values.get("distill_gpus", 0) not in (0, values["nproc_per_node"]):
        raise ValueError(f"nproc_per_node must be distill_gpus = {values['distill_gpus']}, got {values['nproc_per_node']}")


def plain_logs() -> None:
    """Leave out what kfp.local says about pods, and its colours where there is no terminal."""
    warnings.filterwarnings("ignore", module=r"kfp\.local")
    if not sys.stdout.isatty():
        for name in ("CYAN", "GREEN", "RED", "MAGENTA", "RESET"):
            setattr(logging_utils.Color, name, "")


def show(summary: Path) -> None:
    """Print the closing table and where the report is."""
    table = Table(title="Compressed")
    for column in ("stage", "perplexity", "sparsity", "size MB", "seconds", "peak GB"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for row in read_json(summary / "summary.json")["rows"]:
        table.add_row(
            row["name"],
            _number(row["perplexity"], 1, 2),
            _number(row["sparsity"], 1, 4),
            _number(row["bytes"], 1e6, 1),
            _number(row["seconds"], 1, 1),
            _number(row["peak_memory_bytes"], 1e9, 2),
        )
    console = Console()
    console.print(table)
    console.print(f"report: {summary / 'report.html'}", soft_wrap=True)


def _number(value: float | None, unit: float, digits: int) -> str:
    return "–" if value is None else f"{value / unit:.{digits}f}"


def main() -> None:
    """Read the flags, check them, run the pipeline, show the table."""
    settings = parse(settings_class(), "Prune, distil and quantize a language model on this machine.")
    values = {entry.name: getattr(settings, entry.name) for entry in dataclasses.fields(settings)}
    run_dir = Path(values.pop("run_dir") or f"runs/{datetime.now():%Y%m%d-%H%M%S}").absolute()
    try:
        check_new("run_dir", run_dir)
        check_parameters(values, run_dir)
    except ValueError as error:
        fail(error)
    for name in ("model_id", "train_data", "eval_data"):  # stages run elsewhere: a relative path would be lost
        if Path(values[name]).exists():
            values[name] = str(Path(values[name]).absolute())
    plain_logs()
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(run_dir))
    try:
        outputs = compress(**values).outputs
    except RuntimeError as error:
        fail(error)  # the failing stage's own line stands above; kfp's traceback would bury it
    show(Path(outputs["summary"].path))


if __name__ == "__main__":
    main()
