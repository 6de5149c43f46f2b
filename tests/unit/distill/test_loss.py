"""The chunked loss compared with a plain formula and autograd."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from components.distill import loss as loss_module
from components.distill.loss import IGNORED, chunk_size, distillation_loss, next_token_labels


class Capped(nn.Linear):
    """A head with a soft cap."""

    def forward(self, hidden):
        return 0.5 * torch.tanh(super().forward(hidden) / 0.5)


def case(tokens: int = 37, width: int = 16, vocabulary: int = 51, bias: bool = False, kind: type = nn.Linear):
    torch.manual_seed(0)
    return {
        "student_hidden": torch.randn(tokens, width, dtype=torch.float32, requires_grad=True),
        "student_head": kind(width, vocabulary, bias=bias),
        "teacher_hidden": torch.randn(tokens, 24),
        "teacher_head": kind(24, vocabulary, bias=False),
        "labels": torch.randint(vocabulary, (tokens,)),
    }


def plain(student_hidden, student_head, teacher_hidden, teacher_head, labels, alpha, temperature, kl_direction="forward"):
    """The formula written out, on full logits."""
    keep = labels != IGNORED
    student = student_head(student_hidden)[keep].float()
    teacher = teacher_head(teacher_hidden)[keep].float()
    soft_student = functional.log_softmax(student / temperature, -1)
    soft_teacher = functional.log_softmax(teacher / temperature, -1)
    pair = (soft_student, soft_teacher) if kl_direction == "forward" else (soft_teacher, soft_student)
    kl = functional.kl_div(*pair, log_target=True, reduction="batchmean")
    ce = functional.cross_entropy(student, labels[keep])
    return alpha * temperature**2 * kl + (1 - alpha) * ce


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("head", [{}, {"bias": True}, {"kind": Capped}], ids=["plain", "with bias", "capped"])
@pytest.mark.parametrize("kl_direction", ["forward", "reverse"])
def test_equals_the_plain_formula_with_its_gradient(monkeypatch, alpha, temperature, head, kl_direction):
    monkeypatch.setattr(loss_module, "chunk_size", lambda _: 8)  # several chunks, the last one short
    inputs = case(**head)
    inputs["labels"][[0, 5, 36]] = IGNORED
    wanted = plain(**inputs, alpha=alpha, temperature=temperature, kl_direction=kl_direction)
    (wanted_gradient,) = torch.autograd.grad(wanted, inputs["student_hidden"])
    found, kd, ce = distillation_loss(**inputs, alpha_kd=alpha, temperature=temperature, kl_direction=kl_direction)
    (2 * found).backward()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(inputs["student_hidden"].grad, 2 * wanted_gradient, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(alpha * kd + (1 - alpha) * ce, found)
    assert inputs["student_head"].weight.grad is None


def test_the_gradient_is_right_by_finite_differences():
    inputs = case(tokens=3, width=4, vocabulary=7)
    inputs = {name: value.double() if name != "labels" else value for name, value in inputs.items()}
    hidden = inputs.pop("student_hidden").detach()
    found = torch.zeros_like(hidden)
    for place in [(0, 1), (2, 3)]:
        for sign in (1, -1):
            moved = hidden.clone()
            moved[place] += sign * 1e-2
            found[place] += sign * distillation_loss(moved, **inputs, alpha_kd=0.6, temperature=1.5)[0].item() / 2e-2
    hidden.requires_grad_()
    distillation_loss(hidden, **inputs, alpha_kd=0.6, temperature=1.5)[0].backward()
    for place in [(0, 1), (2, 3)]:
        assert hidden.grad[place].item() == pytest.approx(found[place].item(), rel=1e-2, abs=1e-5)


def test_a_teacher_like_the_student_leaves_nothing_to_distil():
    inputs = case()
    inputs |= {"teacher_hidden": inputs["student_hidden"].detach(), "teacher_head": inputs["student_head"]}
    found, kd, _ = distillation_loss(**inputs, alpha_kd=1.0, temperature=1.0)
    found.backward()
    assert abs(kd.item()) < 1e-6
    assert inputs["student_hidden"].grad.abs().max() < 1e-7


def test_no_labels_give_zero_with_a_live_graph():
    inputs = case()
    inputs["labels"].fill_(IGNORED)
    found, _, _ = distillation_loss(**inputs, alpha_kd=0.5, temperature=1.0)
    found.backward()
    assert found.item() == 0
    assert (inputs["student_hidden"].grad == 0).all()


def test_half_precision_hidden_states_keep_small_gradients():
    """Gradients are scaled up in float32 before conversion to float16, where they would underflow to 0."""
    inputs = {name: value.half() if name != "labels" else value for name, value in case(tokens=4).items()}
    inputs["student_hidden"] = inputs["student_hidden"].detach().requires_grad_()
    found, _, _ = distillation_loss(**inputs, alpha_kd=0.5, temperature=1.0)
    (found * 1e-9 * 2**20).backward()
    assert inputs["student_hidden"].grad.abs().max() > 0


def test_labels_are_the_next_tokens():
    assert next_token_labels(torch.tensor([[4, 5, 6]])).tolist() == [[5, 6, IGNORED]]


def test_a_chunk_takes_the_memory_that_it_may():
    assert chunk_size(151936) == 176
    assert chunk_size(256) == 104857
    assert chunk_size(10**9) == 1
