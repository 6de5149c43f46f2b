"""Where the training runs: one process, or several under FSDP; `with_deepspeed` is the third. Only wrap, step and save differ.

All of them keep the invariant in the same places: gradients of pruned weights are zero before the norm is taken, pruned
weights are zero after every step. FSDP touches local shards only; under DeepSpeed the fp32 master partition is masked,
or its next all-gather would write old values back.
"""

import math
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import load as load_distributed  # type: ignore[attr-defined]
from torch.distributed.checkpoint import save as save_distributed  # type: ignore[attr-defined]
from torch.distributed.tensor import DTensor, distribute_tensor

from components.core.mask.mask import Mask
from components.core.perplexity import decoder_and_head
from components.distill.config import DistillConfig
from components.distill.masking import mask_gradients, mask_weights, train_only_masked
from components.distill.schedule import BETAS, make_schedule

T = TypeVar("T")


def finite(norm: Any) -> float | None:
    """A gradient's norm; None where it is unknown, or infinite in a step that loss scaling skips."""
    return float(norm) if norm is not None and math.isfinite(norm) else None


class SingleProcess:
    """Plain PyTorch, and the steps that the other backends replace.

    Attributes:
        decoder: ids → hidden states, as the loop calls it.
        head: hidden states → logits; never trained.
        parameters: name → parameter that trains, sharded or not.
        pruned: name → local bool tensor, True = pruned, of the local shape.
    """

    rank = 0
    world_size = 1
    checkpoint_form = "torch.distributed.checkpoint"

    def __init__(self, config: DistillConfig, device: torch.device, compute_dtype: torch.dtype) -> None:
        self.config, self.device, self.compute_dtype = config, device, compute_dtype
        # bf16 needs no loss scaling, fp32 no autocast
        self.scaler = torch.amp.GradScaler(device.type, enabled=compute_dtype is torch.float16)

    def autocast(self) -> torch.autocast:
        """The compute format of a forward pass; weights stay float32."""
        return torch.autocast(self.device.type, self.compute_dtype, enabled=self.compute_dtype is not torch.float32)

    def prepare(self, student: Any, mask: Mask, total_steps: int) -> None:
        """Freeze, wrap, and make optimizer and schedule."""
        self.student = student
        self.best: dict[str, Tensor] = {}
        self.decoder, self.head = decoder_and_head(student)
        if self.config.gradient_checkpointing:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.parameters: dict[str, nn.Parameter] = train_only_masked(student, mask)
        self.shard()
        self.pruned = {name: self.place(~mask.tensors[name], parameter) for name, parameter in self.parameters.items()}
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=self.config.learning_rate,
            betas=BETAS,
            weight_decay=self.config.weight_decay,
            fused=True,  # one pass over memory instead of a dozen
        )
        self.schedule = make_schedule(self.optimizer, self.config.warmup_ratio, total_steps)
        self.engage(student)

    def shard(self) -> None:
        """Distribute the model; nothing to do for one process."""

    def engage(self, student: Any) -> None:
        """Hand model and optimizer to an engine; nothing to do without one."""

    def place(self, full: Tensor, parameter: Tensor) -> Tensor:
        """The part of a whole tensor that lies beside this process's part of `parameter`."""
        return full.to(parameter.device)

    def backward(self, loss: Tensor, micro_batches: int) -> None:
        """Add the gradient of one of an optimizer step's micro-batches."""
        self.scaler.scale(loss / micro_batches).backward()

    def step(self) -> float | None:
        """One optimizer step; returns the gradient's norm before clipping, None where it is not known."""
        self.scaler.unscale_(self.optimizer)
        mask_gradients(self.parameters, self.pruned)  # before clipping: the norm is that of what trains
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad()
        mask_weights(self.parameters, self.pruned)
        return finite(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def full_weights(self) -> dict[str, Tensor]:
        """Name → whole trained weight, on every process."""
        return {name: parameter.detach().cpu() for name, parameter in self.parameters.items()}

    def keep_best(self) -> None:
        """Remember the trained weights as they are now; each process its own part."""
        self.best = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def restore_best(self) -> None:
        """Go back to the weights that were remembered."""
        for name, value in self.best.items():
            self.parameters[name].copy_(value)

    def save_state(self, folder: Path) -> None:
        """Write weights, moments and random state; every process must call this."""
        state = training_state(self) | {f"random.{self.rank}": torch.get_rng_state()}
        save_distributed(state, checkpoint_id=folder, no_dist=self.world_size == 1)

    def load_state(self, folder: Path, same_processes: bool, has_best: bool) -> None:
        """Read what `save_state` wrote, also with another number of processes; every process must call this."""
        if has_best:
            self.keep_best()
        state = training_state(self)
        if same_processes:
            state[f"random.{self.rank}"] = torch.get_rng_state()
        load_distributed(state, checkpoint_id=folder, no_dist=self.world_size == 1)  # in place, but for the random state
        if same_processes:
            torch.set_rng_state(state[f"random.{self.rank}"])

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values /= self.world_size
        return values

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        if self.world_size == 1:
            return flag
        return bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def from_first(self, value: T) -> T:
        """The first process's value, on all; of whatever kind can be pickled."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()


class Fsdp(SingleProcess):
    """FSDP2: each block's weights, gradients and moments are sharded over all processes.

    What does not train (embeddings, norms outside the blocks, head) is replicated: it needs no gradient, and the loss reads
    the head outside of any forward pass.
    """

    def __init__(self, config: DistillConfig, device: torch.device, compute_dtype: torch.dtype) -> None:
        super().__init__(config, device, compute_dtype)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def shard(self) -> None:
        """Shard block by block, so that one block at a time is whole."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(self.device.type, (self.world_size,))
        reduced = self.compute_dtype if self.compute_dtype is not torch.float32 else None
        # inputs are left to autocast, so that hidden states keep the format that they have in one process
        policy = MixedPrecisionPolicy(param_dtype=reduced, reduce_dtype=torch.float32, cast_forward_inputs=False)
        frozen = {parameter for parameter in self.student.parameters() if not parameter.requires_grad}
        for block in blocks_of(self.student, self.parameters):
            fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=frozen)
        # a root without weights of its own lets the blocks share streams and prefetch each other
        fully_shard(self.decoder, mesh=mesh, mp_policy=policy, ignored_params=frozen)
        names = set(self.parameters)
        self.parameters = {name: value for name, value in self.student.named_parameters() if name in names}

    def place(self, full: Tensor, parameter: Tensor) -> Tensor:
        """The local shard, cut as the parameter's."""
        assert isinstance(parameter, DTensor)
        shards = distribute_tensor(full.to(self.device), parameter.device_mesh, parameter.placements)
        return shards.to_local()

    def full_weights(self) -> dict[str, Tensor]:
        """Gather whole weights; every process must call this."""
        whole = {}
        for name, parameter in self.parameters.items():
            assert isinstance(parameter, DTensor)
            gathered: Tensor = parameter.full_tensor()
            whole[name] = gathered.detach().cpu()
        return whole


def training_state(backend: SingleProcess) -> dict[str, Tensor]:
    """Trained weights and moments by name, made if the optimizer has not stepped yet, and the best weights.

    Tensors alone: everything else stands in the manifest.
    """
    state: dict[str, Tensor] = {f"best.{name}": value for name, value in backend.best.items()}
    for name, parameter in backend.parameters.items():
        moments = backend.optimizer.state[parameter]
        if not moments:
            moments["step"] = torch.zeros((), device=parameter.device)  # where the fused step wants it
            moments |= {kind: torch.zeros_like(parameter) for kind in ("exp_avg", "exp_avg_sq")}
        state[name] = parameter.detach()
        state |= {f"{name}.{kind}": moments[kind] for kind in ("step", "exp_avg", "exp_avg_sq")}
    return state


def blocks_of(student: nn.Module, trained: dict[str, nn.Parameter]) -> nn.ModuleList:
    """The list of decoder blocks: the outermost `nn.ModuleList` that holds every weight that trains.

    Raises:
        ValueError: there is none.
    """
    for name, module in student.named_modules():
        if isinstance(module, nn.ModuleList) and all(weight.startswith(f"{name}.") for weight in trained):
            return module
    raise ValueError("student_model must have all masked weights in one nn.ModuleList of blocks for backend fsdp")
