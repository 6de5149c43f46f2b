"""The compression pipeline: resolve → fetch → tokenize → prune → distill → quantize × formats → report → publish.

Defaults come from the stages' settings, where each parameter is documented.
"""

from types import SimpleNamespace
from typing import NamedTuple

from kfp import dsl, kubernetes
from kfp.dsl import HTML, Artifact, Dataset, Input, Model, PipelineTask

from components.distill.component import distill
from components.distill.config import DistillConfig
from components.fetch.component import fetch
from components.prune.component import prune
from components.prune.config import PruneConfig
from components.publish.component import publish
from components.publish.config import DestinationConfig
from components.quantize.component import quantize
from components.quantize.config import FORMATS
from components.report.component import report
from components.resolve.component import resolve
from components.tokenize.component import tokenize
from components.tokenize.config import TokenizeConfig

MODEL_ID = "Qwen/Qwen3-0.6B"
# secret → its keys as variables, where there is one: that of KFP's own object store, and one for s3:// where pods have no role
STORE_SECRETS = {
    "mlpipeline-minio-artifact": {"accesskey": "MINIO_ACCESS_KEY", "secretkey": "MINIO_SECRET_KEY"},
    "sparse-distill-s3": {"accesskey": "AWS_ACCESS_KEY_ID", "secretkey": "AWS_SECRET_ACCESS_KEY"},
}


def sized(task: PipelineTask, cpu: str, memory: str) -> PipelineTask:
    """Give a task its CPU and memory, and retries with a short explicit back-off (KFP's own waits up to an hour)."""
    task.set_cpu_limit(cpu).set_memory_limit(memory)
    return task.set_retry(num_retries=2, backoff_duration="30s", backoff_factor=2, backoff_max_duration="5m")


def on_gpu(task: PipelineTask, gpu_type: str, gpus: int, cpu: str, memory: str) -> PipelineTask:
    """The same with GPUs; 0 of them runs on the CPU."""
    return sized(task, cpu, memory).set_accelerator_type(gpu_type).set_accelerator_limit(gpus)


def with_store_secret(task: PipelineTask) -> PipelineTask:
    """Give a task the credentials of the object stores, where there are any."""
    for name, keys in STORE_SECRETS.items():
        kubernetes.use_secret_as_env(task, secret_name=name, secret_key_to_env=keys, optional=True)
    return task


def with_hub_secret(task: PipelineTask) -> PipelineTask:
    """Give a task the token for gated and private models, where there is one."""
    return kubernetes.use_secret_as_env(task, secret_name="hf-token", secret_key_to_env={"token": "HF_TOKEN"}, optional=True)


class Quantized(NamedTuple):
    """A model in one format, and its record."""

    model: Model
    stats: Artifact


@dsl.pipeline(name="quantize-format")
def quantize_format(
    distilled_model: Input[Model],
    mask: Input[Artifact],
    tokens: Input[Dataset],
    format: str,
    dtype: str,
    eval_blocks: int,
    eval_seq_len: int,
    skip_ppl_eval: bool,
    trust_remote_code: bool,
    gpu_type: str,
    gpus: int,
    cpu: str,
    memory: str,
) -> Quantized:
    """Quantize to one format; a pipeline of its own because a loop does not hand resource parameters to its tasks."""
    task = quantize(
        distilled_model=distilled_model,
        mask=mask,
        tokens=tokens,
        format=format,
        dtype=dtype,
        eval_blocks=eval_blocks,
        eval_seq_len=eval_seq_len,
        skip_ppl_eval=skip_ppl_eval,
        trust_remote_code=trust_remote_code,
    )
    on_gpu(task, gpu_type, gpus, cpu, memory)
    return Quantized(model=task.outputs["quantized_model"], stats=task.outputs["stats"])


class Outputs(NamedTuple):
    """What a run leaves: the report's page, and a folder with the page and its numbers."""

    page: HTML
    summary: Artifact


class Prepared(NamedTuple):
    """The tasks before distillation."""

    fetched: PipelineTask
    tokenized: PipelineTask
    pruned: PipelineTask


def prepare(p: SimpleNamespace) -> Prepared:
    """Add the stages before distillation to the pipeline that is being defined; `p` holds its parameters by name."""
    resolved = sized(resolve(model_id=p.model_id, train_data=p.train_data, eval_data=p.eval_data), p.light_cpu, p.light_memory)
    resolved.set_caching_options(False)  # it looks whether something changed; all behind it is keyed by its answer
    fetched = sized(
        fetch(
            model_id=resolved.outputs["model_id"],
            revision=resolved.outputs["model_revision"],
            trust_remote_code=p.trust_remote_code,
        ),
        p.light_cpu,
        p.light_memory,
    )
    tokenized = sized(
        tokenize(
            dense_model=fetched.outputs["dense_model"],
            train_data=p.train_data,
            eval_data=p.eval_data,
            train_revision=resolved.outputs["train_revision"],
            eval_revision=resolved.outputs["eval_revision"],
            nsamples=p.nsamples,
            seq_len=p.seq_len,
            eval_blocks=p.eval_blocks,
            eval_seq_len=p.eval_seq_len,
            seed=p.seed,
            trust_remote_code=p.trust_remote_code,
        ),
        p.light_cpu,
        p.light_memory,
    )
    pruned = on_gpu(
        prune(
            dense_model=fetched.outputs["dense_model"],
            tokens=tokenized.outputs["tokens"],
            sparsity=p.sparsity,
            pattern=p.pattern,
            method=p.method,
            nsamples=p.nsamples,
            seq_len=p.seq_len,
            eval_blocks=p.eval_blocks,
            eval_seq_len=p.eval_seq_len,
            seed=p.seed,
            dtype=p.dtype,
            skip_ppl_eval=p.skip_ppl_eval,
            trust_remote_code=p.trust_remote_code,
        ),
        p.gpu_type,
        p.prune_gpus,
        p.prune_cpu,
        p.prune_memory,
    )
    for task in (resolved, fetched, tokenized):
        with_hub_secret(task)
    return Prepared(fetched, tokenized, pruned)


def finish(p: SimpleNamespace, prepared: Prepared, distilled: PipelineTask) -> Outputs:
    """Add the stages behind distillation."""
    with dsl.ParallelFor(p.formats) as format:
        quantized = quantize_format(
            distilled_model=distilled.outputs["distilled_model"],
            mask=prepared.pruned.outputs["mask"],
            tokens=prepared.tokenized.outputs["tokens"],
            format=format,
            dtype=p.dtype,
            eval_blocks=p.eval_blocks,
            eval_seq_len=p.eval_seq_len,
            skip_ppl_eval=p.skip_ppl_eval,
            trust_remote_code=p.trust_remote_code,
            gpu_type=p.gpu_type,
            gpus=p.quantize_gpus,
            cpu=p.quantize_cpu,
            memory=p.quantize_memory,
        )
    reported = sized(
        report(
            fetched=prepared.fetched.outputs["stats"],
            pruned=prepared.pruned.outputs["stats"],
            distilled=distilled.outputs["stats"],
            quantized=dsl.Collected(quantized.outputs["stats"]),
        ),
        p.light_cpu,
        p.light_memory,
    )
    # not under a condition, into which KFP hands no collected artifacts: with nowhere to publish to it only holds the gate
    published = publish(
        models=dsl.Collected(quantized.outputs["model"]),
        summary=reported.outputs["summary"],
        publish_to=p.publish_to,
        version=p.version,
        max_ppl_ratio=p.max_ppl_ratio,
        min_sparsity=p.min_sparsity,
        registry=p.registry,
        registry_model=p.registry_model,
    )
    with_store_secret(sized(published, p.light_cpu, p.light_memory)).set_caching_options(False)  # the place may have changed
    return Outputs(page=reported.outputs["page"], summary=reported.outputs["summary"])


@dsl.pipeline(name="compress", description="Prune, distil and quantize a language model.")
def compress(
    model_id: str = MODEL_ID,
    train_data: str = TokenizeConfig.train_data,
    eval_data: str = TokenizeConfig.eval_data,
    sparsity: float = PruneConfig.sparsity,
    pattern: str = PruneConfig.pattern,
    method: str = PruneConfig.method,
    nsamples: int = PruneConfig.nsamples,
    seq_len: int = PruneConfig.seq_len,
    epochs: int = DistillConfig.epochs,
    max_steps: int = DistillConfig.max_steps,
    batch_size: int = DistillConfig.batch_size,
    grad_accum_steps: int = DistillConfig.grad_accum_steps,
    learning_rate: float = DistillConfig.learning_rate,
    warmup_ratio: float = DistillConfig.warmup_ratio,
    alpha_kd: float = DistillConfig.alpha_kd,
    temperature: float = DistillConfig.temperature,
    weight_decay: float = DistillConfig.weight_decay,
    kl_direction: str = DistillConfig.kl_direction,
    backend: str = DistillConfig.backend,
    launcher: str = DistillConfig.launcher,
    nproc_per_node: int = DistillConfig.nproc_per_node,
    master_port: int = DistillConfig.master_port,
    deepspeed_config: str = DistillConfig.deepspeed_config,
    gradient_checkpointing: bool = DistillConfig.gradient_checkpointing,
    teacher_cache: str = DistillConfig.teacher_cache,
    keep_best: bool = DistillConfig.keep_best,
    patience: int = DistillConfig.patience,
    sparse_check_eps: float = DistillConfig.sparse_check_eps,
    fail_on_sparse_violation: bool = DistillConfig.fail_on_sparse_violation,
    formats: list[str] = list(FORMATS),  # noqa: B006 (KFP reads it once)
    dtype: str = PruneConfig.dtype,
    seed: int = PruneConfig.seed,
    eval_blocks: int = PruneConfig.eval_blocks,
    eval_seq_len: int = PruneConfig.eval_seq_len,
    skip_ppl_eval: bool = PruneConfig.skip_ppl_eval,
    trust_remote_code: bool = PruneConfig.trust_remote_code,
    publish_to: str = DestinationConfig.publish_to,
    version: str = DestinationConfig.version,
    max_ppl_ratio: float = DestinationConfig.max_ppl_ratio,
    min_sparsity: float = DestinationConfig.min_sparsity,
    registry: str = DestinationConfig.registry,
    registry_model: str = DestinationConfig.registry_model,
    gpu_type: str = "nvidia.com/gpu",
    prune_gpus: int = 1,
    prune_cpu: str = "4",
    prune_memory: str = "16Gi",
    distill_gpus: int = 1,
    distill_cpu: str = "8",
    distill_memory: str = "32Gi",
    quantize_gpus: int = 1,
    quantize_cpu: str = "4",
    quantize_memory: str = "16Gi",
    light_cpu: str = "2",
    light_memory: str = "8Gi",
) -> Outputs:
    """Prune, distil and quantize a language model.

    Args:
        model_id: Hub id with optional @revision, folder, or builtin:smollm2-135m.
        train_data: Corpus for calibration and training: hub dataset `name:config`, local path, or builtin:python-docs.
        eval_data: Corpus for perplexity; may be the same, its evaluation split is read.
        sparsity: Share of weights to remove from each linear layer, in [0, 1); for a pattern N:M it must be 1 - N/M.
        pattern: `unstructured`, or N:M to keep N of every M neighbouring weights of a row.
        method: Pruning method: sparsegpt or magnitude.
        nsamples: Calibration blocks.
        seq_len: Tokens of a calibration or training block.
        epochs: Passes over the training blocks.
        max_steps: Stop distilling after so many optimizer steps; 0 = no limit.
        batch_size: Training blocks of a forward pass.
        grad_accum_steps: Forward passes of an optimizer step.
        learning_rate: Peak of the cosine schedule.
        warmup_ratio: Share of the steps in which the learning rate rises.
        alpha_kd: Weight of the distillation term in alpha_kd * KL + (1 - alpha_kd) * CE.
        temperature: Softens both distributions of the KL.
        weight_decay: AdamW's decoupled weight decay.
        kl_direction: `forward`: KL(teacher || student); `reverse`: KL(student || teacher).
        backend: Distillation in one process (`none`), or in several by `fsdp` or `deepspeed`.
        launcher: What starts the processes: `python` (one), `torchrun` or `accelerate`.
        nproc_per_node: Processes of the distill pod, one a GPU.
        master_port: Port where the processes meet.
        deepspeed_config: DeepSpeed JSON file with ZeRO stage 0, 1 or 2; empty = the shipped one, ZeRO 2.
        gradient_checkpointing: Keep fewer activations and compute them again in the backward pass.
        teacher_cache: Keep the teacher's hidden states on disk: `auto` (if there is more than one epoch), `always` or `never`.
        keep_best: Save the epoch with the lowest perplexity instead of the last.
        patience: End distilling after so many epochs without a lower perplexity; 0 = never.
        sparse_check_eps: A weight outside the mask may have this magnitude at the end of distillation; 0 = exactly zero.
        fail_on_sparse_violation: Fail if that check does; otherwise it is only recorded.
        formats: Quantization formats: int8, fp8.
        dtype: Number format: auto (float16 on a GPU, float32 on a CPU), float32, float16 or bfloat16.
        seed: Seed of calibration windows and training order.
        eval_blocks: Evaluation blocks; 0 = all.
        eval_seq_len: Tokens of an evaluation block; published numbers use 2048.
        skip_ppl_eval: Measure no perplexity.
        trust_remote_code: Run Python code that comes with the model.
        publish_to: Publish models and report there: gs://, s3:// or minio:// with bucket and prefix; empty = only the gate.
        version: Name of the published version; empty = from the content.
        max_ppl_ratio: Refuse to publish if a perplexity is above so many times the dense one; 0 = no limit.
        min_sparsity: Refuse to publish below this sparsity; 0 = no limit.
        registry: Address of a Kubeflow Model Registry to register what is published in; empty = none.
        registry_model: Name of the model in the registry.
        gpu_type: Resource name of the GPUs.
        prune_gpus: GPUs of the prune stage; 0 runs it on the CPU.
        prune_cpu: CPU limit of the prune stage.
        prune_memory: Memory limit of the prune stage.
        distill_gpus: GPUs of the distill stage; 0 runs it on the CPU.
        distill_cpu: CPU limit of the distill stage.
        distill_memory: Memory limit of the distill stage.
        quantize_gpus: GPUs of each quantize stage; 0 runs it on the CPU.
        quantize_cpu: CPU limit of each quantize stage.
        quantize_memory: Memory limit of each quantize stage.
        light_cpu: CPU limit of resolve, fetch, tokenize, report and publish.
        light_memory: Memory limit of resolve, fetch, tokenize, report and publish.

    Returns:
        The report's page, and a folder with the page and its numbers.
    """
    p = SimpleNamespace(**locals())
    prepared = prepare(p)
    distilled = on_gpu(
        distill(
            dense_model=prepared.fetched.outputs["dense_model"],
            pruned_model=prepared.pruned.outputs["pruned_model"],
            mask=prepared.pruned.outputs["mask"],
            tokens=prepared.tokenized.outputs["tokens"],
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
        ),
        gpu_type,
        distill_gpus,
        distill_cpu,
        distill_memory,
    )
    # by which its processes talk; a pod has 64 MB of it otherwise
    kubernetes.empty_dir_mount(distilled, "shared-memory", "/dev/shm", medium="Memory", size_limit="8Gi")
    return finish(p, prepared, distilled)
