"""Find the layers that are pruned and quantized, by structure: the decoder's blocks and the `nn.Linear` layers inside them."""

from torch import nn


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


def linears_outside(name: str, model: nn.Module, head: str) -> dict[str, nn.Linear]:
    """The linear layers outside the blocks, by name; without the head.

    Args:
        name: name of the list of blocks in the model.
        model: a causal language model.
        head: name of the layer that makes the logits.
    """
    return {
        layer_name: layer
        for layer_name, layer in linears(model).items()
        if layer_name != head and not layer_name.startswith(f"{name}.")
    }


def check_blocks(parameter: str, name: str, blocks: nn.ModuleList, group: int = 1) -> None:
    """Check that all weight matrices are in linear layers, and that their rows divide evenly into groups.

    Args:
        parameter: name of the setting that names the model, for messages.
        name: the list's name in the model, for messages.
        blocks: the decoder blocks.
        group: M of an N:M pattern.

    Raises:
        ValueError: a block has a weight matrix outside `nn.Linear` (fused experts, Conv1D), which would silently stay dense, or
            a layer's input width is not a multiple of `group`.
    """
    for index, block in enumerate(blocks):
        weights = {id(layer.weight) for layer in linears(block).values()}
        for weight_name, weight in block.named_parameters():
            if weight.ndim >= 2 and id(weight) not in weights:
                raise ValueError(
                    f"{parameter} must keep the matrices of its blocks in nn.Linear layers; "
                    f"{name}.{index}.{weight_name} {list(weight.shape)} is none"
                )
        for layer_name, layer in linears(block).items():
            if layer.in_features % group:
                raise ValueError(
                    f"pattern needs rows that are multiples of {group}; {name}.{index}.{layer_name} has {layer.in_features}"
                )
