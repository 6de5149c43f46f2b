"""Settings of a job are checked before anything is handed over."""

import dataclasses
import inspect
import json

import pytest
from kfp.dsl import Artifact, TaskConfig

from components.core.settings import flags_of
from components.distill.config import DistillConfig
from components.distill_distributed import stage
from components.distill_distributed.component import distill_distributed
from components.distill_distributed.config import DistillDistributedConfig
from components.distill_distributed.stage import distinct, job_name
from components.distill_distributed.sweep import SweepConfig

OUTSIDE = json.dumps({"teacher_model": "gs://bucket/a", "mask_file": "oci://registry/mask"})


@pytest.fixture
def good(checkpoint, corpus, tmp_path):
    return {
        "teacher_model": str(checkpoint),
        "student_model": str(checkpoint),
        "mask_file": str(checkpoint),
        "output_dir": str(tmp_path / "out"),
        "train_data": str(corpus),
        "eval_data": str(corpus),
        "handover": "gs://bucket/handover",
        "image": "sparse-distill/gpu:0.1.0",
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"handover": "bucket/handover"}, "handover must be one of gs://"),
        ({"handover": ""}, "handover must be given, or artifacts must have a place for eval_data, got '{}'"),
        (
            {"handover": "", "artifacts": OUTSIDE},
            "handover must be given, .* cannot reach the artifact: mask_file must be one of gs",
        ),
        ({"artifacts": "[]"}, "artifacts must be JSON of its form"),
        ({"checkpoints": "somewhere"}, "checkpoints must be one of gs://"),
        ({"checkpoint_dir": "/checkpoints"}, "checkpoint_dir must be empty for a job"),
        ({"image": ""}, "image must"),
        ({"kind": "mpijob"}, "kind must be one of pytorchjob, trainjob, got 'mpijob'"),
        ({"backend": "deepspeed"}, "backend must be one of fsdp, got 'deepspeed'"),
        ({"launcher": "python"}, "launcher must be one of torchrun, got 'python'"),
        ({"nodes": 0}, "nodes must be at least 1, got 0"),
        ({"deadline": 0}, "deadline must be at least 1, got 0"),
        ({"retries": -1}, "retries must be at least 0, got -1"),
        ({"mix_data": "builtin:python-docs"}, "mix_data must be empty for a job"),
        ({"queue": "no queue"}, "queue must be the name of a Kubernetes object, got no queue"),
        ({"service_account": "A"}, "service_account must be the name of a Kubernetes object, got A"),
        ({"elastic": "2"}, "elastic must be MIN:MAX"),
        ({"elastic": "3:4"}, "elastic must be MIN:MAX with 1 <= MIN <= nodes = 2 <= MAX, got 3:4"),
        ({"elastic": "1:2", "kind": "trainjob"}, "elastic must be empty for kind trainjob, got 1:2"),
        ({"pod": "{"}, "pod must be JSON"),
        ({"pod": "[]"}, "pod must be JSON of its form"),
        ({"pod": '{"hostNetwork": true}'}, "pod must have settings among affinity, env, .* got hostNetwork"),
        ({"pod": '{"resources": {}}'}, "pod must have settings among .* got resources"),
        ({"gpus": -1}, "gpus must be at least 0, got -1"),
        ({"cpu": ""}, "cpu must be a number of CPUs such as 4, 0.5 or 500m, got ''"),
        ({"cpu": "0m"}, "cpu must be a number of CPUs"),
        ({"memory": "16m"}, "memory must be an amount of memory such as 16Gi, got '16m'"),
        ({"memory": "16GB"}, "memory must be an amount of memory"),
        ({"memory": "auto"}, "memory must be an amount of memory such as 16Gi, got 'auto'"),  # pipelines pass on an amount
        ({"gpu_type": "gpu"}, "gpu_type must be the name of a resource such as nvidia.com/gpu, got 'gpu'"),
        ({"learning_rate": 0}, "learning_rate must be"),  # a rule of the distill stage
    ],
)
def test_a_wrong_value_is_named(good, changes, said):
    DistillDistributedConfig(**good)
    with pytest.raises(ValueError, match=said):
        DistillDistributedConfig(**good | changes)


def test_unset_pod_settings_are_left_out(good):
    """Outside a cluster, KFP passes None for each of them."""
    pod = {"env": None, "tolerations": [], "node_selector": {"pool": "a100"}}
    found = DistillDistributedConfig(**good, pod=json.dumps(pod)).pod_settings()
    assert found.keys() == {"node_selector", "resources"}
    assert found["node_selector"] == {"pool": "a100"}


@pytest.mark.parametrize(("gpus", "asked"), [(8, {"amd.com/gpu": "8"}), (0, {})])
def test_a_node_asks_for_what_it_may_use(good, gpus, asked):
    """Requests that equal the limits; no GPU at all in the manifest of a job on CPUs."""
    settings = DistillDistributedConfig(**good, gpus=gpus, cpu="500m", memory="1.5Gi", gpu_type="amd.com/gpu")
    amounts = {"cpu": "500m", "memory": "1.5Gi"} | asked
    assert settings.pod_settings() == {"resources": {"requests": amounts, "limits": amounts}}


def test_the_nodes_get_the_sizes_given_as_parameters_not_those_of_the_launchers_task(good, tmp_path, monkeypatch):
    class CalledError(Exception):
        """With the stage's settings."""

    def run(config):
        raise CalledError(config)

    monkeypatch.setattr(stage, "run", run)
    known = {entry.name: entry.default for entry in dataclasses.fields(DistillDistributedConfig)}
    taken = distill_distributed.component_spec.inputs
    values = {name: value for name, value in known.items() if name in taken} | {"handover": good["handover"], "image": "x"}
    artifacts = inspect.signature(distill_distributed.python_func).parameters.keys() - values.keys() - {"task_config"}
    values |= {name: Artifact(uri=str(tmp_path / name)) for name in artifacts}
    task = TaskConfig(resources={"limits": {"cpu": "2", "memory": "8Gi"}}, node_selector={"pool": "a100"})
    with pytest.raises(CalledError) as called:
        distill_distributed.python_func(**values | {"gpus": 0, "cpu": "12", "memory": "48Gi"}, task_config=task)
    (config,) = called.value.args
    amounts = {"cpu": "12", "memory": "48Gi"}
    assert config.pod_settings() == {
        "resources": {"requests": amounts, "limits": amounts},
        "node_selector": {"pool": "a100"},
    }


def test_a_mask_is_handed_over_with_its_folder(good, tmp_path):
    (tmp_path / "sparsity_mask.safetensors").write_bytes(b"")
    settings = DistillDistributedConfig(**good | {"mask_file": str(tmp_path / "sparsity_mask.safetensors")})
    assert settings.inputs()["mask_file"] == str(tmp_path)


def test_a_run_without_evaluation_hands_no_evaluation_text_over(good):
    assert "eval_data" in DistillDistributedConfig(**good).inputs()
    assert "eval_data" not in DistillDistributedConfig(**good, skip_ppl_eval=True).inputs()


def test_what_is_used_twice_is_handed_over_once():
    assert distinct({"teacher_model": "/a", "train_data": "/t", "eval_data": "/t"}) == {
        "teacher_model": "teacher_model",
        "train_data": "train_data",
        "eval_data": "train_data",
    }


def test_flags_say_the_settings_again(good, tmp_path):
    settings = {name: value for name, value in good.items() if name not in ("handover", "image")}
    flags = flags_of(DistillConfig(**settings, epochs=3), DistillConfig, leave_out={"teacher_model"})
    assert "--epochs=3" in flags
    assert f"--output_dir={tmp_path / 'out'}" in flags
    assert not [flag for flag in flags if flag.startswith(("--teacher_model", "--deepspeed_config"))]


def test_tries_of_a_task_share_a_name_and_no_others_do(good, tmp_path):
    first, second = (DistillDistributedConfig(**good | {"output_dir": str(tmp_path / task / "out")}) for task in ("a", "b"))
    name = job_name("run", first)
    assert name == job_name("run", first)
    assert len({name, job_name("other", first), job_name("run", second)}) == 3
    assert len(name) < 40  # the operator appends the replica, and a Service's name has at most 63 characters
    assert name[0].isalpha()


@pytest.mark.parametrize("run_id", ["", "..", "a/b", ".", "-x", "a/../.."])
def test_a_sweep_never_leaves_the_place_of_its_run(run_id):
    with pytest.raises(ValueError, match="run_id must be a run's id"):
        SweepConfig(run_id=run_id, handover="/handover")
