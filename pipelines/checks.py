"""Check the parameters of a run by the stages' own rules, before anything is started."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pipelines.parameters import Group


def check_parameters(groups: Iterable[Group], values: Mapping[str, Any], on_this_machine: bool) -> None:
    """Check the values of a pipeline's parameters.

    Args:
        groups: what the pipeline offers.
        values: parameter → value, defaults included.
        on_this_machine: the stages will run here, so check files and packages too; on a cluster the pods alone can.

    Raises:
        ValueError: names parameter, rule and value.
    """
    for group in groups:
        names = group.names()
        with _named_as_in_the_pipeline(names):
            settings = group.settings(**{field: values[name] for field, name in names.items() if name in values})
            if on_this_machine:
                settings.check_environment()
    _check_across_stages(values)


def _check_across_stages(values: Mapping[str, Any]) -> None:
    """The rules that no stage can check alone."""
    if values["skip_ppl_eval"] and values["publish_max_ppl_ratio"]:
        raise ValueError(f"publish_max_ppl_ratio must be 0 with skip_ppl_eval, got {values['publish_max_ppl_ratio']}")
    sparsity, wanted = values["prune_sparsity"], values["publish_min_sparsity"]
    if wanted > sparsity:
        raise ValueError(f"publish_min_sparsity must be at most prune_sparsity = {sparsity}, got {wanted}")
    gpus, processes = values.get("distill_gpus", 0), values["distill_nproc_per_node"]
    if gpus not in (0, processes):
        raise ValueError(f"distill_nproc_per_node must be distill_gpus = {gpus}, got {processes}")


@contextlib.contextmanager
def _named_as_in_the_pipeline(names: Mapping[str, str]) -> Iterator[None]:
    """Let an error begin with the pipeline's parameter instead of the stage's field."""
    try:
        yield
    except ValueError as error:
        message = re.sub(r"^\w+", lambda match: names.get(match[0], match[0]), str(error))
        raise ValueError(message) from error
