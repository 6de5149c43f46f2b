"""Find what is pruned, by structure: the decoder's blocks and the weight matrices inside them.

A matrix is that of an `nn.Linear`, which is stored as [out, in]; that of a `Conv1D` (GPT-2), stored as [in, out]; or that of an
expert of a mixture: transformers keeps those of all experts in one parameter, [experts, out, in] or [experts, in, out].
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from components.core.progress import log

NAMED = 5  # matrices that a line names


@dataclass(frozen=True)
class Matrix:
    """A weight matrix, in the parameter that holds it.

    Attributes:
        parameter: the parameter's name.
        layer: the name of the module that multiplies by it; of experts, the parameter's.
        expert: the part of the parameter that it is; None = all.
        transposed: whether it is stored as [in, out].
    """

    parameter: str
    layer: str
    expert: int | None = None
    transposed: bool = False

    def of(self, whole: Tensor) -> Tensor:
        """The view [out, in] of a tensor that has the parameter's shape."""
        part = whole if self.expert is None else whole[self.expert]
        return part.T if self.transposed else part


def matrices(module: nn.Module) -> dict[str, Matrix]:
    """Name within the module → weight matrix, in definition order. The names of experts have their numbers in them."""
    found: dict[str, Matrix] = {}
    for name, part in module.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(part, nn.Linear | Conv1D):
            found[name] = Matrix(f"{prefix}weight", name, transposed=isinstance(part, Conv1D))
        for kind, stacked in stacks(part).items():
            for expert in range(len(stacked)):
                where = f"{prefix}{kind}"
                found[f"{prefix}{expert}.{kind}"] = Matrix(where, where, expert, bool(part.is_transposed))
    return found


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Name → weight matrix, a view [out, in] that can be written to."""
    return {name: matrix.of(module.get_parameter(matrix.parameter).data) for name, matrix in matrices(module).items()}


def stacks(module: nn.Module) -> dict[str, Tensor]:
    """Name → parameter of a module that has a matrix for each expert of a mixture; transformers tells how they are stored."""
    if not isinstance(getattr(module, "is_transposed", None), bool):
        return {}
    return {name: weight for name, weight in module.named_parameters(recurse=False) if weight.ndim == 3}


def stack_names(block: nn.Module) -> set[str]:
    """Names of the parameters that have a matrix for each expert."""
    return {matrix.parameter for matrix in matrices(block).values() if matrix.expert is not None}


def layer_names(block: nn.Module) -> list[str]:
    """Names of all weights of two dimensions or more in a block, without `.weight`."""
    return [name.removesuffix(".weight") for name, weight in block.named_parameters() if weight.ndim >= 2]


def is_named(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches one of some patterns, in which * stands for anything."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def find_blocks(parameter: str, model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks: the outermost `nn.ModuleList` in which every entry contains weight matrices.

    If there are several (a vision tower beside a decoder), the one with the most weights in matrices is used.

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
        if isinstance(module, nn.ModuleList) and not inside_another and all(matrices(block) for block in module):
            found[name] = module
    if not found:
        raise ValueError(
            f"{parameter} must be a decoder with an nn.ModuleList of blocks that hold weight matrices; "
            f"{type(model).__name__} has none"
        )
    name = max(found, key=lambda key: sum(map(_size, found[key])))
    return name, found[name]


def _size(block: nn.Module) -> int:
    """Number of weights in a block's matrices."""
    return sum(block.get_parameter(name).numel() for name in {matrix.parameter for matrix in matrices(block).values()})


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


def check_blocks(parameter: str, name: str, blocks: nn.ModuleList, group: int = 1, ignore: Collection[str] = ()) -> None:
    """Check that the weight matrices of all blocks can be pruned, but for those that are to be ignored.

    Args:
        parameter: name of the setting that names the model, for messages.
        name: the list's name in the model.
        blocks: the decoder blocks.
        group: M of an N:M pattern.
        ignore: patterns of names in the model.

    Raises:
        ValueError: a block has a weight of two dimensions or more that is none of its `matrices` and would silently stay dense,
            or one that another block has too, a matrix has no weights, or its rows are no multiple of `group`.
    """
    owners: dict[int, int] = {}
    for index, block in enumerate(blocks):
        prefix, found = f"{name}.{index}", matrices(block)
        known = {matrix.parameter for matrix in found.values()} | routing(block)
        for weight_name, weight in block.named_parameters():
            layer = f"{prefix}.{weight_name.removesuffix('.weight')}"
            if weight.ndim >= 2 and weight_name not in known and not is_named(layer, ignore):
                raise ValueError(
                    f"{parameter} must keep the matrices of its blocks in nn.Linear, Conv1D or experts of transformers; "
                    f"{prefix}.{weight_name} {list(weight.shape)} is none, and would be left dense if ignore named {layer}"
                )
        for matrix_name, matrix in found.items():
            weight = block.get_parameter(matrix.parameter)
            if (owner := owners.setdefault(id(weight), index)) != index:
                raise ValueError(
                    f"{parameter} must have blocks with weights of their own; {prefix} shares {matrix_name} with {name}.{owner}"
                )
            if not weight.numel():
                raise ValueError(f"{parameter} must have weights in all its matrices; {prefix}.{matrix_name} has none")
            width = matrix.of(weight).shape[1]
            if width % group and not is_named(f"{prefix}.{matrix.layer}", ignore):
                raise ValueError(f"pattern needs rows that are multiples of {group}; {prefix}.{matrix_name} has {width}")


def routing(block: nn.Module) -> set[str]:
    """Names of the small weights of two dimensions that come with the experts of a mixture, and always stay dense.

    One of their dimensions is the number of experts: they choose among these, or are their biases.
    """
    experts = {len(stacked) for module in block.modules() for stacked in stacks(module).values()}
    pruned = {matrix.parameter for matrix in matrices(block).values()}
    small = {name for name, weight in block.named_parameters() if weight.ndim == 2 and experts & set(weight.shape)}
    return small - pruned


def check_quantizable(parameter: str, name: str, blocks: nn.ModuleList) -> bool:
    """Check that the matrices of the blocks can be quantized; returns whether some are those of experts. Arguments as above.

    Raises:
        ValueError: one is neither that of an `nn.Linear` nor of an expert.
    """
    has_experts = False
    for index, block in enumerate(blocks):
        weights = {id(module.weight) for module in block.modules() if isinstance(module, nn.Linear)}
        experts = stack_names(block)
        has_experts = has_experts or bool(experts)
        known = routing(block) | experts
        for weight_name, weight in block.named_parameters():
            if weight.ndim >= 2 and id(weight) not in weights and weight_name not in known:
                raise ValueError(
                    f"{parameter} must keep the matrices of its blocks in nn.Linear or experts of transformers to be "
                    f"quantized; {name}.{index}.{weight_name} {list(weight.shape)} is neither"
                )
    return has_experts
