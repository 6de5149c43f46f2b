"""KFP wrapper of the distill stage."""

from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from components.images import gpu_pod


@gpu_pod()
def distill(
    dense_model: Input[Model],
    pruned_model: Input[Model],
    mask: Input[Artifact],
    tokens: Input[Dataset],
    distilled_model: Output[Model],
    stats: Output[Artifact],
    metrics: Output[Metrics],
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
    backend: str,
    launcher: str,
    nproc_per_node: int,
    master_port: int,
    deepspeed_config: str,
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
    """Distil the dense teacher into the sparse student."""
    from components.core.record import publish
    from components.distill.config import DistillConfig
    from components.distill.stage import run

    record = run(
        DistillConfig(
            teacher_model=dense_model.path,
            student_model=pruned_model.path,
            mask_file=mask.path,
            output_dir=distilled_model.path,
            train_data=tokens.path,
            eval_data=tokens.path,
            seq_len=seq_len,
            epochs=epochs,
            max_steps=max_steps,
            batch_size=batch_size,
            grad_accum_steps=grad_accum_steps,
            learning_rate=learning_rate,
            warmup_ratio=warmup_ratio,
            alpha_kd=alpha_kd,
            temperature=temperature,
            weight_decay=weight_decay,
            kl_direction=kl_direction,
            backend=backend,
            launcher=launcher,
            nproc_per_node=nproc_per_node,
            master_port=master_port,
            deepspeed_config=deepspeed_config,
            gradient_checkpointing=gradient_checkpointing,
            teacher_cache=teacher_cache,
            keep_best=keep_best,
            patience=patience,
            seed=seed,
            dtype=dtype,
            sparse_check_eps=sparse_check_eps,
            fail_on_sparse_violation=fail_on_sparse_violation,
            eval_blocks=eval_blocks,
            eval_seq_len=eval_seq_len,
            skip_ppl_eval=skip_ppl_eval,
            trust_remote_code=trust_remote_code,
        )
    )
    publish(record, metrics, stats.path)
