"""The distillation loss, computed exactly and with little memory.

    L = α · T² · KL(p_teacher ‖ p_student) + (1 − α) · CE(p_student, next token),   p = softmax(logits / T) in the KL

averaged over the positions with a label (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015). This is the
forward KL; the reverse, KL(p_student ‖ p_teacher), seeks the teacher's modes (Gu et al., "MiniLLM", 2023).

A vocabulary is about a hundred times wider than the hidden states, so the logits of teacher and student are computed from the
hidden states for one chunk of tokens at a time and then discarded. The gradient with respect to the student's hidden states is
computed in the same pass, in closed form:

    ∂L/∂logits = α · T · (softmax(s/T) − softmax(t/T)) + (1 − α) · (softmax(s) − onehot(label))

For the reverse KL, the first term is  α · T · p_s ⊙ (log p_s − log p_t − KL)  instead. Autograd takes it from the logits to the
hidden states, since a head may scale or cap its logits. The heads are never trained (they are outside the mask), so no gradient
flows into them. Softmaxes are computed in float32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from components.core.head import Head

IGNORED = -100  # label of a position that does not count, as in torch's cross entropy
CHUNK_BYTES = 512 * 2**20  # of all that is computed from a chunk's logits
LOGITS_HELD = 5  # of the size of a chunk's logits, in float32: both models' logits and log-probabilities, and the gradient


def next_token_labels(ids: Tensor) -> Tensor:
    """Labels [batch, seq_len] of token ids [batch, seq_len]: the next token; the last position has none."""
    return functional.pad(ids[:, 1:], (0, 1), value=IGNORED)


def distillation_loss(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    labels: Tensor,
    alpha_kd: float,
    temperature: float,
    kl_direction: str = "forward",
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss over all positions with a label.

    Args:
        student_hidden: final hidden states [tokens, width]; only they receive a gradient.
        student_head: width → vocabulary.
        teacher_hidden: [tokens, teacher's width].
        teacher_head: teacher's width → the same vocabulary.
        labels: int64 [tokens], `IGNORED` where a position does not count.
        alpha_kd: α in [0, 1].
        temperature: T > 0.
        kl_direction: `forward` or `reverse`.

    Returns:
        (loss, T²·KL, CE), scalars; only the first carries a gradient. All are 0, with the graph intact, if no position counts.
    """
    loss, kd, ce = _ChunkedLoss.apply(
        student_hidden, teacher_hidden.detach(), labels, student_head, teacher_head, alpha_kd, temperature, kl_direction
    )
    return loss, kd, ce


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        teacher_hidden: Tensor,
        labels: Tensor,
        student_head: Head,
        teacher_head: Head,
        alpha: float,
        temperature: float,
        kl_direction: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradient = torch.zeros_like(student_hidden, dtype=torch.float32)
        kd = torch.zeros((), device=student_hidden.device)
        ce = torch.zeros_like(kd)
        # positions without a label weigh nothing instead of being left out: how many there are is not known without waiting
        # for the device
        weights = (labels != IGNORED).float()  # [tokens]
        size = chunk_size(student_head.weight.shape[0])
        for start in range(0, len(labels), size):
            rows = slice(start, start + size)
            with torch.enable_grad():
                hidden = student_hidden[rows].detach().requires_grad_()
                logits = student_head(hidden)  # [chunk, vocabulary]
            wanted = labels[rows, None].clamp(min=0)
            logits_gradient, kd_rows, ce_rows = chunk_loss(
                logits.detach().float(), teacher_head(teacher_hidden[rows]).float(), wanted, alpha, temperature, kl_direction
            )
            kd += kd_rows @ weights[rows]
            ce += ce_rows @ weights[rows]
            (chunk_gradient,) = torch.autograd.grad(logits, hidden, logits_gradient.to(logits.dtype))
            gradient[rows] = chunk_gradient.float().mul_(weights[rows, None])
        count = weights.sum().clamp(min=1)
        ctx.save_for_backward(gradient.div_(count))
        ctx.hidden_dtype = student_hidden.dtype
        kd, ce = kd / count, ce / count
        ctx.mark_non_differentiable(kd, ce)
        return alpha * kd + (1 - alpha) * ce, kd, ce

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # scaled in float32 before the cast: with fp16 loss scaling the unscaled values would underflow
        return ((ctx.saved_tensors[0] * gradients[0]).to(ctx.hidden_dtype), *[None] * 7)


def chunk_size(vocabulary: int) -> int:
    """How many tokens' logits are computed at a time."""
    return max(1, CHUNK_BYTES // (LOGITS_HELD * 4 * vocabulary))


def chunk_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, temperature: float, kl_direction: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and the gradient for one chunk of logits.

    Args:
        student: float32 logits [chunk, vocabulary].
        teacher: float32 logits [chunk, vocabulary].
        labels: int64 [chunk, 1].
        alpha: α.
        temperature: T.
        kl_direction: `forward` or `reverse`.

    Returns:
        (∂L/∂student [chunk, vocabulary], T²·KL [chunk], CE [chunk]).
    """
    log_student = student.log_softmax(-1)
    ce = -log_student.gather(1, labels).squeeze(1)
    log_teacher = (teacher / temperature).log_softmax(-1)
    log_softened = log_student if temperature == 1 else (student / temperature).log_softmax(-1)
    student_p = log_softened.exp()
    if kl_direction == "forward":
        teacher_p = log_teacher.exp()
        kd = temperature**2 * log_teacher.sub_(log_softened).mul_(teacher_p).sum(-1)
        gradient = student_p.sub_(teacher_p)
    else:
        ratio = log_softened - log_teacher
        kl = (student_p * ratio).sum(-1, keepdim=True)  # [chunk, 1]
        kd = temperature**2 * kl.squeeze(1)
        gradient = ratio.sub_(kl).mul_(student_p)
    gradient.mul_(alpha * temperature)
    gradient.add_(log_student.exp(), alpha=1 - alpha)
    gradient.scatter_add_(1, labels, torch.full_like(labels, alpha - 1, dtype=gradient.dtype))
    return gradient, kd, ce
