"""The compression pipeline with distillation on many nodes: a PyTorchJob or TrainJob in place of the one distill pod.

All other stages, and their parameters, are those of `compress`.
"""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from kfp import dsl, kubernetes
from kfp.dsl import PipelineTask

from components.distill_distributed.component import distill_distributed, sweep_jobs
from components.distill_distributed.config import DistillDistributedConfig
from components.images import GPU_IMAGE
from pipelines.compress import compress, finish, on_gpu, prepare, sized, with_store_secret

BUCKET, MOUNT = "minio://mlpipeline/handover", "/handover"
# how one pod starts its processes: here the job does
ONE_POD = ("backend", "launcher", "master_port", "deepspeed_config")


def with_parameters_of(base: Any, leave_out: tuple[str, ...] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a pipeline function, which takes them as `**shared`, the parameters of another pipeline and their documentation."""
    shared = inspect.signature(base.pipeline_func)
    described = inspect.getdoc(base.pipeline_func) or ""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = [entry for entry in inspect.signature(function).parameters.values() if entry.kind is not entry.VAR_KEYWORD]
        taken = [entry for name, entry in shared.parameters.items() if name not in leave_out]
        names = [entry.name for entry in (*own, *taken)]

        def pipeline(*arguments: Any) -> None:
            function(**dict(zip(names, arguments, strict=True)))

        lines = [line for line in described.partition("Args:\n")[2].splitlines() if line.strip().split(":")[0] not in leave_out]
        begun = inspect.getdoc(function) or ""
        pipeline.__doc__ = "\n".join([begun, *([] if "Args:" in begun else ["\nArgs:"]), *lines])
        pipeline.__name__ = function.__name__
        pipeline.__signature__ = inspect.Signature([*own, *taken])  # type: ignore[attr-defined]
        return pipeline

    return decorate


def distributed(handover_claim: str = "") -> Any:
    """The pipeline.

    Args:
        handover_claim: ReadWriteMany volume claim on which models are exchanged, mounted at `/handover`; empty = in a bucket.
    """

    def with_handover(task: PipelineTask) -> PipelineTask:
        if handover_claim:
            kubernetes.mount_pvc(task, pvc_name=handover_claim, mount_path=MOUNT)
        return with_store_secret(task)

    @dsl.pipeline(name="compress-on-nodes")
    @with_parameters_of(compress, leave_out=ONE_POD)
    def compress_on_nodes(  # noqa: D417 (those of `compress` are added)
        handover: str = MOUNT if handover_claim else BUCKET,
        nodes: int = DistillDistributedConfig.nodes,
        image: str = GPU_IMAGE,
        kind: str = DistillDistributedConfig.kind,
        elastic: str = DistillDistributedConfig.elastic,
        retries: int = DistillDistributedConfig.retries,
        deadline: int = DistillDistributedConfig.deadline,
        queue: str = DistillDistributedConfig.queue,
        runtime: str = DistillDistributedConfig.runtime,
        service_account: str = DistillDistributedConfig.service_account,
        **shared: Any,
    ) -> None:
        """Prune, distil on many nodes, and quantize a language model.

        Args:
            handover: Where launcher and nodes exchange models: gs://, s3:// or minio:// bucket and prefix, or a mounted folder.
            nodes: Nodes of the distillation, each with distill_gpus GPUs, distill_cpu and distill_memory.
            image: Image of the nodes.
            kind: pytorchjob, or trainjob for Kubeflow Trainer 2.2 and newer.
            elastic: MIN:MAX nodes with which a pytorchjob may go on; empty = all of them.
            retries: How often every node may be started again after a failure.
            deadline: Seconds that the job may run, queueing not counted.
            queue: Kueue LocalQueue; empty = no queue.
            runtime: ClusterTrainingRuntime of a trainjob.
            service_account: ServiceAccount of the nodes, such as one with access to the bucket.
        """
        p = SimpleNamespace(**shared)
        prepared = prepare(p)
        distilled = distill_distributed(
            dense_model=prepared.fetched.outputs["dense_model"],
            pruned_model=prepared.pruned.outputs["pruned_model"],
            mask=prepared.pruned.outputs["mask"],
            tokens=prepared.tokenized.outputs["tokens"],
            handover=handover,
            image=image,
            kind=kind,
            nodes=nodes,
            elastic=elastic,
            retries=retries,
            deadline=deadline,
            queue=queue,
            runtime=runtime,
            service_account=service_account,
            seq_len=p.seq_len,
            epochs=p.epochs,
            max_steps=p.max_steps,
            batch_size=p.batch_size,
            grad_accum_steps=p.grad_accum_steps,
            learning_rate=p.learning_rate,
            warmup_ratio=p.warmup_ratio,
            alpha_kd=p.alpha_kd,
            temperature=p.temperature,
            weight_decay=p.weight_decay,
            kl_direction=p.kl_direction,
            nproc_per_node=p.nproc_per_node,
            gradient_checkpointing=p.gradient_checkpointing,
            teacher_cache=p.teacher_cache,
            keep_best=p.keep_best,
            patience=p.patience,
            seed=p.seed,
            dtype=p.dtype,
            sparse_check_eps=p.sparse_check_eps,
            fail_on_sparse_violation=p.fail_on_sparse_violation,
            eval_blocks=p.eval_blocks,
            eval_seq_len=p.eval_seq_len,
            skip_ppl_eval=p.skip_ppl_eval,
            trust_remote_code=p.trust_remote_code,
        )
        # these go to the nodes, the launcher itself asks for no GPU
        with_handover(on_gpu(distilled, p.gpu_type, p.distill_gpus, p.distill_cpu, p.distill_memory))
        finish(p, prepared, distilled)

    @dsl.pipeline(name="compress-distributed", description="Prune, distil on many nodes, and quantize a language model.")
    @with_parameters_of(compress_on_nodes)
    def compress_distributed(**parameters: Any) -> None:
        """Prune, distil on many nodes, and quantize a language model; whatever becomes of it, no job is left behind."""
        sweep = sized(
            sweep_jobs(run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER, handover=parameters["handover"]),
            parameters["light_cpu"],
            parameters["light_memory"],
        )
        with_handover(sweep).set_caching_options(False)
        with dsl.ExitHandler(sweep):
            # a pipeline of its own: an exit handler does not hand resource parameters to its tasks, and lets no output out
            compress_on_nodes(**parameters)

    return compress_distributed


compress_distributed = distributed()
