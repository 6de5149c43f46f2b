"""Check a run's parameters against the stages' own rules before anything is started."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from components.core.settings import naming
from pipelines.parameters import Group


def check_parameters(groups: Iterable[Group], values: Mapping[str, Any], on_this_machine: bool) -> None:
    """Check the values of a pipeline's parameters.

    Args:
        groups: the settings that the pipeline offers.
        values: parameter → value, including defaults.
        on_this_machine: whether the stages run here. If so, files and packages are checked too; on a cluster only the pods can.

    Raises:
        ValueError: a value is wrong; the message names the parameter, the rule and the value.
    """
    for group in groups:
        names = group.names()
        given = {field: values[name] for field, name in names.items() if name in values}
        if not group.required() <= given.keys():
            continue  # a pipeline of another version, which has no such settings
        with _named_as_in_the_pipeline(names):
            settings = group.settings(**given)
            if on_this_machine:
                with naming(settings):
                    settings.check_environment()
    _check_across_stages(values)


def _check_across_stages(values: Mapping[str, Any]) -> None:
    """Check the rules that involve several stages, as far as the pipeline has their parameters."""
    given = values.keys()
    if {"skip_ppl_eval", "publish_max_ppl_ratio"} <= given and values["skip_ppl_eval"] and values["publish_max_ppl_ratio"]:
        raise ValueError(f"publish_max_ppl_ratio must be 0 with skip_ppl_eval, got {values['publish_max_ppl_ratio']}")
    if {"prune_sparsity", "publish_min_sparsity"} <= given and values["publish_min_sparsity"] > values["prune_sparsity"]:
        sparsity, wanted = values["prune_sparsity"], values["publish_min_sparsity"]
        raise ValueError(f"publish_min_sparsity must be at most prune_sparsity = {sparsity}, got {wanted}")
    if {"distill_gpus", "distill_nproc_per_node"} <= given:
        gpus, processes = values["distill_gpus"], values["distill_nproc_per_node"]
        if gpus not in (0, processes):
            raise ValueError(f"distill_nproc_per_node must be distill_gpus = {gpus}, got {processes}")


@contextlib.contextmanager
def _named_as_in_the_pipeline(names: Mapping[str, str]) -> Iterator[None]:
    """Replace the stage's field name at the start of an error message with the pipeline's parameter name."""
    try:
        yield
    except ValueError as error:
        message = re.sub(r"^\w+", lambda match: names.get(match[0], match[0]), str(error))
        raise ValueError(message) from error
