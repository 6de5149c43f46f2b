"""Where a pipeline keeps the checkpoints of training."""

import os
from dataclasses import dataclass, field

from components.core.settings import OUTPUT, Settings
from components.core.storage import check_place, is_bucket, run_place

CHECKPOINT_VARIABLE = "DISTILL_CHECKPOINT_DIR"


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings(Settings):
    """Where a pipeline keeps the checkpoints of training."""

    checkpoints: str = field(default="auto", metadata=OUTPUT)
    """Where a pipeline keeps checkpoints, from which the training of a lost pod goes on: `auto`, beside its artifacts; `none`;
    or a bucket with a prefix."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoints not in ("auto", "none"):
            check_place("checkpoints", self.checkpoints)
            if not is_bucket(self.checkpoints):
                raise ValueError(
                    f"checkpoints must be auto, none or in a bucket, got {self.checkpoints}: a pod's disk goes with it"
                )


def checkpoints_of_run(checkpoints: str, uri: str) -> str:
    """The place of a run's checkpoints; empty = none.

    Args:
        checkpoints: see `CheckpointSettings`.
        uri: that of any artifact of the run.
    """
    if checkpoints == "none":
        return ""
    run = run_place(uri)
    return f"{run}/checkpoints" if checkpoints == "auto" else f"{checkpoints}/{run.rpartition('/')[2]}"


def checkpoint_dir_here(checkpoints: str, uri: str, backend: str, keep_best: bool) -> str:
    """The place for checkpoints in a pipeline's task; empty = none.

    On this machine `pipelines/run.py` gives a folder. DeepSpeed with `keep_best` has no checkpoints, see `DistillConfig`.

    Args:
        checkpoints: see `CheckpointSettings`.
        uri: that of the stage's output.
        backend: the setting of this name.
        keep_best: the setting of this name.
    """
    if backend == "deepspeed" and keep_best:
        return ""
    return os.environ.get(CHECKPOINT_VARIABLE) or (checkpoints_of_run(checkpoints, uri) if is_bucket(uri) else "")
