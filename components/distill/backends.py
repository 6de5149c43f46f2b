"""Training in a single process, and what its other backends share: FSDP is in `with_fsdp`, DeepSpeed in `with_deepspeed`.

All of them enforce a fixed mask at the same points: gradients of pruned weights are zeroed before the norm is computed, and
pruned weights after every step. FSDP masks only local shards; under DeepSpeed the fp32 master partition is masked too, because
its next all-gather would otherwise write old values back.
"""

import contextlib
import copy
import math
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import load as load_distributed  # type: ignore[attr-defined]
from torch.distributed.checkpoint import save as save_distributed  # type: ignore[attr-defined]
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from components.core.checkpoint.weights import Weights, return_memory
from components.core.head import Head
from components.core.mask.mask import Mask
from components.core.perplexity import decoder_and_head
from components.distill.admm import Admm, counts_of
from components.distill.config import DistillConfig
from components.distill.masking import local, mask_gradients, mask_weights
from components.distill.schedule import BETAS, make_schedule, moments

T = TypeVar("T")


def checked_norm(norm: Any, may_skip: bool) -> float | None:
    """A gradient's norm, or None if it is unknown or not finite.

    Args:
        norm: the norm over all processes, or None.
        may_skip: whether loss scaling skips a step whose gradient is not finite.

    Raises:
        ValueError: it is not finite, and no step is skipped.
    """
    if norm is None or math.isfinite(norm):
        return None if norm is None else float(norm)
    if may_skip:
        return None
    raise ValueError(f"the gradient must be finite, its norm is {float(norm)}: lower learning_rate or use another dtype")


@contextlib.contextmanager
def plain_errors(what: str) -> Iterator[None]:
    """Turn whatever a library raises at a checkpoint into an OSError of one line, and keep its warnings quiet.

    The end of the program stays what it is.

    Args:
        what: the start of the message.

    Raises:
        OSError: the library failed, because of a full disk or a damaged file, for instance.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # such as the one that there is one process alone
            yield
    except CheckpointException as error:  # holds what each process raised, SystemExit too
        causes = [cause for cause, _ in error.failures.values()]
        if ends := [cause for cause in causes if not isinstance(cause, Exception)]:
            raise ends[0] from None
        raise OSError(f"{what}: {_first_line(causes[0])}") from error
    except (MemoryError, torch.OutOfMemoryError):  # says nothing about the files
        raise
    except Exception as error:
        raise OSError(f"{what}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


class SingleProcess:
    """Plain PyTorch, with methods that the other backends override.

    Attributes:
        decoder: ids → hidden states, as called by the loop.
        head: hidden states → logits; never trained.
        parameters: name → trained parameter, sharded or not.
        pruned: name → bool tensor of the parameter's local shape, True = pruned; empty if the mask is not fixed.
        admm: chooses the mask while training; None if it is fixed.
    """

    rank = 0
    world_size = 1
    checkpoint_form = "torch.distributed.checkpoint"

    def __init__(self, config: DistillConfig, device: torch.device, compute_dtype: torch.dtype) -> None:
        self.config, self.device, self.compute_dtype = config, device, compute_dtype
        self.admm: Admm | None = None
        # bf16 needs no loss scaling, fp32 no autocast
        self.scaler = torch.amp.GradScaler(device.type, enabled=compute_dtype is torch.float16)

    def autocast(self) -> torch.autocast:
        """Autocast a forward pass to the compute dtype; weights stay float32."""
        return torch.autocast(self.device.type, self.compute_dtype, enabled=self.compute_dtype is not torch.float32)

    def load(self, model: Any, weights: Weights, trained: Collection[str]) -> tuple[nn.Module, Head]:
        """Distribute a model that has no weights yet, and load what this process keeps of them.

        Args:
            model: its parameters are on the meta device.
            weights: its weights.
            trained: names of the weights that train; none for a teacher.

        Returns:
            (decoder, head).
        """
        self.shard(model, trained)
        weights.load(self.device)
        weights.tie()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        with self.autocast() if trained else contextlib.nullcontext():  # a teacher has its number format itself
            parts = decoder_and_head(model, "student_model" if trained else "teacher_model")
        return_memory()  # that of gathered blocks
        return parts

    def prepare(self, student: Any, weights: Weights, mask: Mask, total_steps: int) -> None:
        """Load the student, zero what the mask does not keep, and create the optimizer and the schedule."""
        self.student = student
        self.best: dict[str, Tensor] = {}
        self.decoder, head = self.load(student, weights, mask.tensors.keys())
        # a copy in the compute dtype, so that the loss need not convert it for every chunk; it is never trained
        self.head = head if self.compute_dtype is torch.float32 else copy.deepcopy(head).to(self.compute_dtype)
        if self.config.gradient_checkpointing:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.parameters = {name: value for name, value in student.named_parameters() if name in mask.tensors}
        self.pruned = {name: self.place(~mask.tensors[name], parameter) for name, parameter in self.parameters.items()}
        mask_weights(self.parameters, self.pruned)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=self.config.learning_rate,
            betas=BETAS,
            weight_decay=self.config.weight_decay,
            fused=True,  # one pass over memory instead of a dozen
        )
        self.schedule = make_schedule(self.optimizer, self.config.warmup_ratio, total_steps)
        self.engage(student)

    @torch.no_grad()
    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Set trained weights to full tensors, by name; every process must call this."""
        for name, value in weights.items():
            local(self.parameters[name]).copy_(self.place(value, self.parameters[name]))

    def constrain(self, mask: Mask) -> None:
        """From here on train all weights, with as many of them kept as the mask keeps, instead of those under the mask."""
        self.pruned = {}
        counts = counts_of(mask, self.student)
        self.admm = Admm(self.parameters, self.optimizer, counts, mask, self.config.admm_penalty, self.place, self.gather)

    def shard(self, model: Any, trained: Collection[str]) -> None:
        """Distribute a model without weights; nothing to do for one process. Arguments as for `load`."""

    def engage(self, student: Any) -> None:
        """Pass the model and the optimizer to an engine; nothing to do without one."""

    def place(self, full: Tensor, parameter: Tensor) -> Tensor:
        """The part of a full tensor that corresponds to this process's part of `parameter`."""
        return full.to(parameter.device)

    def gather(self, part: Tensor, parameter: Tensor) -> Tensor:
        """The full tensor, from each process's part, which corresponds to that of `parameter`; every process must call this."""
        return part

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Accumulate the gradient of one micro-batch of an optimizer step.

        Args:
            loss: its share of the step's loss.
            is_last: whether it is the step's last one.
        """
        self.scaler.scale(loss).backward()

    def step(self) -> float | None:
        """Take one optimizer step; returns the gradient's norm before clipping, or None if unknown or skipped.

        Raises:
            ValueError: the gradient is not finite; the weights are as before.
        """
        self.scaler.unscale_(self.optimizer)
        mask_gradients(self.parameters, self.pruned)  # before clipping, so that the norm covers only kept weights
        clipped = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm)
        whole = clipped.full_tensor() if isinstance(clipped, DTensor) else clipped
        norm = checked_norm(whole, may_skip=self.scaler.is_enabled())
        if self.admm:
            self.admm.pull()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad()
        mask_weights(self.parameters, self.pruned)
        return norm

    def full(self, name: str) -> Tensor:
        """A whole trained weight, on every process; every process must call this."""
        weight: Tensor = self.parameters[name].detach().cpu()
        return weight

    def as_saved(self) -> contextlib.AbstractContextManager[None]:
        """The weights as they would be saved now, until the end of the `with`; every process must call this."""
        return self.admm.projected() if self.admm else contextlib.nullcontext()

    def keep_best(self) -> None:
        """Remember the current trained weights; each process keeps its own part."""
        self.best = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def restore_best(self) -> None:
        """Restore the weights that `keep_best` remembered."""
        for name, value in self.best.items():
            self.parameters[name].copy_(value)

    def save_state(self, folder: Path) -> None:
        """Write weights, Adam's moments, ADMM's variables and random state; every process must call this.

        Raises:
            OSError: they could not be written.
        """
        state = training_state(self) | {f"random.{self.rank}": torch.get_rng_state()}
        with plain_errors(f"{folder} could not be written"):
            save_distributed(state, checkpoint_id=folder, no_dist=self.world_size == 1)

    def load_state(self, folder: Path, same_processes: bool, has_best: bool) -> None:
        """Read what `save_state` wrote, even with a different number of processes; every process must call this.

        Raises:
            OSError: the library cannot read it; some of the state may have been read.
        """
        self.best = {}
        if has_best:
            self.keep_best()
        state = training_state(self)
        if same_processes:
            state[f"random.{self.rank}"] = torch.get_rng_state()
        with plain_errors(f"{folder} could not be read"):
            load_distributed(state, checkpoint_id=folder, no_dist=self.world_size == 1)  # in place, but for the random state
        if same_processes:
            torch.set_rng_state(state[f"random.{self.rank}"])

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values /= self.world_size
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        if self.world_size == 1:
            return flag
        return bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def from_first(self, value: T) -> T:
        """The first process's value, broadcast to all; it can be anything that pickles."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()


def training_state(backend: SingleProcess) -> dict[str, Tensor]:
    """Trained weights and Adam's moments by name, the best weights, and ADMM's variables.

    Only tensors are included: everything else is in the manifest.
    """
    state: dict[str, Tensor] = {f"best.{name}": value for name, value in backend.best.items()}
    for name, parameter in backend.parameters.items():
        state[name] = parameter.detach()
        state |= {f"{name}.{kind}": value for kind, value in moments(backend.optimizer, parameter).items()}
    return state | (backend.admm.state() if backend.admm else {})
