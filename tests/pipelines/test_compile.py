"""The golden YAML is what the code compiles to, and it promises what the code does."""

import inspect

import pytest
import yaml
from docstring_parser import parse

from pipelines import compile as compile_module
from pipelines.compress import compress


@pytest.fixture(scope="module")
def spec():
    return next(iter(yaml.safe_load_all((compile_module.COMPILED / "compress.yaml").read_text())))


def test_compiling_gives_the_golden_file_byte_for_byte(tmp_path, monkeypatch):
    golden = compile_module.COMPILED
    monkeypatch.setattr(compile_module, "COMPILED", tmp_path)
    compile_module.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in golden.iterdir())
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (golden / path.name).read_bytes(), path.name


def test_every_parameter_is_described(spec):
    described = {entry.arg_name for entry in parse(inspect.getdoc(compress.pipeline_func)).params}
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert described == set(parameters)
    assert all(parameter.get("description") for parameter in parameters.values())
    assert parameters["model_id"]["defaultValue"] == "Qwen/Qwen3-0.6B"
    assert parameters["sparsity"]["defaultValue"] == 0.7


def tasks(dag):
    """Name → task of a DAG and of the loops inside it."""
    return dag["dag"]["tasks"]


def test_only_resolve_is_never_cached(spec):
    cached = {name: bool(task["cachingOptions"]) for name, task in tasks(spec["root"]).items() if "for-loop" not in name}
    assert cached == {
        "resolve": False,
        "fetch": True,
        "tokenize": True,
        "prune": True,
        "distill": True,
        "report": True,
    }


def test_every_pod_has_run_time_resources_and_an_explicit_back_off(spec):
    loop = next(component for component in spec["components"].values() if "dag" in component)
    for name, task in (tasks(spec["root"]) | tasks(loop)).items():
        if "for-loop" in name:
            continue
        assert task["retryPolicy"]["backoffMaxDuration"] == "300s", name
        executor = spec["components"][task["componentRef"]["name"]]["executorLabel"]
        container = spec["deploymentSpec"]["executors"][executor]["container"]
        resources = container["resources"]
        assert "runtime-parameter" in str(resources) or "{{$.inputs" in str(resources), name
        assert ("accelerator" in resources) == (name in {"prune", "distill", "quantize"}), name
        assert "pip install" not in str(container["command"]), name


def test_formats_are_quantized_side_by_side(spec):
    loop = next(component for component in spec["components"].values() if "dag" in component)
    assert list(tasks(loop)) == ["quantize"]
    assert not any("iteratorPolicy" in task for task in tasks(spec["root"]).values())
