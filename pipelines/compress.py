"""The compression pipeline: resolve → fetch → tokenize → prune → distill → quantize × formats → report → publish.

Its parameters are the stages' settings; see `pipelines.parameters`.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

from kfp import dsl
from kfp.dsl import HTML, Artifact, PipelineTask

from components.distill.component import distill, remove_checkpoints
from components.fetch.component import fetch
from components.prune.component import prune
from components.publish.component import publish
from components.report.component import report
from components.resolve.component import resolve
from components.tokenize.component import tokenize
from pipelines.parameters import GROUPS, call, describe, parameters, takes
from pipelines.pods import light, on_gpu, with_hub_secret, with_shared_memory, with_store_secret
from pipelines.quantize_format import quantize_format

MODEL_ID = "Qwen/Qwen3-0.6B"
IMPORTANT = (
    "model_id", "train_data", "eval_data", "prune_sparsity", "distill_epochs", "distill_learning_rate", "quantize_formats",
    "publish_to", "publish_max_ppl_ratio", "nsamples",
)  # fmt: skip


class Outputs(NamedTuple):
    """The outputs of a run: the report's page, and a folder with the page and its numbers."""

    compression_report: HTML
    report_files: Artifact


def stages(
    p: SimpleNamespace,
    distillation: Callable[..., PipelineTask],
    with_places: Callable[[PipelineTask], PipelineTask] = with_store_secret,
) -> Outputs:
    """Add all stages to the pipeline that is being defined.

    Args:
        p: the pipeline's parameters by name.
        distillation: adds the distill stage, given `p` and the keyword arguments dense_model, pruned_model, pruned_mask and
            tokens.
        with_places: gives a task access to the places that the run writes to.
    """
    others = {name: value for name, value in vars(p).items() if name not in resolve.component_spec.inputs}
    resolved = with_places(light(p, call(resolve, p, parameters=others)))
    # it checks whether anything has changed: the revisions that it returns are part of the cache keys of all later stages
    resolved.set_caching_options(False)
    named = {name: resolved.outputs[name] for name in ("model_id", "model_revision", "train_revision", "eval_revision")}

    fetched = light(p, call(fetch, p, model_id=named["model_id"], revision=named["model_revision"]))
    dense_model = fetched.outputs["dense_model"]

    revisions = {name: named[name] for name in ("train_revision", "eval_revision")}
    tokenized = light(p, call(tokenize, p, dense_model=dense_model, **revisions))
    tokens = tokenized.outputs["tokens"]
    for task in (resolved, fetched, tokenized):
        with_hub_secret(task)

    # the first stage knows the model, and so how much memory the pods of the large stages need
    sizes = {name: resolved.outputs[name] for name in resolve.component_spec.outputs if name.endswith("_memory")}
    p = SimpleNamespace(**vars(p) | sizes)
    pruned = with_shared_memory(on_gpu(p, "prune", call(prune, p, dense_model=dense_model, tokens=tokens)))
    results = {"pruned_model": pruned.outputs["pruned_model"], "pruned_mask": pruned.outputs["mask"]}

    distilled = distillation(p, dense_model=dense_model, **results, tokens=tokens)
    distilled_model, mask = distilled.outputs["distilled_model"], distilled.outputs["distilled_mask"]

    with dsl.ParallelFor(p.quantize_formats) as format:
        quantized = call(quantize_format, p, distilled_model=distilled_model, mask=mask, tokens=tokens, format=format)

    quantized_model = quantized.outputs["quantized_model"]  # whose history holds the records of all stages
    reported = light(p, call(report, p, models=dsl.Collected(quantized_model)))
    report_files = reported.outputs["report_files"]

    # not inside a condition, where KFP does not pass collected artifacts; if publish_to is empty, it only checks the gate
    published = light(p, call(publish, p, models=dsl.Collected(quantized_model), report_files=report_files))
    with_store_secret(published).set_caching_options(False)  # the contents of publish_to may have changed
    return Outputs(compression_report=reported.outputs["compression_report"], report_files=report_files)


def in_one_pod(p: SimpleNamespace, **inputs: Any) -> PipelineTask:
    """Add the distill stage as a single pod."""
    task = with_shared_memory(on_gpu(p, "distill", call(distill, p, **inputs)))
    removal = light(p, remove_checkpoints(metrics=task.outputs["metrics"], checkpoints=p.distill_checkpoints))
    for each in (task, removal):
        with_store_secret(each)
    return task


@dsl.pipeline(
    name="compress",
    description=describe("Prune, distil and quantize a language model.", IMPORTANT),
)
@takes(parameters(GROUPS["compress"], model_id=MODEL_ID))
def compress(p: SimpleNamespace) -> Outputs:
    """Prune, distil and quantize a language model."""
    return stages(p, in_one_pod)
