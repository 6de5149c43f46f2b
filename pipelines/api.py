"""Access to the KFP API: log in, upload a pipeline version, and report errors in one line.

Logging in works as in `kfp.Client`: by a token in KF_PIPELINES_TOKEN, cookies in KF_PIPELINES_COOKIES, a pod's projected
service account token, or the current kubectl context. Credentials are never flags, which keeps them out of the shell history.
"""

import contextlib
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfp.client import KF_PIPELINES_SA_TOKEN_ENV, KF_PIPELINES_SA_TOKEN_PATH, Client, ServiceAccountTokenVolumeCredentials
from kfp.client.client import KF_PIPELINES_ENDPOINT_ENV
from kfp_server_api import ApiException, V2beta1Pipeline, V2beta1PipelineVersion
from simple_parsing.helpers import field as flag
from urllib3.exceptions import HTTPError, MaxRetryError

from components.core.checks import check_not_empty
from components.core.errors import VALUE, one_line
from components.core.progress import log
from pipelines.package import Package

TOKEN, COOKIES = "KF_PIPELINES_TOKEN", "KF_PIPELINES_COOKIES"
REQUEST_SECONDS = 60  # kfp sets no timeout, so a lost connection would hang forever


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Which KFP server to use."""

    host: str = ""
    """Address of the KFP API; empty = KF_PIPELINES_ENDPOINT, the cluster this runs in, or the current kubectl context."""
    namespace: str = ""
    """Profile namespace, for a multi-user KFP only."""

    def __post_init__(self) -> None:
        if self.host and (not self.host.startswith(("http://", "https://")) or "@" in self.host):
            raise ValueError("host must begin with http:// or https:// and hold no password, log in by environment variables")
        for name in (TOKEN, COOKIES):
            if not (value := os.environ.get(name, "").strip()).isascii() or not value.isprintable():
                raise ValueError(f"{name} must be one line of plain characters")  # without the value, which is secret


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(ServerConfig):
    """Which pipeline to run, and how."""

    pipeline: str = "compress"
    """Name of a pipeline in pipelines/compiled, or the path of a compiled YAML file."""
    params: str = ""
    """YAML file with values for the pipeline's parameters; empty = none."""
    set: list[str] = flag(default_factory=list, action="extend")  # noqa: RUF009 (it is a field)
    """Values for the pipeline's parameters, as name=value; they override those in the params file."""
    experiment: str = "sparse-distill"
    """Experiment to put the runs in; created if it does not exist."""
    service_account: str = ""
    """Kubernetes service account of the pods; empty = KFP's own."""
    no_cache: bool = False
    """Recompute everything; uploads a separate pipeline version that has caching disabled."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_empty("experiment", self.experiment)


class _Client(Client):
    def get_kfp_healthz(self, sleep_duration: int = 5) -> Any:
        """Check that the host is KFP. kfp's own method retries for 25 seconds and prints a traceback each time."""
        health, _, headers = self._healthz_api.healthz_service_get_healthz_with_http_info(_request_timeout=REQUEST_SECONDS)
        if "json" not in headers.get("Content-Type", ""):
            raise ValueError(f"host must answer as the KFP API, got a web page; is it a login page? Set {TOKEN} or {COOKIES}")
        return health


def connect(config: ServerConfig) -> Client:
    """Log in and make sure that KFP answers."""
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # its retry warnings repeat what the final error says
    token_file = Path(os.environ.get(KF_PIPELINES_SA_TOKEN_ENV) or KF_PIPELINES_SA_TOKEN_PATH)
    with _looking_around(config.host or os.environ.get(KF_PIPELINES_ENDPOINT_ENV, "")):
        client = _Client(
            host=config.host or None,
            existing_token=os.environ.get(TOKEN, "").strip() or None,
            cookies=os.environ.get(COOKIES, "").strip() or None,
            credentials=ServiceAccountTokenVolumeCredentials(str(token_file)) if token_file.is_file() else None,
        )
    client.get_kfp_healthz()
    return client


@contextlib.contextmanager
def _looking_around(host: str) -> Iterator[None]:
    """Keep quiet what kfp says while it tries one way to the server after the other; what fails in the end is an error anyway.

    With an address it prints only what somebody who logs in must see.
    """
    out = contextlib.nullcontext() if host else contextlib.redirect_stdout(io.StringIO())
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), out:
            yield
    finally:
        logging.disable(logging.NOTSET)


@contextlib.contextmanager
def plain_errors(host: str) -> Iterator[None]:
    """Turn errors of the API or the network into a ValueError with a one-line message that contains no secrets.

    Raises:
        ValueError: in place of any API or network error.
    """
    try:
        yield
    except ApiException as error:
        raise ValueError(_explain(error)) from None  # the chained error would print headers and body
    except HTTPError as error:
        reason = error.reason if isinstance(error, MaxRetryError) else error
        raise ValueError(
            f"host must be a KFP API that can be reached, got {one_line(host, VALUE) or 'none'}: {reason}"
        ) from None


def _explain(error: ApiException) -> str:
    if error.status == 401:
        return f"KFP asks for a login (401): {TOKEN} or {COOKIES} must hold one that is valid"
    try:
        said = json.loads(error.body or "")
        message = str(said.get("message") or said.get("error"))
    except (ValueError, AttributeError):  # not JSON, such as a proxy's error page
        message = str(error.reason)
    secrets = [os.environ.get(TOKEN, ""), *(part.partition("=")[2] for part in os.environ.get(COOKIES, "").split(";"))]
    for secret in filter(None, map(str.strip, secrets)):
        message = message.replace(secret, "…")
    meaning = {403: "this login may not do that", 404: "not found, or host is not the address of KFP"}
    return f"KFP answered {error.status} ({meaning.get(error.status, error.reason)}): {message}"


def everything(list_page: Callable[..., Any], items: str, **where: Any) -> Iterator[Any]:
    """All items from one of the client's paginated list functions; `items` is the attribute of a page that holds them."""
    token = ""
    while True:
        page = list_page(page_token=token, page_size=100, **where)
        yield from getattr(page, items) or ()
        if not (token := page.next_page_token):
            return


def _named(things: Iterable[Any], name: str) -> Any:
    return next((thing for thing in things if thing.display_name == name), None)


def upload(client: Client, package: Package, namespace: str) -> V2beta1PipelineVersion:
    """The pipeline version with exactly this YAML, which is uploaded unless it already exists."""
    where = namespace or None
    pipeline = _named(everything(client.list_pipelines, "pipelines", namespace=where), package.name)
    if pipeline is None:  # kfp's upload of a new pipeline would name its first version after the pipeline
        wanted = V2beta1Pipeline(display_name=package.name, description=package.description, namespace=where)
        pipeline = client.pipelines.pipeline_service_create_pipeline(pipeline=wanted)
    versions = everything(client.list_pipeline_versions, "pipeline_versions", pipeline_id=pipeline.pipeline_id)
    if version := _named(versions, package.version):
        log(f"{package.name} {package.version} is there already, nothing uploaded")
        return version
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{package.name}.yaml"
        path.write_bytes(package.content)
        version = client.upload_pipeline_version(str(path), package.version, pipeline_id=pipeline.pipeline_id)
    log(f"{package.name} {package.version} uploaded")
    return version
