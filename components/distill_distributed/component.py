"""KFP wrappers of distillation on many nodes and of the sweep at the end of a run."""

from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output, TaskConfig, TaskConfigField, TaskConfigPassthrough

from components.images import launcher_pod

# settings on the task apply to the nodes; the launcher itself needs only those that give it access to a handover. The task's
# resources are those of the launcher, listed here because KFP refuses them otherwise; those of the nodes are parameters
TO_NODES = [
    TaskConfigPassthrough(field=TaskConfigField.RESOURCES, apply_to_task=True),
    TaskConfigField.KUBERNETES_AFFINITY,
    TaskConfigField.KUBERNETES_NODE_SELECTOR,
    TaskConfigField.KUBERNETES_TOLERATIONS,
    TaskConfigPassthrough(field=TaskConfigField.ENV, apply_to_task=True),
    TaskConfigPassthrough(field=TaskConfigField.KUBERNETES_VOLUMES, apply_to_task=True),
]


@launcher_pod(task_config_passthroughs=TO_NODES)
def distill_distributed(
    dense_model: Input[Model],
    pruned_model: Input[Model],
    pruned_mask: Input[Artifact],
    tokens: Input[Dataset],
    distilled_model: Output[Model],
    distilled_mask: Output[Artifact],
    job_manifest: Output[Artifact],
    metrics: Output[Metrics],
    task_config: TaskConfig,
    handover: str,
    image: str,
    kind: str,
    checkpoints: str,
    nodes: int,
    elastic: str,
    retries: int,
    deadline: int,
    queue: str,
    runtime: str,
    service_account: str,
    gpus: int,
    cpu: str,
    memory: str,
    gpu_type: str,
    seq_len: int,
    epochs: int,
    max_steps: int,
    batch_size: int,
    grad_accum_steps: int,
    learning_rate: float,
    warmup_ratio: float,
    alpha_kd: float,
    alpha_hidden: float,
    temperature: float,
    weight_decay: float,
    kl_direction: str,
    nproc_per_node: int,
    sync_each_batch: str,
    gradient_checkpointing: bool,
    teacher_cache: str,
    keep_best: bool,
    patience: int,
    seed: int,
    dtype: str,
    mask: str,
    admm_penalty: float,
    admm_interval: int,
    sparse_check_eps: float,
    fail_on_sparse_violation: bool,
    eval_blocks: int,
    eval_seq_len: int,
    bos: str,
    skip_ppl_eval: bool,
    trust_remote_code: bool,
) -> None:
    """Distil the dense teacher into the sparse student on many nodes."""
    import json

    from components.core.history import log_metrics
    from components.core.mask.file import MASK_FILE
    from components.core.settings import configure
    from components.core.storage import use_store_of
    from components.distill_distributed.config import POD_SETTINGS, DistillDistributedConfig
    from components.distill_distributed.stage import run

    artifacts = {
        "teacher_model": dense_model.uri,
        "student_model": pruned_model.uri,
        "mask_file": pruned_mask.uri,
        "train_data": tokens.uri,
        "eval_data": tokens.uri,
        "output_dir": distilled_model.uri,
        "output_mask_file": distilled_mask.uri,
    }
    use_store_of(dense_model.uri, dense_model.metadata, *([handover] if handover else artifacts.values()), checkpoints)
    config = configure(
        DistillDistributedConfig,
        locals(),
        teacher_model=dense_model.path,
        student_model=pruned_model.path,
        mask_file=pruned_mask.path,
        train_data=tokens.path,
        eval_data=tokens.path,
        output_dir=distilled_model.path,
        output_mask_file=f"{distilled_mask.path}/{MASK_FILE}",
        artifacts=json.dumps(artifacts),
        job_file=job_manifest.path,
        pod=json.dumps({name: getattr(task_config, name) for name in POD_SETTINGS}),
    )
    record = run(config)
    log_metrics(record, metrics)


@launcher_pod()
def sweep_jobs(place: Output[Artifact], run_id: str, handover: str, checkpoints: str) -> None:
    """Delete a run's remaining jobs, checkpoints and handover data; the URI of `place` tells where the run's artifacts are."""
    from components.core.storage import is_bucket
    from components.distill.checkpoints import checkpoints_of_run
    from components.distill_distributed.sweep import SweepConfig, run

    kept = checkpoints_of_run(checkpoints, place.uri) if is_bucket(place.uri) else ""
    run(SweepConfig(run_id=run_id, handover=handover, checkpoints=kept))
