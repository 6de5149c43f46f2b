"""The golden YAML is what the code compiles to, and has what a run needs."""

import inspect
import re
import sys

import pytest
import yaml
from docstring_parser import parse

from pipelines import compile as compile_module
from pipelines.checks import ALONE
from pipelines.compress import compress
from pipelines.compress_distributed import compress_distributed
from pipelines.reference import documents

PIPELINES = {pipeline.name: pipeline for pipeline in (compress, compress_distributed)}
ASKS_FOR_GPUS = {"prune", "distill", "quantize"}
NEVER_CACHED = {"resolve", "publish", "sweep-jobs"}  # they read or change state outside the run


@pytest.fixture(scope="module", params=PIPELINES)
def spec(request):
    return next(iter(yaml.safe_load_all((compile_module.COMPILED / f"{request.param}.yaml").read_text())))


def compile_to(folder, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["compile.py", "--output_dir", str(folder), *flags])
    compile_module.main()
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_compiling_gives_the_golden_files_byte_for_byte(tmp_path, monkeypatch):
    golden = {path.name: path.read_text() for path in compile_module.COMPILED.iterdir()}
    assert set(golden) == {"compress.yaml", "compress-distributed.yaml"}
    assert compile_to(tmp_path, monkeypatch) == golden


def test_a_registry_stands_before_every_image(tmp_path, monkeypatch):
    for name, text in compile_to(tmp_path, monkeypatch, "--registry", "ghcr.io/team/").items():
        assert set(re.findall(r"([\w./-]*)sparse-distill/(?:cpu|gpu|launcher):", text)) == {"ghcr.io/team/"}, name


def test_a_volume_takes_the_place_of_the_bucket(tmp_path, monkeypatch):
    text = compile_to(tmp_path, monkeypatch, "--handover_claim", "models")["compress-distributed.yaml"]
    spec, platform = yaml.safe_load_all(text)
    assert spec["root"]["inputDefinitions"]["parameters"]["distill_handover"]["defaultValue"] == "/handover"
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    mounts = {name: entry["pvcMount"][0]["mountPath"] for name, entry in executors.items() if "pvcMount" in entry}
    # resolve writes to it, to find out whether that can be done
    assert mounts == dict.fromkeys(("exec-distill-distributed", "exec-resolve", "exec-sweep-jobs"), "/handover")


def test_every_parameter_is_described(spec):
    function = PIPELINES[spec["pipelineInfo"]["name"]].pipeline_func
    described = {entry.arg_name for entry in parse(inspect.getdoc(function)).params}
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert described == set(parameters)
    assert all(parameter.get("description") for parameter in parameters.values())
    assert parameters["model_id"]["defaultValue"] == "Qwen/Qwen3-0.6B"
    assert parameters["prune_sparsity"]["defaultValue"] == 0.7


def dags(spec):
    """Name → DAG, for the pipeline, its loops and its nested pipelines."""
    nested = {name: component for name, component in spec["components"].items() if "dag" in component}
    return {"root": spec["root"]} | nested


def pods(spec):
    """Name → (task, container), for everything that runs in a pod."""
    found = {}
    for dag in dags(spec).values():
        for name, task in dag["dag"]["tasks"].items():
            component = spec["components"][task["componentRef"]["name"]]
            if "executorLabel" in component:
                found[name] = task, spec["deploymentSpec"]["executors"][component["executorLabel"]]["container"]
    return found


def test_only_what_looks_outside_is_never_cached(spec):
    cached = {name: bool(task["cachingOptions"]) for name, (task, _) in pods(spec).items()}
    assert cached.keys() >= {"resolve", "fetch", "tokenize", "prune", "quantize", "report", "publish"}
    assert cached == {stage: stage not in NEVER_CACHED for stage in cached}


def test_every_pod_has_run_time_resources_and_an_explicit_back_off(spec):
    for name, (task, container) in pods(spec).items():
        assert task["retryPolicy"]["backoffMaxDuration"] == "300s", name
        resources = container["resources"]
        assert "$.inputs.parameters" in resources["resourceCpuLimit"], name
        assert "$.inputs.parameters" in resources["resourceMemoryLimit"], name
        assert ("accelerator" in resources) == (name in ASKS_FOR_GPUS), name


def test_nothing_is_installed_when_a_pod_starts(spec):
    for name, (_, container) in pods(spec).items():
        assert "pip install" not in str(container["command"]), name


def test_every_parameter_that_a_task_reads_is_an_input_of_its_dag(spec):
    """A loop does not declare outer parameters that its tasks use only for resources; they would be missing at run time."""
    for dag_name, dag in dags(spec).items():
        declared = set(dag.get("inputDefinitions", {}).get("parameters", {}))
        for name, task in dag["dag"]["tasks"].items():
            for value in task.get("inputs", {}).get("parameters", {}).values():
                if "componentInputParameter" in value:
                    assert value["componentInputParameter"] in declared, (dag_name, name)


def test_formats_are_quantized_side_by_side(spec):
    tasks = [task for dag in dags(spec).values() for task in dag["dag"]["tasks"].values()]
    loop = next(task for task in tasks if "parameterIterator" in task)
    assert loop["parameterIterator"]["items"]["inputParameter"].endswith("pipelinechannel--quantize_formats")
    assert "iteratorPolicy" not in loop  # no limit: the formats run in parallel


def test_the_launcher_asks_for_little_and_hands_the_nodes_sizes_to_them():
    """With nothing of its own it would be the first to be evicted; with the nodes' sizes it would occupy a node."""
    spec = next(iter(yaml.safe_load_all((compile_module.COMPILED / "compress-distributed.yaml").read_text())))
    task, container = pods(spec)["distill-distributed"]
    channel = "{{{{$.inputs.parameters['pipelinechannel--{}']}}}}"
    assert container["resources"] == {
        "resourceCpuLimit": channel.format("light_cpu"),
        "resourceMemoryLimit": channel.format("light_memory"),
    }
    given = {name: value.get("componentInputParameter") for name, value in task["inputs"]["parameters"].items()}
    sizes = {"gpus": "distill_gpus", "cpu": "distill_cpu", "gpu_type": "gpu_type"}
    assert {name: given[name] for name in sizes} == sizes
    assert task["inputs"]["parameters"]["memory"] == of_resolve("distill_memory")


def of_resolve(output):
    """Where a task finds an output of the resolve stage."""
    return {"taskOutputParameter": {"outputParameterKey": output, "producerTask": "resolve"}}


def test_the_memory_of_the_large_stages_is_what_the_first_one_computes(spec):
    """Quantize is below a loop and a nested pipeline, each of which hands it on by a name of its own."""
    found = {}
    for name, (task, container) in pods(spec).items():
        channel = re.search(r"'(pipelinechannel--[\w-]+)'", container["resources"]["resourceMemoryLimit"])[1]
        found[name] = task["inputs"]["parameters"][channel]
    assert {name for name, source in found.items() if source != {"componentInputParameter": "light_memory"}} >= {
        "prune",
        "quantize",
    }
    large = {"prune", "distill"} & found.keys()
    assert {name: found[name] for name in large} == {name: of_resolve(f"{name}_memory") for name in large}
    assert found["quantize"] == {"componentInputParameter": "quantize_memory"}
    tasks = [task for dag in dags(spec).values() for task in dag["dag"]["tasks"].values()]
    (nested,) = (task for task in tasks if task["componentRef"]["name"] == "comp-quantize-format")
    outer = nested["inputs"]["parameters"]["quantize_memory"]["componentInputParameter"]
    (loop,) = (task for task in tasks if "parameterIterator" in task)
    assert loop["inputs"]["parameters"][outer] == of_resolve("quantize_memory")


def test_the_first_pod_is_given_every_parameter_and_what_it_takes_to_reach_the_places(spec):
    """KFP puts text into a dictionary as it is, which no list survives, nor a path with a quotation mark."""
    task, _ = pods(spec)["resolve"]
    given = task["inputs"]["parameters"]
    packed = given["parameters"]["runtimeValue"]["constant"]
    definitions = spec["root"]["inputDefinitions"]["parameters"]
    for name, value in packed.items():
        assert value == f"{{{{$.inputs.parameters['pipelinechannel--{name}']}}}}"
        assert given[f"pipelinechannel--{name}"]["componentInputParameter"] == name
        assert definitions[name]["parameterType"] in ("STRING", "NUMBER_INTEGER", "NUMBER_DOUBLE", "BOOLEAN")
    alone = {name for name in definitions if given.get(name, {}).get("componentInputParameter") == name}
    assert alone == ALONE | {"quantize_formats"}
    assert packed.keys() == definitions.keys() - alone


def test_the_pods_that_write_to_a_place_have_the_secrets_of_the_stores():
    _, platform = yaml.safe_load_all((compile_module.COMPILED / "compress-distributed.yaml").read_text())
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    known = {name for name, entry in executors.items() if "sparse-distill-s3" in str(entry.get("secretAsEnv"))}
    assert known == {"exec-resolve", "exec-distill-distributed", "exec-publish", "exec-sweep-jobs"}
    _, platform = yaml.safe_load_all((compile_module.COMPILED / "compress.yaml").read_text())
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    known = {name for name, entry in executors.items() if "sparse-distill-s3" in str(entry.get("secretAsEnv"))}
    assert known == {"exec-resolve", "exec-distill", "exec-remove-checkpoints", "exec-publish"}


def test_artifacts_say_what_they_are_and_the_report_reads_the_models_alone(spec):
    """The list of artifacts in the UI shows no more of an artifact than its task and its name."""
    parts = {
        name.removeprefix("comp-"): component for name, component in spec["components"].items() if "executorLabel" in component
    }
    made = {name: set(part.get("outputDefinitions", {}).get("artifacts", {})) - {"metrics"} for name, part in parts.items()}
    distill = {"distill": {"distilled_model", "distilled_mask"}, "remove-checkpoints": set()} if "distill" in parts else {
        "distill-distributed": {"distilled_model", "distilled_mask", "job_manifest"}, "sweep-jobs": {"place"},
    }  # fmt: skip
    assert made == distill | {
        "resolve": set(),
        "fetch": {"dense_model"},
        "tokenize": {"tokens"},
        "prune": {"pruned_model", "mask"},
        "quantize": {"quantized_model"},
        "report": {"compression_report", "report_files"},
        "publish": set(),
    }
    assert {name: parts[name]["inputDefinitions"]["artifacts"].keys() for name in ("report", "publish")} == {
        "report": {"models"},
        "publish": {"models", "report_files"},
    }
    nested = spec["components"]["comp-quantize-format"]["outputDefinitions"]["artifacts"]
    assert nested.keys() - {name for name in nested if name.endswith("-metrics")} == {"quantized_model"}


def test_the_mask_by_which_a_model_is_checked_is_that_of_distillation(spec):
    tasks = [each.get("dag", {}).get("tasks", {}) for each in (spec["root"], *spec["components"].values())]
    (whole,) = [each for each in tasks if "prune" in each]
    (distill,) = [task for name, task in whole.items() if name in ("distill", "distill-distributed")]
    (loop,) = [task for name, task in whole.items() if name.startswith("for-loop")]
    given = distill["inputs"]["artifacts"]["pruned_mask"]["taskOutputArtifact"]
    assert given == {"outputArtifactKey": "mask", "producerTask": "prune"}
    read = [entry["taskOutputArtifact"] for entry in loop["inputs"]["artifacts"].values() if "taskOutputArtifact" in entry]
    keys = {entry["outputArtifactKey"]: entry["producerTask"] for entry in read}
    assert keys["distilled_mask"] == distill["taskInfo"]["name"]
    assert "mask" not in keys


def test_the_job_of_many_nodes_gets_what_is_set_on_its_task():
    spec = next(iter(yaml.safe_load_all((compile_module.COMPILED / "compress-distributed.yaml").read_text())))
    passed = {
        entry["field"]: entry.get("applyToTask", False)
        for entry in spec["components"]["comp-distill-distributed"]["taskConfigPassthroughs"]
    }
    assert passed == {
        "RESOURCES": True,  # those of the launcher; the nodes' are parameters
        "KUBERNETES_AFFINITY": False,
        "KUBERNETES_NODE_SELECTOR": False,
        "KUBERNETES_TOLERATIONS": False,
        "ENV": True,
        "KUBERNETES_VOLUMES": True,
    }


def test_jobs_are_swept_whatever_becomes_of_the_run():
    spec = next(iter(yaml.safe_load_all((compile_module.COMPILED / "compress-distributed.yaml").read_text())))
    sweep = spec["root"]["dag"]["tasks"]["sweep-jobs"]
    assert sweep["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    assert sweep["inputs"]["parameters"]["run_id"]["runtimeValue"]["constant"] == "{{$.pipeline_job_uuid}}"


def test_the_tables_of_parameters_are_as_the_settings_say():
    for path, text in documents().items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: `make compile` writes it anew"
