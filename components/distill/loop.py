"""The training loop, shared by all backends: epochs of optimizer steps, evaluation and checkpoints."""

import math
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from components.core.hidden import token_error
from components.core.perplexity import block_losses, from_mean_loss
from components.core.progress import log, log_perplexity, track
from components.core.storage.place import is_bucket
from components.distill import resume
from components.distill.admm import Admm
from components.distill.backends import SingleProcess
from components.distill.batching import BatchSize
from components.distill.config import DistillConfig
from components.distill.loss import distillation_loss, next_token_labels
from components.distill.remote import RemoteCheckpoints
from components.distill.teacher import Teacher, hidden_states

PREEMPTED = 143  # 128 + SIGTERM: what a shell reports for a process ended by that signal


@dataclass
class Progress:
    """How far a run has got and what it has measured; saved in checkpoints.

    `steps` has one entry per step (loss, kd_loss, ce_loss, hidden_loss, learning_rate, grad_norm; mask_changed and distance
    where ADMM has chosen the mask anew), `epochs` one per evaluation; `batch_size` is the number of blocks per forward pass in
    the next step.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    stopped_early: bool = False
    batch_size: int = 1

    def line(self) -> str:
        """A summary of the last step."""
        last = self.steps[-1]
        return f"loss {last['loss']:.4f}, learning rate {last['learning_rate']:.2e}, {self.tokens_per_second():.0f} tokens/s"

    def tokens_per_second(self) -> float:
        """Training speed over all processes, excluding evaluations."""
        return self.tokens / max(self.seconds, 1e-9)

    def best(self) -> dict[str, float]:
        """The evaluation with the lowest perplexity."""
        return min(self.epochs, key=lambda entry: entry["eval_ppl"])


class Trainer:
    """One training run.

    Args:
        backend: the backend to train on, already prepared.
        teacher: provides the hidden states of training blocks.
        blocks: training tokens [blocks, seq_len].
        evaluation: evaluation tokens [blocks, seq_len], or None.
        config: the stage's settings.
        inputs: fingerprints of the run's inputs, by name.
    """

    def __init__(
        self,
        backend: SingleProcess,
        teacher: Teacher,
        blocks: Tensor,
        evaluation: Tensor | None,
        config: DistillConfig,
        inputs: dict[str, str],
    ) -> None:
        self.backend, self.teacher, self.blocks, self.evaluation, self.config = backend, teacher, blocks, evaluation, config
        self.steps_per_epoch, self.total_steps = plan(len(blocks), config, backend.world_size)
        self.identity = resume.identity(config, inputs, config.step_blocks(backend.world_size))
        self.remote = None
        if is_bucket(config.checkpoint_dir):
            self.remote = RemoteCheckpoints(config.checkpoint_dir, self.identity, config.keep_checkpoints, backend)
            self.config = replace(config, checkpoint_dir=str(self.remote.folder))
        self.progress = Progress()
        self.batch = BatchSize(config, backend)
        self.asked_to_end = False

    def fit(self) -> Progress:
        """Train for all epochs, resuming from the newest checkpoint if there is one. Prints `[PPL] epoch=… eval_ppl=…`.

        Raises:
            SystemExit: SIGTERM was received; a checkpoint has been written.
        """
        if self.remote:
            self.remote.fetch()
        if self.config.checkpoint_dir:
            manifest = resume.load(self.backend, self.config, self.identity)
            if manifest:
                self.progress = Progress(**manifest["progress"])
                self.batch = BatchSize(self.config, self.backend, self.progress.batch_size)
            if self.remote:
                self.remote.clear()
            signal.signal(signal.SIGTERM, self._ask_to_end)
        self.backend.student.train()
        steps = self._steps()
        if self.backend.rank == 0:
            steps = track(steps, "distilling", self.total_steps - len(self.progress.steps), self.progress.line)
        for step in steps:
            ending = self.backend.any(self.asked_to_end)
            if self.config.checkpoint_dir and (ending or step % self.config.checkpoint_steps == 0):
                self._save(step, ending)
            if ending:
                log(f"stopped after step {step} on request; the same command resumes from there")
                raise SystemExit(PREEMPTED)
        if self.config.keep_best and self.progress.epochs:
            self.backend.restore_best()
        elif self.backend.admm:
            self.backend.admm.project()
        self.backend.student.eval()
        return self.progress

    def _save(self, step: int, ending: bool) -> None:
        """Write a checkpoint; to a bucket only as often as uploads keep up with training."""
        if self.remote and not ending and self.remote.is_busy():
            if self.backend.rank == 0:
                log(f"no checkpoint at step {step}, since the one before is still being uploaded")
            return
        if self.remote:
            self.remote.finish()
        try:
            resume.save(self.backend, self.config, step, self.identity, asdict(self.progress), is_shared=self.remote is None)
        except OSError as error:
            if not self.remote:  # whoever gives a folder wants to know; a pipeline's training goes on without checkpoints
                raise
            log(f"no checkpoint at step {step}, training goes on: {error}")
            return
        if self.remote:
            self.remote.send(step)
            if ending:
                self.remote.finish()

    def _ask_to_end(self, *_: Any) -> None:
        self.asked_to_end = True

    def _steps(self) -> Iterator[int]:
        """Take one optimizer step after another; evaluate after each epoch and at the end."""
        while (done := len(self.progress.steps)) < self.total_steps and not self.progress.stopped_early:
            rows = self._rows(done)
            start = time.monotonic()
            with self.batch.measured():
                entry = self.step(rows)
                if self.backend.admm and (done + 1) % self.config.admm_interval == 0:
                    entry |= self._change_mask(self.backend.admm, done + 1)
            seconds = time.monotonic() - start
            self.progress.batch_size = self.batch.size
            self.progress.steps.append({"step": done + 1, "seconds": round(seconds, 4)} | entry)
            self.progress.tokens += sum(part.numel() for part in rows) * self.blocks.shape[1] * self.backend.world_size
            self.progress.seconds += seconds
            if (done + 1) % self.steps_per_epoch == 0 or done + 1 == self.total_steps:
                self._end_epoch(done // self.steps_per_epoch + 1)
            yield done + 1

    def _rows(self, step: int) -> list[Tensor]:
        """Indices of the blocks that this process trains on in a step: one tensor [batch_size] per micro-batch.

        The order depends only on seed and epoch; each step's blocks are divided among the processes without overlap.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        order = order_of(len(self.blocks), self.config, epoch)
        here = self.config.step_blocks()
        start = (position * self.backend.world_size + self.backend.rank) * here
        return list(order[start : start + here].split(self.batch.size))

    def step(self, rows: list[Tensor]) -> dict[str, float]:
        """Take one optimizer step over micro-batches of block indices [batch_size].

        Returns:
            loss, kd_loss, ce_loss, hidden_loss (means over micro-batches and processes; the last only if it is part of the
            loss), learning_rate, grad_norm (before clipping, omitted if unknown).

        Raises:
            ValueError: the loss is not finite.
        """
        learning_rate, parts = self.backend.schedule.get_last_lr()[0], []
        for number, part in enumerate(rows, start=1):
            losses = self.losses(part)
            self.backend.backward(losses["loss"] / len(rows), number == len(rows))
            parts.append(torch.stack([value.detach() for value in losses.values()]))
        totals = self.backend.mean(torch.stack(parts).mean(0))
        if not torch.isfinite(totals).all():
            raise ValueError(f"the loss must be finite, got {totals.tolist()}: lower learning_rate or use another dtype")
        norm = self.backend.step()
        entry = dict(zip(losses, totals.tolist(), strict=True)) | {"learning_rate": learning_rate}
        return entry if norm is None else entry | {"grad_norm": norm}

    def _change_mask(self, admm: Admm, step: int) -> dict[str, float]:
        """Let ADMM choose the mask anew: the share of its places that are new, and the distance from it of all weights."""
        new, kept, apart, size = self.backend.mean(admm.update()).tolist()
        entry = {"mask_changed": new / kept, "distance": math.sqrt(apart / size)}
        if self.backend.rank == 0:
            share, distance = entry.values()
            log(f"mask after step {step}: {share:.2%} of what it keeps has changed; distance of the weights {distance:.4f}")
        return entry

    def losses(self, rows: Tensor) -> dict[str, Tensor]:
        """The loss for training blocks, given by index [batch], and its parts; only the first carries a gradient."""
        config, of_blocks = self.config, bool(self.config.alpha_hidden)
        ids = self.blocks[rows].to(self.backend.device)
        wanted = self.teacher.hidden(rows, of_blocks)
        with self.backend.autocast():
            found = hidden_states(self.backend.decoder, ids, of_blocks)
            loss, kd, ce = distillation_loss(
                found[-1].flatten(0, 1),
                self.backend.head,
                wanted[-1].flatten(0, 1),
                self.teacher.head,
                next_token_labels(ids).flatten(),
                config.alpha_kd,
                config.temperature,
                config.kl_direction,
            )
        named = {"loss": loss, "kd_loss": kd, "ce_loss": ce}
        if not config.alpha_hidden:
            return named
        hidden = torch.stack([token_error(*pair) for pair in zip(found, wanted, strict=True)]).mean()
        return named | {"loss": loss + config.alpha_hidden * hidden, "hidden_loss": hidden}

    def evaluate(self) -> float:
        """The student's perplexity on the evaluation blocks, divided among the processes; every process must call this."""
        assert self.evaluation is not None
        count, length = self.evaluation.shape
        share = -(-count // self.backend.world_size)
        rows = torch.arange(share) + self.backend.rank * share
        with self.backend.autocast():  # sharding requires equally many blocks on all processes; repeats are not counted
            losses = block_losses(self.backend.decoder, self.backend.head, self.evaluation[rows.clamp(max=count - 1)])
        total = self.backend.mean(losses[rows.to(losses.device) < count].sum()) * self.backend.world_size
        return from_mean_loss(float(total) / (count * (length - 1)))

    def _end_epoch(self, epoch: int) -> None:
        if self.evaluation is None:
            return
        self.backend.student.eval()
        with self.backend.as_saved():
            value = self.evaluate()
            self.progress.epochs.append({"epoch": epoch, "eval_ppl": value})
            best = self.progress.best()
            if self.config.keep_best and best["epoch"] == epoch:
                self.backend.keep_best()
        self.backend.student.train()
        if self.backend.rank == 0:
            log_perplexity("eval_ppl", value, prefix=f"epoch={epoch} ")
        if self.config.patience and epoch - best["epoch"] >= self.config.patience:
            self.progress.stopped_early = True


def order_of(blocks: int, config: DistillConfig, epoch: int) -> Tensor:
    """The order of the training blocks in an epoch, which depends only on seed and epoch."""
    return torch.randperm(blocks, generator=torch.Generator().manual_seed(config.seed * 100_003 + epoch))


def rows_used(blocks: int, config: DistillConfig, world_size: int) -> Tensor:
    """Which training blocks a run sees, ascending: not all if `max_steps` ends it within its first epoch."""
    steps, total = plan(blocks, config, world_size)
    if total >= steps:
        return torch.arange(blocks)
    seen = total * config.step_blocks(world_size)
    return order_of(blocks, config, 0)[:seen].sort().values


def plan(blocks: int, config: DistillConfig, world_size: int) -> tuple[int, int]:
    """(optimizer steps per epoch, optimizer steps in total).

    Raises:
        ValueError: there are too few blocks for one step.
    """
    a_step = config.step_blocks(world_size)
    steps = blocks // a_step
    if not steps:
        raise ValueError(
            f"train_data must have at least the {a_step} blocks of an optimizer step over all processes, got {blocks}"
        )
    return steps, min(steps * config.epochs, config.max_steps or steps * config.epochs)
