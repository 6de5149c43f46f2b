"""Block reconstruction: train the weights that are kept in a decoder block, so that it gives what the dense block gave.

Guo et al., "EBFT: Effective and Block-Wise Fine-Tuning for Sparse LLMs", 2024. Layer by layer, each linear layer is fitted by
itself. Here all of a block are trained together, by backpropagation through the block, which therefore may undo in one layer
what another has lost. The block's inputs are those of the pruned model, and the outputs to reach are the dense block's, so that
errors of earlier blocks are made good too.

The loss is the relative error of a token's hidden state, the mean over tokens of

    ‖block(x) − y‖² / ‖y‖²,

for y [width] of the dense block. The paper has ‖block(x) − y‖²; but the next block normalises every token by itself, and
without the division the few tokens with massive activations would be all that counts.

Adam with a cosine schedule trains float32 copies of the weights, whatever number format the block has. Its steps are as long as
the learning rate, however large the weights are, so this is given relative to the size of a matrix's weights, as in Adafactor
(Shazeer & Stern 2018): the same value then suits matrices and models whose weights differ in size. Gradients are masked, so
Adam's moments and its steps are zero for removed weights.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from components.core.hidden import token_error
from components.core.processes import average
from components.core.walk.stream import Batch, run_block

TOKENS_PER_STEP = 512  # over all processes; two epochs of these steps led as far as four of steps of 2,048 tokens
MEASURED = 4  # batches, of which one tells whether training has helped
Examples = Callable[[], Iterable[tuple[Batch, Tensor]]]  # for each epoch anew: a batch and what the block should make of it


@torch.enable_grad()
def reconstruct(
    block: nn.Module, examples: Examples, masks: Mapping[str, Tensor], *, epochs: int = 4, learning_rate: float = 0.01
) -> tuple[float, float]:
    """Train the kept weights of a pruned block, in place; processes that share the examples all call this.

    Args:
        block: the block, with its removed weights at zero.
        examples: gives the batches, each with the output [rows, seq_len, width] that the dense block has for it.
        masks: name of a parameter of the block → bool mask of its shape, True = kept; other parameters stay as they are. A
            batch may leave some unused, as one without a token for an expert does.
        epochs: how often to go through the examples.
        learning_rate: of Adam, at the beginning, as a fraction of the root mean square of a parameter's kept weights.

    Returns:
        (loss before, loss after), of one batch in `MEASURED`. If training has not lowered it, the weights are as before, and so
        is the loss.
    """
    weights = [block.get_parameter(name) for name in masks]
    before, steps = _mean_loss(block, examples)
    start = [weight.detach().clone() for weight in weights]
    copies = [weight.to(torch.float32, copy=True).requires_grad_() for weight in start]
    sizes = [
        float(weight.float().square().sum() / mask.sum()) ** 0.5 for weight, mask in zip(start, masks.values(), strict=True)
    ]
    optimizer = torch.optim.Adam(
        [{"params": [copy], "lr": learning_rate * size} for copy, size in zip(copies, sizes, strict=True)]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    trained = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_()
    for _ in range(epochs):
        for batch, wanted in examples():
            gradients = torch.autograd.grad(token_error(run_block(block, batch), wanted), weights, materialize_grads=True)
            for copy, gradient, mask in zip(copies, gradients, masks.values(), strict=True):
                copy.grad = gradient.float() * mask
                average(copy.grad)
            optimizer.step()
            schedule.step()
            _assign(weights, copies)
    for weight, was_trained in zip(weights, trained, strict=True):
        weight.requires_grad_(was_trained)
    after, _ = _mean_loss(block, examples)
    if after < before:
        return before, after
    _assign(weights, start)
    return before, before


@torch.no_grad()
def _mean_loss(block: nn.Module, examples: Examples) -> tuple[float, int]:
    """(Mean loss of one batch in `MEASURED`, number of all batches)."""
    losses, count = [], 0
    for batch, wanted in examples():
        if count % MEASURED == 0:
            losses.append(token_error(run_block(block, batch), wanted))
        count += 1
    loss = torch.stack(losses).mean()
    average(loss)
    return float(loss), count


@torch.no_grad()
def _assign(weights: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Set weights in place."""
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)
