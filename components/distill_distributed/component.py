"""KFP wrappers of distillation on many nodes and of the sweep at the end of a run."""

from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output, TaskConfig, TaskConfigField, TaskConfigPassthrough

from components.images import launcher_pod

# settings on the task apply to the nodes; the launcher itself needs only those that give it access to the handover
TO_NODES = [
    TaskConfigField.RESOURCES,
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
    mask: Input[Artifact],
    tokens: Input[Dataset],
    distilled_model: Output[Model],
    stats: Output[Artifact],
    job: Output[Artifact],
    metrics: Output[Metrics],
    task_config: TaskConfig,
    handover: str,
    image: str,
    kind: str,
    nodes: int,
    elastic: str,
    retries: int,
    deadline: int,
    queue: str,
    runtime: str,
    service_account: str,
    seq_len: int,
    epochs: int,
    max_steps: int,
    batch_size: int,
    grad_accum_steps: int,
    learning_rate: float,
    warmup_ratio: float,
    alpha_kd: float,
    temperature: float,
    weight_decay: float,
    kl_direction: str,
    nproc_per_node: int,
    gradient_checkpointing: bool,
    teacher_cache: str,
    keep_best: bool,
    patience: int,
    seed: int,
    dtype: str,
    sparse_check_eps: float,
    fail_on_sparse_violation: bool,
    eval_blocks: int,
    eval_seq_len: int,
    skip_ppl_eval: bool,
    trust_remote_code: bool,
) -> None:
    """Distil the dense teacher into the sparse student on many nodes."""
    import dataclasses
    import json

    from components.core.history import log_metrics
    from components.core.settings import configure
    from components.distill_distributed.config import DistillDistributedConfig
    from components.distill_distributed.stage import run

    config = configure(
        DistillDistributedConfig,
        locals(),
        teacher_model=dense_model.path,
        student_model=pruned_model.path,
        mask_file=mask.path,
        train_data=tokens.path,
        eval_data=tokens.path,
        output_dir=distilled_model.path,
        job_file=job.path,
        pod=json.dumps(dataclasses.asdict(task_config)),
    )
    record = run(config)
    log_metrics(record, metrics, stats.path)


@launcher_pod()
def sweep_jobs(run_id: str, handover: str) -> None:
    """Delete a run's remaining jobs and handover data."""
    from components.distill_distributed.sweep import SweepConfig, run

    run(SweepConfig(run_id=run_id, handover=handover))
