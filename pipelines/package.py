"""A compiled pipeline as it is sent to a cluster: its YAML, the name of its version, and values for its parameters."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from components.core.corpus import check_corpus
from components.core.errors import shown
from components.core.models import SMOLLM2, check_model_id
from components.core.reading import read_limited
from components.images import VERSION
from pipelines.checks import check_parameters, converted, pipeline_of
from pipelines.parameters import GROUPS

COMPILED = Path(__file__).with_name("compiled")
SIGNS = {"model_id", "train_data", "eval_data"}  # parameters by which a compression pipeline is recognised

TYPES = {
    "STRING": str,
    "NUMBER_INTEGER": int,
    "NUMBER_DOUBLE": float,
    "BOOLEAN": bool,
    "LIST": list,
    "STRUCT": dict,
}  # parameter type in a pipeline spec → type


@dataclass(frozen=True, kw_only=True)
class Package:
    """A compiled pipeline."""

    name: str
    """The pipeline's name."""
    description: str
    """What it does."""
    content: bytes
    """Its YAML."""
    parameters: dict[str, dict[str, Any]]
    """Parameter → its definition in the YAML: parameterType, defaultValue, isOptional."""
    types: dict[str, type]
    """Parameter → its type."""

    @property
    def version(self) -> str:
        """Name of the pipeline version: identical for identical YAML, different for any other."""
        return f"{VERSION}-{hashlib.sha256(self.content).hexdigest()[:12]}"


def read_package(pipeline: str, cache: bool = True) -> Package:
    """Read a compiled pipeline.

    Args:
        pipeline: the name of a pipeline in `pipelines/compiled`, or the path of a YAML file.
        cache: whether the package's tasks may take results from KFP's cache.

    Raises:
        ValueError: there is no such pipeline, or the file is not a compiled pipeline.
    """
    compiled = dict(sorted((found.stem, found) for found in COMPILED.glob("*.yaml")))
    path = Path(pipeline) if pipeline.endswith((".yaml", ".yml")) else compiled.get(pipeline)
    if not path or not path.is_file():
        raise ValueError(f"pipeline must be {', '.join(compiled)} or an existing YAML file, got {shown(pipeline)}")
    try:
        content = read_limited(path)
        spec, *platform = yaml.safe_load_all(content)
        about = spec["pipelineInfo"]
        parameters = spec["root"].get("inputDefinitions", {}).get("parameters", {})
        if not cache:
            _switch_cache_off(spec)
            content = yaml.safe_dump_all([spec, *platform]).encode()
        types = {name: TYPES[definition["parameterType"]] for name, definition in parameters.items()}
        about = {"name": about["name"], "description": about.get("description", "")}
        return Package(**about, content=content, parameters=parameters, types=types)
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"pipeline must be a compiled KFP v2 pipeline, got {path}") from None


def _switch_cache_off(spec: dict[str, Any]) -> None:
    """Clear the caching options of every task, since a run of an uploaded version cannot override the compiled options."""
    for component in (spec["root"], *spec["components"].values()):
        for task in component.get("dag", {}).get("tasks", {}).values():
            task["cachingOptions"] = {}


def read_parameters(package: Package, params: str, assignments: list[str]) -> dict[str, Any]:
    """Read values for a pipeline's parameters, convert them to their declared types and check them by the stages' rules.

    Args:
        package: the pipeline.
        params: a YAML file that maps parameters to values; empty = none.
        assignments: values as `name=value`; they override those in the file.

    Returns:
        Parameter → value, only for parameters that were given.

    Raises:
        ValueError: a value is wrong; the message names the parameter, the rule and the value.
    """
    given = _read_file(params) if params else {}
    for assignment in assignments:
        name, sign, text = assignment.partition("=")
        if not sign or not name:
            raise ValueError(f"set must be name=value, got {shown(assignment)}")
        given[name] = text
    values = converted(package.name, package.types, given)
    defaults = {}
    for name, definition in package.parameters.items():
        if "defaultValue" in definition:
            defaults[name] = _default(definition)
        elif not definition.get("isOptional") and name not in values:
            raise ValueError(f"{name} must be given: {package.name} has no default for it")
    all_values = defaults | values
    if all_values.keys() >= SIGNS:
        check_parameters(GROUPS[pipeline_of(all_values)], all_values, on_this_machine=False)
        _check_places(all_values, package)
    return values


def _read_file(params: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(read_limited(params))
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"params must be a YAML file: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"params must map parameters to values, got {type(found).__name__} in {params}")
    return found


def _default(definition: dict[str, Any]) -> Any:
    value = definition["defaultValue"]
    return int(value) if definition["parameterType"] == "NUMBER_INTEGER" else value  # the YAML stores 1 as 1.0


def _check_places(values: dict[str, Any], package: Package) -> None:
    """Check that the pods can reach what a run reads and writes; paths inside the pods cannot be checked here."""
    for name, check in (("model_id", check_model_id), ("train_data", check_corpus), ("eval_data", check_corpus)):
        value = values[name]
        if value.startswith("/"):
            continue
        if Path(value).exists() or value == SMOLLM2:
            raise ValueError(f"{name} must be found by the pods, got {value!r}: it is on this machine alone")
        check(name, value)
    if values.get("publish_to", "").startswith("/"):
        raise ValueError(f"publish_to must be a bucket, got {values['publish_to']!r}: the pod's own disk goes with the pod")
    handover = values.get("distill_handover", "")
    if handover.startswith("/") and b"pvcMount" not in package.content:
        raise ValueError(
            f"distill_handover must be a bucket, got {handover!r}: {package.name} was compiled without handover_claim"
        )
