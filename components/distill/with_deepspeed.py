"""The DeepSpeed backend: ZeRO 0, 1 or 2."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from components.core.errors import readable
from components.distill.backends import SingleProcess, checked_norm, plain_errors
from components.distill.config import DistillConfig
from components.distill.masking import mask_weights

ENGINE = "engine"  # DeepSpeed's name for its part of a checkpoint


class DeepSpeed(SingleProcess):
    """DeepSpeed with ZeRO 0, 1 (partitions the optimizer state) or 2 (the gradients too), set by a JSON file."""

    checkpoint_form = "deepspeed"

    def __init__(self, config: DistillConfig, device: torch.device, compute_dtype: torch.dtype) -> None:
        super().__init__(config, device, compute_dtype)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.scaler = torch.amp.GradScaler(device.type, enabled=False)  # the engine scales the loss itself

    def autocast(self) -> torch.autocast:
        """Disabled: the engine casts the weights themselves."""
        return torch.autocast(self.device.type, enabled=False)

    def engage(self, student: Any) -> None:
        """Pass the decoder and the optimizer to the engine."""
        if self.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False)
        for name, parameter in self.parameters.items():
            # gradients are reduced and partitioned as they arrive, so they must be masked as they arrive
            parameter.register_hook(lambda gradient, name=name: gradient.masked_fill(self.pruned[name], 0))
        with readable("deepspeed_config must hold settings that DeepSpeed accepts"):
            engine, *_ = deepspeed.initialize(
                model=self.decoder,
                optimizer=self.optimizer,
                lr_scheduler=self.schedule,
                config=deepspeed_settings(self.config, self.compute_dtype, self.world_size),
                dist_init_required=False,
            )
        self.engine = self.decoder = engine

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Accumulate a gradient; at the last of a step, the engine takes the step."""
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(loss, scale_wrt_gas=False)
        self.engine.step()

    def step(self) -> float | None:
        """Mask master weights and their low-precision copies; the step itself was taken with the last micro-batch."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                mapping = getattr(parameter, "_hp_mapping", None)
                if mapping is not None:  # this process owns a part of the parameter's master weights
                    place = mapping.lp_fragment_address
                    part = self.pruned[name].flatten()[place.start : place.start + place.numel]
                    mapping.hp_fragment.masked_fill_(part.to(mapping.hp_fragment.device), 0)
        mask_weights(self.parameters, self.pruned)
        norm = self.engine.get_global_grad_norm() or None  # ZeRO 0 does not report it
        return checked_norm(norm, may_skip=self.compute_dtype is torch.float16)

    def save_state(self, folder: Path) -> None:
        """Write the engine's own format: its moments are flat partitions that fit only this number of processes.

        Raises:
            OSError: this process could not write its part; the others wait until the launcher ends them.
        """
        with plain_errors(f"{folder} could not be written"):
            self.engine.save_checkpoint(str(folder), tag=ENGINE)

    def load_state(self, folder: Path, same_processes: bool, has_best: bool) -> None:
        """Read what `save_state` wrote.

        Raises:
            ValueError: it was written by a different number of processes.
            OSError: the engine cannot read it on every process; some of the state may have been read.
        """
        if not same_processes:
            raise ValueError(f"nproc_per_node must be as before to go on with backend deepspeed, got {self.world_size}")
        assert not has_best  # rejected by the settings
        fault: OSError | None = None
        try:
            with plain_errors(f"{folder} could not be read"):
                path, _ = self.engine.load_checkpoint(str(folder), tag=ENGINE)
                if path is None:  # how the engine reports that there is nothing to read
                    raise ValueError("the engine finds no checkpoint in it")
        except OSError as error:
            fault = error
        if self.any(fault is not None):
            raise fault or OSError(f"{folder} could not be read by another process")


def deepspeed_settings(config: DistillConfig, compute_dtype: torch.dtype, world_size: int) -> dict[str, Any]:
    """The engine's settings: those of the JSON file, overridden by those that the loop determines."""
    given = config.read_deepspeed_config()
    return given | {
        "train_micro_batch_size_per_gpu": max(1, config.batch_size),
        "gradient_accumulation_steps": config.grad_accum_steps,
        "train_batch_size": config.step_blocks(world_size),
        "gradient_clipping": config.max_grad_norm,
        "bf16": given.get("bf16", {}) | {"enabled": compute_dtype is torch.bfloat16},
        "fp16": given.get("fp16", {}) | {"enabled": compute_dtype is torch.float16},
        "zero_allow_untested_optimizer": True,
    }
