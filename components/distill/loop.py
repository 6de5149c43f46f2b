"""The training loop: epochs of optimizer steps, an evaluation after each epoch."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from components.core.mask import Mask
from components.core.perplexity import decoder_and_head
from components.core.progress import log_perplexity, track
from components.distill.config import DistillConfig
from components.distill.loss import distillation_loss, next_token_labels
from components.distill.masking import mask_gradients, mask_on_device, mask_weights, train_only_masked

BETAS = (0.9, 0.95)  # the usual pair for language models: a shorter memory than AdamW's default, for short runs


def cosine_with_warmup(step: int, warmup: int, total: int) -> float:
    """Share of the peak learning rate at `step` (from 0): a linear rise over `warmup` steps, then half a cosine to 0.

    Unlike the usual schedule of transformers no step has rate 0, which would be lost in a short run.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


@dataclass
class Progress:
    """What the loop has to tell: one entry a step (loss, kd_loss, ce_loss, learning_rate, grad_norm), one an epoch."""

    steps: list[dict[str, float]] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    def line(self) -> str:
        """The last step in words."""
        last = self.steps[-1]
        return f"loss {last['loss']:.4f}, learning rate {last['learning_rate']:.2e}, {self.tokens_per_second():.0f} tokens/s"

    def tokens_per_second(self) -> float:
        """Training speed, evaluations left out."""
        return self.tokens / max(self.seconds, 1e-9)


class Trainer:
    """Student, teacher, optimizer and schedule of one run.

    Args:
        student: causal language model, float32.
        teacher: causal language model with the same vocabulary.
        mask: which of the student's weights train.
        blocks: training tokens [blocks, seq_len].
        config: the stage's settings.
        compute_dtype: format of the student's forward pass; its weights stay float32.
        evaluate: perplexity of the student, or None.

    Raises:
        ValueError: too few blocks for one optimizer step.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        mask: Mask,
        blocks: Tensor,
        config: DistillConfig,
        compute_dtype: torch.dtype,
        evaluate: Callable[[], float] | None,
    ) -> None:
        self.config, self.blocks, self.evaluate, self.student = config, blocks, evaluate, student
        self.device = next(student.parameters()).device
        self.parameters = train_only_masked(student, mask)
        self.pruned = mask_on_device(mask, self.parameters)
        self.student_decoder, self.student_head = decoder_and_head(student)
        self.teacher_decoder, self.teacher_head = decoder_and_head(teacher)
        self.steps_an_epoch = blocks.shape[0] // (config.batch_size * config.grad_accum_steps)
        self.total_steps = self.steps_an_epoch * config.epochs
        if config.max_steps:
            self.total_steps = min(self.total_steps, config.max_steps)
        if not self.total_steps:
            raise ValueError(
                f"train_data must have at least batch_size * grad_accum_steps = {config.batch_size * config.grad_accum_steps} "
                f"blocks, got {blocks.shape[0]}"
            )
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, betas=BETAS, weight_decay=config.weight_decay
        )
        warmup = round(config.warmup_ratio * self.total_steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: cosine_with_warmup(step, warmup, self.total_steps)
        )
        # bf16 needs no loss scaling, fp32 no autocast
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=compute_dtype is torch.float16)
        self.autocast = torch.autocast(self.device.type, compute_dtype, enabled=compute_dtype is not torch.float32)
        self.progress = Progress()

    def fit(self) -> Progress:
        """Run all epochs. Prints `[PPL] epoch=… eval_ppl=…` after each."""
        self.student.train()
        stepped = track(self._steps(), "distilling", self.total_steps, self.progress.line)
        for _ in stepped:
            pass
        self.student.eval()
        return self.progress

    def _steps(self) -> Iterator[int]:
        """Take one optimizer step after another; evaluate after each epoch and at the end."""
        step = 0
        for epoch in range(self.config.epochs):
            for batches in self._batches(epoch):
                start = time.monotonic()
                entry = self.step(batches)
                step += 1
                self.progress.steps.append({"step": step} | entry)
                self.progress.tokens += sum(batch.numel() for batch in batches)
                self.progress.seconds += time.monotonic() - start
                last_of_epoch = step == self.steps_an_epoch * (epoch + 1)
                if last_of_epoch or step == self.total_steps:
                    self._evaluate(epoch + 1)
                yield step
                if step == self.total_steps:
                    return

    def _batches(self, epoch: int) -> Iterator[list[Tensor]]:
        """The micro-batches of each optimizer step of an epoch, in an order set by seed and epoch."""
        generator = torch.Generator().manual_seed(self.config.seed * 100_003 + epoch)
        order = torch.randperm(self.blocks.shape[0], generator=generator)
        size, accumulate = self.config.batch_size, self.config.grad_accum_steps
        for step in range(self.steps_an_epoch):
            rows = order[step * size * accumulate : (step + 1) * size * accumulate]
            yield [self.blocks[part] for part in rows.split(size)]

    def step(self, batches: list[Tensor]) -> dict[str, float]:
        """One optimizer step over micro-batches of token ids [batch_size, seq_len].

        Returns:
            loss, kd_loss, ce_loss (means over the micro-batches), learning_rate, grad_norm (before clipping).

        Raises:
            ValueError: the loss is not finite.
        """
        totals = torch.zeros(3, device=self.device)
        for ids in batches:
            losses = self.losses(ids.to(self.device))
            self.scaler.scale(losses[0] / len(batches)).backward()
            totals += torch.stack([part.detach() for part in losses]) / len(batches)
        if not torch.isfinite(totals).all():
            raise ValueError(f"the loss must be finite, got {totals.tolist()}: lower learning_rate or use another dtype")
        self.scaler.unscale_(self.optimizer)
        mask_gradients(self.parameters, self.pruned)  # before clipping: the norm is that of what trains
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm)
        learning_rate = self.schedule.get_last_lr()[0]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad()
        mask_weights(self.parameters, self.pruned)
        loss, kd, ce = totals.tolist()
        return {"loss": loss, "kd_loss": kd, "ce_loss": ce, "learning_rate": learning_rate, "grad_norm": float(norm)}

    def losses(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, kd_loss, ce_loss) on token ids [batch, seq_len]."""
        with self.autocast:
            hidden = self.student_decoder(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
            with torch.no_grad():
                target = self.teacher_decoder(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
            labels = next_token_labels(ids).flatten()
            return distillation_loss(
                hidden,
                self.student_head,
                target,
                self.teacher_head,
                labels,
                self.config.alpha_kd,
                self.config.temperature,
            )

    def _evaluate(self, epoch: int) -> None:
        if self.evaluate is None:
            return
        self.student.eval()
        with self.autocast:
            value = self.evaluate()
        self.student.train()
        log_perplexity("eval_ppl", value, prefix=f"epoch={epoch} ")
        self.progress.epochs.append({"epoch": epoch, "eval_ppl": value})
