"""Calibration: record the arguments that each decoder block is called with, then replay the blocks one by one.

A recording pass runs the embeddings, the first block and whatever the model computes outside its blocks (position embeddings,
attention masks); the other blocks are skipped. It takes about as long as one block and captures the exact keyword arguments of
every block, which differ from block to block in models that, say, mix sliding-window and full attention.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from components.core.blocks import linears
from components.core.errors import readable
from components.core.perplexity import differ


@dataclass
class Batch:
    """One calibration batch on its way through the blocks.

    Attributes:
        hidden: input of the next block, [batch, seq_len, width].
        calls: for each block, its remaining positional arguments and its keyword arguments.
    """

    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]


def batch_size(nsamples: int, seq_len: int, tokens: int = 2048) -> int:
    """The largest divisor of `nsamples` for which a batch has at most `tokens` tokens; at least 1."""
    return max(size for size in range(1, nsamples + 1) if nsamples % size == 0 and (size == 1 or size * seq_len <= tokens))


@torch.no_grad()
def capture(model: Any, blocks: nn.ModuleList, ids: Tensor) -> list[Batch]:
    """Run the recording pass over calibration ids [nsamples, seq_len].

    Raises:
        ValueError: the model does not call each block once, in order, with the hidden states as first argument.
    """
    device = next(model.parameters()).device
    batches: list[Batch] = []
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    seen: list[Any] = []  # first block's input, first block's output
    originals = [block.forward for block in blocks]

    def recorder(index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if index != len(calls) or not args or not isinstance(args[0], Tensor):
                raise ValueError("dense_model must call its blocks once each, in order, with the hidden states first")
            reference = batches[0].calls[index] if batches else (calls[-1] if calls else None)
            calls.append(_share((args[1:], kwargs), reference))
            if index == 0:
                seen[:] = [args[0].clone(), originals[0](*args, **kwargs)]
            return seen[1]

        return forward

    try:
        for index, block in enumerate(blocks):
            block.forward = recorder(index)
        for part in ids.split(batch_size(*ids.shape)):
            calls.clear()
            model.base_model(input_ids=part.to(device), use_cache=False)
            if len(calls) != len(blocks):
                raise ValueError(f"dense_model must call each of its {len(blocks)} blocks, {len(calls)} were called")
            batches.append(Batch(seen[0], list(calls)))
    finally:
        for block in blocks:
            del block.forward  # the instance attribute, so that the class's own method is used again
    return batches


def _share(value: Any, reference: Any) -> Any:
    """`value`, reusing the tensors of `reference` wherever they are equal, so that only one copy is kept."""
    if isinstance(value, Tensor):
        same = isinstance(reference, Tensor) and value.shape == reference.shape and torch.equal(value, reference)
        return reference if same else value
    if isinstance(value, tuple) and isinstance(reference, tuple) and len(value) == len(reference):
        return tuple(_share(*pair) for pair in zip(value, reference, strict=True))
    if isinstance(value, dict) and isinstance(reference, dict):
        return {key: _share(item, reference.get(key)) for key, item in value.items()}
    return value


def run_block(block: nn.Module, batch: Batch, index: int) -> Tensor:
    """Hidden states [batch, seq_len, width] that block `index` outputs for a batch."""
    args, kwargs = batch.calls[index]
    output = block(batch.hidden, *args, **kwargs)
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden


@torch.no_grad()
def check_replay(model: Any, blocks: nn.ModuleList, batch: Batch, ids: Tensor) -> None:
    """Check that replaying the blocks gives what the model itself computes in its last block.

    It does not where blocks pass each other anything besides the hidden states, such as keys and values: their Hessians would
    silently be those of another model.

    Args:
        model: a causal language model.
        blocks: its decoder blocks.
        batch: the first calibration batch.
        ids: the calibration tokens [nsamples, seq_len].

    Raises:
        ValueError: the two differ, or a block cannot be replayed.
    """
    last: list[Any] = []
    handle = blocks[-1].register_forward_hook(lambda *call: last.append(call[-1]))
    try:
        rows = ids[: len(batch.hidden)].to(batch.hidden.device)
        model.base_model(input_ids=rows, use_cache=False)
    finally:
        handle.remove()
    expected = last[0][0] if isinstance(last[0], tuple) else last[0]
    replayed = Batch(batch.hidden, batch.calls)
    rule = "dense_model must have blocks that depend on each other by their hidden states alone"
    with readable(f"{rule}, {type(model).__name__} cannot be pruned"):
        for index, block in enumerate(blocks):
            advance(block, [replayed], index)
    if differ(expected, replayed.hidden):
        raise ValueError(f"{rule}, those of {type(model).__name__} give other results one by one")


@torch.no_grad()
def hessians(block: nn.Module, batches: list[Batch], index: int, what: str) -> dict[str, Tensor]:
    """Hessian of each linear layer's squared output error, H = 2/n · Σ xᵀx over calibration tokens (SparseGPT, eq. 1).

    Layers that receive the same tensor object (q, k, v; gate, up) share one Hessian, which is accumulated only once.

    Returns:
        name within the block → float32 [in_features, in_features].

    Raises:
        ValueError: a layer saw no tokens (an expert that none were routed to), or a Hessian is not finite.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    leader: dict[str, str] = {}  # linear → the linear whose Hessian it shares
    inputs: list[tuple[str, Tensor]] = []  # current forward pass: (leader, its input), kept alive to compare identity

    def hook(name: str) -> Any:
        def accumulate(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            shared = next((other for other, tensor in inputs if tensor is x), None)
            if name not in leader:
                leader[name] = shared or name
            if leader[name] != name:
                if shared != leader[name]:
                    raise ValueError(f"dense_model must give {name} the same input as {leader[name]} in every batch")
                return
            inputs.append((name, x))
            rows = x.reshape(-1, x.shape[-1]).float()  # [tokens, in_features]
            if name not in sums:
                sums[name] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
            sums[name].addmm_(rows.T, rows)
            counts[name] = counts.get(name, 0) + rows.shape[0]

        return accumulate

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in linears(block).items()]
    try:
        for batch in batches:
            inputs.clear()
            run_block(block, batch, index)
    finally:
        for handle in handles:
            handle.remove()
    for name in linears(block):
        if counts.get(leader.get(name, ""), 0) == 0:
            raise ValueError(
                f"nsamples must be large enough for every layer to see a token, {what} {name} saw none; "
                "if more do not help, dense_model never uses it and cannot be pruned"
            )
    for name, total in sums.items():
        total.mul_(2 / counts[name])
        if not torch.isfinite(total).all():
            raise ValueError(f"dtype must hold the activations: the Hessian of {what} {name} is not finite; try bfloat16")
    return {name: sums[leader[name]] for name in linears(block)}


@torch.no_grad()
def advance(block: nn.Module, batches: list[Batch], index: int) -> None:
    """Replace each batch's hidden states with the output of block `index` after pruning."""
    for batch in batches:
        batch.hidden = run_block(block, batch, index)
