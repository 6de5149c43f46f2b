"""The end of each node's log, read while the nodes live: when a job fails, its operator takes the failing pod away at once."""

import re
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from components.core import storage
from components.core.errors import SECRETS
from components.core.progress import log
from components.distill_distributed.cluster import ApiError, Cluster

READ_LINES = 1000  # of a node, in one request
KEPT_LINES = 200  # of those, in memory
KEPT_CHARACTERS = 2000  # of each line
TOLD_LINES = 40  # when a node has failed
OVERLAP_SECONDS = 30  # between what two requests cover, since clocks differ
RANK = re.compile(r"\[rank\d+\]: ")  # with which torch marks the lines of a process's traceback
# how a process or torchrun ends when another node is lost; torchrun also ends so when one of its processes has failed, which
# has told why itself
OF_OTHERS = re.compile(r"\S*Error: .*gloo/transport|torch\.distributed\.\S+(Error|Exception)\b")
SUMMARY = "=" * 60  # torchrun's, after its traceback, begins and ends with this line
# of C++, and between two tracebacks
FRAMES = re.compile(r"frame #\d+: |Exception raised from .*\(most recent call first\):|<omitting python frames>")
BETWEEN = re.compile(r"$|The above exception was the direct cause|During handling of the above exception")


@dataclass
class Node:
    """What is known of a node's log.

    Attributes:
        pod: uid of its pod.
        stamp: time of the newest line that was read from this pod.
        read_at: when the whole of this pod's log was last read; None = never.
        restarts: how often its container had been restarted by then.
        kept: the last lines of the node, over all its containers and pods, with their times.
        untold: how many of the newest lines have not been printed.
        failed: whether the last try to read the log failed.
    """

    pod: str = ""
    stamp: str = ""
    read_at: float | None = None
    restarts: int = 0
    kept: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    untold: int = 0
    failed: bool = False


class NodeLogs:
    """The logs of a job's nodes.

    Args:
        cluster: where the job is.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.nodes: dict[str, Node] = {}

    def read(self, pods: list[dict[str, Any]]) -> None:
        """Read what is new in the pods' logs; print all lines of the first node, which logs for all."""
        first = min([*self.nodes, *(pod["metadata"]["name"] for pod in pods)], default="")
        for pod in pods:
            if pod["status"].get("phase") in ("Running", "Succeeded", "Failed"):
                self._read(pod, leads=pod["metadata"]["name"] == first)

    def _read(self, pod: dict[str, Any], leads: bool) -> None:
        """Read what is new in a pod's log, that of its container before a restart included; of most nodes only the end.

        Each request covers the time since the last one, with some overlap, and known lines are skipped, so that nothing is lost
        or repeated when a request fails or another launcher takes over. What cannot be read now is read at the next call: the
        pod's machine may be lost.
        """
        name, uid, container = pod["metadata"]["name"], pod["metadata"]["uid"], pod["spec"]["containers"][0]["name"]
        counts = {status["name"]: int(status["restartCount"]) for status in pod["status"].get("containerStatuses", [])}
        node = self.nodes.setdefault(name, Node())
        if node.pod != uid:
            node.pod, node.stamp, node.read_at, node.restarts = uid, "", None, 0
        now, restarts, node.failed = time.monotonic(), counts.get(container, 0), True
        tail = None if leads else READ_LINES
        seconds = None if node.read_at is None else int(now - node.read_at) + OVERLAP_SECONDS
        try:
            if restarts > node.restarts:
                self._take(name, self.cluster.log(name, container, True, tail, seconds), leads)
            self._take(name, self.cluster.log(name, container, False, tail, seconds), leads)
        except (ApiError, OSError):
            return
        node.read_at, node.restarts, node.failed = now, restarts, False

    def _take(self, name: str, lines: list[str], leads: bool) -> None:
        """Keep the lines of a node that are new."""
        node = self.nodes[name]
        new = [line for line in lines if line.partition(" ")[0] > node.stamp]  # several lines may have the same time
        if not new:
            return
        node.stamp, new = new[-1].partition(" ")[0], folded(new)
        node.kept.extend(line[:KEPT_CHARACTERS] for line in new)
        node.untold = min(node.untold + len(new), TOLD_LINES)
        if leads:
            show(name, new)
            node.untold = 0

    def tell(self, name: str) -> bool:
        """Print those of a node's last lines that have not been printed; returns whether there can be no more of them."""
        node = self.nodes.get(name, Node())
        if node.untold:
            log(f"the last lines of {name}:")
            show(name, list(node.kept)[-node.untold :])
            node.untold = 0
        return not node.failed

    def save(self, place: str) -> None:
        """Write the last lines of every node to `<place>/<pod>.log`, if the place can be written."""
        if not self.nodes:
            return
        try:
            for name, node in self.nodes.items():
                text = SECRETS.sub("***", "".join(f"{line}\n" for line in node.kept))
                storage.write_bytes(f"{place}/{name}.log", text.encode())
        except (ValueError, OSError) as error:
            log(f"the last lines of the nodes could not be saved: {error}")
        else:
            log(f"the last lines of {', '.join(sorted(self.nodes))} are in {place}")


def show(name: str, lines: list[str]) -> None:
    """Print lines of a node's log."""
    for line in lines:
        log(f"  {name}| {without_time(line)}")


def without_time(line: str) -> str:
    """A line without the time that Kubernetes puts in front."""
    return line.partition(" ")[2]


def folded(lines: list[str]) -> list[str]:
    """Lines of a log, where a traceback that only tells of the loss of another node is shortened to its last line."""
    shown: list[str] = []
    begun: dict[str, list[str]] = {}  # prefix of a process → its traceback, since those of several processes mix
    after = False  # a traceback that was shortened
    inside = False  # torchrun's summary
    for line in lines:
        text = without_time(line)
        prefix = found[0] if (found := RANK.match(text)) else ""
        text = text.removeprefix(prefix)
        if inside or (after and text == SUMMARY):
            inside = (text == SUMMARY) != inside
        elif text.startswith("Traceback (most recent call last):"):
            begun[prefix] = [line]
        elif prefix in begun and text.startswith(" "):
            begun[prefix].append(line)
        elif prefix in begun:
            traceback, after = begun.pop(prefix), OF_OTHERS.match(text) is not None
            shown += [f"{line.rstrip()} (traceback of {len(traceback)} lines left out)"] if after else [*traceback, line]
        elif not FRAMES.match(text) and not (after and BETWEEN.match(text)):
            shown.append(line)
            after = False
    return [*shown, *(line for traceback in begun.values() for line in traceback)]
