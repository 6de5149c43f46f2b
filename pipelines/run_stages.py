"""The stages of a run on a cluster, as its Argo workflow has them, and what their pods logged.

KFP's v2beta1 API lists a run's tasks, but not what belongs to what (every stage has an `executor`), what its pods are called or
why one failed. The v1beta1 API of the same server hands out the workflow itself, which has all of it.
"""

import contextlib
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kfp.client import Client
from kfp_server_api import ApiException, V2beta1Run
from urllib3.exceptions import HTTPError

from components.core.reading import LARGEST, parse_json
from pipelines.api import REQUEST_SECONDS
from pipelines.transcript import own_lines

EXECUTOR, DRIVER = "system-container-executor", "-driver"  # how the templates end whose nodes are stages, or prepare them
FAILED = ("Failed", "Error")
TRY = re.compile(r"\(\d+\)$")  # Argo's mark of one try of a node; the items of a loop are marked (0:0)
ITEM = re.compile(r"\((\d+):")
# lines that KFP's launcher and Argo write into every pod's log
PLUMBING = re.compile(r'I\d{4} \d\d:\d\d:\d\d\.|time="?[\d-]+T\S+ level=(info|INFO) ')
# where a pod's log is: at the API server itself, and at the UI, which does not pass on the first of these paths
LOG_PATHS = ("/apis/v1alpha1/runs/{run}/nodes/{pod}/log", "/k8s/pod/logs")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of a run.

    Attributes:
        key: unique within the run, and the same at every look.
        name: the stage's name; in a loop with the number of the item, from 1.
        state: running, cached, succeeded or failed.
        seconds: how long it took; 0 while it runs.
        pods: names of its pods, one for each try, the oldest first.
        namespace: the namespace of the pods.
        reason: why the last try that failed did so, as Kubernetes or Argo says; empty = none failed.
    """

    key: str
    name: str
    state: str
    seconds: float
    pods: tuple[str, ...]
    namespace: str
    reason: str


def read_stages(client: Client, run_id: str) -> list[Stage]:
    """The stages of a run that have begun; none on a KFP that does not hand out workflows.

    Raises:
        ApiException: KFP refuses the request.
        HTTPError: KFP does not answer.
    """
    try:
        answer, *_ = client.runs.api_client.call_api(
            "/apis/v1beta1/runs/{run}",
            "GET",
            path_params={"run": run_id},
            header_params={"Accept": "application/json"},
            auth_settings=["Bearer"],
            response_type="object",
            _request_timeout=REQUEST_SECONDS,
        )
    except ApiException as error:
        if error.status == 404:
            return []
        raise
    text = answer.get("pipeline_runtime", {}).get("workflow_manifest") if isinstance(answer, dict) else None
    return stages(parse_json(text, f"the workflow of run {run_id}", dict[str, Any])) if text else []


def stages(workflow: dict[str, Any]) -> list[Stage]:
    """The stages of an Argo workflow that have begun, and the drivers that failed, in the order of their start."""
    nodes = sorted((workflow.get("status", {}).get("nodes") or {}).values(), key=lambda node: node.get("startedAt") or "")
    parts: dict[str, list[dict[str, Any]]] = {}  # the nodes that together are one stage: its tries, and what is above them
    for node in nodes:
        if node.get("templateName", "").endswith((EXECUTOR, DRIVER)) and node["type"] != "Skipped":
            parts.setdefault(TRY.sub("", node["name"]), []).append(node)
    found = ((tries[0]["templateName"], _stage(workflow, key, tries, nodes)) for key, tries in parts.items())
    return [stage for template, stage in found if template.endswith(EXECUTOR) or stage.state == "failed"]


def _stage(workflow: dict[str, Any], key: str, tries: list[dict[str, Any]], nodes: list[dict[str, Any]]) -> Stage:
    whole = next((node for node in tries if node["type"] == "Retry"), tries[-1])
    inside = [node for node in nodes if node["name"] == key or node["name"].startswith((f"{key}.", f"{key}("))]
    pods = [node for node in inside if node["type"] == "Pod"]
    if whole.get("phase") in FAILED:
        state = "failed"
    elif whole.get("phase") != "Succeeded":
        state = "running"
    else:  # the executor of a stage that comes from the cache is skipped
        state = "succeeded" if pods or all(node["type"] != "Skipped" for node in inside) else "cached"
    about = workflow["metadata"]
    failed = [node for node in (*reversed(pods), whole) if node.get("phase") in FAILED]
    numbers = (str(int(number) + 1) for number in ITEM.findall(key))
    return Stage(
        key=key,
        name=" ".join([TRY.sub("", whole["displayName"]), *numbers]),
        state=state,
        seconds=_seconds(whole),
        # each is named after the workflow, its template and the hash at the end of its node's id
        pods=tuple(f"{about['name']}-{node['templateName']}-{node['id'].rpartition('-')[2]}" for node in pods),
        namespace=about["namespace"],
        reason=next((node["message"] for node in failed if node.get("message")), ""),
    )


def _seconds(node: dict[str, Any]) -> float:
    if not node.get("startedAt") or not node.get("finishedAt"):
        return 0.0
    return (datetime.fromisoformat(node["finishedAt"]) - datetime.fromisoformat(node["startedAt"])).total_seconds()


def read_log(client: Client, run: V2beta1Run, stage: Stage) -> list[str]:
    """What a stage itself printed in its last pod, line by line, without what KFP and Argo say; empty = it cannot be read."""
    if not stage.pods:
        return []
    pod = stage.pods[-1]
    query = {"podname": pod, "podnamespace": stage.namespace, "runid": run.run_id, "createdat": f"{run.created_at:%Y-%m-%d}"}
    for path in LOG_PATHS:
        with contextlib.suppress(ApiException, HTTPError):  # it is at the other address, or the pod and its log are gone
            response = client.runs.api_client.call_api(
                path,
                "GET",
                path_params={"run": run.run_id, "pod": pod},
                query_params=list(query.items()),
                auth_settings=["Bearer"],
                _preload_content=False,
                _request_timeout=REQUEST_SECONDS,
            )
            if "html" not in response.headers.get("Content-Type", ""):  # the page of a login
                lines = response.read(LARGEST).decode(errors="replace").split("\n")
                return [line.rstrip() for line in own_lines(lines) if not PLUMBING.match(line)]
    return []
