"""The tables of the cluster guide that tell how much memory and disk the stages take, computed as the resolve stage does."""

from typing import Any

from components.resolve.shape import Shape, llama_tensors, shape_of
from components.resolve.sizing import GIB, STAGES, Need, Terms, distill, limit, total
from pipelines.parameters import GROUPS, parameters

MODELS = {
    "Qwen3-0.6B": shape_of(llama_tensors(28, 1024, 3072, 16, 8, 128, 151936, tied=True)),
    "Qwen3-1.7B": shape_of(llama_tensors(28, 2048, 6144, 16, 8, 128, 151936, tied=True)),
    "Qwen3-8B": shape_of(llama_tensors(36, 4096, 12288, 32, 8, 128, 151936, tied=False)),
    "Qwen3-32B": shape_of(llama_tensors(64, 5120, 25600, 64, 8, 128, 151936, tied=False)),
    "Llama-3.1-70B": shape_of(llama_tensors(80, 8192, 28672, 64, 8, 128, 128256, tied=False)),
}
USABLE = 79 * GIB  # of a GPU of 80 GB, as CUDA tells
GPUS_OF_A_NODE = 8
SAVING = {"distill_gradient_checkpointing": True}


def defaults(pipeline: str) -> dict[str, Any]:
    """The parameters of a run with the defaults, by name."""
    return {entry.name: entry.default for entry in parameters(GROUPS[pipeline])}


def distillation(gpus: int, **changes: Any) -> dict[str, Any]:
    """The parameters of a run that distils on some GPUs, on nodes with up to `GPUS_OF_A_NODE`, by name.

    Args:
        gpus: a power of two.
        changes: parameter → value, where it differs from the default.
    """
    if gpus == 1:
        return defaults("compress") | changes
    here = min(gpus, GPUS_OF_A_NODE)
    sizes = {"distill_gpus": here, "distill_nproc_per_node": here, "distill_nodes": gpus // here}
    return defaults("compress-distributed") | sizes | changes


def gpus_needed(shape: Shape, **changes: Any) -> int:
    """The smallest power of two of GPUs of 80 GB on which a model can be distilled. Arguments as for `distillation`."""
    powers = (1 << power for power in range(20))
    return next(gpus for gpus in powers if total(distill(shape, distillation(gpus, **changes)).gpu) <= USABLE)


def sizes() -> str:
    """What each stage takes of models of several sizes, and the terms of the largest."""
    rows = ["| model | stage | GPUs of 80 GB | of each GPU | memory of a pod | disk of a pod |", "|---|---|---|---|---|---|"]
    for model, shape in MODELS.items():
        for stage in ("prune", "quantize"):
            rows.append(_row(model, stage, 1, STAGES[stage](shape, defaults("compress"))))
        for what, changes in (("distill", {}), ("distill, gradient checkpointing", SAVING)):
            gpus = gpus_needed(shape, **changes)
            rows.append(_row(model, what, gpus, distill(shape, distillation(gpus, **changes))))
    model, shape = list(MODELS.items())[-1]
    gpus = gpus_needed(shape, **SAVING)
    needs = {
        "prune": STAGES["prune"](shape, defaults("compress")),
        f"distill on {gpus} GPUs, gradient checkpointing": distill(shape, distillation(gpus, **SAVING)),
        "quantize": STAGES["quantize"](shape, defaults("compress")),
    }
    terms = [f"The terms of {model}, in GB, before the margin of a tenth:", "", "| stage | of | terms |", "|---|---|---|"]
    for stage, need in needs.items():
        places = {"each GPU": need.gpu, "a pod's memory": need.host, "a pod's disk": need.disk}
        terms += [f"| {stage} | {place} | {_terms(found)} |" for place, found in places.items()]
    return "\n".join([*rows, "", *terms])


def _row(model: str, stage: str, gpus: int, need: Need) -> str:
    gpu, disk = (f"{total(terms) / 1e9:.0f} GB" for terms in (need.gpu, need.disk))
    return f"| {model} | {stage} | {gpus} | {gpu} | {limit(total(need.host))} | {disk} |"


def _terms(terms: Terms) -> str:
    return ", ".join(f"{term} {needed / 1e9:.1f}" for term, needed in terms.items() if needed)
