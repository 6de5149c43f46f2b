"""Watch a run on a cluster, stage by stage, until it ends."""

import re
import time
from typing import Any

from kfp.client import Client
from kfp_server_api import ApiException, V2beta1Run
from urllib3.exceptions import HTTPError

from components.core.errors import VALUE, one_line
from components.core.progress import clock, log
from pipelines.api import REQUEST_SECONDS
from pipelines.run_stages import Stage, read_log, read_stages

FINISHED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
POLL_SECONDS = 10.0
SECONDS_BETWEEN_LINES = 60.0
RETRIES = 30  # consecutive polls without an answer, before giving up
LOG_LINES = 20  # of a stage that failed
PERPLEXITY = re.compile(r"\[PPL\] (\S.*)")


def wait(client: Client, run_id: str, timeout: float) -> list[str]:
    """Wait until a run ends; tell what happens to its stages, whenever its state changes, and at least once a minute its state.

    Args:
        client: client of the KFP server that has the run.
        run_id: id of the run.
        timeout: maximum number of seconds to wait; 0 = no limit.

    Returns:
        Why the run did not succeed; empty if it did.

    Raises:
        ValueError: the timeout has passed; the run itself continues.
        ApiException: KFP rejects a request, or too many in a row fail.
        HTTPError: too many requests in a row do not reach KFP.
    """
    start = time.monotonic()
    told, told_at, silent = "", start, 0
    known: dict[str, tuple[str, int]] = {}  # stage → what has been told of it: state and tries
    while True:
        stages: list[Stage] = []
        try:
            run = client.runs.run_service_get_run(run_id=run_id, _request_timeout=REQUEST_SECONDS)
            stages = read_stages(client, run_id)
        except (ApiException, HTTPError) as error:
            silent += 1
            if silent > RETRIES or (isinstance(error, ApiException) and error.status < 500):
                raise
            state = "no answer, asking again"
        else:
            silent, state = 0, run.state or "PENDING"
        now = time.monotonic()
        for stage in stages:
            if known.get(stage.key) != (news := (stage.state, max(len(stage.pods), 1))):
                known[stage.key] = news
                _tell(client, run, stage, clock(now - start))
        if state != told or now - told_at >= SECONDS_BETWEEN_LINES:
            told, told_at = state, now
            running = ", ".join(stage.name for stage in stages if stage.state == "running")
            log(f"{clock(now - start)} {state}" + (f": {running}" if running else ""))
        if state in FINISHED:
            return _problems(run, stages)
        if timeout and now - start >= timeout:
            raise ValueError(f"timeout must be longer than the run, got {timeout:g} seconds: it is {state} and goes on")
        time.sleep(POLL_SECONDS)


def _tell(client: Client, run: V2beta1Run, stage: Stage, when: str) -> None:
    """Tell what has become of a stage; of one that failed, the end of its log as well."""
    reason = one_line(stage.reason, VALUE) or "no reason given"
    if stage.state == "cached":
        log(f"{when} {stage.name} is taken from the cache")
    elif stage.state == "running":
        log(f"{when} {stage.name} " + (f"is tried again: {reason}" if len(stage.pods) > 1 else "begins"))
    else:
        lines = read_log(client, run, stage)
        took = f"after {clock(stage.seconds)}"
        if stage.state == "failed":
            log(f"{when} {stage.name} failed {took}: {reason}; " + ("its log ends:" if lines else "its log cannot be read"))
            for line in lines[-LOG_LINES:]:
                log(f"    {_shown(line)}")
        else:
            measured = [match[1] for line in lines if (match := PERPLEXITY.search(line))]
            log(f"{when} {stage.name} ended {took}" + (f", {_shown(measured[-1])}" if measured else ""))


def _shown(line: str) -> str:
    """A line of a log, indented as it is, not too long, and without secrets and control characters."""
    line = "".join(filter(str.isprintable, line.rpartition("\r")[2].expandtabs()))  # before a \r is what was overwritten
    return line[: len(line) - len(line.lstrip())] + one_line(line)


def _problems(run: V2beta1Run, stages: list[Stage]) -> list[str]:
    if run.state == "SUCCEEDED":
        return []
    failed = " and ".join(stage.name for stage in stages if stage.state == "failed")
    return [f"the run is {run.state}" + (f": {failed} failed" if failed else _because(run.error))]


def _because(error: Any) -> str:
    return f": {error.message}" if error and error.message else ""
