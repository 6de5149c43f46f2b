"""Memory and time of the distillation loss compared with the naive one: full logits, log_softmax, autograd.

    python tests/benchmarks/loss.py --tokens 2048 --vocabulary 151936 --width 1024 --repeats 3

The variants take turns, each repeat in a new process, so that drift of the machine affects both. Memory is what the loss
and its backward pass add to the peak resident set size after a warm-up on a few tokens; the heads and hidden
states are allocated before. Both are float32 on the CPU and use the same random numbers. Exits with 1 if the chunked loss
needs more than 0.20 times the memory or 1.3 times the time, or differs by more than 1e-5 in value or gradient.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from components.core.history import peak_memory
from components.distill.loss import distillation_loss

ALPHA = 0.7
MIB = 2**20
MEMORY_GOAL, TIME_GOAL, ERROR_GOAL = 0.20, 1.3, 1e-5
VARIANTS = ("naive", "chunked")


def naive_loss(
    student_hidden: Tensor,
    student_head: nn.Linear,
    teacher_hidden: Tensor,
    teacher_head: nn.Linear,
    labels: Tensor,
    alpha_kd: float,
    temperature: float,
) -> Tensor:
    """The naive loss, for hidden states [tokens, width] and labels [tokens]."""
    student = student_head(student_hidden)  # [tokens, vocabulary]
    with torch.no_grad():
        teacher = teacher_head(teacher_hidden)  # [tokens, vocabulary]
    kd = functional.kl_div(
        (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1), reduction="batchmean", log_target=True
    )
    return alpha_kd * temperature**2 * kd + (1 - alpha_kd) * functional.cross_entropy(student, labels)


def loss_of(variant: str, *arguments: Tensor | nn.Linear | float) -> Tensor:
    """The loss of a variant."""
    if variant == "naive":
        return naive_loss(*arguments)
    return distillation_loss(*arguments)[0]


def problem(tokens: int, vocabulary: int, width: int) -> tuple[Tensor, nn.Linear, Tensor, nn.Linear, Tensor, float]:
    """Random hidden states, frozen heads and labels; logits have a standard deviation of about 3."""
    generator = torch.Generator().manual_seed(0)
    arguments: list[Tensor | nn.Linear] = []
    for _ in range(2):
        head = nn.Linear(width, vocabulary, bias=False, device="meta").to_empty(device="cpu").requires_grad_(False)
        head.weight.normal_(std=3 / width**0.5, generator=generator)
        arguments += [torch.randn(tokens, width, generator=generator), head]
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    arguments[0].requires_grad_()
    return *arguments, labels, ALPHA


def resident() -> int:
    """Resident memory of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure(variant: str, arguments: argparse.Namespace) -> None:
    """Measure one variant in this process; print bytes, seconds and the loss, and save the gradient."""
    warm = problem(2, 64, 16)
    loss_of(variant, *warm, arguments.temperature).backward()
    work = problem(arguments.tokens, arguments.vocabulary, arguments.width)
    hidden = work[0]
    before = resident()
    highest_before = peak_memory()
    start = time.perf_counter()
    loss = loss_of(variant, *work, arguments.temperature)
    loss.backward()
    seconds = time.perf_counter() - start
    highest = peak_memory()
    assert highest > highest_before, "making the problem took more memory than the loss: use more tokens"
    torch.save(hidden.grad, arguments.gradient)
    print(json.dumps({"bytes": highest - before, "seconds": seconds, "loss": loss.item()}))


def compare(arguments: argparse.Namespace, folder: Path) -> bool:
    """Run both variants in turn, print a table, and return whether the goals are met."""
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(arguments.repeats):
        for variant in VARIANTS:
            line = [sys.executable, __file__, "--variant", variant, "--gradient", str(folder / variant)]
            line += [f"--{name}={getattr(arguments, name)}" for name in ("tokens", "vocabulary", "width", "temperature")]
            done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
            found[variant].append(json.loads(done.stdout))
    naive, chunked = (
        {name: statistics.median(run[name] for run in found[variant]) for name in ("bytes", "seconds", "loss")}
        for variant in VARIANTS
    )
    gradients = [torch.load(folder / variant, weights_only=True).double() for variant in VARIANTS]
    memory, duration = chunked["bytes"] / naive["bytes"], chunked["seconds"] / naive["seconds"]
    value_error = abs(chunked["loss"] - naive["loss"]) / abs(naive["loss"])
    gradient_error = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
    size = f"{arguments.tokens} tokens, vocabulary {arguments.vocabulary}, width {arguments.width}"
    print(f"{size}, temperature {arguments.temperature}, median of {arguments.repeats}")
    norms = [gradient.norm() for gradient in gradients]
    print(f"{'':18}{'naive':>10}{'chunked':>10}{'ratio':>10}{'goal':>10}")
    print(f"{'peak memory, MiB':18}{naive['bytes'] / MIB:10.0f}{chunked['bytes'] / MIB:10.0f}{memory:10.3f}{MEMORY_GOAL:10.2f}")
    print(f"{'time, s':18}{naive['seconds']:10.2f}{chunked['seconds']:10.2f}{duration:10.2f}{TIME_GOAL:10.2f}")
    print(f"{'':18}{'':20}{'error':>10}{'goal':>10}")
    print(f"{'loss':18}{naive['loss']:10.5f}{chunked['loss']:10.5f}{value_error:10.1e}{ERROR_GOAL:10.0e}")
    print(f"{'gradient, norm':18}{norms[0]:10.6f}{norms[1]:10.6f}{gradient_error:10.1e}{ERROR_GOAL:10.0e}")
    return memory <= MEMORY_GOAL and duration <= TIME_GOAL and max(value_error, gradient_error) <= ERROR_GOAL


def main() -> None:
    """Parse the command line; measure one variant, or compare both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 2048), ("vocabulary", 151936), ("width", 1024), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--gradient", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        measure(arguments.variant, arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        met = compare(arguments, Path(folder))
    raise SystemExit(0 if met else 1)


if __name__ == "__main__":
    main()
