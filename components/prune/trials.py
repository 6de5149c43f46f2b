"""Try allocations of sparsity on some of the calibration text, and take the one that changes the model's predictions least.

In one walk, two quarters of the text go through the dense model and, side by side, through those of all candidates. SparseGPT
without refit prunes each block once for each candidate, with Hessians of the first quarter's inputs in the candidate's own
blocks. In the end KL(dense ‖ pruned) of the predictions of the second quarter's tokens is compared.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from components.core.blocks import weights_of
from components.core.files import check_room
from components.core.head import Head
from components.core.perplexity import token_divergences
from components.core.processes import from_all, is_main, rank, together
from components.core.progress import log, track
from components.core.walk.stream import Stream
from components.core.walk.walk import Walk
from components.core.walk.work import SharedWork
from components.prune.allocation import OUTLIER, Layer, Plan, budgeted, first_plans, second_plans
from components.prune.blocks import Layers, chosen, made_fast, prune_groups, share
from components.prune.calibration import Group, hessians, observe
from components.prune.conditioning import input_scales
from components.prune.config import QUARTERS, UNIFORM, PruneConfig

Sparsities = Mapping[str, float]  # name of a parameter → share of zeros
DENSE = "dense"  # beside the candidates
USING_OUTLIERS = ("owl", "search")  # allocations


@dataclass(frozen=True)
class Verdict:
    """What is known after a walk.

    Attributes:
        divergences: candidate → mean KL(dense ‖ pruned) of the predictions after each token, in nats.
        outliers: of each block, the share of Wanda scores above `OUTLIER` times their mean; 0 if they are not counted.
    """

    divergences: dict[str, float]
    outliers: list[float]


@dataclass(frozen=True)
class Texts:
    """What goes through the blocks of one model in this process: its share of the rows.

    Attributes:
        inputs: for the Hessians.
        compared: for the comparison.
    """

    inputs: Stream
    compared: Stream


def layers_of(walk: Walk, config: PruneConfig) -> dict[str, Layer]:
    """The layers of a model's blocks that are pruned, by the names of their weights; experts of a mixture are one layer."""
    return {
        f"{prefix}.{matrix.parameter}": Layer(
            index, matrix.parameter.partition(".")[0], block.get_parameter(matrix.parameter).numel()
        )
        for index, block in enumerate(walk.blocks)
        for prefix in [f"{walk.name}.{index}"]
        for matrix in chosen(block, prefix, config).values()
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
    layers, kind = layers_of(walk, config), config.allocation
    if kind == UNIFORM:
        return Allocation(UNIFORM, dict.fromkeys(layers, config.sparsity), {})
    tried = planned(first_plans(kind, layers), layers, config)
    verdict = try_out(walk, place / "allocation-1", calibration, tried, config, outliers=kind in USING_OUTLIERS)
    divergences = verdict.divergences
    if plans := second_plans(kind, layers, divergences, verdict.outliers):
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
    walk: Walk,
    folder: Path,
    calibration: Tensor,
    candidates: Mapping[str, Sparsities],
    config: PruneConfig,
    *,
    outliers: bool = False,
) -> Verdict:
    """Compare candidates in one walk; goes on after the blocks that are finished. Every process calls this.

    Args:
        walk: the dense model.
        folder: for work; what it takes most of is removed at the end.
        calibration: ids [nsamples, seq_len].
        candidates: name → the sparsity of each layer.
        config: the stage's settings.
        outliers: whether to count outliers, which takes the Hessians of the dense model's inputs.

    Raises:
        ValueError: the model cannot be pruned.
    """
    work = SharedWork(folder, "allocation")
    done, count = len(work.results), len(walk.blocks)
    plain = replace(config, effort="fast", method="sparsegpt", refit=0, swaps=0)
    if done < count:
        with together():
            texts = begin(walk, folder, calibration, candidates, config, fresh=done == 0)
        streams = [stream for text in texts.values() for stream in (text.inputs, text.compared)]
        for index in track(range(done, count), "trying allocations", count - done):
            with walk.block(index) as block:
                found = try_block(walk, block, index, texts, candidates, plain, outliers)
            last = index + 1 == count
            divergences = compare(walk, texts) if last else {}
            states = [] if last else [stream.before(index + 1) for stream in streams]
            work.commit({"outliers": found, "divergences": divergences}, activations=states)
        for stream in streams:
            for states_of in stream.files:
                states_of.file.unlink()
    return Verdict(work.results[-1]["divergences"], [result["outliers"] for result in work.results])


def begin(
    walk: Walk, folder: Path, calibration: Tensor, candidates: Mapping[str, Sparsities], config: PruneConfig, fresh: bool
) -> dict[str, Texts]:
    """Check the model and the disk, unless an earlier process has; returns this process's texts, see `Texts`."""
    first, second, *_ = calibration.tensor_split(QUARTERS)
    if fresh:
        if is_main():
            room = walk.disk([first, second] * (1 + len(candidates)))
            check_room("output_dir", config.output_dir, room, ", with the hidden states on their way")
        walk.check()
    with walk.outside():
        inputs = made_fast(walk.record(share(first), folder, f"inputs-{rank()}", fresh), walk, config)
        compared = walk.record(share(second), folder, f"compared-{rank()}", fresh)
        dense = Texts(inputs, replace(compared, autocast=inputs.autocast))
        texts = {DENSE: dense}
        for number, name in enumerate(candidates):
            streams = {"inputs": dense.inputs, "compared": dense.compared}
            twins = {kind: walk.twin(stream, folder, f"{kind}-{number}-{rank()}", fresh) for kind, stream in streams.items()}
            texts[name] = Texts(**twins)
    return texts


@torch.no_grad()
def try_block(
    walk: Walk,
    block: nn.Module,
    index: int,
    texts: Mapping[str, Texts],
    candidates: Mapping[str, Sparsities],
    config: PruneConfig,
    outliers: bool,
) -> float:
    """Let the texts go through a block, dense and then pruned for each candidate; returns its share of outliers."""
    prefix = f"{walk.name}.{index}"
    with together():
        dense = {name: weight.clone() for name, weight in weights_of(block).items()}
        pruned = chosen(block, prefix, config)

    def groups_of(text: Texts) -> list[Group]:
        with together():
            observed = observe(block, text.inputs.batches(index, walk.device), pruned)
        return hessians(block, observed, prefix)

    found = 0.0
    for name, text in texts.items():
        if name != DENSE:
            with together():
                for layer, weight in weights_of(block).items():
                    weight.copy_(dense[layer])
            prune_groups(block, groups_of(text), candidates[name], Layers(), prefix, config)
        elif outliers:
            found = outlier_share(block, groups_of(text))
        with together():
            walk.advance(text.inputs, index)
            walk.advance(text.compared, index)
    return found


@torch.no_grad()
def outlier_share(block: nn.Module, groups: list[Group]) -> float:
    """The share of a block's Wanda scores |W| · ‖X‖₂ that are above `OUTLIER` times their mean; all processes call this."""
    weights = weights_of(block)

    def scores() -> Iterator[Tensor]:
        for group in groups:
            if group.hessian is not None:
                scales = input_scales(group.hessian)[0]
                for name in group.names:
                    yield weights[name].float().abs() * scales  # [out, in]

    sums = [each for found in from_all([(float(part.sum()), part.numel()) for part in scores()]) for each in found]
    count: int = sum(numel for _, numel in sums)
    limit = OUTLIER * sum(total for total, _ in sums) / count
    return sum(from_all(sum(int((part > limit).sum()) for part in scores()))) / count


@torch.no_grad()
def compare(walk: Walk, texts: Mapping[str, Texts]) -> dict[str, float]:
    """See `Verdict.divergences`; all processes call this.

    Raises:
        ValueError: one is not finite.
    """
    sums = {}
    with together(), walk.outside():
        head = Head(walk.model)
        for name, text in texts.items():
            if name != DENSE:
                pairs = zip(walk.outputs(text.compared), walk.outputs(texts[DENSE].compared), strict=True)
                sums[name] = sum(float(token_divergences(found, wanted, head).sum()) for (_, found), (_, wanted) in pairs)
    everywhere = from_all((sums, texts[DENSE].compared.ids.numel()))
    tokens = sum(count for _, count in everywhere)
    means = {name: sum(found[name] for found, _ in everywhere) / tokens for name in sums}
    with together():
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise ValueError(f"dtype must hold the activations: the KL of allocation {name} is {mean}; try bfloat16")
    return means
