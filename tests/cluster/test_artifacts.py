"""The distill stages on a store that is described by `store_session_info` alone, started as KFP starts them.

KFP's own launcher downloads a task's inputs before the task's code runs, and here an archive does. The rest is real: the
command of the compiled pipeline, KFP's executor, the secret, and an S3 server that refuses requests that are not signed for its
region by its key. No variable of any pod names the store.
"""

import json
import re
from pathlib import Path

import pytest
import s3fs
import yaml
from kfp import dsl
from kubernetes import client

from components.core import storage
from components.core.history import StageRecord
from components.core.mask.file import find_mask, fingerprint_of_file
from components.core.storage import session
from components.core.storage.place import open_store
from components.core.storage.session import CREDENTIALS, INFO, STORE, session_of
from components.distill.component import remove_checkpoints
from components.distill.config import DistillConfig
from components.distill_distributed.config import DistillDistributedConfig
from components.images import CPU_IMAGE, GPU_IMAGE
from pipelines.compile import COMPILED
from tests.cluster.fixtures import check_like_one
from tests.cluster.launcher import Handover, Launcher, settings
from tests.cluster.operator import ACCOUNT
from tests.faulty_server import in_front_of
from tests.stores import demands

SECRET, SECRET_VALUE, KEY, REGION = "mlpipeline-minio-artifact", "not-to-be-shown", "minio", "a-region"
ROOT = "minio://bucket/v2/artifacts/compress"
EXECUTOR = """
run=/minio/bucket/v2/artifacts/compress/$RUN
mkdir -p $run/task/unique && python -m tarfile -e /inputs/inputs.tar.gz $run/task/unique
"$@" || exit
stats=$run/distill/unique/distilled_model/distill_stats.json
test ! -e $stats || echo "RESULT $(tr -d '\\n' < $stats)"
"""


STAGES = {
    "compress": ("distill", DistillConfig),
    "compress-distributed": ("distill-distributed", DistillDistributedConfig),
}
TASK_CONFIG = {"task_config": {"env": [{"name": "OMP_NUM_THREADS", "value": "1"}]}}


@pytest.fixture(scope="module")
def store(space, address, servers):
    """The store; the secret with its credentials, and the right to read it that KFP gives to its runs."""
    core, rbac = client.CoreV1Api(space.api), client.RbacAuthorizationV1Api(space.api)
    data = {"accesskey": KEY, "secretkey": SECRET_VALUE}
    core.create_namespaced_secret(space.namespace, {"metadata": {"name": SECRET}, "stringData": data})
    rule = {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]}
    rbac.create_namespaced_role(space.namespace, {"metadata": {"name": "of-kfp"}, "rules": [rule]})
    binding = {
        "metadata": {"name": "of-kfp"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "of-kfp"},
        "subjects": [{"kind": "ServiceAccount", "name": ACCOUNT, "namespace": space.namespace}],
    }
    rbac.create_namespaced_role_binding(space.namespace, binding)
    with in_front_of(servers["s3"], address) as server:
        server.fault = demands(REGION, KEY)
        yield server
    rbac.delete_namespaced_role_binding("of-kfp", space.namespace)
    rbac.delete_namespaced_role("of-kfp", space.namespace)


@pytest.fixture
def told(store, monkeypatch) -> str:
    """What KFP tells about the store; this process reaches it in the same way."""
    params = {"endpoint": store.url.removeprefix("http://"), "region": REGION, "disableSSL": "true", "fromEnv": "false"}
    params |= {"secretName": SECRET, "accessKeyKey": "accesskey", "secretKeyKey": "secretkey"}
    info = json.dumps({"Provider": "minio", "Params": params})
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv(STORE, json.dumps(vars(session_of(f"{ROOT}/run/task/unique/model", {INFO: info}))))
    for name, value in zip(CREDENTIALS, (KEY, SECRET_VALUE), strict=True):
        monkeypatch.setenv(name, value)
    return info


class Task(Launcher):
    """The pod of a distill stage as KFP makes it.

    Args:
        space: where it runs.
        name: the pod's name.
        run: the run that it belongs to.
        told: `store_session_info`.
        pipeline: `compress` or `compress-distributed`.
        given: settings that differ from the defaults.
    """

    def __init__(self, space, name, run, told, pipeline, given):
        self.space, self.name, self.run_id = space, name, run.name
        component, config = STAGES[pipeline]
        spec = next(yaml.safe_load_all((COMPILED / f"{pipeline}.yaml").read_text()))
        executor = spec["deploymentSpec"]["executors"][f"exec-{component}"]["container"]
        definition = spec["components"][f"comp-{component}"]
        folder = f"{ROOT}/{run.name}/task/unique"
        artifacts = {"dense_model": "dense", "pruned_model": "pruned", "pruned_mask": "pruned", "tokens": "tokens"}

        def artifact(uri, kind="system.Artifact", **metadata):
            return {"artifacts": [{"name": "1", "uri": uri, "type": {"schemaTitle": kind}, "metadata": metadata}]}

        made = {
            name: output["artifactType"]["schemaTitle"] for name, output in definition["outputDefinitions"]["artifacts"].items()
        }
        defaults = {name: entry.default for name, entry in config.__dataclass_fields__.items()} | {"checkpoints": "auto"}
        values = defaults | settings(Path("/")) | given
        taken = definition["inputDefinitions"]["parameters"].keys() - {"task_config"}
        executor_input = {
            "inputs": {
                "parameterValues": {name: values[name] for name in taken} | TASK_CONFIG,
                "artifacts": {name: artifact(f"{folder}/{path}", **{INFO: told}) for name, path in artifacts.items()},
            },
            "outputs": {
                "artifacts": {name: artifact(f"{ROOT}/{run.name}/distill/unique/{name}", kind) for name, kind in made.items()},
                "outputFile": "/tmp/kfp_outputs/output_metadata.json",
            },
        }
        arguments = [argument.replace("{{$}}", json.dumps(executor_input)) for argument in executor["args"]]
        command = ["env", f"RUN={run.name}", "sh", "-c", EXECUTOR, "sh", *executor["command"], *arguments]
        image = executor["image"].replace(GPU_IMAGE, CPU_IMAGE)
        self.create(run, command, ["minio"], Handover("", env=[{"name": "OMP_NUM_THREADS", "value": "1"}]), image)


def upload(models: Path, run_id: str) -> None:
    """Store the input artifacts as KFP does: the files alone."""
    place = f"{ROOT}/{run_id}/task/unique"
    for name in ("dense", "pruned", "tokens"):
        storage.upload(models / name, f"{place}/{name}")
        open_store(f"{place}/{name}").delete(["complete.json"])


@pytest.mark.usefixtures("inputs")
def test_a_store_that_only_kfp_describes_is_all_that_is_needed(space, told, store, models, pipeline_run, tmp_path):
    upload(models, pipeline_run.name)
    before = store.received
    given = {"image": CPU_IMAGE, "batch_size": 2, "gpus": 0, "cpu": "500m", "memory": "2Gi"}
    launcher = Task(space, f"{pipeline_run.name}-launcher", pipeline_run, told, "compress-distributed", given)
    log = launcher.wait_for_end("Succeeded")
    assert "RESULT" not in log  # the launcher does not have the model
    place = f"{ROOT}/{pipeline_run.name}/distill/unique/distilled_model"
    storage.download(place, tmp_path / "distilled")
    record = StageRecord.load(tmp_path / "distilled" / "distill_stats.json")
    check_like_one(models, vars(record))
    storage.download(place.replace("distilled_model", "distilled_mask"), tmp_path / "mask")
    assert fingerprint_of_file(find_mask(tmp_path / "mask")) == record.measured["mask"]
    size = sum(file.stat().st_size for file in (tmp_path / "distilled").iterdir())
    assert store.received - before < 4 * size + 8 * 2**20  # the model and two checkpoints, all of them from the nodes
    assert not open_store(f"{ROOT}/{pipeline_run.name}/checkpoints").list()
    objects = [*launcher.nodes().values(), *launcher.jobs(), launcher.read()]
    assert SECRET in json.dumps(objects)
    assert SECRET_VALUE not in json.dumps(objects) + log


@pytest.mark.usefixtures("inputs")
def test_training_in_a_pod_that_is_lost_goes_on_from_the_bucket_in_the_next_one(
    space, told, store, models, pipeline_run, monkeypatch
):
    steps = 400
    given = {"batch_size": 4, "grad_accum_steps": 1, "epochs": 100, "max_steps": steps}
    first = Task(space, f"{pipeline_run.name}-try-1", pipeline_run, told, "compress", given)
    first.wait_for_line(r"checkpoint uploaded: minio://bucket/\S+/checkpoints/\S+/step-\d+")
    space.core.delete_namespaced_pod(first.name, space.namespace, grace_period_seconds=0)
    second = Task(space, f"{pipeline_run.name}-try-2", pipeline_run, told, "compress", given)
    stats = second.result()
    (resumed,) = re.findall(r"^resuming from \S+/step-(\d+)$", second.log(), re.MULTILINE)
    assert int(resumed) >= 50
    assert [step["step"] for step in stats["details"]["steps"]] == list(range(1, steps + 1))
    assert stats["sparse_integrity_check"]["violations"] == 0
    assert f"{pipeline_run.name}/checkpoints" in second.log()
    monkeypatch.setattr(session, "_read_secret", lambda _: {})  # this process has its content
    metrics = dsl.Metrics(uri=f"{ROOT}/{pipeline_run.name}/distill/unique/metrics", metadata={INFO: told})
    assert open_store(f"{ROOT}/{pipeline_run.name}/checkpoints").list()
    remove_checkpoints.python_func(metrics=metrics, checkpoints="auto")
    assert not open_store(f"{ROOT}/{pipeline_run.name}/checkpoints").list()
