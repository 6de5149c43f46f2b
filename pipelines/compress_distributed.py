"""The compression pipeline with distillation on many nodes: a PyTorchJob or TrainJob replaces the single distill pod.

All other stages and their parameters are the same as in `compress`.
"""

from types import SimpleNamespace
from typing import Any

from kfp import dsl, kubernetes
from kfp.dsl import PipelineTask

from components.distill_distributed.component import distill_distributed, sweep_jobs
from components.images import GPU_IMAGE
from pipelines.compress import IMPORTANT as IMPORTANT_IN_ONE_POD
from pipelines.compress import MODEL_ID, stages
from pipelines.parameters import GROUPS, call, describe, parameters, takes
from pipelines.pods import light, with_store_secret

MOUNT = "/handover"
IMPORTANT = (*IMPORTANT_IN_ONE_POD[:8], "distill_nodes", "distill_handover")


def defaults(handover_claim: str = "") -> dict[str, str]:
    """Defaults that differ from those of the stages' settings."""
    return {"model_id": MODEL_ID, "distill_handover": MOUNT if handover_claim else "", "distill_image": GPU_IMAGE}


def distributed(handover_claim: str = "") -> Any:
    """Build the pipeline.

    Args:
        handover_claim: ReadWriteMany volume claim for exchanging models, mounted at `/handover`; empty = nodes read and write
            the artifacts themselves.
    """
    made = parameters(GROUPS["compress-distributed"], **defaults(handover_claim))

    def with_handover(task: PipelineTask) -> PipelineTask:
        if handover_claim:
            kubernetes.mount_pvc(task, pvc_name=handover_claim, mount_path=MOUNT)
        return with_store_secret(task)

    def on_many_nodes(p: SimpleNamespace, **inputs: Any) -> PipelineTask:
        return with_handover(light(p, call(distill_distributed, p, **inputs)))

    @dsl.pipeline(name="compress-on-nodes")
    @takes(made)
    def compress_on_nodes(p: SimpleNamespace) -> None:
        """Prune, distil on many nodes, and quantize a language model."""
        stages(p, on_many_nodes, with_handover)

    @dsl.pipeline(
        name="compress-distributed",
        description=describe("Prune, distil on many nodes, and quantize a language model.", IMPORTANT),
    )
    @takes(made)
    def compress_distributed(p: SimpleNamespace) -> None:
        """Prune, distil on many nodes, and quantize a language model; however the run ends, no job is left behind."""
        data = {"handover": p.distill_handover, "checkpoints": p.distill_checkpoints}
        sweep = light(p, call(sweep_jobs, p, run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER, **data))
        with_handover(sweep).set_caching_options(False)
        with dsl.ExitHandler(sweep):
            # a nested pipeline: an exit handler passes no resource parameters to its tasks and exposes none of their outputs
            call(compress_on_nodes, p)

    return compress_distributed


compress_distributed = distributed()
