"""How to reach the store that holds a pipeline's artifacts, as KFP tells a stage with every artifact that it is given.

KFP 2.14 and newer write `store_session_info` into the metadata of input artifacts: provider, endpoint, region, TLS, and the
Kubernetes secret with the credentials, which its own launcher has just read as the pod's service account. A stage passes it on
to the processes that it starts, on this machine or on others, by the variables below. They apply to the artifacts' bucket
alone: other places are reached by the libraries' own settings.
"""

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from components.core.errors import shown
from components.core.reading import parse_json
from components.core.retry import TRANSIENT, TransientError, retried

INFO = "store_session_info"
STORE = "ARTIFACT_STORE"  # a Session as JSON
CREDENTIALS = ("ARTIFACT_STORE_ACCESS_KEY", "ARTIFACT_STORE_SECRET_KEY")
TOKEN = "ARTIFACT_STORE_TOKEN"  # a service account's key for gs://, as JSON
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
TIMEOUT = (5, 30)  # seconds to connect, and for the answer
PROVIDERS = ("minio", "s3", "gs")


class Told(TypedDict):
    """The content of `store_session_info`; KFP writes all values as strings."""

    Provider: str
    Params: NotRequired[dict[str, str] | None]


@dataclass(frozen=True, kw_only=True)
class Session:
    """One bucket and how to reach it.

    Attributes:
        bucket: `scheme://bucket`.
        endpoint: address of the server; empty = the provider's own.
        region: the server's region; empty = none.
        path_style: whether the bucket's name belongs into the path, not into the host's name.
        secret: Kubernetes secret with the credentials; empty = the pod's own identity.
        keys: variable → its key in the secret.
    """

    bucket: str
    endpoint: str
    region: str
    path_style: bool
    secret: str
    keys: dict[str, str]

    def covers(self, place: str) -> bool:
        """Whether a place lies in the bucket."""
        return place.startswith(f"{self.bucket}/")

    def as_env(self) -> list[dict[str, Any]]:
        """The variables for another pod in the format of a container's `env`; the secret is only referred to."""
        entries: list[dict[str, Any]] = [{"name": STORE, "value": json.dumps(asdict(self))}]
        for variable, key in self.keys.items():
            entries.append({"name": variable, "valueFrom": {"secretKeyRef": {"name": self.secret, "key": key}}})
        return entries


def session_of(uri: str, metadata: Mapping[str, Any]) -> Session | None:
    """The session of an artifact, or None if KFP has not told it.

    Args:
        uri: the artifact's URI.
        metadata: the artifact's metadata.

    Raises:
        ValueError: `store_session_info` is damaged, or its provider is unknown.
    """
    if not (info := metadata.get(INFO)):
        return None
    told = parse_json(str(info), INFO, Told)
    provider, params = told["Provider"], told.get("Params") or {}
    if provider not in PROVIDERS:
        raise ValueError(f"{INFO} must have a Provider among {', '.join(PROVIDERS)}, got {shown(provider)}")
    secret = "" if params.get("fromEnv", "").lower() == "true" else params.get("secretName", "")
    names = {TOKEN: "tokenKey"} if provider == "gs" else dict(zip(CREDENTIALS, ("accessKeyKey", "secretKeyKey"), strict=True))
    if secret and (missing := [name for name in names.values() if not params.get(name)]):
        raise ValueError(f"{INFO} must name the keys of secret {shown(secret)}, it has no {missing[0]}")
    endpoint = params.get("endpoint", "")
    if endpoint and "://" not in endpoint:
        endpoint = f"{'http' if params.get('disableSSL', '').lower() == 'true' else 'https'}://{endpoint}"
    return Session(
        bucket=_bucket(uri),
        endpoint=endpoint,
        region=params.get("region", ""),
        path_style=bool(endpoint) and params.get("forcePathStyle", "true").lower() == "true",
        secret=secret,
        keys={variable: params[name] for variable, name in names.items()} if secret else {},
    )


def use_store_of(uri: str, metadata: Mapping[str, Any], *places: str) -> None:
    """Have this process reach the store of an artifact as KFP says, if any of the places lies in the same bucket.

    Args:
        uri: the artifact's URI.
        metadata: the artifact's metadata.
        places: what this process and those that it starts will read and write.

    Raises:
        ValueError: as for `session_of` and `use_session`.
    """
    if any(_bucket(place) == _bucket(uri) for place in places):
        use_session(session_of(uri, metadata), *places)


def use_session(session: Session | None, *places: str) -> None:
    """Have this process and those that it starts reach the session's bucket as it says, if any of the places lies in it.

    Raises:
        ValueError: the secret cannot be read, or lacks a key.
    """
    if session is None or not any(map(session.covers, places)):
        return
    os.environ[STORE] = json.dumps(asdict(session))
    if session.secret:
        os.environ.update(_read_secret(session))


def _bucket(place: str) -> str:
    """`scheme://bucket` of a place; empty for a folder."""
    scheme, found, path = place.partition("://")
    return f"{scheme}://{path.partition('/')[0]}" if found else ""


def run_place(uri: str) -> str:
    """Where a run has its artifacts, given the URI of one: KFP puts it at `<run>/<task>/<unique>/<name>`."""
    return uri.rsplit("/", 3)[0]


def current_session(place: str) -> Session | None:
    """The session that this process uses for a place, if there is one."""
    if not (stored := os.environ.get(STORE)):
        return None
    session = parse_json(stored, STORE, Session)
    return session if session.covers(place) else None


def _read_secret(session: Session) -> dict[str, str]:
    from kubernetes import client, config
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    what = f"{INFO} names the secret {session.secret}, which"
    settings = client.Configuration()
    try:
        config.load_incluster_config(settings)
        namespace = NAMESPACE_FILE.read_text(encoding="utf-8").strip()
    except config.ConfigException as error:
        raise ValueError(f"{what} can only be read in a pod: {error}") from error
    settings.retries = False
    api = client.CoreV1Api(client.ApiClient(settings))

    def read() -> dict[str, str]:
        try:
            return api.read_namespaced_secret(session.secret, namespace, _request_timeout=TIMEOUT).data or {}
        except ApiException as error:
            kind = TransientError if error.status in TRANSIENT else ValueError
            raise kind(f"{what} cannot be read: {error.status}, {error.reason}") from error
        except HTTPError as error:
            raise TransientError(f"{what} cannot be read: {error}") from error

    found = retried(read)
    for key in session.keys.values():
        if key not in found:
            raise ValueError(f"{what} must have the key {key}, it has {', '.join(sorted(found)) or 'none'}")
    return {variable: base64.b64decode(found[key]).decode() for variable, key in session.keys.items()}
