"""Checks that several settings classes share. Each raises a `ValueError` that names the parameter, the rule and the value."""

import math
import re
from collections.abc import Collection

from components.core.errors import shown

AUTO = "auto"  # of a memory limit: by the model's sizes
DTYPES = ("auto", "float32", "float16", "bfloat16")
# Kubernetes would take 16m for memory too, as 0.016 bytes
CPU = re.compile(r"(?=.*[1-9])([0-9]{1,9}(\.[0-9]{1,9})?|[0-9]{1,12}m)")
MEMORY = re.compile(r"(?=.*[1-9])[0-9]{1,18}(\.[0-9]{1,9})?([kMGTPE]|[KMGTPE]i)?")
RESOURCE = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


def check_at_least(parameter: str, value: float, low: float) -> None:
    """Check that `value` >= `low` and is finite; NaN fails."""
    if not value >= low:
        raise ValueError(f"{parameter} must be at least {low}, got {value}")
    _not_infinite(parameter, value)


def check_above(parameter: str, value: float, low: float) -> None:
    """Check that `value` > `low` and is finite; NaN fails."""
    if not value > low:
        raise ValueError(f"{parameter} must be above {low}, got {value}")
    _not_infinite(parameter, value)


def _not_infinite(parameter: str, value: float) -> None:
    if value == math.inf:
        raise ValueError(f"{parameter} must be finite, got {value}")


def check_in_unit_interval(parameter: str, value: float) -> None:
    """Check that `value` is in [0, 1]; NaN fails."""
    check_range(parameter, value, 0, 1)


def check_range(parameter: str, value: float, low: float, high: float) -> None:
    """Check that `value` is in [low, high]; NaN fails."""
    if not low <= value <= high:
        raise ValueError(f"{parameter} must be in [{low}, {high}], got {value}")


def check_one_of(parameter: str, value: str, choices: Collection[str]) -> None:
    """Check that `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{parameter} must be one of {', '.join(choices)}, got {shown(value)}")


def check_text(parameter: str, value: object) -> None:
    """Check that `value`, if it is a string, can be written to a file and named to the system: no NUL, no broken characters."""
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= sign <= "\udfff" for sign in value)):
        raise ValueError(f"{parameter} must be UTF-8 text, got {shown(value)}")


def check_not_empty(parameter: str, value: str) -> None:
    """Check that `value` is not empty."""
    if not value.strip():
        raise ValueError(f"{parameter} must be given, got {value!r}")


def check_gpus(parameter: str, value: int) -> None:
    """Check that `value` is a number of GPUs."""
    check_at_least(parameter, value, 0)


def check_cpu(parameter: str, value: str) -> None:
    """Check that `value` is an amount of CPU above 0 in Kubernetes' format."""
    _check_format(parameter, value, CPU, "a number of CPUs such as 4, 0.5 or 500m")


def check_memory(parameter: str, value: str) -> None:
    """Check that `value` is an amount of memory above 0 in Kubernetes' format."""
    _check_format(parameter, value, MEMORY, "an amount of memory such as 16Gi")


def check_memory_or_auto(parameter: str, value: str) -> None:
    """Check that `value` is `AUTO` or an amount of memory above 0 in Kubernetes' format."""
    if value != AUTO:
        _check_format(parameter, value, MEMORY, f"{AUTO} or an amount of memory such as 16Gi")


def check_resource(parameter: str, value: str) -> None:
    """Check that `value` is the name of a resource of Kubernetes' nodes."""
    _check_format(parameter, value, RESOURCE, "the name of a resource such as nvidia.com/gpu")


def _check_format(parameter: str, value: str, form: re.Pattern[str], what: str) -> None:
    if not form.fullmatch(value):
        raise ValueError(f"{parameter} must be {what}, got {shown(value)}")


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """Parse `N:M`, which keeps N of every M weights, as (N, M); None for `unstructured`."""
    if pattern == "unstructured":
        return None
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if not match or not 0 < int(match[1]) < int(match[2]):
        raise ValueError(f"pattern must be 'unstructured' or N:M with 0 < N < M, got {shown(pattern)}")
    return int(match[1]), int(match[2])
