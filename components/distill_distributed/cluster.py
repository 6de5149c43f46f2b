"""What the launcher asks of Kubernetes: its own pod, the job, the job's pods, their logs and events.

Everything is polled: a connection that drops is a request that is sent again, and there is no watch to lose events with.
Answers are plain dictionaries in Kubernetes' own form.
"""

import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError, ProtocolError, ReadTimeoutError
from urllib3.util import Retry

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
TIMEOUT = (5, 60)  # seconds to connect, and between two bytes of an answer
BACKOFF_SECONDS = 0.5  # doubled with each of the tries: with 9 of them an API server may be away for four minutes
TRIES = 9
GONE_PATIENCE = 300.0  # seconds in which a deleted job must be gone
TIMED_LINE = re.compile(r"\d{4}-\d\d-\d\dT\S+ ")  # all else in a log is what the kubelet says in its place


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
        except (ValueError, TypeError, KeyError):  # from a proxy in between, say
            reason = error.reason
        super().__init__(f"Kubernetes refused {request}: {error.status}, {reason}")
        self.status = error.status


class Client(client.ApiClient):
    """The client, whose errors are ours: each fits one line, and is a ValueError or OSError as everywhere else."""

    def request(self, method: str, url: str, *args: Any, **options: Any) -> Any:
        """Send a request. Raises ApiError if it is refused, OSError if there is no answer after all retries."""
        try:
            return super().request(method, url, *args, **options)
        except ApiException as error:
            raise ApiError(f"{method} {url}", error) from error
        except HTTPError as error:
            raise OSError(f"Kubernetes does not answer: {error}") from error


class Cluster:
    """A namespace of a cluster.

    Args:
        api: how to reach the API server.
        namespace: the namespace.
    """

    def __init__(self, api: client.ApiClient, namespace: str) -> None:
        self.api, self.namespace = api, namespace
        self.core, self.custom = client.CoreV1Api(api), client.CustomObjectsApi(api)

    @classmethod
    def connect(cls) -> "Cluster":
        """The cluster that this pod runs in, else that of the current kubeconfig context.

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
        settings.retries = Retry(
            total=TRIES,
            backoff_factor=BACKOFF_SECONDS,
            status_forcelist=(429, 500, 502, 503, 504),
            allowed_methods=None,  # a job is created by name: a second try gets 409 and adopts it
            raise_on_status=False,
        )
        return cls(Client(settings), namespace)

    def own_pod(self) -> dict[str, Any] | None:
        """The pod that this process runs in; None outside of a cluster."""
        if not NAMESPACE_FILE.exists():
            return None
        name = os.environ.get("KFP_POD_NAME") or os.environ["HOSTNAME"]
        return self._plain(self.core.read_namespaced_pod(name, self.namespace, _request_timeout=TIMEOUT))

    def create_job(self, kind: str, manifest: dict[str, Any]) -> dict[str, Any] | None:
        """Create a job; None if one of this name exists."""
        try:
            return self._plain(
                self.custom.create_namespaced_custom_object(*self._path(kind), manifest, _request_timeout=TIMEOUT)
            )
        except ApiError as error:
            if error.status == 409:
                return None
            raise

    def read_job(self, kind: str, name: str) -> dict[str, Any] | None:
        """A job; None if there is none of this name."""
        try:
            return self._plain(self.custom.get_namespaced_custom_object(*self._path(kind), name, _request_timeout=TIMEOUT))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def own_job(self, kind: str, name: str, owner: dict[str, Any]) -> None:
        """Make a job the child of another owner."""
        change = {"metadata": {"ownerReferences": [owner]}}
        self.custom.patch_namespaced_custom_object(*self._path(kind), name, change, _request_timeout=TIMEOUT)

    def delete_job(self, kind: str, name: str) -> None:
        """Delete a job and its pods, if it is there."""
        try:
            self.custom.delete_namespaced_custom_object(*self._path(kind), name, _request_timeout=TIMEOUT)
        except ApiError as error:
            if error.status != 404:
                raise

    def wait_until_gone(self, kind: str, name: str) -> None:
        """Wait until a deleted job is gone, finalizers and all, and its pods write nothing any more.

        Raises:
            ValueError: it does not go.
        """
        start = time.monotonic()
        while self.read_job(kind, name) is not None or self.pods_of(kind, name):
            if time.monotonic() - start > GONE_PATIENCE:
                raise ValueError(f"job {name} is deleted but still there after {GONE_PATIENCE:.0f} s: see its finalizers")
            time.sleep(1)

    def list_jobs(self, kind: str, label: str) -> list[dict[str, Any]]:
        """The jobs with a label `name=value`; none where the cluster does not know the kind."""
        try:
            found = self.custom.list_namespaced_custom_object(*self._path(kind), label_selector=label, _request_timeout=TIMEOUT)
        except ApiError as error:
            if error.status == 404:
                return []
            raise
        return list(found["items"])

    def pods_of(self, kind: str, name: str) -> list[dict[str, Any]]:
        """A job's pods, by name."""
        selector = f"{KINDS[kind].pods_label}={name}"
        found = self.core.list_namespaced_pod(self.namespace, label_selector=selector, _request_timeout=TIMEOUT)
        return sorted((self._plain(pod) for pod in found.items), key=lambda pod: str(pod["metadata"]["name"]))

    def log(self, pod: str, container: str, previous: bool, tail: int | None = None, seconds: int | None = None) -> list[str]:
        """Lines of a container's log, each with its time in front; none while there is no log, or no longer.

        Args:
            pod: the pod's name.
            container: the container's name.
            previous: of the container's last run instead of the present one.
            tail: only so many last lines.
            seconds: only lines of so many last seconds.
        """
        options = {name: value for name, value in (("tail_lines", tail), ("since_seconds", seconds)) if value is not None}
        for _ in range(TRIES):
            try:
                answer = self.core.read_namespaced_pod_log(
                    pod,
                    self.namespace,
                    container=container,
                    previous=previous,
                    timestamps=True,
                    _preload_content=False,  # the client would decode the bytes to their Python literal
                    _request_timeout=TIMEOUT,
                    **options,
                )
                lines = answer.data.decode("utf-8", errors="replace").split("\n")  # a carriage return ends no line
            except ApiError as error:
                if error.status in (400, 404):  # the container has not started, or the pod is gone
                    return []
                raise
            except (ProtocolError, ReadTimeoutError):  # halfway through the answer, which the client leaves to its caller
                time.sleep(BACKOFF_SECONDS)
            else:
                return [line for line in lines if TIMED_LINE.match(line)]
        raise OSError(f"the log of {pod} broke off {TRIES} times")

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
