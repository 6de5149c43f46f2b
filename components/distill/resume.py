"""Checkpoints from which a killed training run resumes: `torch.distributed.checkpoint` plus a manifest.

A checkpoint is a folder `step-00000040` with the trained weights, Adam's moments, each process's random state, and
`manifest.json`. The manifest is written last: a folder without one is incomplete and never read, whatever its date. Weights
and moments are stored with their global shapes, so a different number of FSDP processes can resume from them. The library's
own index is a pickle: resume only from folders that nobody else can write to.
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from components.core.files import write_json
from components.core.progress import log
from components.core.reading import read_json
from components.core.settings import EXECUTION, INPUT, OUTPUT, START, names_of
from components.distill.backends import SingleProcess
from components.distill.config import DistillConfig
from components.distill.schedule import restore_schedule

MANIFEST = "manifest.json"
# a run may resume with other values of these; the contents of inputs are compared by fingerprint
FREE_SETTINGS = names_of(DistillConfig, INPUT, OUTPUT, START, EXECUTION)


def identity(config: DistillConfig, inputs: Mapping[str, str], global_batch: int) -> dict[str, Any]:
    """What must not change for a run to resume: settings, fingerprints of its inputs, and the blocks per step."""
    settings = {name: value for name, value in asdict(config).items() if name not in FREE_SETTINGS}
    return {**inputs, "global_batch": global_batch, "settings": settings}


def newest(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step, or None."""
    complete = sorted(path.parent for path in folder.glob(f"step-*/{MANIFEST}"))
    return complete[-1] if complete else None


def save(
    backend: SingleProcess, config: DistillConfig, step: int, identity: Mapping[str, Any], progress: dict[str, Any]
) -> None:
    """Write a checkpoint and delete old ones; every process must call this."""
    folder = Path(config.checkpoint_dir) / f"step-{step:08d}"
    if backend.rank == 0 and folder.exists():
        shutil.rmtree(folder)  # left incomplete by a killed run
    backend.barrier()
    backend.save_state(folder)
    if backend.rank == 0:
        manifest = {
            "step": step,
            "world_size": backend.world_size,
            "form": backend.checkpoint_form,
            "has_best": bool(backend.best),
            "scaler": backend.scaler.state_dict(),
            "identity": identity,
            "progress": progress,
        }
        write_json(folder / MANIFEST, manifest)
        all_steps = sorted(Path(config.checkpoint_dir).glob("step-*"))
        complete = [path for path in all_steps if (path / MANIFEST).is_file()]
        for old in set(all_steps) - set(complete[-config.keep_checkpoints :]):  # incomplete ones too
            shutil.rmtree(old, ignore_errors=True)
        log(f"checkpoint: {folder}")
    backend.barrier()


def load(backend: SingleProcess, config: DistillConfig, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Resume from the newest complete checkpoint; every process must call this.

    Returns:
        its manifest, or None if there is no checkpoint.

    Raises:
        ValueError: the checkpoint belongs to another run (the first difference is named) or another backend, or is not on all
            machines.
    """
    folder = backend.from_first(newest(Path(config.checkpoint_dir)))
    if folder is None:
        return None
    if backend.any(not (folder / MANIFEST).is_file()):
        raise ValueError(f"checkpoint_dir must be a folder that all machines share, {folder} is not on all of them")
    manifest: dict[str, Any] = read_json(folder / MANIFEST, dict[str, Any])
    if manifest["identity"] != dict(identity):
        raise ValueError(
            f"checkpoint_dir must hold checkpoints of this run, {folder} differs in {_difference(manifest, identity)}"
        )
    if manifest["form"] != backend.checkpoint_form:
        raise ValueError(
            f"backend must read checkpoints of form {manifest['form']!r}, {config.backend} reads {backend.checkpoint_form!r}"
        )
    backend.load_state(folder, manifest["world_size"] == backend.world_size, manifest["has_best"])
    restore_schedule(backend.optimizer, backend.schedule, manifest["step"])
    backend.scaler.load_state_dict(manifest["scaler"])
    if backend.rank == 0:
        log(f"resuming from {folder}")
    return manifest


def _difference(manifest: dict[str, Any], identity: Mapping[str, Any]) -> str:
    then, now = manifest["identity"], dict(identity)
    for name in now.keys() - {"settings"}:
        if then.get(name) != now[name]:
            return f"{name}: {then.get(name)} then, {now[name]} now"
    names = [name for name in now["settings"] if then["settings"].get(name) != now["settings"][name]]
    return ", ".join(f"{name}: {then['settings'].get(name)} then, {now['settings'][name]} now" for name in names[:1])
