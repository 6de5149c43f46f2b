"""Values that are out of all proportion, paths that cannot be used, and secrets in what is said about them."""

import json
import os
import runpy
import sys

import pytest

from components.core.checks import check_one_of
from components.core.corpus import check_corpus
from components.core.models import check_model_id
from components.core.progress import log
from components.core.settings import naming
from components.core.storage import check_place
from components.distill.config import DistillSettings
from components.distill_distributed.node import NodeConfig
from components.prune.config import PruneConfig
from components.tokenize.config import TokenizeSettings
from pipelines.compile import CompileConfig
from pipelines.package import read_package, read_parameters
from tests.unit.test_bad_input import assert_refused, inputs, no_weights, start  # noqa: F401 (fixtures)

TOKEN = "hf_" + "aBcDeFgH" * 4


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"nsamples": 65537}, r"nsamples must be in \[1, 65536\], got 65537"),
        ({"seed": -1}, r"seed must be in \[0, 4294967295\], got -1"),
        ({"seed": 2**32}, r"seed must be in \[0, 4294967295\], got 4294967296"),
    ],
)
def test_counts_and_seeds_have_bounds(settings, line):
    with pytest.raises(ValueError, match=f"^{line}$"):
        TokenizeSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"temperature": 0.09}, r"temperature must be in \[0.1, 100\], got 0.09"),
        ({"temperature": 101.0}, r"temperature must be in \[0.1, 100\], got 101.0"),
        ({"weight_decay": 1.5}, r"weight_decay must be in \[0, 1\], got 1.5"),
    ],
)
def test_temperature_and_weight_decay_have_sane_ranges(settings, line):
    with pytest.raises(ValueError, match=f"^{line}$"):
        DistillSettings(**settings)


@pytest.mark.usefixtures("no_weights")
def test_a_sparsity_that_would_empty_a_matrix_is_refused(start, tmp_path):  # noqa: F811
    line = "sparsity must leave every matrix a weight, got 0.9999999: model.layers.0.self_attn.q_proj has 4096"
    assert_refused(start("prune", {"sparsity": "0.9999999"}), line, tmp_path)
    assert_refused(start("prune", {"sparsity": "0.9999"}), "sparsity must leave every matrix a weight", tmp_path)


@pytest.mark.usefixtures("no_weights")
def test_a_value_of_two_dashes_is_refused(start, tmp_path, monkeypatch, capfd):  # noqa: F811
    monkeypatch.setattr(sys, "argv", ["prune", "--seed=--"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("components.prune", run_name="__main__")
    assert capfd.readouterr().err == "error: seed must have a value, got '--'\n"


@pytest.mark.parametrize("parameter", ["dense_model", "calibration_data", "eval_data", "output_dir", "mask_file"])
@pytest.mark.usefixtures("no_weights")
def test_a_name_that_is_too_long_names_its_parameter(start, tmp_path, parameter):  # noqa: F811
    ended = start("prune", {parameter: str(tmp_path / ("a" * 300))})
    assert_refused(ended, f"{parameter} ", tmp_path)
    assert len(ended.err) <= 501


def test_an_error_of_the_system_names_the_innermost_path():
    settings = PruneConfig(dense_model="/a", output_dir="/a/b", calibration_data="/a/b/c")
    with pytest.raises(ValueError, match="^output_dir cannot be used: Permission denied, '/a/b/d'$"), naming(settings):
        raise PermissionError(13, "Permission denied", "/a/b/d")
    for unnamed in (PermissionError(13, "Permission denied", "/elsewhere"), OSError(28, "No space left on device")):
        with pytest.raises(OSError, match=unnamed.strerror), naming(settings):
            raise unnamed


@pytest.mark.parametrize("parameter", ["output_dir", "mask_file"])
@pytest.mark.usefixtures("no_weights")
def test_an_address_is_no_place_for_an_output(start, tmp_path, parameter):  # noqa: F811
    ended = start("prune", {parameter: f"s3://bucket/x?token={TOKEN}"})
    assert_refused(ended, f"{parameter} must be a path on this machine, got 's3://bucket/x?token=***'", tmp_path)


def test_a_log_line_holds_no_secret(capfd):
    log(f"fetched owner/{TOKEN}")
    assert capfd.readouterr().out == "fetched owner/***\n"


@pytest.mark.parametrize(
    "check", [check_model_id, check_corpus, check_place, lambda *given: check_one_of(*given, choices=("a",))]
)
def test_a_secret_is_not_in_the_error_itself(check):
    """In a pod, the error is printed with its traceback and not by the shell."""
    with pytest.raises(ValueError, match="^model_id must be .*, got './\\*\\*\\*'$"):
        check("model_id", f"./{TOKEN}")


def test_a_folder_with_very_many_files_is_no_corpus(start, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("components.core.corpus.MOST_FILES", 1)
    ended = start("evaluate", {"eval_data": "{corpus}"})
    assert_refused(ended, "eval_data must hold at most 1 files", tmp_path)


@pytest.mark.parametrize("registry", ["ghcr.io/team", "localhost:5000", "ghcr.io/team/", "eu.gcr.io/a/b_c"])
def test_a_registry_is_accepted(registry):
    assert CompileConfig(registry=registry).registry == registry


@pytest.mark.parametrize(
    "registry", ["https://ghcr.io", "ghcr.io/Team", "a b", "host/..?token=x", "host:port", "-x", "x" * 300]
)
def test_what_is_no_registry_is_refused(registry):
    with pytest.raises(ValueError, match="^registry must be a registry's host, with a port and path if it has them"):
        CompileConfig(registry=registry)


def test_a_claim_must_be_a_name():
    with pytest.raises(ValueError, match="^handover_claim must be the name of a Kubernetes object, got 'a b'$"):
        CompileConfig(handover_claim="a b")


GOOD = dict.fromkeys(("teacher_model", "student_model", "mask_file", "train_data"), "/x")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"inputs": "["}, "inputs must be JSON: EOF"),
        ({"inputs": "{}"}, "inputs must have mask_file, student_model, teacher_model, train_data, got none for "),
        ({"inputs": GOOD | {"x y": "/x"}}, "inputs must have names of parameters, got 'x y'"),
        ({"inputs": GOOD | {"mask_file": "../y"}}, r"inputs\.mask_file must be one of gs://"),
        ({"flags": "null"}, "flags must be JSON of its form, it: Input should be a valid array, got None"),
        ({"flags": "[" * 100_000}, "flags must be JSON: recursion"),
        ({"result": "x"}, "result must be one of gs://"),
    ],
)
def test_a_node_checks_its_settings(settings, line):
    with pytest.raises(ValueError, match=f"^{line}"):
        given = {"result": "/x", "inputs": GOOD, "flags": "[]"} | settings
        NodeConfig(**given | {"inputs": json.dumps(given["inputs"]) if isinstance(given["inputs"], dict) else given["inputs"]})


def test_a_pipe_or_a_device_as_parameters_is_refused_at_once(tmp_path):
    package = read_package("compress")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ValueError, match=f"^params must be a YAML file: {path} must be an ordinary file$"):
            read_parameters(package, str(path), [])


def test_a_pipeline_is_no_path_without_its_ending(tmp_path):
    (tmp_path / "x.yaml").touch()
    with pytest.raises(ValueError, match="^pipeline must be compress, compress-distributed or an existing YAML file, got"):
        read_package(str(tmp_path / "x"))
