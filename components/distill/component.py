"""KFP wrapper of the distill stage."""

from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from components.images import gpu_pod, launcher_pod


@gpu_pod()
def distill(
    dense_model: Input[Model],
    pruned_model: Input[Model],
    pruned_mask: Input[Artifact],
    tokens: Input[Dataset],
    distilled_model: Output[Model],
    distilled_mask: Output[Artifact],
    metrics: Output[Metrics],
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
    backend: str,
    launcher: str,
    nproc_per_node: int,
    master_port: int,
    deepspeed_config: str,
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
    checkpoints: str,
    gpus: int,
) -> None:
    """Distil the dense teacher into the sparse student."""
    from components.core.history import log_metrics
    from components.core.mask.file import MASK_FILE
    from components.core.settings import configure
    from components.core.storage import use_store_of
    from components.distill.checkpoints import checkpoint_dir_here
    from components.distill.config import DistillConfig
    from components.distill.stage import run

    checkpoint_dir = checkpoint_dir_here(checkpoints, distilled_model.uri, backend, keep_best)
    use_store_of(dense_model.uri, dense_model.metadata, checkpoint_dir)
    config = configure(
        DistillConfig,
        locals(),
        teacher_model=dense_model.path,
        student_model=pruned_model.path,
        mask_file=pruned_mask.path,
        output_dir=distilled_model.path,
        output_mask_file=f"{distilled_mask.path}/{MASK_FILE}",
        train_data=tokens.path,
        eval_data=tokens.path,
        checkpoint_dir=checkpoint_dir,
    )
    record = run(config)
    log_metrics(record, metrics)


@launcher_pod()
def remove_checkpoints(metrics: Input[Metrics], checkpoints: str) -> None:
    """Remove the checkpoints of a training whose model KFP has stored; until then, a lost pod still needs them."""
    from components.core.storage import is_bucket, remove_leftovers, use_store_of
    from components.distill.checkpoints import checkpoints_of_run

    place = checkpoints_of_run(checkpoints, metrics.uri)
    if place and is_bucket(metrics.uri):
        use_store_of(metrics.uri, metrics.metadata, place)
        remove_leftovers(place)
