"""The cluster that KUBECONFIG names, with job kinds, operators, and a separate namespace with the manifests for these tests.

Any cluster will do if its nodes have the project's images. What it lacks is installed and removed again: the kinds PyTorchJob
(PYTORCHJOB_CRD may name a file with the published schema), TrainJob and Workflow, and an operator of jobs. The bucket needs
the test machine to be the cluster's node, and so does the shared volume unless STORAGE_CLASS names a class with ReadWriteMany.
"""

import os
import uuid
from pathlib import Path

import pytest
import yaml
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from tests.cluster import pytorchjob, trainjob
from tests.cluster.fixtures import address, inputs, models, pipeline_run
from tests.cluster.operator import ACCOUNT, Operator, Space, wait_for
from tests.manifests.test_manifests import MANIFESTS, render

__all__ = ["address", "inputs", "models", "pipeline_run"]

CRDS = Path(__file__).parent / "crds"
OPERATORS = {  # Deployment that reconciles a kind of job where Kubeflow is installed → the stand-in
    "training-operator": (pytorchjob.KIND, pytorchjob.reconcile),
    "kubeflow-trainer-controller-manager": (trainjob.KIND, trainjob.reconcile),
}


@pytest.fixture(scope="session")
def api() -> client.ApiClient:
    """A client with administrator rights."""
    if not os.environ.get("KUBECONFIG"):
        pytest.skip("KUBECONFIG names no cluster")
    settings = client.Configuration()
    try:
        config.load_kube_config(client_configuration=settings)
        settings.retries = False
        client.VersionApi(client.ApiClient(settings)).get_code(_request_timeout=5)
    except (config.ConfigException, ApiException, HTTPError) as error:
        pytest.skip(f"the cluster of KUBECONFIG does not answer: {error}")
    settings.retries = None
    return client.ApiClient(settings)


@pytest.fixture(scope="session")
def kinds(api):
    """PyTorchJob, TrainJob and Workflow; those that were missing are removed at the end."""
    extensions = client.ApiextensionsV1Api(api)
    created = []
    pytorchjobs = os.environ.get("PYTORCHJOB_CRD") or CRDS / "pytorchjobs.yaml"
    for file in (pytorchjobs, CRDS / "trainjobs.yaml", CRDS / "workflows.yaml"):
        definition = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        name = definition["metadata"]["name"]
        try:
            extensions.create_custom_resource_definition(definition, _preload_content=False)
            created.append(name)
        except ApiException as error:
            if error.status != 409:
                raise

        def served(name=name):
            status = extensions.read_custom_resource_definition(name).status
            return any(entry.type == "Established" and entry.status == "True" for entry in status.conditions or [])

        wait_for(f"{name} is served", served)
    yield
    for name in created:
        extensions.delete_custom_resource_definition(name)


@pytest.fixture(scope="session")
def namespace(api, kinds) -> str:
    """A namespace with the manifests for plain KFP and the service account of KFP's run pods."""
    core, rbac = client.CoreV1Api(api), client.RbacAuthorizationV1Api(api)
    name = f"sparse-distill-{uuid.uuid4().hex[:8]}"
    core.create_namespace({"metadata": {"name": name}})
    core.create_namespaced_service_account(name, {"metadata": {"name": ACCOUNT}})
    create = {
        "ServiceAccount": core.create_namespaced_service_account,
        "Role": rbac.create_namespaced_role,
        "RoleBinding": rbac.create_namespaced_role_binding,
    }
    for object_ in render(MANIFESTS / "overlays" / "kfp"):
        object_["metadata"]["namespace"] = name
        for subject in object_.get("subjects", []):
            subject["namespace"] = name
        create[object_["kind"]](name, object_)
    yield name
    core.delete_namespace(name)


@pytest.fixture(scope="session")
def space(api, namespace) -> Space:
    """The namespace, with operators running in it."""
    deployments = client.AppsV1Api(api).list_deployment_for_all_namespaces().items
    installed = {deployment.metadata.name for deployment in deployments}
    operator = Operator(Space(api, namespace), dict(work for name, work in OPERATORS.items() if name not in installed))
    operator.start()
    yield operator.space
    operator.stop()
