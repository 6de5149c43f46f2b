"""Run the whole pipeline on this machine, without a cluster: `python pipelines/run.py --model_id …`.

`kfp.local` runs the same pipeline function that is compiled for clusters, with one process per stage. The same command with the
same `--run_dir` goes on with a run that was stopped, killed or failed.
"""

import dataclasses
import inspect
import signal
import sys
import warnings
from dataclasses import field, make_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from kfp import local
from rich.console import Console
from rich.table import Table

from components.core.cli import errors_in_one_line, fail, parse, stop_at_sigterm
from components.core.history import REPORT_PAGE, REPORT_SUMMARY
from components.core.reading import read_json
from components.core.settings import naming
from pipelines.checks import check_parameters
from pipelines.compress import MODEL_ID, compress
from pipelines.local_stages import LocalStages
from pipelines.parameters import GROUPS, parameters
from pipelines.run_folder import TEMPORARY, check_run_dir, remove_unfinished, used_alone
from pipelines.sizes import PodSettings
from pipelines.transcript import log_file

HERE = [group for group in GROUPS["compress"] if group.settings is not PodSettings]
LOG = "run.log"
RUN_DIR_HELP = (
    "Folder for all artifacts; empty = runs/<date and time>. In the folder of an earlier run, a stage that is complete there "
    "with the same parameters and inputs is not run again."
)


def settings_class() -> type:
    """A settings class with the pipeline's parameters, defaults and help, except for pod sizes, as there are no pods."""
    run_dir = field(default="", metadata={"help": RUN_DIR_HELP})
    fields: list[Any] = [("run_dir", str, run_dir)]
    for parameter in parameters(HERE, model_id=MODEL_ID):
        default = parameter.default
        made: dict[str, Any] = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
        assert default is not inspect.Parameter.empty
        fields.append((parameter.name, parameter.type, field(**made, metadata={"help": parameter.help})))
    made_class = make_dataclass("Compress", fields, frozen=True, kw_only=True)
    made_class.__module__ = "builtins"  # it has no source, which would be looked for at length for each field
    return made_class


def show(report_files: Path, log_file: Path) -> None:
    """Print the final table and the paths of the log and the report."""
    table = Table(title="Compressed")
    for column in ("stage", "perplexity", "sparsity", "size MB", "seconds", "peak GB"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for row in read_json(report_files / REPORT_SUMMARY, dict[str, Any])["rows"]:
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
    console.print(f"full log: {log_file}", soft_wrap=True)
    console.print(f"report: {report_files / REPORT_PAGE}", soft_wrap=True)


def _number(value: float | None, unit: float, digits: int) -> str:
    return "–" if value is None else f"{value / unit:.{digits}f}"


def main() -> None:
    """Parse and check the flags, run the pipeline and print the table."""
    settings = parse(settings_class(), "Prune, distil and quantize a language model on this machine.")
    values = {entry.name: getattr(settings, entry.name) for entry in dataclasses.fields(settings)}
    stop_at_sigterm()
    run_dir = Path(values.pop("run_dir") or f"runs/{datetime.now():%Y%m%d-%H%M%S}").absolute()
    with errors_in_one_line(), naming(settings):
        check_run_dir(run_dir)
        check_parameters(HERE, values, on_this_machine=True)
        for name in ("model_id", "train_data", "eval_data"):  # a stage may run in another working directory
            if Path(values[name]).exists():
                values[name] = str(Path(values[name]).absolute())
    try:
        with errors_in_one_line(), used_alone(run_dir) as lock:
            report_files = run(run_dir, lock, values)
    except RuntimeError as error:
        fail(error)
    except KeyboardInterrupt:  # before the stages
        raise SystemExit(128 + signal.SIGINT) from None
    show(report_files, run_dir / LOG)


def gpus_here(values: dict[str, Any]) -> dict[str, int]:
    """What the parameters for the GPUs of pods would be for this machine: one for each process, as far as there are any."""
    from components.core.device import visible_gpus  # torch, for which --help and wrong flags need not wait

    visible = visible_gpus()
    stages = ("prune", "distill", "quantize")
    return {f"{stage}_gpus": min(values.get(f"{stage}_nproc_per_node", 1), visible) for stage in stages}


def run(run_dir: Path, lock: TextIO, values: dict[str, Any]) -> Path:
    """Run the pipeline; returns the report's folder.

    Raises:
        RuntimeError: a stage failed.
        SystemExit: a signal has stopped the run.
    """
    warnings.filterwarnings("ignore", module=r"kfp\.local")  # its warnings about pods do not apply here
    workspace = str(run_dir / TEMPORARY / "workspace")  # by default, kfp.local makes one in /tmp
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(run_dir), workspace_root=workspace)
    terminal = sys.stdout
    with log_file(run_dir / LOG) as log:
        stages = LocalStages(run_dir, lock, log, terminal)
        try:
            with stages.in_charge():
                outputs = compress(**values, **gpus_here(values)).outputs
        except RuntimeError as error:  # the failing stage's own lines are above; kfp's traceback would bury them
            if stages.stopped_by:
                print(f"stopped; the same command with --run_dir {run_dir} goes on from here", file=sys.stderr)
                raise SystemExit(128 + stages.stopped_by) from None
            error.args = (f"{error}; the full log is {run_dir / LOG}",)
            raise
    remove_unfinished(run_dir)
    return Path(outputs["report_files"].path)


if __name__ == "__main__":
    main()
