"""How much memory and disk the stages take, term by term, from a model's sizes and a run's parameters.

Prune, quantize and the measuring of perplexity hold one block, what lies outside the blocks, and a batch of hidden states; the
hidden states of whole texts lie on disk. Distillation holds whole models, divided among its processes:

    trained weights and gradient (float32), Adam's two moments (float32), mask (1 byte):  17 bytes per trained weight
    what ADMM keeps of the weights that its mask has and of its dual variable (float32), if it chooses the mask:  4 more
    weights that do not train, outside the blocks: float32 for the student, the number format for the teacher; on every process

On a GPU all of this lies in its memory, and the host holds a part of the weights while it is read or written. On a CPU the host
holds it all. A stage has phases, of which the one that takes most decides.

On a CPU, the peaks of all stages were 0.88 to 1.06 times the sums of the terms, for a model of four of Qwen3-0.6B's blocks,
without what a process takes; tests/benchmarks/memory.py compares them. What is said of GPUs is not measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from components.resolve.shape import Shape

Terms = dict[str, float]  # term → bytes

GIB = 2**30
MARGIN = 1.1  # for what an allocator loses to pieces that it cannot join
PROCESS, PROCESS_ON_GPU = 1.5e9, 4e9  # a process with its imports, tokens and threads; with CUDA's libraries
DEVICE = 1.5e9  # of a GPU: CUDA's context, workspaces of its libraries, buffers of NCCL
SHARED_MEMORY = 8 * GIB  # what the processes of a pod may write to /dev/shm
FILE_CACHE = 4e9  # files that have just been written and will soon be read; Linux can do with less
EVAL_TOKENS, TRAIN_TOKENS = 300_000, 2_500_000  # of WikiText-2, where a run takes whole texts
KEPT_CHECKPOINTS = 2

# as in core/perplexity.py and distill/loss.py, which need torch
TOKENS_PER_FORWARD, TOKENS_PER_CHUNK = 2048, 128
CHUNK_BYTES = 512 * 2**20
LOGIT_BYTES = 10  # of each logit when perplexity is measured: in the number format, in float32, and its logarithm
COMPARED_BYTES = 24  # of each logit when allocations are compared: those of two models, and the divergence
FACTORING = 6  # matrices [in, in] in float32 while SparseGPT factors the inverse of a Hessian: copies, factors, their transpose
PRUNING = 8  # matrices in float32 while layers with the same inputs are pruned: four of each of two
TRAINING = 20  # bytes for each weight of a block that is trained: itself in float32, gradients, Adam's moments, what it was
TRIED = {"uniform": 0, "slope": 1.5, "owl": 1, "search": 4}  # times the calibration text that comparing allocations keeps
CHECKING = 3  # matrices in float32 while one of them is checked or quantized
ROUNDING = 24  # bytes for each weight of embedding and head while they become integers of a packed format
NORMS = 5  # hidden states in float32 that a block keeps for the backward pass, besides inputs and outputs of its matrices


@dataclass(frozen=True)
class Need:
    """What a stage takes, by term, in bytes.

    Attributes:
        host: memory of its pod, or of each node.
        gpu: memory of each of its GPUs; empty on a CPU.
        disk: of its pod, or of each node, with the inputs that KFP puts there.
    """

    host: Terms
    gpu: Terms
    disk: Terms


def total(terms: Terms) -> float:
    """Bytes of all terms, with a margin."""
    return MARGIN * sum(terms.values())


def limit(needed: float) -> str:
    """The memory limit for some bytes in Kubernetes' format, rounded up in steps so coarse that small changes change nothing.

    The steps are 1, 2, 3, 4, 6, 8, 12, 16, … GiB.
    """
    steps = (GIB * size << power for power in range(64) for size in ((2, 3) if power else (1, 2, 3)))
    return f"{next(size for size in steps if size >= needed) // GIB}Gi"


def prune(shape: Shape, run: Mapping[str, Any]) -> Need:
    """What the prune stage takes.

    Args:
        shape: the model's sizes.
        run: the run's parameters by name, as `pipelines.checks.check_run` returns them.
    """
    size = number_bytes(run, "prune")
    more = run["prune_effort"] != "fast" or run["prune_target"] == "dense" or run["prune_reconstruct"] == "block"
    uneven = run["prune_allocation"] != "uniform"
    pruning = {
        "a block": shape.block * size,
        "its Hessians": shape.hessians * 4,
        "the dense block and its inputs": shape.block * size + shape.hessians * 4 if more or uneven else 0,
        "training the block": TRAINING * shape.block + batch(shape, run, size) * 2 if more else 0,
        "the inverse of a Hessian": FACTORING * shape.widest**2 * 4,
        "matrices that are pruned": PRUNING * shape.matrix * 4,
        "a batch": batch(shape, run, size),
    }
    host = {"masks of a block": shape.block} | loading(shape, size, run["prune_gpus"])
    text = run["nsamples"] * run["seq_len"]
    tried = TRIED[run["prune_allocation"]] * text
    disk = {
        "dense model": shape.stored,
        "pruned model and its parts": 2 * shape.parameters * size,
        "mask and its parts": 2 * shape.inside / 8,
        "hidden states": 2 * max(text * (2 if more else 1) + 2 * evaluation_tokens(run), tried) * shape.width * size,
    }
    comparing = {"weights outside the blocks": shape.outside * size, "logits": logits(shape, COMPARED_BYTES) if uneven else 0}
    held = largest(pruning, comparing, *walking(shape, run, size))
    return placed(run["prune_gpus"], held, host, disk, run["prune_nproc_per_node"])


def quantize(shape: Shape, run: Mapping[str, Any]) -> Need:
    """What the stage takes that quantizes to one format. Arguments as for `prune`."""
    size, gpus = number_bytes(run, "quantize"), run["quantize_gpus"]
    packed = {"packed-int8", "packed-int4"} & {*run["quantize_formats"]}
    by_gptq = (
        packed
        if run["quantize_rounding"] == "gptq"
        else packed & {"packed-int4"}
        if run["quantize_rounding"] == "auto"
        else set()
    )
    quantizing: Terms = {  # int8 and fp8 on the CPU in any case
        "a block": shape.block * size,
        "the quantized block": shape.block,
        "masks of a block": shape.block,
        "a matrix that is quantized": CHECKING * shape.matrix * 4,
    }
    rounding: Terms = {
        "its Hessians": shape.hessians * 4,
        "the inverse of a Hessian": FACTORING * shape.widest**2 * 4,
        "a batch": batch(shape, run, size),
    }
    words: Terms = {"embedding and head while they are rounded": ROUNDING * shape.outside}
    quantizing = largest(quantizing | (rounding if by_gptq else {}), words if packed else {})
    measuring = {} if run["skip_ppl_eval"] else largest(*walking(shape, run, size))
    reading = loading(shape, size, gpus)
    text = run["nsamples"] * run["seq_len"] if by_gptq else 0
    disk = {
        "distilled model and mask": shape.parameters * size + shape.inside / 8,
        "quantized model and its parts": 2 * (shape.inside + shape.outside * size),
        "hidden states": 2 * max(evaluation_tokens(run), text) * shape.width * size,
    }
    if gpus:
        return placed(gpus, largest(measuring, quantizing if packed else {}), largest(quantizing, reading), disk)
    return placed(gpus, largest(quantizing, measuring), reading, disk)


def distill(shape: Shape, run: Mapping[str, Any]) -> Need:
    """What the distill stage takes, or each node if there are several. Arguments as for `prune`."""
    size, gpus, here = number_bytes(run, "distill"), run["distill_gpus"], run["distill_nproc_per_node"]
    backend = run.get("distill_backend", "fsdp")  # the only one on many nodes
    nodes = int(run.get("distill_elastic", "").partition(":")[0] or run.get("distill_nodes", 1))
    shards = here * nodes if backend == "fsdp" else 1
    # DeepSpeed's bundled settings divide what the optimizer has; what a user's own file says is not known here
    states = here if backend == "deepspeed" and not run["distill_deepspeed_config"] else shards
    copied = size if size < 4 else 0  # what is float32 anyway is not copied
    cached = run["distill_teacher_cache"] == "always" or (
        run["distill_teacher_cache"] == "auto" and run["distill_epochs"] > 1 and not run["distill_alpha_hidden"]
    )
    chooses = run["distill_mask"] == "admm"
    held = {
        "trained weights": shape.inside * 4 / states,
        "their gradient": shape.inside * 4 / states,
        "Adam's moments": shape.inside * 8 / states,
        "mask": shape.inside / shards,
        "ADMM's variables": shape.inside * 4 / shards if chooses else 0,
        "best weights": shape.inside * 4 / shards if run["distill_keep_best"] else 0,
        "student outside the blocks": shape.outside * 4 + shape.head * copied,
        "teacher's blocks": 0 if cached else shape.inside * size / shards,
        "teacher outside the blocks": shape.head * size if cached else shape.outside * size,
    }
    training = {
        # FSDP gathers a block and the next one, and adds up the gradient of one; without it, all are there if they are needed
        "weights in the number format": shape.block * (3 * size + 4) if backend == "fsdp" else shape.inside * copied,
        "activations": activations(shape, run, size),
        "logits": max(CHUNK_BYTES, logits(shape)),
    }
    host = {"matrices that are checked": CHECKING * shape.matrix * 4} | loading(shape, 4, gpus)
    disk = {
        "dense model": shape.stored,
        "pruned model and mask": shape.parameters * size + shape.inside / 8,
        "distilled model and its parts": 2 * shape.parameters * size,
        "its mask and the parts": 2 * shape.inside / 8,
        "checkpoints": KEPT_CHECKPOINTS * shape.inside * (17 if chooses else 12) / nodes,
        "teacher's states": TRAIN_TOKENS * shape.width * 2 if cached else 0,
        "hidden states": 2 * evaluation_tokens(run) * shape.width * size,
    }
    return placed(gpus, held | largest(training, *walking(shape, run, size)), host, disk, here)


STAGES = {"prune": prune, "distill": distill, "quantize": quantize}


def number_bytes(run: Mapping[str, Any], stage: str) -> int:
    """Bytes of a number in the format in which a stage computes."""
    automatic = 2 if run[f"{stage}_gpus"] else 4
    return {"auto": automatic, "float32": 4}.get(run["dtype"], 2)


def evaluation_tokens(run: Mapping[str, Any]) -> int:
    """Tokens on which perplexity is measured."""
    return 0 if run["skip_ppl_eval"] else run["eval_blocks"] * run["eval_seq_len"] or EVAL_TOKENS


def largest(*phases: Terms) -> Terms:
    """The phase that takes most."""
    return max(phases, key=lambda terms: sum(terms.values()))


def walking(shape: Shape, run: Mapping[str, Any], size: int) -> tuple[Terms, Terms]:
    """The beginning and the end of a walk: the model is checked, and perplexity is measured."""
    outside = {"weights outside the blocks": shape.outside * size}
    return (
        outside | {"a block": shape.block * size, "a batch": batch(shape, run, size)},
        outside | {"logits": logits(shape)},
    )


def batch(shape: Shape, run: Mapping[str, Any], size: int) -> float:
    """Bytes of the texts that go through a block together: inputs and outputs of its matrices, and what attention may see."""
    longest: int = max(run["seq_len"], run["eval_seq_len"])
    tokens = max(TOKENS_PER_FORWARD, longest)
    return tokens * (shape.features * size + shape.widest * 4) + longest**2 * size


def logits(shape: Shape, each: int = LOGIT_BYTES) -> float:
    """Bytes of the logits of a chunk of tokens when perplexity is measured, or of work that takes `each` bytes of a logit."""
    return TOKENS_PER_CHUNK * shape.vocabulary * each


def activations(shape: Shape, run: Mapping[str, Any], size: int) -> float:
    """Bytes that the backward pass of distillation needs: of each block, or of one and the hidden states before each.

    With alpha_hidden, the teacher's states after each block and their differences from the student's come on top.
    """
    tokens: int = max(1, run["distill_batch_size"]) * run["seq_len"]
    block = shape.features * size + NORMS * shape.width * 4
    kept = block + shape.blocks * shape.width * 4 if run["distill_gradient_checkpointing"] else shape.blocks * block
    compared = shape.blocks * shape.width * (size + 4) if run["distill_alpha_hidden"] else 0
    return tokens * (kept + compared)


def loading(shape: Shape, size: int, gpus: int) -> Terms:
    """What the host holds of a part of the weights while it is read and, for a GPU, converted."""
    part = max(shape.block, shape.outside)
    read = {"a part of the model as it is stored": part * shape.stored / shape.parameters}
    return read | ({"the part in the number format": part * size} if gpus else {})


def placed(gpus: int, device: Terms, host: Terms, disk: Terms, processes: int = 1) -> Need:
    """What a stage takes.

    Args:
        gpus: how many it has.
        device: what each process holds where it computes.
        host: what each process holds on the host besides.
        disk: what lies on the disk.
        processes: how many there are in a pod.
    """
    own = {"a process": PROCESS_ON_GPU if gpus else PROCESS} | host | ({} if gpus else device)
    shared = {"files just written": min(FILE_CACHE, sum(disk.values()))}
    if processes > 1:
        shared |= {"shared memory": SHARED_MEMORY}
    on_gpu = {"CUDA and its libraries": DEVICE} | device if gpus else {}
    return Need({term: processes * needed for term, needed in own.items()} | shared, on_gpu, disk)
