"""Try allocations of sparsity on some of the calibration text, and take the one that changes the model's predictions least.

In one walk the dense model and all candidates are run side by side. SparseGPT, without refit, prunes each block once for each
candidate, with Hessians of the dense model's inputs, which are the same for all: a quarter of the calibration text goes through
the dense blocks for them. Another quarter goes through the dense blocks and through those of each candidate, and in the end
KL(dense ‖ pruned) of the predictions of its tokens is compared.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from components.core.blocks import linears
from components.core.files import check_room
from components.core.perplexity import token_divergences
from components.core.processes import from_all, is_main, rank, spread, together
from components.core.progress import log, track
from components.core.walk.stream import Stream
from components.core.walk.walk import Walk
from components.core.walk.work import SharedWork
from components.prune.allocation import OUTLIER, Layer, Plan, budgeted, first_plans, second_plans
from components.prune.blocks import share
from components.prune.calibration import Group, hessians, kind_of, observe
from components.prune.conditioning import input_scales, inverse_factor
from components.prune.config import QUARTERS, UNIFORM, PruneConfig
from components.prune.sparsegpt import sparsegpt

Sparsities = Mapping[str, float]  # name of a layer's weight → share of zeros


@dataclass(frozen=True)
class Verdict:
    """What is known after a walk.

    Attributes:
        divergences: candidate → mean KL(dense ‖ pruned) of the predictions after each token, in nats.
        outliers: of each block, the share of Wanda scores above `OUTLIER` times their mean.
    """

    divergences: dict[str, float]
    outliers: list[float]


@dataclass(frozen=True)
class Texts:
    """What goes through the blocks in this process: its share of the rows.

    Attributes:
        inputs: for the Hessians, through the dense blocks.
        dense: text to compare by, through the dense blocks.
        pruned: the same, through the blocks of each candidate.
    """

    inputs: Stream
    dense: Stream
    pruned: dict[str, Stream]

    def streams(self) -> list[Stream]:
        """All of them."""
        return [self.inputs, self.dense, *self.pruned.values()]


def layers_of(walk: Walk) -> dict[str, Layer]:
    """The linear layers of a model's blocks, by the names of their weights."""
    return {
        f"{walk.name}.{index}.{name}.weight": Layer(index, kind_of(name), layer.weight.numel())
        for index, block in enumerate(walk.blocks)
        for name, layer in linears(block).items()
    }


@dataclass(frozen=True)
class Allocation:
    """What is chosen.

    Attributes:
        name: of the candidate.
        sparsities: the share of zeros of each layer.
        divergences: see `Verdict`; empty if nothing was tried.
    """

    name: str
    sparsities: Sparsities
    divergences: dict[str, float]

    def as_json(self) -> list[dict[str, Any]]:
        """An entry for each candidate, in the order in which they were tried."""
        return [
            {"name": name, "divergence": divergence, "chosen": name == self.name}
            for name, divergence in self.divergences.items()
        ]


def allocate(walk: Walk, place: Path, calibration: Tensor, config: PruneConfig) -> Allocation:
    """Choose the sparsity of each layer. Every process calls this.

    Args:
        walk: the dense model.
        place: for work.
        calibration: ids [nsamples, seq_len].
        config: the stage's settings.

    Raises:
        ValueError: the model cannot be pruned.
    """
    layers = layers_of(walk)
    if config.allocation == UNIFORM:
        return Allocation(UNIFORM, dict.fromkeys(layers, config.sparsity), {})
    tried = planned(first_plans(config.allocation, layers), layers, config)
    verdict = try_out(walk, place / "allocation-1", calibration, tried, config)
    divergences = verdict.divergences
    if plans := second_plans(config.allocation, layers, divergences, verdict.outliers):
        more = planned(plans, layers, config)
        divergences = divergences | try_out(walk, place / "allocation-2", calibration, more, config).divergences
        tried |= more
    best = min(divergences, key=lambda name: divergences[name])  # the first of equal ones, and uniform comes first
    told = ", ".join(f"{name} {divergence:.4f}" for name, divergence in divergences.items())
    log(f"allocation: KL from the dense model on a part of the calibration text: {told}")
    log(f"allocation: {best} is taken" + (", no other is closer to the dense model" if best == UNIFORM else ""))
    return Allocation(best, tried[best], divergences)


def planned(plans: Mapping[str, Plan], layers: Mapping[str, Layer], config: PruneConfig) -> dict[str, Sparsities]:
    """The sparsities of each plan. In the uniform one, each layer has exactly its own share, as where nothing is tried."""
    even = dict.fromkeys(layers, config.sparsity)
    return {name: budgeted(plan, layers, config.sparsity) if name != UNIFORM else even for name, plan in plans.items()}


def try_out(
    walk: Walk, folder: Path, calibration: Tensor, candidates: Mapping[str, Sparsities], config: PruneConfig
) -> Verdict:
    """Compare candidates in one walk; goes on after the blocks that are finished. Every process calls this.

    Args:
        walk: the dense model.
        folder: for work; what it takes most of is removed at the end.
        calibration: ids [nsamples, seq_len].
        candidates: name → the sparsity of each layer.
        config: the stage's settings.

    Raises:
        ValueError: the model cannot be pruned.
    """
    work = SharedWork(folder, "allocation")
    done, count = len(work.results), len(walk.blocks)
    if done < count:
        with together():
            texts = begin(walk, folder, calibration, candidates, config, fresh=done == 0)
        for index in track(range(done, count), "trying allocations", count - done):
            with walk.block(index) as block:
                outliers = try_block(walk, block, index, texts, candidates, config)
            last = index + 1 == count
            divergences = compare(walk, texts) if last else {}
            states = [] if last else [stream.before(index + 1) for stream in texts.streams()]
            work.commit({"outliers": outliers, "divergences": divergences}, activations=states)
        for stream in texts.streams():
            for states_of in stream.files:
                states_of.file.unlink()
    return Verdict(work.results[-1]["divergences"], [result["outliers"] for result in work.results])


def begin(
    walk: Walk, folder: Path, calibration: Tensor, candidates: Mapping[str, Sparsities], config: PruneConfig, fresh: bool
) -> Texts:
    """Check the model and the disk, unless an earlier process has; returns this process's texts."""
    inputs, compared, *_ = calibration.tensor_split(QUARTERS)
    if fresh:
        if is_main():
            texts = [inputs, compared, *[compared] * len(candidates)]
            check_room("output_dir", config.output_dir, walk.disk(texts), ", with the hidden states on their way")
        walk.check()
    with walk.outside():
        dense = walk.record(share(compared), folder, f"dense-{rank()}", fresh)
        pruned = {
            name: walk.twin(dense, folder, f"candidate-{number}-{rank()}", fresh) for number, name in enumerate(candidates)
        }
        return Texts(walk.record(share(inputs), folder, f"inputs-{rank()}", fresh), dense, pruned)


@torch.no_grad()
def try_block(
    walk: Walk, block: nn.Module, index: int, texts: Texts, candidates: Mapping[str, Sparsities], config: PruneConfig
) -> float:
    """Let the texts go through a block, pruned for each candidate in turn; returns its share of outliers."""
    prefix = f"{walk.name}.{index}"
    with together():
        observed = observe(block, texts.inputs.batches(index, walk.device))
    groups = hessians(block, observed, prefix)
    outliers = outlier_share(block, groups)
    with together():
        for text in (texts.inputs, texts.dense):
            walk.advance(text, index)
        dense = {name: layer.weight.detach().clone() for name, layer in linears(block).items()}
        factors = [
            (group.names, inverse_factor(group.hessian, config.damping, f"{prefix}.{group.names[0]}", normalise=True))
            for group in groups
            if group.hessian is not None
        ]
    for candidate, sparsities in candidates.items():
        with together():
            for names, factor in factors:
                wanted = [sparsities[f"{prefix}.{name}.weight"] for name in names]
                found = sparsegpt([dense[name] for name in names], factor, wanted, block_size=config.block_size)
                for name, (weight, _) in zip(names, found, strict=True):
                    block.get_parameter(f"{name}.weight").copy_(weight)
        for group in groups:
            for name in group.names:
                spread(block.get_parameter(f"{name}.weight").data, group.process)
        with together():
            walk.advance(texts.pruned[candidate], index)
    return outliers


@torch.no_grad()
def outlier_share(block: nn.Module, groups: list[Group]) -> float:
    """The share of a block's Wanda scores |W| · ‖X‖₂ that are above `OUTLIER` times their mean; all processes call this."""

    def scores() -> Iterator[Tensor]:
        for group in groups:
            if group.hessian is not None:
                scales = input_scales(group.hessian)[0]
                for name in group.names:
                    yield block.get_parameter(f"{name}.weight").float().abs() * scales  # [out, in]

    sums = [each for found in from_all([(float(part.sum()), part.numel()) for part in scores()]) for each in found]
    count: int = sum(numel for _, numel in sums)
    limit = OUTLIER * sum(total for total, _ in sums) / count
    return sum(from_all(sum(int((part > limit).sum()) for part in scores()))) / count


@torch.no_grad()
def compare(walk: Walk, texts: Texts) -> dict[str, float]:
    """See `Verdict.divergences`; all processes call this.

    Raises:
        ValueError: one is not finite.
    """
    sums = {}
    with together(), walk.outside():
        head = walk.model.get_output_embeddings()
        for name, text in texts.pruned.items():
            pairs = zip(walk.outputs(text), walk.outputs(texts.dense), strict=True)
            sums[name] = sum(float(token_divergences(hidden, wanted, head).sum()) for (_, hidden), (_, wanted) in pairs)
    everywhere = from_all((sums, texts.dense.ids.numel()))
    tokens = sum(count for _, count in everywhere)
    means = {name: sum(found[name] for found, _ in everywhere) / tokens for name in sums}
    with together():
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise ValueError(f"dtype must hold the activations: the KL of allocation {name} is {mean}; try bfloat16")
    return means
