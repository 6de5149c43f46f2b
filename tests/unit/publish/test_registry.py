"""Registering: one version per format, idempotent, and the pointer moves only afterwards.

The registry is a small server on this machine that implements the part of the REST API (v1alpha3) that the client uses.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

import pytest

from components.core import retry
from components.publish.config import PublishConfig
from components.publish.stage import run
from tests.unit.publish.conftest import DENSE, INT8

API = "/api/model_registry/v1alpha3"
TOKEN = "do-not-print-me"


class Server(ThreadingHTTPServer):
    """Stores models, versions and artifacts, and the requests."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.models, self.versions, self.artifacts = [], [], []
        self.asked, self.tokens, self.broken = [], set(), None
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """Handles look-up and creation."""

    def do_GET(self):
        url = urlparse(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        match url.path.removeprefix(API).strip("/").split("/"):
            case ["registered_models"]:
                self.answer(
                    200, {"items": self.server.models, "nextPageToken": "", "pageSize": 1, "size": len(self.server.models)}
                )
            case ["registered_model"]:
                self.find(self.server.models, name=query["name"])
            case ["model_version"]:
                self.find(self.server.versions, name=query["name"], registeredModelId=query["parentResourceId"])
            case ["model_versions", version, "artifacts"]:
                items = [artifact for parent, artifact in self.server.artifacts if parent == version]
                self.answer(200, {"items": items, "nextPageToken": "", "pageSize": 0, "size": len(items)})
            case _:
                self.answer(404, {"code": "404", "message": "no such page"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        match urlparse(self.path).path.removeprefix(API).strip("/").split("/"):
            case ["registered_models"]:
                self.create("models", self.server.models, body)
            case ["model_versions"]:
                self.create("versions", self.server.versions, body)
            case ["model_versions", version, "artifacts"]:
                self.create("artifacts", self.server.artifacts, body, version)

    def find(self, kept, **wanted):
        found = [one for one in kept if wanted.items() <= one.items()]
        self.answer(200, found[0]) if found else self.answer(404, {"code": "404", "message": "no such"})

    def create(self, kind, kept, body, parent=None):
        if self.server.broken == kind:
            self.answer(500, {"code": "500", "message": "broken"})
            return
        body["id"] = str(len(kept) + 1)
        kept.append((parent, body) if parent else body)
        self.answer(201, body)

    def answer(self, status, body):
        self.server.asked.append(f"{self.command} {status}")
        self.server.tokens.add(self.headers["Authorization"])
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_):
        """Print nothing, since the test reads what the stage prints."""


@pytest.fixture
def server():
    """A running registry."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def publish(server, settings):
    """Publish as `v1` and register as `small`."""

    def published(**changes):
        return run(
            PublishConfig(**{**settings, "version": "v1", "registry": server.address, "registry_model": "small"} | changes)
        )

    return published


@pytest.fixture
def uploads(monkeypatch):
    """The place of each upload."""
    import components.publish.stage as stage

    real, places = stage.complete, []
    monkeypatch.setattr(stage, "complete", lambda folder, place: (places.append(place), real(folder, place)))
    return places


def test_each_format_is_a_version_that_names_its_place(server, publish):
    place = publish().measured["place"]
    assert [model["name"] for model in server.models] == ["small"]
    assert [version["name"] for version in server.versions] == ["v1-int8", "v1-fp8"]
    properties = server.versions[0]["customProperties"]
    assert properties["perplexity"]["double_value"] == INT8
    assert properties["dense_perplexity"]["double_value"] == DENSE
    assert properties["model_id"]["string_value"] == "some/model"
    assert [(parent, artifact["uri"]) for parent, artifact in server.artifacts] == [
        ("1", f"{place}/int8"),
        ("2", f"{place}/fp8"),
    ]
    assert {artifact["modelFormatName"] for _, artifact in server.artifacts} == {"huggingface"}
    assert server.tokens == {None}


def test_registered_again_nothing_is_written(server, publish, uploads):
    publish()
    server.asked.clear()
    publish()
    assert set(server.asked) == {"GET 200"}
    assert len(uploads) == 1


@pytest.mark.parametrize("kind", ["models", "versions", "artifacts"])
def test_a_registration_that_breaks_off_fails_and_a_retry_completes_it(server, publish, uploads, tmp_path, kind):
    server.broken = kind
    with pytest.raises(OSError, match=f"the registry {server.address} answered 500"):
        publish()
    assert not (tmp_path / "models" / "latest.json").exists()
    server.broken = None
    publish()
    assert len(uploads) == 1
    assert (tmp_path / "models" / "latest.json").exists()
    assert [
        (version["name"], artifact["uri"].rsplit("/", 2)[1:])
        for version, (_, artifact) in zip(server.versions, server.artifacts, strict=True)
    ] == [("v1-int8", ["v1", "int8"]), ("v1-fp8", ["v1", "fp8"])]


@pytest.mark.parametrize("kind", ["models", "versions", "artifacts"])
def test_a_registry_that_fails_for_a_while_is_asked_again(server, publish, uploads, monkeypatch, capsys, kind):
    server.broken = kind
    plain = retry.log

    def log(line):
        plain(line)
        server.broken = None

    monkeypatch.setattr(retry, "log", log)
    publish()
    assert "trying again in 0 s (1 of 5): the registry" in capsys.readouterr().out
    assert len(server.artifacts) == 2


def test_a_version_registered_with_another_place_is_left_alone(server, publish, tmp_path):
    publish(publish_to=str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match=f"version v1-int8 must not be registered .* it is at {tmp_path}/elsewhere/v1/int8"):
        publish()
    assert not (tmp_path / "models" / "latest.json").exists()
    assert len(server.artifacts) == 2


def test_a_registry_that_does_not_answer_is_told_before_the_upload(publish, tmp_path, unused_port):
    address = f"http://127.0.0.1:{unused_port}"
    with pytest.raises(OSError, match=f"the registry {address} does not answer"):
        publish(registry=address)
    assert not list(tmp_path.glob("models/*"))


def test_the_token_comes_from_the_file_that_the_environment_names_and_is_not_printed(
    server, publish, tmp_path, monkeypatch, capfd
):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    record = publish()
    assert server.tokens == {f"Bearer {TOKEN}"}
    server.broken = "versions"
    with pytest.raises(OSError, match="answered 500") as failed:
        publish(version="v2")
    assert TOKEN not in "".join([str(failed.value), str(record), *capfd.readouterr()])


@pytest.fixture
def unused_port(server):
    """A port on which nothing listens."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as other:
        port = other.server_port
    return port
