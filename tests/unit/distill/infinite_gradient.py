"""The distill stage with an infinite gradient in the third step of one process: `… INF_RANK FLAGS`."""

import sys
from typing import Any

import torch
from torch import Tensor

from components.core.cli import main
from components.distill.config import DistillConfig
from components.distill.with_fsdp import Fsdp

rank, seen = int(sys.argv.pop(1)), 0
backward = Fsdp.backward


def spoilt(self: Any, loss: Tensor, is_last: bool) -> None:
    """As `Fsdp.backward`, but for one number in one process."""
    global seen
    backward(self, loss, is_last)
    seen += is_last
    if is_last and seen == 3 and self.rank == rank:
        name = next(iter(self.parameters))
        gradient = self.parameters[name].grad.to_local()
        gradient[(~self.pruned[name]).nonzero(as_tuple=True)] = torch.inf


Fsdp.backward = spoilt  # type: ignore[method-assign]
main(DistillConfig, "components.distill.stage")
