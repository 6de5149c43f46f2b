"""The stages of a run on this machine: a process each, which goes on or is taken as it is in a later run.

`kfp.local` walks through the pipeline. Two of its functions are replaced: the one that runs a task, to choose the folder for
its outputs, and the one that starts a task's process, to follow that process and to end it.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from kfp.local import subprocess_task_handler
from kfp.local.orchestrator import task_executor
from kfp.local.orchestrator.orchestrator_utils import OrchestratorUtils
from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineTaskSpec

from components.core.process import GRACE_SECONDS
from components.distill.checkpoints import CHECKPOINT_VARIABLE
from pipelines.run_folder import CHECKPOINTS, DONE, PROGRAM, TEMPORARY, is_complete, remove_outputs, set_complete, stage_folder
from pipelines.transcript import copy

FOR_CLUSTERS = ("remove_checkpoints",)  # a local run keeps its checkpoints in its own folder


class LocalStages:
    """Runs stages, several at a time in the loop over formats, and stops them.

    Args:
        run_dir: the run's folder.
        lock: the lock that each stage inherits.
        log: gets everything that the stages print.
        terminal: gets their own lines.

    Attributes:
        stopped_by: the signal that stopped the run; 0 = none.
    """

    def __init__(self, run_dir: Path, lock: TextIO, log: TextIO, terminal: TextIO) -> None:
        self.run_dir, self.lock, self.log, self.terminal = run_dir, lock, log, terminal
        self.running: set[subprocess.Popen[str]] = set()
        self.stopped_by = 0

    @contextlib.contextmanager
    def in_charge(self) -> Iterator[None]:
        """Run the tasks of `kfp.local`, and handle SIGTERM and SIGINT."""
        original_task, original_process = task_executor.execute_single_task, subprocess_task_handler.run_local_subprocess

        def run_task(**task: Any) -> Any:
            return original_task(**self._placed(task))

        handlers = {number: signal.signal(number, self.stop) for number in (signal.SIGTERM, signal.SIGINT)}
        task_executor.execute_single_task, subprocess_task_handler.run_local_subprocess = run_task, self.run
        try:
            yield
        finally:
            task_executor.execute_single_task, subprocess_task_handler.run_local_subprocess = original_task, original_process
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _placed(self, task: dict[str, Any]) -> dict[str, Any]:
        """A task of `kfp.local` with the folder for its outputs, and without retries, which are for pods."""
        spec = PipelineTaskSpec()
        spec.CopyFrom(task["task_spec"])
        spec.ClearField("retry_policy")
        name = spec.component_ref.name
        container = task["executors"][task["components"][name].executor_label].container
        arguments = OrchestratorUtils.make_task_arguments(spec.inputs, task["io_store"])
        place = stage_folder(name.removeprefix("comp-"), [*container.command, *container.args], arguments)
        if not spec.caching_options.enable_cache:
            (self.run_dir / place / DONE).unlink(missing_ok=True)
        return task | {"task_spec": spec, "pipeline_resource_name": place}

    def run(self, full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
        """Run a stage in its folder, unless it is complete there; returns its exit code."""
        *_, source, _, executor_input, _, stage = full_command
        outputs = json.loads(executor_input)["outputs"]
        folder = Path(outputs["outputFile"]).parents[1]
        if self.stopped_by:
            return 1
        if stage in FOR_CLUSTERS:
            return 0
        if is_complete(folder):
            self._say(f"== {stage}: done before, taken as it is")
            return 0
        self._say(f"== {stage}")
        if any(other.parent != folder for other in self.run_dir.glob(f"{stage}-*/{CHECKPOINTS}")):
            self._say(f"{stage}: the checkpoints here are of other parameters or inputs, so it starts from the beginning")
        remove_outputs(folder, outputs)
        folder.mkdir(exist_ok=True)
        program = folder / PROGRAM
        program.write_text(source, encoding="utf-8")
        # without the shell that kfp.local puts in between, which would not pass on a signal
        command = [sys.executable, "-m", "pipelines.stage_process", str(os.getpid()), "--component_module_path", str(program)]
        command += ["--executor_input", executor_input, "--function_to_execute", stage]
        places = {"TMPDIR": str(self.run_dir / TEMPORARY), CHECKPOINT_VARIABLE: str(folder / CHECKPOINTS)}
        code = self._follow(command, os.environ | (env_vars or {}) | places | {"_KFP_RUNTIME": "true"})
        if code == 0:
            set_complete(folder)
        return code

    def _follow(self, command: list[str], environment: dict[str, str]) -> int:
        """Run a process in a group of its own, which Ctrl-C does not reach, to its end."""
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
            pass_fds=(self.lock.fileno(),),
        ) as process:
            assert process.stdout
            self.running.add(process)
            try:
                if self.stopped_by:  # while it was started
                    process.terminate()
                copy(process.stdout, self.log, self.terminal)
            except BaseException:  # such as a full disk
                process.terminate()
                raise
            finally:
                process.wait()
                self.running.remove(process)
        return process.returncode

    def stop(self, number: int, _: FrameType | None) -> None:
        """Handle a signal: ask the stages to end, and kill them if they do not, or at the second signal."""
        if self.stopped_by:
            self._kill()
            return
        self.stopped_by = number
        for process in list(self.running):
            process.terminate()
        timer = threading.Timer(GRACE_SECONDS, self._kill)
        timer.daemon = True
        timer.start()

    def _kill(self) -> None:
        for process in list(self.running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _say(self, line: str) -> None:
        self.terminal.write(f"{line}\n")
        self.terminal.flush()
