"""Quantizing to one format: the body of the pipelines' loop over formats.

It is a separate pipeline because a loop does not pass resource parameters to its tasks.
"""

from dataclasses import replace
from inspect import Parameter
from types import SimpleNamespace
from typing import NamedTuple

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Model

from components.quantize.component import quantize
from components.quantize.config import QuantizeSettings
from pipelines.parameters import Group, call, parameters, takes
from pipelines.pods import on_gpu
from pipelines.sizes import PodSettings

SIZES = [entry for entry in parameters([Group("pods", PodSettings)]) if entry.name.startswith(("gpu_type", "quantize_"))]
TAKEN = [*parameters([Group("quantize", QuantizeSettings)]), *SIZES]


class Quantized(NamedTuple):
    """A model in one format."""

    quantized_model: Model


@dsl.pipeline(name="quantize-format")
@takes([replace(entry, default=Parameter.empty) for entry in TAKEN])  # the enclosing pipeline passes all of them
def quantize_format(
    p: SimpleNamespace, distilled_model: Input[Model], mask: Input[Artifact], tokens: Input[Dataset], format: str
) -> Quantized:
    """Quantize to one format."""
    inputs = {"distilled_model": distilled_model, "mask": mask, "tokens": tokens, "format": format}
    task = on_gpu(p, "quantize", call(quantize, p, **inputs))
    return Quantized(quantized_model=task.outputs["quantized_model"])
