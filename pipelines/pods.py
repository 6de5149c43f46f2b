"""What a stage's pod gets: CPU, memory, GPUs, retries, secrets."""

from types import SimpleNamespace

from kfp import kubernetes
from kfp.dsl import PipelineTask

# optional secret → its keys as variables: that of KFP's own object store, and one for s3:// if pods have no IAM role
STORE_SECRETS = {
    "mlpipeline-minio-artifact": {"accesskey": "MINIO_ACCESS_KEY", "secretkey": "MINIO_SECRET_KEY"},
    "sparse-distill-s3": {"accesskey": "AWS_ACCESS_KEY_ID", "secretkey": "AWS_SECRET_ACCESS_KEY"},
}


def light(p: SimpleNamespace, task: PipelineTask) -> PipelineTask:
    """Size the pod of a stage that needs little computation; `p` holds the pipeline's parameters by name."""
    return _sized(task, p.light_cpu, p.light_memory)


def on_gpu(p: SimpleNamespace, stage: str, task: PipelineTask) -> PipelineTask:
    """Size the pod of a stage that runs on GPUs, or on the CPU if the number of GPUs is 0."""
    cpu, memory, gpus = (getattr(p, f"{stage}_{resource}") for resource in ("cpu", "memory", "gpus"))
    return _sized(task, cpu, memory).set_accelerator_type(p.gpu_type).set_accelerator_limit(gpus)


def _sized(task: PipelineTask, cpu: str, memory: str) -> PipelineTask:
    """Set CPU, memory, and retries with a short back-off (KFP's default waits up to an hour)."""
    task.set_cpu_limit(cpu).set_memory_limit(memory)
    return task.set_retry(num_retries=2, backoff_duration="30s", backoff_factor=2, backoff_max_duration="5m")


def with_shared_memory(task: PipelineTask) -> PipelineTask:
    """Give a task memory through which its processes communicate; the default in a pod is 64 MB."""
    return kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory", size_limit="8Gi")


def with_store_secret(task: PipelineTask) -> PipelineTask:
    """Give a task the credentials for the object stores, if they exist."""
    for name, keys in STORE_SECRETS.items():
        kubernetes.use_secret_as_env(task, secret_name=name, secret_key_to_env=keys, optional=True)
    return task


def with_hub_secret(task: PipelineTask) -> PipelineTask:
    """Give a task the token for gated and private models, if it exists."""
    return kubernetes.use_secret_as_env(task, secret_name="hf-token", secret_key_to_env={"token": "HF_TOKEN"}, optional=True)
