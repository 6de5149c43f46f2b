"""Check a run's parameters against the stages' own rules before anything is started."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

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
        with _named_as_in_the_pipeline(names):
            settings = group.settings(**{field: values[name] for field, name in names.items() if name in values})
            if on_this_machine:
                settings.check_environment()
    _check_across_stages(values)


def _check_across_stages(values: Mapping[str, Any]) -> None:
    """Check the rules that involve several stages."""
    ratio, sparsity, wanted = (
        values.get(name, 0) for name in ("publish_max_ppl_ratio", "prune_sparsity", "publish_min_sparsity")
    )
    if ratio and values.get("skip_ppl_eval"):
        raise ValueError(f"publish_max_ppl_ratio must be 0 with skip_ppl_eval, got {ratio}")
    if wanted > sparsity:
        raise ValueError(f"publish_min_sparsity must be at most prune_sparsity = {sparsity}, got {wanted}")
    gpus, processes = values.get("distill_gpus", 0), values.get("distill_nproc_per_node", 1)
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
