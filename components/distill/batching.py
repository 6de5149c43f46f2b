"""How many training blocks go through the models at a time: a matter of speed and memory, not of a step's arithmetic."""

import contextlib
import math
from collections.abc import Iterator

import torch

from components.core.device import device_memory
from components.core.progress import log
from components.distill.backends import SingleProcess
from components.distill.config import DistillConfig

SHARE = 0.9  # of the device's memory that may be used: the allocator loses some to pieces that it cannot join


class BatchSize:
    """Training blocks per forward pass: as set, or as many of a step's as fit on the device.

    The first step takes one block at a time. As long as what a step has taken shows that twice as many fit, the next one takes
    twice as many. So nothing runs out of memory by trial: it would leave other processes waiting for the one that did, and on
    a CPU the system ends a process that takes too much. There, one block is taken at a time.

    Attributes:
        size: blocks per forward pass of the next step.

    Args:
        config: the stage's settings.
        backend: what trains.
        size: blocks per forward pass that fitted before an interruption, if they are not set.
    """

    def __init__(self, config: DistillConfig, backend: SingleProcess, size: int = 1) -> None:
        self.backend, self.all = backend, config.step_blocks()
        self.may_grow = not config.batch_size and device_memory(backend.device) is not None
        self.size = math.gcd(size, self.all) if self.may_grow else max(1, config.batch_size)

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Measure what an optimizer step takes, and decide on the size for the next; every process must call this."""
        before = device_memory(self.backend.device) if self.may_grow else None
        if before is None:
            yield
            return
        torch.accelerator.reset_peak_memory_stats(self.backend.device)
        yield
        twice = 2 * self.size
        self.may_grow = self.all % twice == 0
        if not self.may_grow:
            return
        after = device_memory(self.backend.device)
        assert after
        needed = after.used + 2 * (after.peak - before.used)
        if self.backend.any(needed > SHARE * after.usable):
            self.may_grow = False
            sizes = f"about {needed / 1e9:.1f} GB, and there are {after.usable / 1e9:.1f}"
            log(f"training blocks per forward pass: {self.size} of a step's {self.all}, since {twice} would take {sizes}")
            return
        self.size = twice
        if twice == self.all or self.all % (2 * twice):
            log(f"training blocks per forward pass: {twice} of a step's {self.all}")
