"""KFP wrapper of the resolve stage."""

from typing import NamedTuple

from components.images import launcher_pod


@launcher_pod()
def resolve(model_id: str, train_data: str, eval_data: str) -> NamedTuple(
    "Versions", model_id=str, model_revision=str, train_revision=str, eval_revision=str
):
    """Find the commits of the model and the texts."""
    from components.core.settings import configure
    from components.resolve.config import ResolveConfig
    from components.resolve.stage import run

    found = run(configure(ResolveConfig, locals())).measured
    return (found["model_id"], found["model_revision"], found["train_revision"], found["eval_revision"])
