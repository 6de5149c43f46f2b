"""Uploading, starting and waiting, against a fake KFP API on loopback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from components.images import VERSION
from pipelines.package import COMPILED
from pipelines.submit import main
from tests.pipelines.fake_kfp import PAGE, TOKEN, check, command, kfp  # noqa: F401 (fixtures)

# ruff: noqa: F811 (pytest passes fixtures by name)

GOLDEN = COMPILED / "compress.yaml"


def changed(folder, text="# another version\n"):
    """A copy of the pipeline's YAML with different bytes."""
    path = folder / "changed.yaml"
    path.write_text(text + GOLDEN.read_text())
    return path


def test_the_first_run_makes_pipeline_version_and_experiment(kfp, command):
    code, out, err = command(main, "--run_name", "first", "--service_account", "runner")
    assert (code, err) == (0, "")
    (pipeline,), (version,), (experiment,), (run,) = (
        kfp.things[kind] for kind in ("pipelines", "pipeline_versions", "experiments", "runs")
    )
    assert pipeline["display_name"] == "compress"
    assert version["display_name"].startswith(f"{VERSION}-")
    assert experiment["display_name"] == "sparse-distill"
    assert kfp.uploads == [GOLDEN.read_bytes()]
    reference = {"pipeline_id": pipeline["pipeline_id"], "pipeline_version_id": version["pipeline_version_id"]}
    assert run["pipeline_version_reference"] == reference
    assert run["experiment_id"] == experiment["experiment_id"]
    assert (run["display_name"], run["service_account"]) == ("first", "runner")
    assert f"{kfp.url}/#/runs/details/{run['run_id']}" in out


def test_the_same_yaml_is_uploaded_once_and_another_one_beside_it(kfp, command, tmp_path):
    for name in ("older", "other", "last"):  # the pipeline is on the second page
        kfp.add("pipelines", "pipeline_id", {"display_name": name})
    command(main)
    assert "nothing uploaded" in command(main)[1]
    assert len(kfp.uploads) == 1
    for comment in "abc":
        assert command(main, "--pipeline", changed(tmp_path, f"# {comment}\n"))[0] == 0
    assert "nothing uploaded" in command(main, "--pipeline", changed(tmp_path, "# c\n"))[1]  # it is on the second page
    names = [version["display_name"] for version in kfp.things["pipeline_versions"]]
    assert len(names) == len(set(names)) == 4 > PAGE
    assert len(kfp.things["pipelines"]) == 4
    assert len(kfp.things["experiments"]) == 1
    assert kfp.things["runs"][-1]["pipeline_version_reference"]["pipeline_version_id"] == "pipeline_versions-4"


def test_a_profile_namespace_is_given_wherever_it_counts(kfp, command):
    assert command(main, "--namespace", "alice")[0] == 0
    about = ["GET pipelines", "POST pipelines", "GET experiments", "POST experiments"]
    assert [kfp.namespaces[request] for request in about] == ["alice"] * 4


def test_parameters_have_the_types_of_the_pipeline(kfp, command, tmp_path):
    params = tmp_path / "params.yaml"
    params.write_text("distill_learning_rate: 2e-5\ndistill_epochs: 3\nprune_sparsity: 0.6\nmodel_id: /models/dense\n")
    flags = ["--set", "prune_sparsity=0.5", "skip_ppl_eval=true", "--set", "quantize_formats=[int8]", "distill_cpu=16"]
    flags += ["distill_temperature=2"]
    assert command(main, "--params", params, *flags)[0] == 0
    sent = kfp.things["runs"][0]["runtime_config"]["parameters"]
    assert sent == {
        "distill_learning_rate": 2e-5,
        "distill_epochs": 3,
        "prune_sparsity": 0.5,
        "model_id": "/models/dense",
        "skip_ppl_eval": True,
        "quantize_formats": ["int8"],
        "distill_cpu": "16",
        "distill_temperature": 2.0,
    }
    assert isinstance(sent["distill_epochs"], int)
    assert isinstance(sent["distill_temperature"], float)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--set", "prune_sparsty=0.5"],
            "prune_sparsty must be a parameter of compress, it has bos, distill_admm_interval, distill_admm_penalty, distil",
        ),
        (["--set", "quantize_formats=" + "[" * 5000], "quantize_formats must be"),
        (["--set", "distill_epochs=2.5"], "distill_epochs must be a whole number, got '2.5'"),
        (["--set", "distill_learning_rate=nan"], "distill_learning_rate must be a finite number, got 'nan'"),
        (["--set", "skip_ppl_eval=1"], "skip_ppl_eval must be true or false, got '1'"),
        (["--set", "quantize_formats=int8"], "quantize_formats must be a list, got 'int8'"),
        (["--set", "prune_sparsity=1.3"], "prune_sparsity must be in [0, 1), got 1.3"),
        (["--set", "distill_nproc_per_node=2"], "distill_nproc_per_node must be 1 for backend none and launcher python, got 2"),
        (
            ["--set", "quantize_formats=[int3]"],
            "quantize_formats must be one of int8, fp8, packed-int8, packed-int4, got 'int3'",
        ),
        (["--set", "publish_to=gs://bucket/a\nb"], "publish_to must be one of gs://bucket/prefix"),
        (["--set", 'publish_to=gs://bucket/"x"'], "publish_to must have no quotation mark, backslash or line break, got "),
        (["--set", "distill_epochs"], "set must be name=value, got 'distill_epochs'"),
        (["--params", "{distill_epochs: true}"], "distill_epochs must be a whole number, got True"),
        (["--params", "{distill_cpu: 8}"], "distill_cpu must be a string, got 8"),
        (["--params", "[distill_epochs]"], "params must map parameters to values, got list"),
        (["--params", "{"], "params must be a YAML file"),
        (["--pipeline", "compres"], "pipeline must be compress"),
        (["--pipeline", __file__.replace(".py", ".yaml")], "pipeline must be compress"),
        (["--timeout", "5"], "timeout must be 0 without wait, got 5"),
        (["--wait", "--timeout", "-1"], "timeout must be at least 0, got -1.0"),
        (["--experiment", ""], "experiment must be given, got ''"),
        (["--host", "kfp.example.com"], "host must begin with http:// or https://"),
        (["--host", f"https://me:{TOKEN}@kfp.example.com"], "and hold no password"),
    ],
)
def test_a_wrong_value_is_reported_in_one_line_before_any_request(kfp, command, tmp_path, flags, message):
    if flags[0] == "--params":
        (tmp_path / "params.yaml").write_text(flags[1])
        flags = ["--params", tmp_path / "params.yaml"]
    code, out, err = command(main, *flags)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert kfp.requests == []


def test_what_only_the_image_has_is_not_looked_for_here(kfp, command):
    flags = ["train_data=/data/corpus", "distill_backend=deepspeed", "distill_launcher=torchrun"]
    flags += ["distill_deepspeed_config=/etc/zero.json"]
    assert command(main, "--set", *flags)[0] == 0


@pytest.mark.parametrize("text", ["", "- 1\n", "name: compress\n", "{", "\x00"])
def test_a_file_that_is_not_a_pipeline_is_refused(kfp, command, tmp_path, text):
    path = tmp_path / "other.yaml"
    path.write_text(text)
    code, _, err = command(main, "--pipeline", path)
    assert (code, err) == (2, f"error: pipeline must be a compiled KFP v2 pipeline, got {path}\n")
    assert kfp.requests == []


def test_a_yaml_of_two_documents_and_a_parameter_without_default(kfp, command, tmp_path):
    spec = next(yaml.safe_load_all(GOLDEN.read_text()))
    spec["pipelineInfo"]["name"] = "other"
    spec["root"]["inputDefinitions"]["parameters"] = {"text": {"parameterType": "STRING"}}
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump_all([spec, {"platforms": {"kubernetes": {}}}]))
    assert command(main, "--pipeline", path)[2] == "error: text must be given: other has no default for it\n"
    assert command(main, "--pipeline", path, "--set", "text=a=b")[0] == 0
    assert kfp.things["runs"][0]["runtime_config"]["parameters"] == {"text": "a=b"}
    assert command(main, "--pipeline", path, "--set", "text=", "--no_cache")[0] == 0
    assert list(yaml.safe_load_all(kfp.uploads[1]))[1] == {"platforms": {"kubernetes": {}}}


def test_without_cache_every_task_of_every_level_computes_anew(kfp, command):
    for _ in range(2):
        assert command(main, "--no_cache")[0] == 0
    command(main)
    without, usual = (next(yaml.safe_load_all(upload)) for upload in kfp.uploads)

    def cached(spec):
        levels = [spec["root"], *spec["components"].values()]
        return [task.get("cachingOptions") for level in levels for task in level.get("dag", {}).get("tasks", {}).values()]

    assert any(cached(usual))
    assert not any(cached(without))
    versions = [run["pipeline_version_reference"]["pipeline_version_id"] for run in kfp.things["runs"]]
    assert versions[0] == versions[1] != versions[2]


@pytest.mark.parametrize(
    ("status", "kind", "text", "message"),
    [
        (401, "application/json", f'{{"message": "bad {TOKEN}"}}', "KFP asks for a login (401): KF_PIPELINES_TOKEN or"),
        (
            403,
            "application/json",
            f'{{"message": "{TOKEN} may not"}}',
            "KFP answered 403 (this login may not do that): … may not",
        ),
        (404, "text/html", "<html>", "KFP answered 404 (not found, or host is not the address of KFP): Not Found"),
        (500, "application/json", '{"error": "database"}', "KFP answered 500 (Internal Server Error): database"),
        (200, "text/html", "<html>Log in</html>", "host must answer as the KFP API, got a web page; is it a login page?"),
    ],
)
def test_a_refusal_is_one_line_at_once_without_the_token(kfp, command, status, kind, text, message):
    kfp.refusal = status, kind, text
    code, out, err = command(main)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert len(err.splitlines()) == 1
    assert len(kfp.requests) == 1


def test_cookies_log_in_too_and_stay_secret(kfp, command, monkeypatch):
    monkeypatch.delenv("KF_PIPELINES_TOKEN")
    monkeypatch.setenv("KF_PIPELINES_COOKIES", "authservice_session=canary-cookie")
    kfp.refusal = 403, "application/json", '{"message": "canary-cookie is of no use"}'
    assert command(main)[2] == "error: KFP answered 403 (this login may not do that): … is of no use\n"
    assert kfp.headers["Cookie"] == "authservice_session=canary-cookie"


def test_the_token_of_a_pods_service_account_logs_in(kfp, command, monkeypatch, tmp_path):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    monkeypatch.delenv("KF_PIPELINES_TOKEN")
    assert command(main)[0] == 2
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    assert command(main)[0] == 0


@pytest.mark.parametrize("name", ["KF_PIPELINES_TOKEN", "KF_PIPELINES_COOKIES"])
def test_a_login_of_two_lines_is_refused_unseen(kfp, command, monkeypatch, name):
    monkeypatch.setenv(name, f"{TOKEN}\n{TOKEN}")
    code, _, err = command(main)
    assert (code, err) == (2, f"error: {name} must be one line of plain characters\n")


@pytest.mark.parametrize("host", ["http://127.0.0.1:1", ""], ids=["an address", "no address and no kubectl context"])
def test_as_a_program_it_says_no_more_than_one_line(tmp_path, host):
    places = {"HOME": str(tmp_path), "KUBECONFIG": str(tmp_path / "none"), "KF_PIPELINES_ENDPOINT": ""}
    environment = os.environ | {"KF_PIPELINES_TOKEN": TOKEN if host else "", "COMPRESS_DEBUG": ""} | places
    program = Path(__file__).parents[2] / "pipelines" / "submit.py"
    flags = ["--host", host] if host else []  # nothing listens there, nor where kfp looks without an address
    done = subprocess.run([sys.executable, str(program), *flags], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: host must be a KFP API that can be reached, got {host or 'none'}: ")
    assert "Connection refused" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "body",
    [{"display_nam": "a"}, {"display_name": ["a"]}, {"state": "DONE"}, {"runtime_config": {"parameter": {}}}],
)
def test_the_fake_refuses_what_the_models_do_not_have(body):
    with pytest.raises(AssertionError):
        check(body, "V2beta1Run")


@pytest.mark.parametrize(
    ("renamed", "value", "parameter"),
    [
        ("distill_patience", "prune_sparsity=1.3", "prune_sparsity"),
        ("distill_patience", "publish_min_sparsity=0.9", "publish_min_sparsity"),
        ("quantize_formats", "train_data=missing.txt", "train_data"),
        ("prune_sparsity", "publish_min_sparsity=0.5", ""),
        ("distill_nproc_per_node", "distill_gpus=8", ""),
    ],
)
def test_a_pipeline_of_another_version_is_checked_as_far_as_its_parameters_go(
    kfp, command, tmp_path, renamed, value, parameter
):
    text = GOLDEN.read_text().replace(renamed, "unknown").replace("name: compress\n", "name: my-compress\n")
    path = tmp_path / "other.yaml"
    path.write_text(text)
    code, _, err = command(main, "--pipeline", path, "--set", value)
    assert (code, err.partition(" ")[2].partition(" ")[0]) == (2 if parameter else 0, parameter)


def test_a_pipeline_that_lacks_what_a_job_must_have_is_not_checked_for_it(kfp, command, tmp_path):
    path = tmp_path / "other.yaml"
    path.write_text((COMPILED / "compress-distributed.yaml").read_text().replace("distill_image", "unknown"))
    assert command(main, "--pipeline", path)[0] == 0
