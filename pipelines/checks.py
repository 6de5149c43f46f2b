"""Check a run's parameters against the stages' own rules before anything is started.

`run`, `submit` and `schedule` do so, and so does the resolve stage, which is the first one, for runs started in any other way.
"""

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from inspect import Parameter
from typing import Any, get_origin

import yaml

from components.core.errors import shown
from components.core.settings import naming
from components.resolve.config import ResolveSettings
from pipelines.parameters import GROUPS, Group, parameters

# type → (description for error messages, Python types, parser for text)
TYPES: dict[type, tuple[str, tuple[type, ...], Callable[[str], Any]]] = {
    str: ("a string", (str,), str),
    int: ("a whole number", (int,), lambda text: int(text.removesuffix(".0"))),  # for kfp.local, all numbers are floats
    float: ("a finite number", (int, float), float),
    bool: ("true or false", (bool,), {"true": True, "false": False}.__getitem__),
    list: ("a list", (list,), yaml.safe_load),
    dict: ("a mapping", (dict,), yaml.safe_load),
}
# text parameters that the resolve stage takes by themselves; it takes the others in a dictionary, into whose JSON KFP puts text
# as it is
ALONE = {entry.name for entry in fields(ResolveSettings)}


def pipeline_of(names: Iterable[str]) -> str:
    """Which of the two pipelines has these parameters."""
    return "compress-distributed" if "distill_handover" in names else "compress"


def converted(pipeline: str, types: Mapping[str, type], given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert values to the types of a pipeline's parameters.

    Args:
        pipeline: its name.
        types: parameter → type.
        given: parameter → value; text stands for a value of any type, as in a flag, or as KFP passes values in a dictionary.

    Raises:
        ValueError: a name or a value is wrong; the message names the parameter, the rule and the value.
    """
    for name in given:
        if name not in types:
            raise ValueError(f"{name} must be a parameter of {pipeline}, it has {', '.join(sorted(types))}")
    return {name: _typed(name, types[name], value) for name, value in given.items()}


def _typed(name: str, kind: type, value: Any) -> Any:
    what, classes, parse = TYPES[kind]
    wrong = ValueError(f"{name} must be {what}, got {shown(value)}")
    if isinstance(value, str):
        try:
            value = parse(value)
        except (ValueError, KeyError, yaml.YAMLError, RecursionError):  # the last, where brackets are nested without end
            raise wrong from None
    is_other_bool = isinstance(value, bool) and bool not in classes  # in Python a bool is an int
    is_too_large = isinstance(value, int | float) and not abs(value) <= sys.float_info.max
    if not isinstance(value, classes) or is_other_bool or is_too_large:
        raise wrong
    return value


def check_run(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the values of a run of one of the two pipelines where it runs; returns those of all parameters in their types.

    Args:
        given: parameter → value, as for `converted`; what is missing has its default.

    Raises:
        ValueError: as for `converted` and `check_parameters`.
    """
    pipeline = pipeline_of(given)
    made = parameters(GROUPS[pipeline])
    values = {entry.name: entry.default for entry in made}
    values |= converted(pipeline, {entry.name: get_origin(entry.type) or entry.type for entry in made}, given)
    for name, value in values.items():
        if value is Parameter.empty:
            raise ValueError(f"{name} must be given: {pipeline} has no default for it")
    check_parameters(GROUPS[pipeline], values, on_this_machine=False)
    return values


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
    for name, value in values.items():
        if isinstance(value, str) and name not in ALONE and json.dumps(value, ensure_ascii=False) != f'"{value}"':
            raise ValueError(f"{name} must have no quotation mark, backslash or line break, got {shown(value)}")


def _check_across_stages(values: Mapping[str, Any]) -> None:
    """Check the rules that involve several stages, as far as the pipeline has their parameters."""
    given = values.keys()
    if {"skip_ppl_eval", "publish_max_ppl_ratio"} <= given and values["skip_ppl_eval"] and values["publish_max_ppl_ratio"]:
        raise ValueError(f"publish_max_ppl_ratio must be 0 with skip_ppl_eval, got {values['publish_max_ppl_ratio']}")
    if {"prune_sparsity", "publish_min_sparsity"} <= given and values["publish_min_sparsity"] > values["prune_sparsity"]:
        sparsity, wanted = values["prune_sparsity"], values["publish_min_sparsity"]
        raise ValueError(f"publish_min_sparsity must be at most prune_sparsity = {sparsity}, got {wanted}")
    for stage in ("prune", "distill"):
        if {f"{stage}_gpus", f"{stage}_nproc_per_node"} <= given:
            gpus, processes = values[f"{stage}_gpus"], values[f"{stage}_nproc_per_node"]
            if gpus not in (0, processes):
                raise ValueError(f"{stage}_nproc_per_node must be {stage}_gpus = {gpus}, got {processes}")


@contextlib.contextmanager
def _named_as_in_the_pipeline(names: Mapping[str, str]) -> Iterator[None]:
    """Replace the stage's field name at the start of an error message with the pipeline's parameter name."""
    try:
        yield
    except ValueError as error:
        message = re.sub(r"^\w+", lambda match: names.get(match[0], match[0]), str(error))
        raise ValueError(message) from error
