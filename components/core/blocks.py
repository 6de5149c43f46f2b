"""Find the layers that are pruned and quantized, by structure: the decoder's blocks and the `nn.Linear` layers inside them."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from components.core.progress import log

NAMED = 5  # matrices that a line names


def find_blocks(parameter: str, model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks: the outermost `nn.ModuleList` in which every entry contains `nn.Linear` layers.

    If there are several (a vision tower beside a decoder), the one with the most weights in linear layers is used.

    Args:
        parameter: name of the setting that names the model, for messages.
        model: a causal language model.

    Returns:
        (its name in the model, the list).

    Raises:
        ValueError: there is no such list.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside_another = any(name.startswith(outer + ".") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside_another and all(linears(block) for block in module):
            found[name] = module
    if not found:
        raise ValueError(
            f"{parameter} must be a decoder with an nn.ModuleList of blocks that hold nn.Linear layers; "
            f"{type(model).__name__} has none"
        )
    name = max(found, key=lambda key: sum(layer.weight.numel() for layer in linears(found[key]).values()))
    return name, found[name]


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """Name within the block → linear layer, in definition order."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def report_dense(model: Any, covered: Iterable[str]) -> dict[str, int]:
    """Say how many weights stay dense: those of all matrices but the covered ones, embeddings and the head.

    Args:
        model: a causal language model.
        covered: names of the weights that are pruned or quantized.

    Returns:
        `dense_weights`, to be recorded, unless there are none.
    """
    skipped = {id(weight) for module in model.modules() if isinstance(module, nn.Embedding) for weight in module.parameters()}
    skipped |= {id(model.get_output_embeddings().weight), *(id(model.get_parameter(name)) for name in covered)}
    named = model.named_parameters()
    dense = {name: weight.numel() for name, weight in named if weight.ndim >= 2 and id(weight) not in skipped}
    if not dense:
        return {}
    some = ", ".join(list(dense)[:NAMED]) + (f" and {len(dense) - NAMED} more" if len(dense) > NAMED else "")
    log(f"{sum(dense.values())} weights stay dense: {some}")
    return {"dense_weights": sum(dense.values())}


def check_blocks(parameter: str, name: str, blocks: nn.ModuleList, group: int = 1) -> None:
    """Check that all weight matrices are in linear layers, and that their rows divide evenly into groups.

    Args:
        parameter: name of the setting that names the model, for messages.
        name: the list's name in the model, for messages.
        blocks: the decoder blocks.
        group: M of an N:M pattern.

    Raises:
        ValueError: a block has a weight matrix outside `nn.Linear` (fused experts, Conv1D), which would silently stay dense,
            or one that another block has too, a layer has no weights, or its input width is not a multiple of `group`.
    """
    owners: dict[int, int] = {}
    for index, block in enumerate(blocks):
        weights = {id(layer.weight) for layer in linears(block).values()}
        for weight_name, weight in block.named_parameters():
            if weight.ndim >= 2 and id(weight) not in weights:
                raise ValueError(
                    f"{parameter} must keep the matrices of its blocks in nn.Linear layers; "
                    f"{name}.{index}.{weight_name} {list(weight.shape)} is none"
                )
        for layer_name, layer in linears(block).items():
            if (owner := owners.setdefault(id(layer.weight), index)) != index:
                raise ValueError(
                    f"{parameter} must have blocks with weights of their own; "
                    f"{name}.{index} shares {layer_name} with {name}.{owner}"
                )
            if not layer.weight.numel():
                raise ValueError(f"{parameter} must have weights in all its matrices; {name}.{index}.{layer_name} has none")
            if layer.in_features % group:
                raise ValueError(
                    f"pattern needs rows that are multiples of {group}; {name}.{index}.{layer_name} has {layer.in_features}"
                )
