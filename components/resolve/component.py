"""KFP wrapper of the resolve stage."""

from typing import NamedTuple

from components.images import launcher_pod


@launcher_pod()
def resolve(
    model_id: str, train_data: str, eval_data: str, quantize_formats: list[str], parameters: dict[str, str]
) -> NamedTuple(
    "Resolved",
    model_id=str,
    model_revision=str,
    train_revision=str,
    eval_revision=str,
    prune_memory=str,
    distill_memory=str,
    quantize_memory=str,
):
    """Check the run's parameters, find the commits of the model and the texts, and size the pods of the large stages.

    KFP turns each of `parameters` into text, and breaks lists, and text with quotation marks: these are arguments of their own.
    """
    import json

    from components.core.settings import configure
    from components.resolve.config import ResolveConfig
    from components.resolve.stage import run

    others = json.dumps(parameters | {"quantize_formats": quantize_formats})
    found = run(configure(ResolveConfig, locals(), parameters=others)).measured
    revisions = (found["model_id"], found["model_revision"], found["train_revision"], found["eval_revision"])
    return (*revisions, found["prune_memory"], found["distill_memory"], found["quantize_memory"])
