"""Error and time of the pruning methods on layers of a real model, without the rest of the stage.

    python tests/benchmarks/layers.py --data valid.txt --cache /tmp/layers.pt

For each method, alone and with what can follow it, prints ‖(W − Ŵ)X‖² / ‖WX‖², the mean over the layers of each block, and the
seconds for a block: those on the clock, and those that all threads have computed, which other programs on the machine disturb
less (with OMP_NUM_THREADS=1, as otherwise threads that wait count too). The inputs are those of the dense model. They are
computed once and kept in the file `cache`.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from components.core.checkpoint.loading import load_tokenizer
from components.core.checks import parse_pattern
from components.core.cli import parse
from components.core.models import SMOLLM2, local_folder
from components.core.tokens import build_blocks
from components.core.walk.walk import Walk
from components.prune.alps import alps
from components.prune.calibration import hessians, observe
from components.prune.conditioning import Factor, inverse_factor
from components.prune.config import PruneConfig
from components.prune.layers import relative_error
from components.prune.magnitude import magnitude
from components.prune.refit import refit
from components.prune.sparsegpt import sparsegpt
from components.prune.swaps import swap
from components.prune.wanda import wanda

Pruned = tuple[Tensor, Tensor]  # weights and mask [out, in]
Step = Callable[[Pruned, Tensor, Tensor], Pruned]  # of what is pruned, the Hessian and the target


@dataclass(frozen=True, kw_only=True)
class LayersConfig:
    """Settings of the benchmark."""

    data: str
    """Corpus for calibration."""
    cache: str
    """File for the layers and their Hessians; computed if it is not there."""
    model: str = SMOLLM2
    """The model whose layers are pruned."""
    blocks: list[int] = field(default_factory=lambda: [0, 15, 29])
    """Which of its blocks."""
    nsamples: int = 32
    """Calibration blocks."""
    seq_len: int = 512
    """Tokens in each."""
    sparsity: float = 0.7
    """Fraction of weights to remove."""
    pattern: str = "unstructured"
    """`unstructured` or N:M."""


@dataclass(frozen=True)
class Group:
    """Layers that have the same inputs: the number of their block, their weights [out, in] and their Hessian."""

    block: int
    weights: list[Tensor]
    hessian: Tensor


def compute_groups(config: LayersConfig) -> Iterator[Group]:
    """The layers of some blocks, with the Hessians of the dense model's inputs."""
    folder = local_folder(config.model)
    tokenizer = load_tokenizer(folder)
    ids = build_blocks("data", config.data, "calibration", tokenizer, "auto", config.seq_len, config.nsamples, 0).ids
    walk = Walk("model", folder, torch.float32, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as place:
        with walk.outside():
            text = walk.record(ids, Path(place), "calibration", True)
        for index in range(max(config.blocks) + 1):
            with walk.block(index) as block:
                if index in config.blocks:
                    for group in hessians(block, observe(block, text.batches(index, walk.device)), f"block {index}"):
                        assert group.hessian is not None  # there is one process
                        weights = [block.get_parameter(f"{name}.weight").data.clone() for name in group.names]
                        yield Group(index, weights, group.hessian)
                walk.advance(text, index)


def load_groups(config: LayersConfig) -> list[Group]:
    """The layers, from the cache if it is there."""
    cache = Path(config.cache)
    if not cache.is_file():
        torch.save([(group.block, group.weights, group.hessian) for group in compute_groups(config)], cache)
    groups = [Group(*parts) for parts in torch.load(cache, weights_only=True)]
    if missing := set(config.blocks) - {group.block for group in groups}:
        raise SystemExit(f"cache must have all blocks, {cache} lacks {sorted(missing)}: remove it, to compute it again")
    return [group for group in groups if group.block in config.blocks]


def refitted(pruned: Pruned, hessian: Tensor, target: Tensor, iterations: int) -> Pruned:
    """A refit as a step."""
    return refit(*pruned, hessian, target, iterations=iterations), pruned[1]


def factor(hessian: Tensor) -> Factor:
    """The factorized Hessian, with the default damping."""
    return inverse_factor(hessian, PruneConfig.damping, "layer")


def measure(name: str, groups: list[Group], prune: Callable[[list[Tensor], Tensor], list[Pruned]], steps: list[Step]) -> None:
    """Prune all layers, take the steps, and print a row of the table."""
    blocks = {group.block for group in groups}
    errors: dict[int, list[float]] = {block: [] for block in blocks}
    clock, computed = time.perf_counter(), time.process_time()
    results = []
    for group in groups:
        for weight, found in zip(group.weights, prune(group.weights, group.hessian), strict=True):
            target = weight @ group.hessian
            for step in steps:
                found = step(found, group.hessian, target)
            results.append((group, weight, found[0]))
    clock, computed = time.perf_counter() - clock, time.process_time() - computed
    for group, weight, found in results:
        errors[group.block].append(relative_error(weight, found, group.hessian))
    means = " ".join(f"{sum(found) / len(found):9.5f}" for _, found in sorted(errors.items()))
    print(f"{name:32} {means} {clock / len(blocks):8.2f} {computed / len(blocks):8.2f}", flush=True)


def main() -> None:
    """Measure all methods and print a table."""
    config = parse(LayersConfig)
    n_of_m, groups = parse_pattern(config.pattern), load_groups(config)

    def even(weights: list[Tensor]) -> list[float]:
        return [config.sparsity] * len(weights)

    methods: dict[str, Callable[[list[Tensor], Tensor], list[Pruned]]] = {
        "magnitude": lambda weights, _: magnitude(weights, even(weights), n_of_m),
        "wanda": lambda weights, hessian: wanda(weights, hessian, even(weights), n_of_m),
        "sparsegpt": lambda weights, hessian: sparsegpt(weights, factor(hessian), even(weights), n_of_m),
        "alps, 15 iterations": lambda weights, hessian: alps(weights, factor(hessian), even(weights), n_of_m, iterations=15),
        "alps": lambda weights, hessian: alps(weights, factor(hessian), even(weights), n_of_m),
    }
    refits: dict[str, list[Step]] = {f" + refit {count}": [partial(refitted, iterations=count)] for count in (10, 20, 40)}
    exchanges: list[Step] = [*refits[" + refit 10"], lambda found, *more: swap(*found, *more, n_of_m), *refits[" + refit 10"]]
    print(f"{'':32} {' '.join(f'block {block:>3}' for block in sorted({group.block for group in groups}))}  seconds computed")
    for name, prune in methods.items():
        for step, steps in {"": [], **refits, " + refit + swaps + refit": exchanges}.items():
            measure(name + step, groups, prune, steps)


if __name__ == "__main__":
    main()
