"""Watch a run on a cluster until it ends."""

import time
from typing import Any

from kfp.client import Client
from kfp_server_api import ApiException, V2beta1Run
from urllib3.exceptions import HTTPError

from components.core.progress import clock, log
from pipelines.api import REQUEST_SECONDS

FINISHED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
POLL_SECONDS = 10.0
SECONDS_BETWEEN_LINES = 60.0
RETRIES = 30  # consecutive polls without an answer, before giving up


def wait(client: Client, run_id: str, timeout: float) -> V2beta1Run:
    """Wait until a run ends; log a line whenever its state changes, and at least once a minute.

    Args:
        client: client of the KFP server that has the run.
        run_id: id of the run.
        timeout: maximum number of seconds to wait; 0 = no limit.

    Raises:
        ValueError: the timeout has passed; the run itself continues.
        ApiException: KFP rejects a request, or too many in a row fail.
        HTTPError: too many requests in a row do not reach KFP.
    """
    start = time.monotonic()
    told, told_at, silent = "", start, 0
    while True:
        try:
            run = client.runs.run_service_get_run(run_id=run_id, _request_timeout=REQUEST_SECONDS)
        except (ApiException, HTTPError) as error:
            silent += 1
            if silent > RETRIES or (isinstance(error, ApiException) and error.status < 500):
                raise
            state = "no answer, asking again"
        else:
            silent, state = 0, run.state or "PENDING"
        now = time.monotonic()
        if state != told or now - told_at >= SECONDS_BETWEEN_LINES:
            told, told_at = state, now
            log(f"{clock(now - start)} {state}")
        if state in FINISHED:
            return run
        if timeout and now - start >= timeout:
            raise ValueError(f"timeout must be longer than the run, got {timeout:g} seconds: it is {state} and goes on")
        time.sleep(POLL_SECONDS)


def problems(run: V2beta1Run) -> list[str]:
    """What the API reports about a run that did not succeed: the run first, then its failed tasks; empty if it succeeded."""
    if run.state == "SUCCEEDED":
        return []
    tasks = (run.run_details and run.run_details.task_details) or ()
    failed = [f"{task.display_name} failed{_because(task.error)}" for task in tasks if task.state == "FAILED"]
    return [f"the run is {run.state}{_because(run.error)}", *failed]


def _because(error: Any) -> str:
    return f": {error.message}" if error and error.message else ""
