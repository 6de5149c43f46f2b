"""What may be pruned and trained under a mask: all weight matrices of a model except the head."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from components.core.blocks import matrices
from components.core.mask.mask import Mask


def head_name(model: Any) -> str:
    """Name of the module that computes the logits."""
    head = model.get_output_embeddings()
    return next(str(name) for name, module in model.named_modules() if module is head)


def prunable_weights(model: Any) -> dict[str, Tensor]:
    """The weights that may be pruned, by name: those that hold the `matrices` of a model, except the head."""
    head = head_name(model)
    names = {matrix.parameter: None for matrix in matrices(model).values() if matrix.layer != head}
    return {name: model.get_parameter(name) for name in names}


def weight_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Name → shape of every parameter."""
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def check_mask(mask: Mask, model: Any) -> None:
    """Check that a mask fits a model and only masks its matrices other than the head. Raises ValueError."""
    check_fits(mask, weight_shapes(model))
    for name in sorted(mask.tensors.keys() - prunable_weights(model).keys()):
        raise ValueError(f"mask_file must mask matrices other than the head, got {name}")


def check_fits(mask: Mask, shapes: Mapping[str, Iterable[int]]) -> None:
    """Check that a mask fits a model with weights of these shapes.

    Raises:
        ValueError: the mask is empty, or a masked tensor is missing from the model or has another shape there.
    """
    if not mask.tensors:
        raise ValueError("mask_file must mask at least one tensor, got none")
    for name, tensor in mask.tensors.items():
        if name not in shapes:
            raise ValueError(f"mask_file must match the model: it masks {name}, which the model does not have")
        if list(tensor.shape) != list(shapes[name]):
            raise ValueError(
                f"mask_file must match the model: {name} is {list(shapes[name])} there and {list(tensor.shape)} in the mask"
            )
