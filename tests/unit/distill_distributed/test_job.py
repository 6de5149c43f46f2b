"""The job's manifest: golden files, the published schemas, and the settings that shape it."""

import dataclasses
import functools
import os
from pathlib import Path

import pytest
import yaml

from components.distill_distributed.job import RENDERERS, JobSpec, as_yaml

GOLDEN = Path(__file__).with_name("golden")
AMOUNTS = {"nvidia.com/gpu": "8", "cpu": "8", "memory": "32Gi"}
ON_CPU = {"resources": {kind: {"cpu": "1", "memory": "2Gi"} for kind in ("requests", "limits")}}
SPEC = JobSpec(
    name="distill-0123456789ab",
    namespace="team",
    run="3f0c",
    image="sparse-distill/gpu:0.1.0",
    command=["python", "-m", "components.distill_distributed.node", "--result", "gs://bucket/3f0c/distill-0123456789ab"],
    nodes=2,
    nproc_per_node=8,
    elastic=None,
    retries=3,
    deadline=86400,
    queue="gpus",
    runtime="torch-distributed",
    service_account="trainer",
    pod={
        "resources": {"requests": AMOUNTS, "limits": AMOUNTS},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "node_selector": {"pool": "a100"},
        "env": [{"name": "NCCL_DEBUG", "value": "WARN"}],
        "volumes": [{"name": "fast", "persistentVolumeClaim": {"claimName": "fast"}}],
        "volume_mounts": [{"name": "fast", "mountPath": "/fast"}],
    },
    session=None,
    owner={"apiVersion": "v1", "kind": "Pod", "name": "launcher", "uid": "0d7a"},
)
CASES = {
    "pytorchjob": ("pytorchjob", SPEC),
    "pytorchjob-elastic": ("pytorchjob", dataclasses.replace(SPEC, nodes=3, elastic=(2, 4))),
    "pytorchjob-one-node": (
        "pytorchjob",
        dataclasses.replace(SPEC, nodes=1, pod=ON_CPU, queue="", service_account="", owner=None),
    ),
    "trainjob": ("trainjob", SPEC),
}


def render(case: str) -> dict:
    kind, spec = CASES[case]
    return RENDERERS[kind](spec)


def pod_of(manifest: dict) -> dict:
    if manifest["kind"] == "PyTorchJob":
        return next(iter(manifest["spec"]["pytorchReplicaSpecs"].values()))["template"]
    node = manifest["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    return node["template"]["spec"]["template"]


@pytest.mark.parametrize("case", CASES)
def test_the_manifest_is_that_of_the_golden_file(case):
    """To rewrite them: `REWRITE_GOLDEN=1 pytest tests/unit/distill_distributed/test_job.py`, then review the diff."""
    file = GOLDEN / f"{case}.yaml"
    text = as_yaml(render(case))
    if os.environ.get("REWRITE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize("case", CASES)
def test_the_published_schema_takes_the_manifest(case):
    """CRD_DIR names a folder with the operators' kubeflow.org_pytorchjobs.yaml and trainer.kubeflow.org_trainjobs.yaml."""
    if "CRD_DIR" not in os.environ:
        pytest.skip("CRD_DIR does not name a folder with the published CRDs")
    jsonschema = pytest.importorskip("jsonschema")
    manifest = render(case)
    name = {"PyTorchJob": "kubeflow.org_pytorchjobs", "TrainJob": "trainer.kubeflow.org_trainjobs"}[manifest["kind"]]
    schema = published_schema(Path(os.environ["CRD_DIR"]) / f"{name}.yaml", manifest["apiVersion"].partition("/")[2])
    jsonschema.validate(manifest, schema)
    with pytest.raises(jsonschema.ValidationError, match="surprise"):  # a schema that accepts anything proves nothing
        jsonschema.validate(manifest | {"spec": manifest["spec"] | {"surprise": 1}}, schema)


@functools.cache
def published_schema(file: Path, version: str) -> dict:
    crd = yaml.load(file.read_text(), yaml.CSafeLoader)
    return closed(next(entry for entry in crd["spec"]["versions"] if entry["name"] == version)["schema"]["openAPIV3Schema"])


def closed(schema: dict) -> dict:
    """A CRD's schema as plain JSON schema that rejects unknown fields, as kubectl does, and accepts both types of quantity."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {
        name: value for name, value in schema.items() if name in ("type", "required", "enum", "minimum", "maximum", "pattern")
    }
    if "items" in schema:
        made["items"] = closed(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        made["additionalProperties"] = closed(schema["additionalProperties"])
    elif "properties" in schema:
        made["properties"] = {name: closed(value) for name, value in schema["properties"].items()}
        made["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    return made


@pytest.mark.parametrize("case", ["pytorchjob", "trainjob"])
def test_gpus_and_placement_reach_the_nodes(case):
    manifest = render(case)
    text = as_yaml(manifest)
    # requests and limits of master and worker, or of the trainer
    assert text.count("nvidia.com/gpu: '8'") == (4 if case == "pytorchjob" else 2)
    pod = pod_of(manifest)["spec"]
    assert pod["tolerations"] == SPEC.pod["tolerations"]
    assert pod["nodeSelector"] == {"pool": "a100"}
    assert {"name": "fast", "mountPath": "/fast"} in pod["containers"][0]["volumeMounts"]
    assert SPEC.pod["volumes"][0] in pod["volumes"]


@pytest.mark.parametrize("case", CASES)
def test_nodes_do_not_run_as_root_and_have_no_mesh(case):
    template = pod_of(render(case))
    assert template["metadata"]["annotations"] == {"sidecar.istio.io/inject": "false"}
    assert template["spec"]["securityContext"]["runAsNonRoot"] is True
    # the operator adds an alpine container, whose image runs as root, to the workers, so the pod must set another user
    assert template["spec"]["securityContext"]["runAsUser"] > 0
    security = template["spec"]["containers"][0]["securityContext"]
    assert security == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


@pytest.mark.parametrize("case", CASES)
def test_no_job_lives_forever(case):
    spec = render(case)["spec"]
    assert spec.get("runPolicy", spec)["activeDeadlineSeconds"] == 86400
    if "runPolicy" in spec:
        assert spec["runPolicy"]["backoffLimit"] == CASES[case][1].retries * CASES[case][1].nodes
        assert spec["runPolicy"]["cleanPodPolicy"] == "Running"
        assert spec["runPolicy"]["ttlSecondsAfterFinished"] > 0


def test_a_fixed_job_has_one_master_and_an_elastic_one_none():
    assert {name: entry["replicas"] for name, entry in render("pytorchjob")["spec"]["pytorchReplicaSpecs"].items()} == {
        "Master": 1,
        "Worker": 1,
    }
    assert list(render("pytorchjob-one-node")["spec"]["pytorchReplicaSpecs"]) == ["Master"]
    elastic = render("pytorchjob-elastic")["spec"]
    assert {name: entry["replicas"] for name, entry in elastic["pytorchReplicaSpecs"].items()} == {"Worker": 3}
    assert (elastic["elasticPolicy"]["minReplicas"], elastic["elasticPolicy"]["maxReplicas"]) == (2, 4)


def test_a_queue_and_an_owner_are_named_only_if_there_are_any():
    assert render("pytorchjob")["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert render("pytorchjob")["metadata"]["ownerReferences"][0]["name"] == "launcher"
    bare = render("pytorchjob-one-node")["metadata"]
    assert "ownerReferences" not in bare
    assert "kueue.x-k8s.io/queue-name" not in bare["labels"]
