"""KFP wrapper of the evaluate stage, for your own pipelines: in `compress`, each stage measures its own output."""

from kfp.dsl import Dataset, Input, Metrics, Model, Output

from components.images import gpu_pod


@gpu_pod()
def evaluate(
    model: Input[Model],
    tokens: Input[Dataset],
    metrics: Output[Metrics],
    eval_blocks: int,
    eval_seq_len: int,
    bos: str,
    dtype: str,
    trust_remote_code: bool,
    gpus: int,
) -> None:
    """Measure the perplexity of any checkpoint."""
    from components.core.history import log_metrics
    from components.core.settings import configure
    from components.evaluate.config import EvaluateConfig
    from components.evaluate.stage import run

    config = configure(EvaluateConfig, locals(), model_dir=model.path, eval_data=tokens.path)
    record = run(config)
    log_metrics(record, metrics)
