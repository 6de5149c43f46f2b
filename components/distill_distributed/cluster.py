"""The launcher's requests to Kubernetes: its own pod, the job, the job's pods, their logs and events.

Everything is polled: if a connection drops, the request is simply sent again, and there is no watch that could miss events.
Responses are plain dictionaries in Kubernetes' own format.
"""

import copy
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
TIMEOUT = (5, 60)  # seconds to connect, and between two bytes of a response
BACKOFF_SECONDS = 0.5  # doubled after each try: 9 tries cover an API server outage of four minutes
TRIES = 9
# of a request that is made again later, or must be answered before this pod is killed
HASTY_TIMEOUT, HASTY_TRIES = (3, 5), 1
GONE_PATIENCE = 300.0  # seconds within which a deleted job must be gone
TIMED_LINE = re.compile(r"\d{4}-\d\d-\d\dT\S+ ")  # any other line in a log is a message from the kubelet


@dataclass(frozen=True)
class Kind:
    """A kind of job, and the label by which its pods are found."""

    group: str
    version: str
    plural: str
    pods_label: str


KINDS = {
    "pytorchjob": Kind("kubeflow.org", "v1", "pytorchjobs", "training.kubeflow.org/job-name"),
    "trainjob": Kind("trainer.kubeflow.org", "v1alpha1", "trainjobs", "jobset.sigs.k8s.io/jobset-name"),
}


class ApiError(ValueError):
    """The API server refused a request; `status` is the HTTP status."""

    def __init__(self, request: str, error: ApiException) -> None:
        try:
            reason = json.loads(error.body)["message"]
        except (ValueError, TypeError, KeyError):  # for example, from a proxy in between
            reason = error.reason
        super().__init__(f"Kubernetes refused {request}: {error.status}, {reason}")
        self.status = error.status


@contextmanager
def accepted(status: int) -> Iterator[None]:
    """Go on after a request that was refused with this status."""
    try:
        yield
    except ApiError as error:
        if error.status != status:
            raise


class Client(client.ApiClient):
    """The client, with one-line errors that are a ValueError or an OSError, as everywhere in this project."""

    def request(self, method: str, url: str, *args: Any, **options: Any) -> Any:
        """Send a request. Raises ApiError if it is refused, OSError if there is no response after all retries."""
        try:
            return super().request(method, url, *args, **options)
        except ApiException as error:
            raise ApiError(f"{method} {url}", error) from error
        except HTTPError as error:
            raise OSError(f"Kubernetes does not answer: {error}") from error


def make_client(settings: client.Configuration, tries: int) -> Client:
    """A client that sends a request again up to `tries` times, at growing intervals."""
    settings = copy.copy(settings)
    settings.retries = Retry(
        total=tries,
        backoff_factor=BACKOFF_SECONDS,
        status_forcelist=(429, 500, 502, 503, 504),
        allowed_methods=None,  # POST too: jobs are created by name, so a repeated request gets 409 and the job is adopted
        raise_on_status=False,
    )
    return Client(settings)


class Cluster:
    """One namespace of a cluster.

    Args:
        settings: address of the API server and how to log in.
        namespace: the namespace.
    """

    def __init__(self, settings: client.Configuration, namespace: str) -> None:
        self.api, self.hasty, self.namespace = make_client(settings, TRIES), make_client(settings, HASTY_TRIES), namespace
        self.core, self.custom = client.CoreV1Api(self.api), client.CustomObjectsApi(self.api)

    @classmethod
    def connect(cls) -> "Cluster":
        """Connect to the cluster that this pod runs in, or else that of the current kubeconfig context.

        Raises:
            ValueError: there is neither.
        """
        settings = client.Configuration()
        try:
            config.load_incluster_config(settings)
            namespace = NAMESPACE_FILE.read_text(encoding="utf-8").strip()
        except config.ConfigException:
            try:
                config.load_kube_config(client_configuration=settings)
            except config.ConfigException as error:
                raise ValueError(f"a job needs a cluster: this is no pod of one, and {error}") from error
            namespace = config.list_kube_config_contexts()[1]["context"].get("namespace", "default")
        return cls(settings, namespace)

    def own_pod(self) -> dict[str, Any] | None:
        """The pod that this process runs in; None outside a cluster."""
        if not NAMESPACE_FILE.exists():
            return None
        name = os.environ.get("KFP_POD_NAME") or os.environ["HOSTNAME"]
        return self._plain(self.core.read_namespaced_pod(name, self.namespace, _request_timeout=TIMEOUT))

    def create_job(self, kind: str, manifest: dict[str, Any]) -> dict[str, Any] | None:
        """Create a job; returns None if one with this name already exists."""
        with accepted(409):
            return self._plain(
                self.custom.create_namespaced_custom_object(*self._path(kind), manifest, _request_timeout=TIMEOUT)
            )
        return None

    def read_job(self, kind: str, name: str) -> dict[str, Any] | None:
        """A job, or None if there is no job with this name."""
        with accepted(404):
            return self._plain(self.custom.get_namespaced_custom_object(*self._path(kind), name, _request_timeout=TIMEOUT))
        return None

    def read_workflow(self, name: str) -> dict[str, Any] | None:
        """A run's Workflow, or None if there is none with this name. Raises ApiError or OSError within seconds."""
        path = ("argoproj.io", "v1alpha1", self.namespace, "workflows", name)
        workflows = client.CustomObjectsApi(self.hasty)
        with accepted(404):
            return self._plain(workflows.get_namespaced_custom_object(*path, _request_timeout=HASTY_TIMEOUT))
        return None

    def change_metadata(self, kind: str, name: str, metadata: dict[str, Any]) -> None:
        """Change a part of a job's metadata, if the job exists; None removes an entry."""
        change = {"metadata": metadata}
        with accepted(404):
            self.custom.patch_namespaced_custom_object(*self._path(kind), name, change, _request_timeout=TIMEOUT)

    def delete_job(self, kind: str, name: str) -> None:
        """Delete a job and its pods, if it exists."""
        with accepted(404):
            self.custom.delete_namespaced_custom_object(*self._path(kind), name, _request_timeout=TIMEOUT)

    def wait_until_gone(self, kind: str, name: str) -> None:
        """Wait until a deleted job, with its finalizers, and its pods are gone, so that nothing is written any more.

        Raises:
            ValueError: it is still there after `GONE_PATIENCE`.
        """
        start = time.monotonic()
        while self.read_job(kind, name) is not None or self.pods_of(kind, name):
            if time.monotonic() - start > GONE_PATIENCE:
                raise ValueError(f"job {name} is deleted but still there after {GONE_PATIENCE:.0f} s: see its finalizers")
            time.sleep(1)

    def wait_until_no_pods(self, selector: str) -> None:
        """Wait until no pod with a label `name=value` is left.

        Raises:
            ValueError: one is still there after `GONE_PATIENCE`.
        """
        start = time.monotonic()
        while pods := self.pods_with(selector):
            if time.monotonic() - start > GONE_PATIENCE:
                raise ValueError(f"pod {pods[0]['metadata']['name']} is still there after {GONE_PATIENCE:.0f} s")
            time.sleep(1)

    def list_jobs(self, kind: str, label: str) -> list[dict[str, Any]]:
        """The jobs with a label `name=value`; none if the cluster does not know the kind."""
        with accepted(404):
            found = self.custom.list_namespaced_custom_object(*self._path(kind), label_selector=label, _request_timeout=TIMEOUT)
            return list(found["items"])
        return []

    def pods_of(self, kind: str, name: str) -> list[dict[str, Any]]:
        """A job's pods, sorted by name."""
        return self.pods_with(f"{KINDS[kind].pods_label}={name}")

    def pods_with(self, selector: str) -> list[dict[str, Any]]:
        """The pods with a label `name=value`, sorted by name."""
        found = self.core.list_namespaced_pod(self.namespace, label_selector=selector, _request_timeout=TIMEOUT)
        return sorted((self._plain(pod) for pod in found.items), key=lambda pod: str(pod["metadata"]["name"]))

    def log(self, pod: str, container: str, previous: bool, tail: int | None = None, seconds: int | None = None) -> list[str]:
        """Lines of a container's log, each prefixed with its timestamp; none if there is no log yet, or it is already gone.

        Args:
            pod: the pod's name.
            container: the container's name.
            previous: read the log of the container's previous run instead of the current one.
            tail: read only this many lines, from the end.
            seconds: read only lines that are at most this many seconds old.

        Raises:
            ApiError, OSError: it cannot be read now, for example because the pod's machine is lost.
        """
        options = {name: value for name, value in (("tail_lines", tail), ("since_seconds", seconds)) if value is not None}
        try:
            answer = client.CoreV1Api(self.hasty).read_namespaced_pod_log(
                pod,
                self.namespace,
                container=container,
                previous=previous,
                timestamps=True,
                _preload_content=False,  # otherwise the client returns the bytes as a Python literal
                _request_timeout=HASTY_TIMEOUT,
                **options,
            )
            lines = answer.data.decode("utf-8", errors="replace").split("\n")  # a carriage return does not end a line
        except ApiError as error:
            if error.status in (400, 404):  # the container has not started, or the pod is gone
                return []
            raise
        except HTTPError as error:  # interrupted mid-response
            raise OSError(f"the log of {pod} broke off: {error}") from error
        return [line for line in lines if TIMED_LINE.match(line)]

    def events_of(self, name: str) -> list[dict[str, Any]]:
        """Events about an object, oldest first."""
        selector = f"involvedObject.name={name}"
        found = self.core.list_namespaced_event(self.namespace, field_selector=selector, _request_timeout=TIMEOUT)
        return sorted((self._plain(event) for event in found.items), key=lambda event: str(event.get("lastTimestamp") or ""))

    def _path(self, kind: str) -> tuple[str, str, str, str]:
        found = KINDS[kind]
        return found.group, found.version, self.namespace, found.plural

    def _plain(self, answer: Any) -> dict[str, Any]:
        plain: dict[str, Any] = self.api.sanitize_for_serialization(answer)
        return plain
