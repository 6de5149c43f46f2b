"""The FSDP2 backend."""

from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from components.core.blocks import find_blocks
from components.core.device import device_memory
from components.distill.backends import SingleProcess
from components.distill.config import DistillConfig

GRADIENTS_FIT = 8  # times the size of a model's whole gradients: on a device with so much memory, they are held


class Fsdp(SingleProcess):
    """FSDP2: each block's weights, gradients and moments are sharded over all processes, and so is a teacher.

    What does not train of a student, and what lies outside a teacher's blocks (embeddings, norms, head), is replicated: it
    needs no gradients, and the loss uses the heads outside any forward pass.
    """

    def __init__(self, config: DistillConfig, device: torch.device, compute_dtype: torch.dtype) -> None:
        super().__init__(config, device, compute_dtype)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def shard(self, model: Any, trained: Collection[str]) -> None:
        """Shard block by block, so that blocks are gathered one at a time."""
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        reduced = self.compute_dtype if self.compute_dtype is not torch.float32 else None
        # inputs are left to autocast, so that hidden states keep the dtype they have in a single process
        policy = MixedPrecisionPolicy(param_dtype=reduced, reduce_dtype=torch.float32, cast_forward_inputs=False)
        name, blocks = find_blocks("student_model" if trained else "teacher_model", model)
        sharded = trained or {f"{name}.{inner}" for inner, _ in blocks.named_parameters()}
        for outside in sorted(weight for weight in sharded if not weight.startswith(f"{name}.")):
            raise ValueError(f"mask_file must mask weights in {name} alone for backend fsdp, got {outside}")
        replicated = {parameter for name, parameter in model.named_parameters() if name not in sharded}
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=replicated)
        # a root without weights of its own lets the blocks share streams and prefetch each other
        fully_shard(model.base_model, mesh=mesh, mp_policy=policy, ignored_params=replicated)

    def engage(self, student: Any) -> None:
        """Decide how often gradients are added up over the processes."""
        memory = device_memory(self.device)
        whole = sum(parameter.numel() * torch.float32.itemsize for parameter in self.parameters.values())
        fits = memory is not None and GRADIENTS_FIT * whole <= memory.usable
        wanted = self.config.sync_each_batch
        self.syncs_once = wanted == "never" or (wanted == "auto" and not self.any(not fits))

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Accumulate a gradient, here alone or over all processes."""
        if self.syncs_once:
            self.student.base_model.set_requires_gradient_sync(is_last)
        super().backward(loss, is_last)

    def place(self, full: Tensor, parameter: Tensor) -> Tensor:
        """The local shard, split in the same way as the parameter."""
        assert isinstance(parameter, DTensor)
        shards = distribute_tensor(full.to(self.device), parameter.device_mesh, parameter.placements)
        return shards.to_local()

    def gather(self, part: Tensor, parameter: Tensor) -> Tensor:
        """Gather the shards of a whole tensor."""
        assert isinstance(parameter, DTensor)
        mesh, placements = parameter.device_mesh, parameter.placements
        sharded = DTensor.from_local(part, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())
        whole: Tensor = sharded.full_tensor()
        return whole

    def full(self, name: str) -> Tensor:
        """Gather a whole trained weight."""
        parameter = self.parameters[name]
        assert isinstance(parameter, DTensor)
        gathered: Tensor = parameter.full_tensor()
        return gathered.detach().cpu()
