"""KFP wrapper of the prune stage."""

from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from components.images import gpu_pod


@gpu_pod()
def prune(
    dense_model: Input[Model],
    tokens: Input[Dataset],
    pruned_model: Output[Model],
    mask: Output[Artifact],
    metrics: Output[Metrics],
    sparsity: float,
    pattern: str,
    allocation: str,
    effort: str,
    method: str,
    refit: int,
    order: str,
    target: str,
    swaps: int,
    reconstruct: str,
    ignore: str,
    idle_experts: str,
    nsamples: int,
    seq_len: int,
    eval_blocks: int,
    eval_seq_len: int,
    bos: str,
    seed: int,
    dtype: str,
    nproc_per_node: int,
    skip_ppl_eval: bool,
    trust_remote_code: bool,
    gpus: int,
) -> None:
    """Prune the dense model in one shot."""
    from components.core.history import log_metrics
    from components.core.mask.file import MASK_FILE
    from components.core.settings import configure
    from components.prune.config import PruneConfig
    from components.prune.stage import run

    config = configure(
        PruneConfig,
        locals(),
        dense_model=dense_model.path,
        output_dir=pruned_model.path,
        mask_file=f"{mask.path}/{MASK_FILE}",
        calibration_data=tokens.path,
        eval_data=tokens.path,
    )
    record = run(config)
    log_metrics(record, metrics)
