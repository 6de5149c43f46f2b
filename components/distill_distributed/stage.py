"""Upload the models, create or adopt the job, watch it, then fetch and verify its result."""

import hashlib
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.core import storage
from components.core.files import new_file, sample_fingerprint
from components.core.history import StageRecord, stats_file
from components.core.mask.file import find_mask, fingerprint_of_file
from components.core.progress import log
from components.core.settings import INPUT, OUTPUT, START, names_of
from components.distill.config import DistillConfig
from components.distill_distributed.cluster import Cluster
from components.distill_distributed.config import DistillDistributedConfig
from components.distill_distributed.job import MANAGED_BY, RENDERERS, RUN_LABEL, JobSpec, as_yaml
from components.distill_distributed.watch import GivenUpError, JobError, Watcher

KFP_RUN_LABEL = "pipeline/runid"
# a node has its own paths and is started by the job; the launcher computes the global batch
NOT_FOR_NODES = names_of(DistillConfig, INPUT, OUTPUT, START) | {"global_batch"}


def run(config: DistillDistributedConfig) -> StageRecord:
    """Distil on many nodes and write the student with its record.

    The job is deleted when this process is asked to stop. If the process is killed, Kubernetes removes the job with this
    pod, or the next try adopts it.

    Raises:
        JobError: the job failed, or its result did not pass verification.
        ValueError: the handover is not writable.
    """
    config.check_environment()
    mask = fingerprint_of_file(find_mask(config.mask_file))
    job_file = Path(config.job_file or f"{config.output_dir}.job.yaml")
    storage.check_writable("handover", config.handover)
    cluster = Cluster.connect()
    pod = cluster.own_pod()
    run_id = (pod or {"metadata": {}})["metadata"].get("labels", {}).get(KFP_RUN_LABEL, "none")
    name = job_name(run_id, config)
    place = f"{config.handover}/{run_id}/{name}"
    manifest = RENDERERS[config.kind](make_spec(config, cluster.namespace, run_id, name, place, pod))
    with new_file(job_file) as scratch:
        scratch.write_text(as_yaml(manifest), encoding="utf-8")
    inputs = distinct(config.inputs())
    for input_name in sorted(set(inputs.values())):
        if not storage.is_complete(f"{place}/inputs/{input_name}"):  # otherwise an earlier try has uploaded it
            storage.upload(Path(config.inputs()[input_name]), f"{place}/inputs/{input_name}")
    with ended_with_this_process(cluster, config.kind, name):
        submit(cluster, config.kind, manifest)
        fewest = config.node_range()
        Watcher(cluster, config.kind, name, fewest[0] if fewest else config.nodes, config.deadline).follow()
    record = collect(f"{place}/result", Path(config.output_dir), name, mask)
    for used in ("inputs", "checkpoints"):
        storage.remove(f"{place}/{used}")
    if pod is None:  # in a pipeline it is kept for a restarted launcher until the sweep
        storage.remove(place)
    return record


def job_name(run_id: str, config: DistillDistributedConfig) -> str:
    """A name that is shared by all tries of one task and by no other task.

    KFP gives each task of each run its own output; from a shell, other settings or inputs must not find an earlier result.
    """
    inputs = {name: sample_fingerprint(files_under(Path(path))) for name, path in config.inputs().items()}
    settings = [*sorted(config.flags(leave_out=NOT_FOR_NODES)), global_batch(config)]
    task = json.dumps([run_id, str(Path(config.output_dir).absolute()), settings, inputs])
    return f"distill-{hashlib.sha256(task.encode()).hexdigest()[:12]}"


def files_under(folder: Path) -> list[Path]:
    """All files under a folder, sorted by path."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def distinct(inputs: dict[str, str]) -> dict[str, str]:
    """Parameter → the first parameter with the same path, so that each path is uploaded only once."""
    first: dict[str, str] = {}
    return {parameter: first.setdefault(path, parameter) for parameter, path in inputs.items()}


def make_spec(
    config: DistillDistributedConfig, namespace: str, run_id: str, name: str, place: str, pod: dict[str, Any] | None
) -> JobSpec:
    """The job for these settings; `pod` is the launcher's own pod, or None."""
    in_folder = Path(config.handover).is_absolute()
    checkpoints = config.checkpoint_dir or (f"{place}/checkpoints" if in_folder else "")
    flags = config.flags(leave_out=NOT_FOR_NODES)
    flags += [f"--global_batch={global_batch(config)}"]
    flags += [f"--checkpoint_dir={checkpoints}"] if checkpoints else []
    command = ["python", "-m", "components.distill_distributed.node", "--place", place]
    command += ["--inputs", json.dumps(distinct(config.inputs())), "--flags", json.dumps(flags)]
    return JobSpec(
        name=name,
        namespace=namespace,
        run=run_id,
        image=config.image,
        command=command,
        nodes=config.nodes,
        nproc_per_node=config.nproc_per_node,
        elastic=config.node_range(),
        retries=config.retries,
        deadline=config.deadline,
        queue=config.queue,
        runtime=config.runtime,
        service_account=config.service_account,
        pod=config.pod_settings(),
        owner=owner_reference(pod) if pod else None,
    )


def global_batch(config: DistillDistributedConfig) -> int:
    """Training blocks per step over all processes, which stays the same when an elastic job loses a node."""
    return config.global_batch or config.batch_size * config.grad_accum_steps * config.nodes * config.nproc_per_node


def owner_reference(pod: dict[str, Any]) -> dict[str, Any]:
    """With this in a job's metadata, Kubernetes removes the job when the pod is removed."""
    return {"apiVersion": "v1", "kind": "Pod", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}


@contextmanager
def ended_with_this_process(cluster: Cluster, kind: str, name: str) -> Iterator[None]:
    """Delete the job when this process is asked to stop or gives up on the job.

    A failed job is kept for inspection; a job whose API server does not respond is left for the next try.
    """

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except (SystemExit, KeyboardInterrupt, GivenUpError) as reason:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second signal must not interrupt the deletion
        log(f"deleting job {name}: {'given up' if isinstance(reason, GivenUpError) else 'asked to end'}")
        cluster.delete_job(kind, name)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def submit(cluster: Cluster, kind: str, manifest: dict[str, Any]) -> None:
    """Create the job, or adopt one from an earlier try.

    In a pipeline's own retry a failed job is adopted too, so that the retry fails immediately with the same error instead of
    training all over again; from a shell a failed job is replaced.

    Raises:
        JobError: the name is taken by a job that does not belong to this task.
    """
    metadata = manifest["metadata"]
    while cluster.create_job(kind, manifest) is None:
        found = cluster.read_job(kind, metadata["name"])
        if found is None:
            continue  # it disappeared between the two requests
        theirs = found["metadata"].get("labels", {})
        if any(theirs.get(label) != metadata["labels"][label] for label in (MANAGED_BY, RUN_LABEL)):
            raise JobError(f"job {metadata['name']} exists and belongs to no try of this task")
        retried = "ownerReferences" in metadata  # by KFP, if this runs in a pod
        if (has_failed(found) and not retried) or "deletionTimestamp" in found["metadata"]:
            log(f"job {metadata['name']} of an earlier try has ended: it is removed and created anew")
            cluster.delete_job(kind, metadata["name"])
            cluster.wait_until_gone(kind, metadata["name"])
            continue
        log(f"job {metadata['name']} of an earlier try is there: adopting it")
        for owner in metadata.get("ownerReferences", []):
            cluster.set_owner(kind, metadata["name"], owner)
        return
    log(f"job {metadata['name']} created: {manifest['kind']} in namespace {metadata['namespace']}")


def has_failed(job: dict[str, Any]) -> bool:
    """Whether a job's status says that it failed."""
    conditions = job.get("status", {}).get("conditions", [])
    return any(entry["type"] == "Failed" and entry["status"] == "True" for entry in conditions)


def collect(place: str, output_dir: Path, name: str, mask: str) -> StageRecord:
    """Fetch the result of a job that reports success, and accept it only if it is complete and passes verification.

    Args:
        place: where the node with the first process wrote the result.
        output_dir: folder to create.
        name: the job's name.
        mask: fingerprint of the mask that was handed over.

    Raises:
        JobError: the result is incomplete, was trained under another mask, or lacks the required integrity check.
    """
    if not storage.is_complete(place):
        raise JobError(f"job {name} says that it succeeded, but {place} holds no complete result")
    storage.download(place, output_dir)
    record = StageRecord.load(output_dir / stats_file("distill"))
    check = record.sparse_integrity_check
    used = record.details.get("inputs", {}).get("mask")
    if used != mask:
        raise JobError(f"job {name} must train under the mask {mask}, its result says {used}")
    if check is None or (record.parameters["fail_on_sparse_violation"] and not check["passed"]):
        raise JobError(f"job {name} must end with a passed integrity check, its result says {check}")
    log(f"distilled by job {name}: {output_dir}")
    return record
