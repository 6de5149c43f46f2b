"""The part of KFP 2.17 that the commands use, on loopback: it stores what it receives and checks every request.

Bodies must match kfp-server-api's models, lists come in pages of two, and any login but the right one is rejected. It answers
as KFP's UI does, which passes the two APIs on to the API server and has the pods' logs itself, or as the API server alone.
"""

import email
import json
import re
import sys
import threading
from contextlib import contextmanager
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import kfp_server_api
import pytest
from kfp.client import Client

PAGE = 2
TOKEN = "canary-token-1f0e"
FIELDS = {"display_name", "state", "storage_state", "created_at"}  # what a filter may name, among others
# a node's phase in Argo → the state of the task that KFP makes of it
STATES = {
    "Running": "RUNNING",
    "Succeeded": "SUCCEEDED",
    "Skipped": "SKIPPED",
    "Omitted": "RUNTIME_STATE_UNSPECIFIED",
    "Failed": "FAILED",
    "Error": "FAILED",
}
SCALARS = {"str": (str, int), "int": int, "bool": bool, "datetime": str}  # 64-bit integers are sent as text or as numbers


def check(value, kind, where="body"):
    """Check that JSON matches a type of kfp-server-api, down to the last field."""
    if kind == "object":
        return
    if kind in SCALARS:
        assert isinstance(value, SCALARS[kind]), f"{where} is no {kind}: {value!r}"
        if kind == "datetime":
            assert datetime.fromisoformat(value).tzinfo, where
        return
    if container := re.fullmatch(r"(list|dict)[\[(](?:str, )?(\w+)[\])]", kind):
        items = value.items() if container[1] == "dict" else enumerate(value)
        for key, item in items:
            check(item, container[2], f"{where}.{key}")
        return
    model = getattr(kfp_server_api, kind)
    if not model.openapi_types:  # an enumeration
        assert value in model.allowable_values, f"{where} is no {kind}: {value!r}"
        return
    fields = {wire: model.openapi_types[name] for name, wire in model.attribute_map.items()}
    assert not value.keys() - fields.keys(), f"{where} has unknown fields: {value.keys() - fields.keys()}"
    for name, item in value.items():
        check(item, fields[name], f"{where}.{name}")


class FakeKfp:
    """The server's state, and what it answers next."""

    def __init__(self):
        self.things = {"pipelines": [], "pipeline_versions": [], "experiments": [], "runs": [], "recurring_runs": []}
        self.requests = []  # "METHOD path" of each request
        self.namespaces = {}  # "METHOD path" → the namespace in that request
        self.uploads = []  # the uploaded files' bytes
        # answers to successive requests for a run: a state, a state and the run's workflow from then on, or an HTTP status
        self.run_answers = []
        self.workflows = {}  # run's id → its Argo workflow
        self.logs = {}  # pod's name → what is in its log
        self.is_ui = True
        self.multi_user = False
        self.headers = None  # of the last request
        self.refusal = None  # (HTTP status, content type, body) for every request
        self.lock = threading.Lock()

    def add(self, kind, key, thing):
        thing[key] = f"{kind}-{len(self.things[kind]) + 1}"
        self.things[kind].append(thing)
        return thing

    def page(self, kind, query, **where):
        """One page of the matching objects; the token is an index into the list."""
        found = [thing for thing in self.things[kind] if where.items() <= thing.items()]
        if "filter" in query:
            for predicate in json.loads(query["filter"])["predicates"]:
                assert predicate["key"] in FIELDS
                equal = {"EQUALS": True, 1: True, "NOT_EQUALS": False, 2: False}[predicate["operation"]]
                found = [thing for thing in found if (thing[predicate["key"]] == predicate["stringValue"]) is equal]
        start = int(query.get("page_token") or 0)
        token = {"next_page_token": str(start + PAGE)} if len(found) > start + PAGE else {}
        model = f"V2beta1List{kind.title().replace('_', '')}Response"
        wire = getattr(kfp_server_api, model).attribute_map[kind]  # recurringRuns, but pipeline_versions
        answer = {wire: found[start : start + PAGE], **token}
        check(answer, model)
        return answer

    def answer(self, method, path, query, content, headers):
        """(HTTP status, JSON) for a request."""
        self.requests.append(f"{method} {path}")
        body = json.loads(content) if content and headers["Content-Type"] == "application/json" else {}
        self.namespaces[self.requests[-1]] = (query | body).get("namespace")
        match method, *path.split("/"):
            case "GET", "healthz":
                return 200, {"multi_user": self.multi_user}
            case "POST", "pipelines", "upload_version":
                form = f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode() + content
                (part,) = email.message_from_bytes(form).get_payload()
                assert part.get_param("name", header="Content-Disposition") == "uploadfile"
                self.uploads.append(part.get_payload(decode=True))
                version = {"display_name": query["name"], "pipeline_id": query["pipelineid"]}
                return 200, self.add("pipeline_versions", "pipeline_version_id", version)
            case "GET", "pipelines":
                return 200, self.page("pipelines", query)
            case "POST", "pipelines":
                check(body, "V2beta1Pipeline")
                return 200, self.add("pipelines", "pipeline_id", body)
            case "GET", "pipelines", pipeline, "versions":
                return 200, self.page("pipeline_versions", query, pipeline_id=pipeline)
            case "GET", "experiments":
                return 200, self.page("experiments", query)
            case "POST", "experiments":
                check(body, "V2beta1Experiment")
                return 200, self.add("experiments", "experiment_id", body)
            case "POST", "runs":
                check(body, "V2beta1Run")
                return 200, self.add("runs", "run_id", body | {"state": "PENDING", "created_at": "2026-11-24T08:00:00Z"})
            case "GET", "runs":
                return 200, self.page("runs", query, experiment_id=query["experiment_id"])
            case "GET", "runs", run:
                return self.run(run)
            case "POST", "runs", named:
                identity, _, act = named.partition(":")
                assert act == "terminate"
                for thing in self.things["runs"]:
                    if thing["run_id"] == identity and thing["state"] in ("PENDING", "RUNNING", "PAUSED"):
                        thing["state"] = "CANCELING"
                        return 200, {}
                return 400, {"message": f"Failed to terminate a run {identity}. Row not found"}
            case "GET", "recurringruns":
                return 200, self.page("recurring_runs", query)
            case "POST", "recurringruns":
                check(body, "V2beta1RecurringRun")
                return 200, self.add("recurring_runs", "recurring_run_id", body | {"status": "ENABLED"})
            case "POST" | "DELETE", "recurringruns", named:
                identity, _, act = named.partition(":")
                (found,) = [thing for thing in self.things["recurring_runs"] if thing["recurring_run_id"] == identity]
                if method == "DELETE":  # the workflows are owned by the schedule's object
                    self.things["recurring_runs"].remove(found)
                    for run in self.things["runs"]:
                        if run.get("recurring_run_id") == identity:
                            del self.workflows[run["run_id"]]
                else:
                    found["status"] = {"enable": "ENABLED", "disable": "DISABLED"}[act]
                return 200, {}
        return 404, {"message": f"nothing at {method} {path}"}

    def run(self, identity):
        """(HTTP status, JSON) for a run."""
        said = self.run_answers.pop(0) if len(self.run_answers) > 1 else self.run_answers[0]
        if isinstance(said, int):
            return said, {"message": "not now"}
        found = next((thing for thing in self.things["runs"] if thing["run_id"] == identity), None)
        if found is None:
            return 404, {"message": f"Run {identity} not found"}
        if not isinstance(said, str):
            said, self.workflows[identity] = said
        found["state"] = said
        nodes = self.workflows.get(identity, {"status": {"nodes": {}}})["status"]["nodes"].values()
        tasks = [{"display_name": node["displayName"], "state": STATES[node["phase"]]} for node in nodes]
        answer = found | {"run_details": {"task_details": tasks}}
        check(answer, "V2beta1Run")
        return 200, answer

    def workflow(self, identity):
        """(HTTP status, JSON) for a run, by the v1beta1 API."""
        self.requests.append(f"GET workflow of {identity}")
        manifest = (
            {"workflow_manifest": json.dumps(self.workflows[identity], sort_keys=True)} if identity in self.workflows else {}
        )
        return 200, {"run": {"id": identity}, "pipeline_runtime": manifest}

    def log(self, path, query):
        """(HTTP status, content type, text) for a pod's log."""
        if not self.is_ui:
            if not (match := re.fullmatch(r"/apis/v1alpha1/runs/([\w-]+)/nodes/([\w-]+)/log", path)):
                return 404, "text/plain", "404 page not found"
            if match[2] not in self.logs:
                return 500, "application/json", '{"error_message": "Failed to read logs for run"}'
            return 200, "text/plain", self.logs[match[2]]
        if path != "/k8s/pod/logs":
            return 404, "text/html", f"<pre>Cannot GET {path}</pre>"
        if self.multi_user and "podnamespace" not in query:
            return 422, "text/plain", "podnamespace argument is required"
        workflow = self.workflows[query["runid"]]
        if query["podname"] not in self.logs or query.get("podnamespace") not in (None, workflow["metadata"]["namespace"]):
            return 500, "text/plain", "Could not get main container logs: Error"
        return 200, "text/plain", self.logs[query["podname"]]


class Handler(BaseHTTPRequestHandler):
    """Passes each request to the server's `kfp`."""

    def handle_one(self):
        kfp = self.server.kfp
        kfp.headers = self.headers
        parts = urlsplit(self.path)
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind = "application/json"
        if kfp.refusal:
            status, kind, text = kfp.refusal
            kfp.requests.append(f"{self.command} {parts.path}")
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status, text = 401, json.dumps({"message": f"no such token: {self.headers.get('Authorization')}"})
        else:
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            with kfp.lock:
                status, kind, text = self.routed(parts.path, query, content)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        content = text if isinstance(text, bytes) else text.encode()
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def routed(self, path, query, content):
        kfp = self.server.kfp
        if not path.startswith(("/apis/v1beta1/", "/apis/v2beta1/")):
            return kfp.log(path, query)
        try:
            if path.startswith("/apis/v1beta1/runs/"):
                status, answer = kfp.workflow(path.removeprefix("/apis/v1beta1/runs/"))
            else:
                status, answer = kfp.answer(self.command, path.removeprefix("/apis/v2beta1/"), query, content, self.headers)
        except AssertionError as error:
            status, answer = 400, {"message": str(error)}
        return status, "application/json", json.dumps(answer)

    do_GET = do_POST = do_DELETE = handle_one  # noqa: N815 (http.server's names)

    def log_message(self, *_):
        """Log nothing."""


@contextmanager
def serving():
    """A fake KFP on a free port, with its address in `url`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.kfp = FakeKfp()
        server.kfp.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.kfp
        server.shutdown()
        thread.join()


@pytest.fixture
def kfp(monkeypatch, tmp_path):
    """A fake KFP, with its address and login in the environment; this machine's own settings are not used."""
    for name in ("UI_ENDPOINT", "COOKIES", "SA_TOKEN_PATH", "IAP_OAUTH2_CLIENT_ID"):
        monkeypatch.delenv(f"KF_PIPELINES_{name}", raising=False)
    monkeypatch.setattr(Client, "_LOCAL_KFP_CONTEXT", str(tmp_path / "no-context.json"))
    with serving() as server:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", server.url)
        monkeypatch.setenv("KF_PIPELINES_TOKEN", TOKEN)
        yield server


@pytest.fixture
def command(monkeypatch, capsys):
    """Run an entry point in this process; return (exit code, stdout, stderr), which must not contain the token."""

    def run(main, *flags):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, flags)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        assert TOKEN not in said.out + said.err
        return code, said.out, said.err

    return run
