"""The Argo workflow of a run, as KFP 2.17's compiler and its workflow controller make it, so far as its nodes' status goes.

Each stage is a driver's pod, and a DAG with one task, `executor`, that is skipped if the stage comes from the cache. The
executors of this project have a retry strategy; KFP 2.17's controller gives one to every other template too, so that each node
becomes one of type Retry with the tries below it.
"""

from datetime import UTC, datetime, timedelta

NAME = "compress-x7k2p"
START = datetime(2026, 11, 24, 8, tzinfo=UTC)
EXECUTOR, POD = "retry-system-container-executor", "retry-system-container-impl"


class Argo:
    """Builds a workflow; `retries` is whether the controller gives every template a retry strategy."""

    def __init__(self, retries=True):
        self.retries = retries
        self.nodes = {}

    def workflow(self):
        """The workflow as JSON, as it is now."""
        return {
            "metadata": {"name": NAME, "namespace": "alice"},
            "status": {"nodes": {name: dict(node) for name, node in self.nodes.items()}},
        }

    def stage(self, name, phase, *tries, inside=("root",), start=0, seconds=0, cached=False):
        """Add or replace a stage.

        Args:
            name: its name.
            phase: Running, Succeeded, Failed or Error.
            tries: (phase, message) for each of its pods.
            inside: the DAGs around it, the outermost first.
            start: seconds from the run's start.
            seconds: how long it took; nothing if it is running.
            cached: whether its executor is skipped.
        """
        times = {"start": start, "seconds": seconds}
        place = self._nested(NAME, "DAG", "entrypoint", "Running")
        for outer in inside:
            place = self._nested(f"{place}.{outer}", "DAG", outer.rpartition("(")[0] or outer, "Running")
        self._nested(f"{place}.{name}-driver", "Pod", "system-container-driver", "Succeeded", **times)
        place = self._nested(f"{place}.{name}", "DAG", EXECUTOR, phase, **times)
        if cached:
            self._node(f"{place}.executor", "Skipped", POD, "Skipped", "when 'true != true' evaluated false", **times)
        elif tries:
            self._node(f"{place}.executor", "Retry", POD, phase, **times)
            for number, (each, message) in enumerate(tries):
                self._node(f"{place}.executor({number})", "Pod", POD, each, message, start + number, seconds)
        return self

    def driver_fails(self, name, message):
        """Add a driver that fails, so that its stage never begins."""
        place = self._nested(NAME, "DAG", "entrypoint", "Failed")
        place = self._nested(f"{place}.root", "DAG", "root", "Failed")
        self._nested(f"{place}.{name}-driver", "Pod", "system-container-driver", "Failed", message)
        self._node(f"{place}.{name}", "Skipped", EXECUTOR, "Omitted", "omitted: depends condition not met")
        return self

    def _nested(self, name, *about, **times):
        """A node, or one with its only try below it; the name of the node that has what is inside."""
        if not self.retries:
            return self._node(name, *about, **times)
        _, *rest = about
        self._node(name, "Retry", *rest, **times)
        return self._node(f"{name}(0)", *about, **times)

    def _node(self, name, kind, template, phase, message="", start=0, seconds=0):
        begins = START + timedelta(seconds=start)
        self.nodes[node_id(name)] = {
            "id": node_id(name),
            "name": name,
            "displayName": name.rpartition(".")[2],
            "type": kind,
            "templateName": template,
            "phase": phase,
            "startedAt": f"{begins:%Y-%m-%dT%H:%M:%SZ}",
            "finishedAt": None if phase == "Running" else f"{begins + timedelta(seconds=seconds):%Y-%m-%dT%H:%M:%SZ}",
        } | ({"message": message} if message else {})
        return name

    def pod(self, *path):
        """The name of a stage's pod: its number and the names of what it is in, from the root to the stage."""
        number, *names = path
        place = ".".join(f"{name}(0)" if self.retries else name for name in (NAME, *names))
        return f"{NAME}-{POD}-{node_id(f'{place}.executor({number})').rpartition('-')[2]}"


def node_id(name):
    """A node's id: the workflow's name and the FNV-1a hash of the node's full name."""
    if name == NAME:
        return NAME
    value = 0x811C9DC5
    for byte in name.encode():
        value = (value ^ byte) * 0x01000193 & 0xFFFFFFFF
    return f"{NAME}-{value}"
