"""The first pod of a run that bypassed `submit`: it is given everything as KFP gives it, and tells what is wrong with it.

The stand-in for KFP takes the compiled pipelines, and puts the values of a run into their dictionary as KFP does: as text, into
the text of its JSON.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from components.core import storage
from components.resolve import stage
from components.resolve.component import resolve
from components.resolve.config import ResolveConfig
from pipelines.compile import COMPILED
from pipelines.parameters import pipeline_name
from tests.unit.test_bad_input import WRONG_VALUES

PIPELINES = ("compress", "compress-distributed")
MANY_NODES = {"distill_handover": "/tmp"}
MEMORY = ("prune_memory", "distill_memory", "quantize_memory")


@functools.cache
def compiled(pipeline):
    return next(yaml.safe_load_all((COMPILED / f"{pipeline}.yaml").read_text()))


def text_of(value):
    """The text that KFP makes of a value (PbValueToText): numbers are doubles and have no exponent."""
    if isinstance(value, bool | list):
        return json.dumps(value)
    return value if isinstance(value, str) else f"{value:.20f}".rstrip("0").rstrip(".")


def handed_over(pipeline, values):
    """What KFP gives to the resolve component of a run with these values; all others have their defaults."""
    spec = compiled(pipeline)
    definitions = spec["root"]["inputDefinitions"]["parameters"]
    assert values.keys() <= definitions.keys()
    known = {name: definition["defaultValue"] for name, definition in definitions.items()} | values
    dag = next(
        part for part in (spec["root"], *spec["components"].values()) if "resolve" in part.get("dag", {}).get("tasks", {})
    )
    given = {}
    for name, source in dag["dag"]["tasks"]["resolve"]["inputs"]["parameters"].items():
        if name in resolve.component_spec.inputs:
            if "componentInputParameter" in source:
                given[name] = known[source["componentInputParameter"]]
            else:
                packed = json.dumps(source["runtimeValue"]["constant"])
                channel = r"\{\{\$\.inputs\.parameters\['pipelinechannel--(\w+)'\]\}\}"
                given[name] = json.loads(re.sub(channel, lambda found: text_of(known[found[1]]), packed))
    return given


@pytest.fixture
def start(checkpoint, corpus):
    """Start a run of a pipeline with some values changed, and run its first stage; gives the stage's outputs by name."""

    def started(pipeline, **values):
        texts = {"train_data": str(corpus), "eval_data": str(corpus)}
        # a default that is a bucket would be contacted
        places = MANY_NODES if pipeline == "compress-distributed" else {}
        given = handed_over(pipeline, {"model_id": str(checkpoint), **texts, **places, **values})
        return dict(zip(resolve.component_spec.outputs, resolve.python_func(**given), strict=True))

    return started


@pytest.fixture
def no_hub(monkeypatch):
    """Make asking for the model's version fail the test: what is wrong must be told before that."""

    def resolve_model(*_):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(stage, "resolve_model", resolve_model)


def assert_refused(start, line, pipeline, **values):
    with pytest.raises(ValueError, match=f"^{re.escape(line)}"):
        start(pipeline, **values)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_run_with_the_defaults_is_resolved(start, checkpoint, pipeline):
    """Otherwise the cases below would be refused for another reason."""
    found = start(pipeline)
    assert found["model_id"] == str(checkpoint)
    assert all(found[name] for name in ("model_revision", "train_revision", "eval_revision"))
    assert all(re.fullmatch(r"\d+Gi", found[name]) for name in MEMORY)
    assert start(pipeline) == found  # a changed limit would miss KFP's cache


def test_memory_that_is_given_is_taken_as_it_is(start, capsys):
    automatic, found = start("compress"), start("compress", distill_memory="12.5G")
    assert found == automatic | {"distill_memory": "12.5G"}
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("distill: ")]
    assert lines == [lines[0], lines[0].replace(automatic["distill_memory"], "12.5G")]  # what is needed is told in any case


def test_a_model_is_not_measured_if_all_memory_is_given(start, monkeypatch):
    monkeypatch.setattr(stage, "model_shape", lambda *_: pytest.fail("its sizes were looked up"))
    given = dict(zip(MEMORY, ("1Gi", "2Gi", "3Gi"), strict=True))
    assert start("compress-distributed", **given).items() >= given.items()


@pytest.mark.parametrize(("given", "distill"), [("auto", "32Gi"), ("5Gi", "5Gi")])
def test_a_model_whose_sizes_are_not_known_gets_the_memory_of_an_average_one(
    start, checkpoint, tmp_path, capsys, given, distill
):
    """Whether it can be used at all is told by the stages that read it."""
    folder = shutil.copytree(checkpoint, tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    found = start("compress", model_id=str(folder), distill_memory=given)
    assert [found[name] for name in MEMORY] == ["16Gi", distill, "16Gi"]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"the pods have the memory of an average model, since the sizes of {folder} are not known: ")


def test_the_memory_follows_the_parameters_of_its_stage(start, capsys):
    on_gpus, on_cpus = start("compress"), start("compress", prune_gpus=0, distill_gpus=0, quantize_gpus=0)
    printed = capsys.readouterr().out.splitlines()
    assert ["of each GPU" in line for line in printed] == [True] * 3 + [False] * 3
    for name in MEMORY:  # CUDA's libraries take more than a tiny model
        assert int(on_cpus[name].removesuffix("Gi")) < int(on_gpus[name].removesuffix("Gi"))


def test_the_watch_for_the_hub_sees_the_stage_ask(start, no_hub):
    with pytest.raises(AssertionError, match="the hub was asked"):
        start("compress")


def in_pipelines():
    """The wrong values of the stages' own tests, by the pipelines' names, as far as pipelines have these parameters."""
    for name, changes, line in WRONG_VALUES:
        named = {pipeline_name(name, field): value for field, value in changes.items()}
        if name != "evaluate" and named.keys() <= compiled("compress")["root"]["inputDefinitions"]["parameters"].keys():
            field, _, rule = line.partition(" ")
            if set(changes.values()) & {"nan", "inf"}:
                rule = f"must be a finite number, got '{changes[field]}'"
            yield named, f"{pipeline_name(name, field)} {rule}"


LEFT_OUT = {
    "block_size",
    "damping",
    "reconstruct_epochs",
    "output_dir",
    "format",
}  # of the stages' wrong values, these are no parameters of a pipeline


def test_every_wrong_value_that_a_pipeline_can_express_is_among_the_cases():
    others = [entry for entry in WRONG_VALUES if entry[0] != "evaluate" and not LEFT_OUT & entry[1].keys()]
    assert len(list(in_pipelines())) == len(others) > 20


CASES = [
    *(("compress", named, line) for named, line in in_pipelines()),
    (
        "compress",
        {"quantize_formats": ["int4"]},
        "quantize_formats must be one of int8, fp8, packed-int8, packed-int4, got 'int4'",
    ),
    ("compress", {"quantize_formats": []}, "quantize_formats must name at least one format, got []"),
    ("compress", {"eval_seq_len": 1}, "eval_seq_len must be at least 2, got 1"),
    ("compress", {"eval_blocks": -1}, "eval_blocks must be at least 0, got -1"),
    ("compress", {"model_id": " "}, "model_id must be given, got ' '"),
    ("compress", {"model_id": "/no/such"}, "model_id must be an existing folder or a hub id"),
    ("compress", {"train_data": "/no/such.txt"}, "train_data must be an existing file or folder"),
    ("compress", {"eval_data": "builtin:x"}, "eval_data must be builtin:python-docs, a hub dataset or a local path"),
    ("compress", {"distill_epochs": 1.5}, "distill_epochs must be a whole number, got '1.5'"),
    ("compress", {"distill_learning_rate": -1e-20}, "distill_learning_rate must be above 0, got -1e-20"),
    ("compress", {"skip_ppl_eval": "yes"}, "skip_ppl_eval must be true or false, got 'yes'"),
    ("compress", {"skip_ppl_eval": True, "publish_max_ppl_ratio": 2}, "publish_max_ppl_ratio must be 0 with skip_ppl_eval"),
    ("compress", {"publish_min_sparsity": 0.9}, "publish_min_sparsity must be at most prune_sparsity = 0.7, got 0.9"),
    ("compress", {"publish_to": "models"}, "publish_to must be one of gs://bucket/prefix"),
    ("compress", {"publish_version": "latest.json"}, "publish_version must be letters, digits"),
    ("compress", {"publish_registry": "x"}, "publish_to must be given for a registry"),
    ("compress", {"distill_nproc_per_node": 2, "distill_gpus": 2}, "distill_nproc_per_node must be 1 for backend none"),
    ("compress", {"distill_gpus": 2}, "distill_nproc_per_node must be distill_gpus = 2, got 1"),
    ("compress", {"prune_gpus": 2}, "prune_nproc_per_node must be prune_gpus = 2, got 1"),
    ("compress", {"prune_nproc_per_node": 2, "nsamples": 1}, "prune_nproc_per_node must be at most nsamples = 1, got 2"),
    ("compress", {"distill_deepspeed_config": "x.json"}, "distill_deepspeed_config must be empty for backend none"),
    ("compress", {"prune_gpus": -1}, "prune_gpus must be at least 0, got -1"),
    ("compress", {"quantize_cpu": "many"}, "quantize_cpu must be a number of CPUs such as 4, 0.5 or 500m, got 'many'"),
    ("compress", {"prune_memory": "16GB"}, "prune_memory must be auto or an amount of memory such as 16Gi, got '16GB'"),
    ("compress", {"quantize_memory": ""}, "quantize_memory must be auto or an amount of memory such as 16Gi, got ''"),
    ("compress", {"light_memory": "auto"}, "light_memory must be an amount of memory such as 16Gi, got 'auto'"),
    ("compress", {"gpu_type": "A100"}, "gpu_type must be the name of a resource such as nvidia.com/gpu, got 'A100'"),
    ("compress-distributed", {"distill_learning_rate": -1}, "distill_learning_rate must be above 0, got -1.0"),
    ("compress-distributed", {"distill_kind": "mpijob"}, "distill_kind must be one of pytorchjob, trainjob, got 'mpijob'"),
    ("compress-distributed", {"distill_nodes": 0}, "distill_nodes must be at least 1, got 0"),
    ("compress-distributed", {"distill_elastic": "3:4"}, "distill_elastic must be MIN:MAX"),
    ("compress-distributed", {"distill_image": ""}, "distill_image must be given"),
    ("compress-distributed", {"distill_queue": "no queue"}, "distill_queue must be the name of a Kubernetes object"),
    ("compress-distributed", {"distill_handover": "handover"}, "distill_handover must be one of gs://bucket/prefix"),
    ("compress-distributed", {"distill_memory": "0Gi"}, "distill_memory must be auto or an amount of memory such as 16Gi, got"),
]


@pytest.mark.parametrize(
    ("pipeline", "changes", "line"),
    CASES,
    ids=[f"{pipeline} {' '.join(f'{name}={value}' for name, value in changes.items())}" for pipeline, changes, _ in CASES],
)
@pytest.mark.usefixtures("no_hub")
def test_a_wrong_value_is_refused_by_the_pipelines_name(start, pipeline, changes, line):
    assert_refused(start, line, pipeline, **changes)


@pytest.fixture(params=["below a file", "gs", "s3", "minio"])
def unwritable(request, connect, tmp_path):
    if request.param == "below a file":
        (tmp_path / "file").touch()
        return f"{tmp_path}/file/models"
    connect(request.param)
    return f"{request.param}://missing-bucket/models"


@pytest.mark.parametrize(
    ("pipeline", "name"),
    [("compress", "publish_to"), ("compress-distributed", "publish_to"), ("compress-distributed", "distill_handover")],
)
@pytest.mark.usefixtures("no_hub")
def test_a_place_that_cannot_be_written_is_refused(start, unwritable, pipeline, name):
    assert_refused(start, f"{name} must be a place that can be written, got {unwritable}", pipeline, **{name: unwritable})


@pytest.mark.usefixtures("no_hub")
def test_values_are_checked_before_places(start, unwritable):
    """They take no time, and nothing is written for a run that cannot succeed."""
    assert_refused(start, "prune_sparsity must be", "compress", publish_to=unwritable, prune_sparsity=1.3)


@pytest.mark.parametrize("value", ["", "auto", "none"])
def test_a_word_is_no_place(value, monkeypatch):
    monkeypatch.setattr(stage, "check_writable", lambda *_: pytest.fail("taken for a place"))
    stage.check_places(dict.fromkeys(stage.PLACES, value))
    stage.check_places({})


@pytest.mark.parametrize("name", stage.PLACES)
def test_each_place_is_checked_by_its_name(name, unwritable):
    with pytest.raises(ValueError, match=f"^{name} must be a place that can be written, got {unwritable}"):
        stage.check_places({name: unwritable})


@pytest.mark.parametrize("scheme", ["gs", "s3", "minio"])
def test_nothing_is_left_at_a_place_that_can_be_written(start, connect, scheme):
    connect(scheme)
    place = f"{scheme}://bucket/of-resolve"
    start("compress-distributed", publish_to=place, distill_handover=place)
    assert storage.place.open_store(place).list() == {}


def test_a_model_in_a_folder_with_a_quotation_mark_is_found(start, checkpoint, tmp_path):
    """It is no part of the dictionary, which could not hold it."""
    folder = tmp_path / 'it\'s "tiny" \\'
    shutil.copytree(checkpoint, folder)
    assert start("compress", model_id=str(folder))["model_id"] == str(folder)


@pytest.mark.parametrize(
    ("parameters", "line"),
    [
        ("{", "parameters must be JSON"),
        ("", "parameters must be JSON"),
        ("[]", "parameters must be JSON of its form, it: Input should be an object, got []"),
        ('{"prune_sparsty": 0.5}', "prune_sparsty must be a parameter of compress, it has bos, distill_admm_interval, "),
        ('{"distill_nodes": 2}', "distill_nodes must be a parameter of compress, it has"),
        ('{"prune_sparsity": null}', "prune_sparsity must be a finite number, got None"),
        ('{"prune_sparsity": [0.5]}', "prune_sparsity must be a finite number, got [0.5]"),
        ('{"prune_sparsity": true}', "prune_sparsity must be a finite number, got True"),
        ('{"distill_learning_rate": 1%s}' % ("0" * 400), "distill_learning_rate must be a finite number, got 1000"),
        ('{"dtype": 16}', "dtype must be a string, got 16"),
        ('{"quantize_formats": "int8"}', "quantize_formats must be a list, got 'int8'"),
        ('{"distill_handover": "/tmp"}', "distill_image must be given: compress-distributed has no default for it"),
        ('{"publish_to": "/tmp/\\"x"}', "publish_to must have no quotation mark, backslash or line break, got "),
        ('{"publish_version": "a\\nb"}', "publish_version must be letters, digits"),
    ],
)
@pytest.mark.usefixtures("no_hub")
def test_parameters_that_are_not_those_of_a_run_are_refused(checkpoint, corpus, parameters, line):
    own = {"model_id": str(checkpoint), "train_data": str(corpus), "eval_data": str(corpus)}
    with pytest.raises(ValueError, match=f"^{re.escape(line)}"):
        stage.run(ResolveConfig(**own, parameters=parameters))


@pytest.mark.parametrize("changes", [{}, {"distill_learning_rate": -1}])
def test_the_stage_runs_where_kfp_runs_it(checkpoint, corpus, tmp_path, changes):
    """In KFP's own executor, in which most of kfp cannot be imported."""
    values = {"model_id": str(checkpoint), "train_data": str(corpus), "eval_data": str(corpus)} | changes
    container = compiled("compress")["deploymentSpec"]["executors"]["exec-resolve"]["container"]
    (tmp_path / "program.py").write_text(container["command"][-1])
    outputs = {name: {"outputFile": str(tmp_path / name)} for name in resolve.component_spec.outputs}
    executor_input = {
        "inputs": {"parameterValues": handed_over("compress", values)},
        "outputs": {"parameters": outputs, "outputFile": str(tmp_path / "executor_output.json")},
    }
    flags = ["--component_module_path", str(tmp_path / "program.py"), "--function_to_execute", "resolve"]
    run = subprocess.run(
        [sys.executable, "-m", "kfp.dsl.executor_main", *flags, "--executor_input", json.dumps(executor_input)],
        env=os.environ | {"_KFP_RUNTIME": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    if changes:
        assert run.returncode != 0
        assert "ValueError: distill_learning_rate must be above 0, got -1.0" in run.stderr.splitlines()
    else:
        assert run.returncode == 0, run.stderr
        found = json.loads((tmp_path / "executor_output.json").read_text())["parameterValues"]
        assert found["model_id"] == str(checkpoint)
        assert all(found[name].endswith("Gi") for name in MEMORY)
