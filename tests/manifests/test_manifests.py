"""The manifests render with `kubectl kustomize`, are valid in strict mode, and grant the calls that the launcher makes."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "manifests"
KUSTOMIZATIONS = sorted(str(file.parent.relative_to(MANIFESTS)) for file in MANIFESTS.rglob("kustomization.yaml"))
OVERLAYS = [name for name in KUSTOMIZATIONS if name.startswith("overlays/")]
VERSIONS = ("1.25", kubernetes_validate.latest_version())  # of Kubernetes: an old one and the latest known one
LOCAL_QUEUE = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "LocalQueue", "spec": {"clusterQueue": "cluster-queue"}}

# client method → (resource, verb) that it requires; `PLURAL` is the custom resource passed to it
CALLS = {
    "create_namespaced_custom_object": ("PLURAL", "create"),
    "get_namespaced_custom_object": ("PLURAL", "get"),
    "list_namespaced_custom_object": ("PLURAL", "list"),
    "patch_namespaced_custom_object": ("PLURAL", "patch"),
    "delete_namespaced_custom_object": ("PLURAL", "delete"),
    "read_namespaced_pod": ("pods", "get"),
    "list_namespaced_pod": ("pods", "list"),
    "read_namespaced_pod_log": ("pods/log", "get"),
    "list_namespaced_event": ("events", "list"),
}


def render(folder: Path) -> list[dict]:
    """The objects that a kustomization renders to."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def granted(objects: list[dict]) -> set[tuple[str, str]]:
    """Every (resource, verb) that the Roles among the objects grant."""
    return {
        (resource, verb)
        for object_ in objects
        if object_["kind"] == "Role"
        for rule in object_["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def named(objects: list[dict], kind: str) -> dict[str, dict]:
    return {object_["metadata"]["name"]: object_ for object_ in objects if object_["kind"] == kind}


def test_the_kustomizations_are_found():
    assert KUSTOMIZATIONS == ["base", "overlays/gke", "overlays/kfp", "overlays/profile", "queue", "storage"]


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_every_kustomization_renders_valid_objects(name):
    objects = render(MANIFESTS / name)
    assert objects
    for object_ in objects:
        if object_["kind"] == "LocalQueue":  # Kueue's own: kubernetes-validate knows only the built-in kinds
            assert {key: object_[key] for key in LOCAL_QUEUE} == LOCAL_QUEUE
        else:
            for version in VERSIONS:
                kubernetes_validate.validate(object_, version, strict=True)


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_binds_the_role_to_the_account_of_its_namespace(name):
    objects = render(MANIFESTS / name)
    (namespace,) = {object_["metadata"]["namespace"] for object_ in objects}
    (binding,) = named(objects, "RoleBinding").values()
    assert binding["roleRef"]["name"] in named(objects, "Role")
    account = {"profile": "default-editor"}.get(Path(name).name, "pipeline-runner")
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": namespace}]


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_training_pods_account_has_no_token_and_no_role(name):
    account = named(render(MANIFESTS / name), "ServiceAccount")["sparse-distill-worker"]
    assert account["automountServiceAccountToken"] is False
    identity = account["metadata"].get("annotations", {}).get("iam.gke.io/gcp-service-account")
    assert (identity is not None) == (name == "overlays/gke")


def test_storage_and_queue_join_an_overlay_by_uncommenting_a_line(tmp_path):
    shutil.copytree(MANIFESTS, tmp_path / "manifests")
    file = tmp_path / "manifests" / "overlays" / "kfp" / "kustomization.yaml"
    assert {object_["kind"] for object_ in render(file.parent)} == {"Role", "RoleBinding", "ServiceAccount"}
    file.write_text(re.sub(r"^# (- \.\./)", r"\1", file.read_text(), flags=re.MULTILINE))
    objects = {object_["kind"]: object_ for object_ in render(file.parent)}
    for kind in ("PersistentVolumeClaim", "LocalQueue"):
        assert objects[kind]["metadata"]["namespace"] == "kubeflow"


def test_the_role_grants_what_the_launcher_calls_and_no_more():
    """Compared with the launcher's source, so that a missing or unused right is found without a cluster."""
    sources = [file.read_text(encoding="utf-8") for file in (ROOT / "components" / "distill_distributed").glob("*.py")]
    methods = {
        node.func.attr
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and "_namespaced_" in node.func.attr
    }
    assert methods <= CALLS.keys(), f"calls of which this test knows no right: {methods - CALLS.keys()}"
    used = {("workflows", "get") for source in sources if '"workflows"' in source}  # by the method that reads jobs
    for resource, verb in (CALLS[method] for method in methods):
        used |= {(plural, verb) for plural in (("pytorchjobs", "trainjobs") if resource == "PLURAL" else (resource,))}
    assert granted(render(MANIFESTS / "base")) == used
