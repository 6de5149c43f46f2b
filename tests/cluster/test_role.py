"""What the manifests grant on a real API server: each verb that the launcher uses, and nothing else."""

import pytest
from kubernetes import client

from tests.cluster.operator import ACCOUNT
from tests.manifests.test_manifests import MANIFESTS, granted, render

VERBS = ("create", "get", "list", "watch", "update", "patch", "delete", "deletecollection")
GROUPS = {
    "": "/api/v1",
    "apps": "/apis/apps/v1",
    "argoproj.io": "/apis/argoproj.io/v1alpha1",
    "batch": "/apis/batch/v1",
    "kubeflow.org": "/apis/kubeflow.org/v1",
    "rbac.authorization.k8s.io": "/apis/rbac.authorization.k8s.io/v1",
    "trainer.kubeflow.org": "/apis/trainer.kubeflow.org/v1alpha1",
}


def as_account(api, namespace, account) -> client.AuthorizationV1Api:
    """A client that acts as a ServiceAccount."""
    asking = client.ApiClient(api.configuration, "Impersonate-User", f"system:serviceaccount:{namespace}:{account}")
    return client.AuthorizationV1Api(asking)


def may(asking, namespace) -> set[tuple[str, str]]:
    """Every allowed (resource, verb) among those that the API server knows in these groups."""
    allowed = set()
    for group, path in GROUPS.items():
        found = asking.api_client.call_api(path, "GET", response_type="V1APIResourceList", auth_settings=["BearerToken"])[0]
        for resource in (entry.name for entry in found.resources if entry.namespaced):
            name, _, part = resource.partition("/")
            for verb in VERBS:
                attributes = {"namespace": namespace, "group": group, "resource": name, "subresource": part, "verb": verb}
                answer = asking.create_self_subject_access_review({"spec": {"resourceAttributes": attributes}})
                if answer.status.allowed:
                    allowed.add((resource, verb))
    return allowed


def test_the_launchers_account_may_do_what_the_role_says_and_no_more(api, namespace):
    role = granted(render(MANIFESTS / "overlays" / "kfp"))
    assert ("pytorchjobs", "create") in role
    assert may(as_account(api, namespace, ACCOUNT), namespace) == role


@pytest.mark.parametrize("account", ["sparse-distill-worker", "default"])
def test_the_training_pods_account_may_do_nothing(api, namespace, account):
    assert may(as_account(api, namespace, account), namespace) == set()


def test_the_launchers_account_may_do_nothing_elsewhere(api, namespace):
    assert may(as_account(api, namespace, ACCOUNT), "default") == set()
