"""KFP wrapper of the quantize stage."""

from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from components.images import gpu_pod


@gpu_pod()
def quantize(
    distilled_model: Input[Model],
    mask: Input[Artifact],
    tokens: Input[Dataset],
    quantized_model: Output[Model],
    metrics: Output[Metrics],
    format: str,
    rounding: str,
    embedding: str,
    nsamples: int,
    seq_len: int,
    seed: int,
    dtype: str,
    eval_blocks: int,
    eval_seq_len: int,
    bos: str,
    skip_ppl_eval: bool,
    trust_remote_code: bool,
    gpus: int,
) -> None:
    """Quantize the distilled model to one format."""
    from components.core.history import log_metrics
    from components.core.settings import configure
    from components.quantize.config import QuantizeConfig
    from components.quantize.stage import run

    config = configure(
        QuantizeConfig,
        locals(),
        model_dir=distilled_model.path,
        output_dir=quantized_model.path,
        mask_file=mask.path,
        calibration_data=tokens.path,
        eval_data=tokens.path,
    )
    record = run(config)
    log_metrics(record, metrics, prefix=f"{config.format}_")
