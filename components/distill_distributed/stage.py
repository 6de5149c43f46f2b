"""Create or adopt the job, watch it, and verify its result."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.core import storage
from components.core.files import new_file, sample_fingerprint
from components.core.history import Record, StageRecord, stats_file
from components.core.mask.file import MASK_FILE, find_mask, fingerprint_of_file
from components.core.progress import log
from components.core.reading import parse_json
from components.core.settings import INPUT, OUTPUT, START, flags_of, names_of
from components.distill.config import DistillConfig
from components.distill_distributed.cluster import Cluster
from components.distill_distributed.config import DistillDistributedConfig
from components.distill_distributed.job import RENDERERS, JobSpec, as_yaml
from components.distill_distributed.lifecycle import ended_with_this_process, owner_reference, submit
from components.distill_distributed.watch import JobError, Watcher

KFP_RUN_LABEL = "pipeline/runid"
# a node has its own paths and is started by the job; the launcher computes the global batch
NOT_FOR_NODES = names_of(DistillConfig, INPUT, OUTPUT, START) | {"global_batch"}


@dataclass(frozen=True)
class Exchange:
    """Where the nodes read and write.

    Attributes:
        inputs: parameter → place of an input.
        result: place of the distilled model.
        mask: place of a folder with its mask; empty = in the model's folder.
        checkpoints: place of the training's checkpoints; empty = none.
    """

    inputs: dict[str, str]
    result: str
    mask: str
    checkpoints: str


def run(config: DistillDistributedConfig) -> StageRecord:
    """Distil on many nodes, and see to it that the student and its record are where they belong.

    Without `handover` the nodes read the inputs and write the student at the artifacts' own places, and none of it passes
    through this process.

    The job is deleted when this process gives up on it, or is asked to stop and is not tried again. Otherwise the next try of
    the same run adopts it, and Kubernetes removes it together with the run.

    Raises:
        JobError: the job failed, or its result did not pass verification.
        ValueError: the handover is not writable.
    """
    config.check_environment()
    mask = fingerprint_of_file(find_mask(config.mask_file))
    job_file = Path(config.job_file or f"{config.output_dir}.job.yaml")
    if config.handover:
        storage.check_writable("handover", config.handover)
    cluster = Cluster.connect()
    pod = cluster.own_pod()
    run_id = (pod or {"metadata": {}})["metadata"].get("labels", {}).get(KFP_RUN_LABEL, "none")
    name = job_name(run_id, config)
    exchange = make_exchange(config, run_id, name)
    manifest = RENDERERS[config.kind](make_spec(config, cluster.namespace, run_id, name, exchange, pod))
    with new_file(job_file) as scratch:
        scratch.write_text(as_yaml(manifest), encoding="utf-8")
    if config.handover:
        hand_over(config, exchange)
    with ended_with_this_process(cluster, config.kind, manifest):
        submit(cluster, config.kind, manifest)
        fewest = config.node_range()
        # KFP stores nothing of a stage that fails, so the logs are written beside the place of the result
        kept_at = config.artifact_places().get("output_dir") or str(job_file.absolute())
        Watcher(cluster, config.kind, name, fewest[0] if fewest else config.nodes, config.deadline, f"{kept_at}.logs").follow()
    record = verify(exchange, name, mask)
    if config.handover:
        storage.download(exchange.result, Path(config.output_dir))
        if exchange.mask:
            with new_file(config.output_mask_file) as scratch:
                folder = scratch.with_name(f"{scratch.name}.folder")
                storage.download(exchange.mask, folder)
                (folder / MASK_FILE).rename(scratch)
    log(f"distilled by job {name}: {config.output_dir if config.handover else exchange.result}")
    clean_up(config, exchange, keep_result=pod is not None)
    return record


def make_exchange(config: DistillDistributedConfig, run_id: str, name: str) -> Exchange:
    """The places of a job's inputs and outputs."""
    if config.handover:
        place = f"{config.handover}/{run_id}/{name}"
        inputs = {parameter: f"{place}/inputs/{shared}" for parameter, shared in distinct(config.inputs()).items()}
        result, mask, all_checkpoints = f"{place}/result", f"{place}/mask", f"{config.handover}/{run_id}/checkpoints"
    else:
        places = config.artifact_places()
        inputs = {parameter: places[parameter] for parameter in config.inputs()}
        result, mask = places["output_dir"], places.get("output_mask_file", "")
        all_checkpoints = f"{storage.run_place(result)}/checkpoints"
    if config.checkpoints != "auto":
        all_checkpoints = f"{config.checkpoints}/{run_id}"
    return Exchange(
        inputs,
        result,
        mask=mask if config.output_mask_file else "",
        checkpoints="" if config.checkpoints == "none" else f"{all_checkpoints}/{name}",
    )


def hand_over(config: DistillDistributedConfig, exchange: Exchange) -> None:
    """Upload the inputs for the nodes, except those that an earlier try has uploaded."""
    folders = {place: Path(config.inputs()[parameter]) for parameter, place in exchange.inputs.items()}
    for place, folder in sorted(folders.items()):
        if not storage.is_complete(place):
            storage.upload(folder, place)


def clean_up(config: DistillDistributedConfig, exchange: Exchange, keep_result: bool) -> None:
    """Remove what a finished job needs no more; in a pipeline its result is kept for a restarted launcher until the sweep."""
    if exchange.checkpoints:
        storage.remove_leftovers(exchange.checkpoints)
    if config.handover:
        job = exchange.result.rpartition("/")[0]
        storage.remove_leftovers(f"{job}/inputs" if keep_result else job)


def job_name(run_id: str, config: DistillDistributedConfig) -> str:
    """A name that is shared by all tries of one task and by no other task.

    KFP gives each task of each run its own output; from a shell, other settings or inputs must not find an earlier result.
    """
    inputs = {name: sample_fingerprint(files_under(Path(path))) for name, path in config.inputs().items()}
    settings = [*sorted(flags_of(config, DistillConfig, leave_out=NOT_FOR_NODES)), global_batch(config)]
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
    config: DistillDistributedConfig, namespace: str, run_id: str, name: str, exchange: Exchange, pod: dict[str, Any] | None
) -> JobSpec:
    """The job for these settings; `pod` is the launcher's own pod, or None."""
    flags = flags_of(config, DistillConfig, leave_out=NOT_FOR_NODES)
    flags += [f"--global_batch={global_batch(config)}"]
    flags += [f"--checkpoint_dir={exchange.checkpoints}"] if exchange.checkpoints else []
    command = ["python", "-m", "components.distill_distributed.node", "--result", exchange.result]
    command += ["--result_mask", exchange.mask] if exchange.mask else []
    command += ["--inputs", json.dumps(exchange.inputs), "--flags", json.dumps(flags)]
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
        session=storage.current_session(exchange.result),
        owner=owner_reference(pod) if pod else None,
    )


def global_batch(config: DistillDistributedConfig) -> int:
    """Training blocks per step over all processes, which stays the same when an elastic job loses a node."""
    return config.global_batch or config.step_blocks(config.nodes * config.nproc_per_node)


def verify(exchange: Exchange, name: str, mask: str) -> StageRecord:
    """Accept the result of a job that reports success only if it is complete and passes verification; returns its record.

    Args:
        exchange: says where the node with the first process wrote the result.
        name: the job's name.
        mask: fingerprint of the mask that the nodes were given.

    Raises:
        JobError: the result is incomplete, was trained under another mask, or lacks the required integrity check.
    """
    for place in (exchange.result, exchange.mask) if exchange.mask else (exchange.result,):
        try:
            storage.check_complete(place)
        except ValueError as error:
            raise JobError(f"job {name} says that it succeeded, but {place} holds no complete result: {error}") from error
    file = f"{exchange.result}/{stats_file('distill')}"
    record = StageRecord(**parse_json(storage.read_bytes(file), file, Record))
    check = record.sparse_integrity_check
    used = record.details.get("inputs", {}).get("mask")
    if used != mask:
        raise JobError(f"job {name} must train under the mask {mask}, its result says {used}")
    if check is None or (record.parameters["fail_on_sparse_violation"] and not check["passed"]):
        raise JobError(f"job {name} must end with a passed integrity check, its result says {check}")
    return record
