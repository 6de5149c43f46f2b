"""KFP wrapper of the tokenize stage."""

from kfp.dsl import Dataset, Input, Metrics, Model, Output

from components.images import cpu_pod


@cpu_pod()
def tokenize(
    dense_model: Input[Model],
    tokens: Output[Dataset],
    metrics: Output[Metrics],
    train_data: str,
    eval_data: str,
    train_revision: str,
    eval_revision: str,
    nsamples: int,
    seq_len: int,
    eval_blocks: int,
    eval_seq_len: int,
    bos: str,
    seed: int,
    trust_remote_code: bool,
) -> None:
    """Cut the texts into blocks of token ids."""
    from components.core.history import log_metrics
    from components.core.settings import configure
    from components.tokenize.config import TokenizeConfig
    from components.tokenize.stage import run

    config = configure(TokenizeConfig, locals(), model_dir=dense_model.path, output_dir=tokens.path)
    record = run(config)
    log_metrics(record, metrics)
