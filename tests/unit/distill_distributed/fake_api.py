"""A Kubernetes API server on loopback: kmock, with the selectors and logs that it lacks, and with faults.

What operators and nodes do is a story, a generator that advances by one step with each request for a job. A test thus defines
what happens between two polls of the launcher, and nothing depends on time. Objects have all fields that the client requires.
"""

import asyncio
import itertools
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

from aiohttp import web
from kmock import KubernetesEmulator, KubernetesError, KubernetesResourceNotFoundError, Server, subresource

NAMESPACE = "team"
RESOURCES = {"pytorchjob": "kubeflow.org/v1/pytorchjobs", "trainjob": "trainer.kubeflow.org/v1alpha1/trainjobs"}
WORKFLOWS = "argoproj.io/v1alpha1/workflows"
POD_LABELS = {"pytorchjob": "training.kubeflow.org/job-name", "trainjob": "jobset.sigs.k8s.io/jobset-name"}


def refusal(status):
    """The response with which Kubernetes rejects a request."""
    body = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": status, "message": "not now"}
    return web.json_response(body, status=status)


async def half(raw, answer):
    """Send the first half of a response and close the connection."""
    beginning = web.StreamResponse(status=answer.status, headers={"Content-Length": str(len(answer.body))})
    await beginning.prepare(raw)
    await beginning.write(answer.body[: len(answer.body) // 2])
    raw.transport.close()
    return beginning


class FakeApi(KubernetesEmulator):
    """The server's state, and what happens next.

    Attributes:
        faults: what goes wrong, as [method, path pattern, fault, how often]; a fault is a status to answer with, the seconds
            to delay the answer, "reset" (no answer, although the request was carried out) or "half" (half an answer).
        story: advances by one step before each answer about a job.
        lines: (pod, whether from the container's previous run) → (time, line) pairs of the log.
        instead_of_logs: what the kubelet answers if it finds no log; like the real one, with status 200.
        asked: "METHOD path?query" of each request that reached the server.
    """

    def __init__(self):
        super().__init__()
        self.faults, self.story, self.lines, self.asked = [], iter(()), {}, []
        self.instead_of_logs = ""
        self.events = itertools.count()
        for resource in (*RESOURCES.values(), WORKFLOWS, "v1/pods", "v1/events"):
            self.resources[resource] = {}
        self["list"] << self._select
        self["get", subresource("log")] << self._log

    async def __call__(self, raw):
        await raw.read()
        self.asked.append(f"{raw.method} {raw.path_qs}")
        for fault in self.faults:
            method, path, kind, left = fault
            if left and raw.method == method and re.search(path, raw.path):
                fault[3] -= 1
                break
        else:
            kind = None
        if isinstance(kind, int):
            return refusal(kind)
        if isinstance(kind, float):
            await asyncio.sleep(kind)
        if raw.method == "GET" and re.search("/(pytorchjobs|trainjobs)/", raw.path):
            try:
                next(self.story, None)
            except Exception:  # the test itself is wrong; without a job it ends
                self.objects.clear()
                raise
        answer = await super().__call__(raw)
        if kind == "reset":
            raw.transport.abort()
        return await half(raw, answer) if kind == "half" else answer

    def fail(self, method, path, kind, times=1):
        """Make requests fail."""
        self.faults.append([method, path, kind, times])

    def _select(self, request):
        """List the objects that match the label or field selector, which has the form name=value."""
        if request.resource not in self.resources:
            raise KubernetesResourceNotFoundError()
        found = [
            thing.raw
            for (resource, namespace, _), thing in self.objects.items()
            if (resource, namespace) == (request.resource, request.namespace) and not thing.deleted
        ]
        if "labelSelector" in request.params:
            label, _, value = request.params["labelSelector"].partition("=")
            found = [thing for thing in found if thing["metadata"].get("labels", {}).get(label) == value]
        if "fieldSelector" in request.params:
            _, _, value = request.params["fieldSelector"].partition("involvedObject.name=")
            found = [thing for thing in found if thing["involvedObject"]["name"] == value]
        return {"metadata": {}, "items": found}

    def _log(self, request):
        if self.instead_of_logs:
            return self.instead_of_logs.encode()
        lines = self.lines.get((request.name, request.params["previous"] == "True"))
        if lines is None:
            raise KubernetesError(status=400, message="container is waiting to start")
        if seconds := int(request.params.get("sinceSeconds", 0)):
            lines = [(time, line) for time, line in lines if time > datetime.now(UTC) - timedelta(seconds=seconds)]
        lines = lines[-int(request.params.get("tailLines", 0)) :]
        return "".join(f"{time:%Y-%m-%dT%H:%M:%S.%f}000Z {line}\n" for time, line in lines).encode()

    def job(self, kind="pytorchjob"):
        """The only job."""
        (job,) = [thing.raw for (resource, *_), thing in self.jobs(kind).items()]
        return job

    def jobs(self, kind="pytorchjob"):
        """All jobs."""
        return {
            key: thing for key, thing in self.objects.items() if key[0] == self.resource(RESOURCES[kind]) and not thing.deleted
        }

    def add_workflow(self, name, created="2026-01-01T00:00:00Z", metadata=None, **parts):
        """Add the Workflow of a run, or replace it."""
        metadata = {"name": name, "uid": f"uid-{name}", "creationTimestamp": created, **(metadata or {})}
        self.objects[WORKFLOWS, NAMESPACE, name] = {"metadata": metadata, **parts}

    def add_job(self, name="distill-1", kind="pytorchjob", **metadata):
        """Add a job as if a launcher had created it."""
        self.objects[RESOURCES[kind], NAMESPACE, name] = {"metadata": {"name": name, "namespace": NAMESPACE, **metadata}}

    def state(self, *types, kind="pytorchjob", reason="", message=""):
        """Set the job's conditions as the operator would, the last with reason and message; earlier ones become false."""
        (thing,) = self.jobs(kind).values()
        earlier = [entry["type"] for entry in thing.get("status", {}).get("conditions", []) if entry["type"] not in types]
        conditions = [{"type": each, "status": "False", "reason": each, "message": ""} for each in earlier]
        conditions += [{"type": each, "status": "True", "reason": each, "message": ""} for each in types]
        conditions[-1] |= {"reason": reason or types[-1], "message": message}
        thing.patch({"status": {"conditions": conditions}})

    def pod(self, name, phase="Running", kind="pytorchjob", unschedulable="", restarts=0, **states):
        """Set a pod of the job; `waiting`, `terminated` and `last` are its container's states as Kubernetes reports them."""
        (job,) = self.jobs(kind).values()
        scheduled = {"type": "PodScheduled", "status": "False" if unschedulable else "True"}
        if unschedulable:
            scheduled |= {"reason": "Unschedulable", "message": unschedulable}
        last = {"terminated": states.pop("last")} if "last" in states else {}
        container = {"name": "pytorch", "image": "image", "imageID": "", "ready": False, "restartCount": restarts}
        self.objects["v1/pods", NAMESPACE, name] = {
            "metadata": {"name": name, "uid": f"uid-{name}", "labels": {POD_LABELS[kind]: job["metadata"]["name"]}},
            "spec": {"containers": [{"name": "pytorch", "image": "image"}]},
            "status": {
                "phase": phase,
                "conditions": [scheduled],
                "containerStatuses": [] if unschedulable else [container | {"state": states, "lastState": last}],
            },
        }

    def run(self, *pods, phase="Running", kind="pytorchjob"):
        """Put all pods in the same phase."""
        for pod in pods:
            self.pod(pod, phase, kind)

    def say(self, pod, *lines, previous=False, age=0.0):
        """Add lines to a pod's log, from `age` seconds ago; those of one call have the same time."""
        time = datetime.now(UTC) - timedelta(seconds=age)
        self.lines.setdefault((pod, previous), []).extend((time, line) for line in lines)

    def warn(self, about, reason, message):
        """Add a warning event."""
        name = f"event-{next(self.events)}"
        self.objects["v1/events", NAMESPACE, name] = {
            "metadata": {"name": name},
            "involvedObject": {"name": about},
            "type": "Warning",
            "reason": reason,
            "message": message,
        }


def ended(code, reason, identity="first"):
    """How a container ended."""
    return {"exitCode": code, "reason": reason, "containerID": identity}


def kubeconfig(api):
    """Text of a kubeconfig that points to the server."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "fake",
        "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake", "namespace": NAMESPACE}}],
        "clusters": [{"name": "fake", "cluster": {"server": str(api.url).rstrip("/")}}],
        "users": [{"name": "fake", "user": {}}],
    }
    return json.dumps(config)


@contextmanager
def serving() -> Iterator[FakeApi]:
    """A fake API server on a free port."""
    started = Future()

    async def serve():
        async with FakeApi() as api, Server(api):
            stop = asyncio.Event()
            started.set_result((api, asyncio.get_running_loop(), stop))
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    api, loop, stop = started.result(timeout=60)
    try:
        yield api
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
