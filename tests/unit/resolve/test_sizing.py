"""The arithmetic of memory: what it must say of large models, what each term follows, and that it agrees with the stages."""

import contextlib
import inspect
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from components.core import perplexity
from components.distill import loss
from components.distill.config import DistillConfig
from components.distill_distributed import job
from components.resolve import sizing
from components.resolve.shape import llama_tensors, shape_of
from components.resolve.sizing import GIB, STAGES, distill, limit, prune, quantize, total
from pipelines import pods
from pipelines.parameters import SHARED
from pipelines.size_tables import MODELS, USABLE, defaults, distillation, gpus_needed

SMALLEST, LARGEST = MODELS["Qwen3-0.6B"], MODELS["Llama-3.1-70B"]
ON_CPU = {f"{stage}_gpus": 0 for stage in STAGES}


def qwen(blocks=28, width=1024, vocabulary=151936):
    """A model like Qwen3-0.6B, of another size."""
    return shape_of(llama_tensors(blocks, width, 3 * width, 16, 8, 128, vocabulary, tied=True))


def run_with(**changes):
    """The parameters of a run on one pod with the defaults, but for some."""
    return defaults("compress") | changes


@pytest.mark.parametrize(
    ("needed", "text"),
    [(1, "1Gi"), (GIB, "1Gi"), (GIB + 1, "2Gi"), (2.5 * GIB, "3Gi"), (9 * GIB, "12Gi"), (97 * GIB, "128Gi")],
)
def test_a_limit_is_rounded_up_in_coarse_steps(needed, text):
    assert limit(needed) == text


def test_a_small_change_of_a_model_changes_no_limit():
    """Otherwise later stages would not come from KFP's cache."""
    for need in STAGES.values():
        limits = {limit(total(need(qwen(vocabulary=151936 + more), run_with()).host)) for more in range(0, 1000, 100)}
        assert len(limits) == 1


@pytest.mark.parametrize("changes", [{"prune_effort": "best"}, {"prune_target": "dense"}, {"prune_reconstruct": "block"}])
def test_dense_blocks_beside_the_pruned_ones_take_memory_and_disk(changes):
    plain, more = (prune(SMALLEST, run_with(**given)) for given in ({}, changes))
    assert total(more.gpu) > total(plain.gpu)
    assert more.disk["hidden states"] > plain.disk["hidden states"]


def test_allocations_that_are_tried_take_memory_and_a_search_disk():
    plain, owl, search = (
        prune(SMALLEST, run_with(prune_allocation=name, eval_blocks=1)) for name in ("uniform", "owl", "search")
    )
    assert total(plain.gpu) < total(owl.gpu) == total(search.gpu)
    assert plain.disk["hidden states"] == owl.disk["hidden states"] < search.disk["hidden states"]


def test_constants_are_those_of_the_stages():
    assert (perplexity.TOKENS_PER_FORWARD, perplexity.TOKENS_PER_CHUNK) == (sizing.TOKENS_PER_FORWARD, sizing.TOKENS_PER_CHUNK)
    assert loss.CHUNK_BYTES == sizing.CHUNK_BYTES
    assert DistillConfig.keep_checkpoints == sizing.KEPT_CHECKPOINTS
    assert f"{sizing.SHARED_MEMORY // GIB}Gi" == job.SHARED_MEMORY
    assert f'size_limit="{job.SHARED_MEMORY}"' in inspect.getsource(pods)


def test_70_billion_parameters_are_pruned_on_one_gpu_and_64_gb_of_memory():
    need = prune(LARGEST, run_with())
    assert total(need.gpu) < USABLE
    assert total(need.host) < 64e9


def test_70_billion_parameters_are_distilled_on_32_gpus():
    assert gpus_needed(LARGEST, distill_gradient_checkpointing=True) == 32
    assert gpus_needed(LARGEST) == 64  # more activations than there is room for


@pytest.mark.parametrize("stage", [prune, quantize])
@pytest.mark.parametrize("changes", [{}, ON_CPU])
def test_depth_takes_disk_but_no_memory_where_blocks_are_loaded_one_by_one(stage, changes):
    run = run_with(**changes, eval_blocks=1)
    few, many = (stage(qwen(blocks=blocks), run) for blocks in (28, 280))
    assert many.gpu == few.gpu
    without_cache = [need.host | {"files just written": 0} for need in (few, many)]
    assert without_cache[0] == without_cache[1]
    assert total(many.disk) > 5 * total(few.disk)


def test_twice_the_processes_hold_half_of_what_is_divided():
    half, whole = (distill(LARGEST, distillation(gpus, distill_mask="admm")).gpu for gpus in (64, 32))
    divided = ("trained weights", "their gradient", "Adam's moments", "mask", "ADMM's variables", "teacher's blocks")
    assert {term: 2 * half[term] for term in divided} == {term: whole[term] for term in divided}
    assert {term: half[term] for term in half if term not in divided} == {
        term: whole[term] for term in whole if term not in divided
    }


def test_more_processes_on_a_node_take_more_of_its_memory():
    four, eight = (distill(LARGEST, distillation(gpus)).host for gpus in (4, 8))
    each = four.keys() - {"files just written", "shared memory"}
    assert {term: 2 * four[term] for term in each} == {term: eight[term] for term in each}


def test_an_elastic_job_is_sized_for_its_fewest_nodes():
    fixed = distill(LARGEST, distillation(32))
    assert distill(LARGEST, distillation(64, distill_elastic="4:16")) == fixed


@pytest.mark.parametrize(
    ("changes", "less", "more"),
    [
        ({"distill_gradient_checkpointing": True}, "activations", None),
        ({"distill_teacher_cache": "always"}, "teacher's blocks", None),
        ({"distill_epochs": 2}, "teacher's blocks", None),
        ({"distill_keep_best": True}, None, "best weights"),
        ({"distill_mask": "admm"}, None, "ADMM's variables"),
        ({"distill_batch_size": 4}, None, "activations"),
        ({"seq_len": 2048}, None, "activations"),
        ({"dtype": "float32"}, "weights in the number format", "teacher's blocks"),
    ],
)
def test_a_setting_of_distillation_changes_its_term(changes, less, more):
    before, after = (distill(MODELS["Qwen3-1.7B"], run_with(**each)).gpu for each in ({}, changes))
    assert less is None or after[less] < before[less]
    assert more is None or after[more] > before[more]


def test_deepspeed_divides_what_the_optimizer_has_unless_a_file_decides():
    processes = {"distill_gpus": 8, "distill_nproc_per_node": 8, "distill_backend": "deepspeed"}
    bundled, own = (distill(SMALLEST, run_with(**processes, distill_deepspeed_config=file)).gpu for file in ("", "x.json"))
    assert 8 * bundled["Adam's moments"] == own["Adam's moments"]
    assert bundled["teacher's blocks"] == own["teacher's blocks"]


@pytest.mark.parametrize("stage", STAGES)
def test_on_a_cpu_the_pod_holds_what_a_gpu_would(stage):
    on_gpu = STAGES[stage](SMALLEST, run_with(dtype="float32"))
    on_cpu = STAGES[stage](SMALLEST, run_with(dtype="float32", **ON_CPU))
    assert on_cpu.gpu == {}
    assert {term: on_cpu.host[term] for term in on_gpu.gpu if term != "CUDA and its libraries"} == {
        term: needed for term, needed in on_gpu.gpu.items() if term != "CUDA and its libraries"
    }


def test_without_evaluation_there_are_no_logits_to_hold():
    wordy = replace(SMALLEST, vocabulary=10 * SMALLEST.vocabulary)  # so that they are what takes most
    assert "logits" in quantize(wordy, run_with(**ON_CPU)).host
    assert "logits" not in quantize(wordy, run_with(**ON_CPU, skip_ppl_eval=True)).host
    assert quantize(SMALLEST, run_with(skip_ppl_eval=True)).disk["hidden states"] == 0


class Watched(dict):
    """Parameters that note which of them are read."""

    def __init__(self, *values):
        super().__init__(*values)
        self.read = set()

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.read.add(name)
        return super().get(name, default)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stages_memory_follows_its_own_parameters(stage):
    """Otherwise a change for one stage would take the others out of the cache."""
    run = Watched(run_with())
    STAGES[stage](SMALLEST, run)
    assert run.read
    assert {name for name in run.read if not name.startswith(f"{stage}_")} <= {*SHARED}


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [(4, 256, 768, 4, 2, 128), (3, 512, 1792, 8, 2, 64)], ids=str)
def test_activations_are_those_that_a_forward_pass_keeps(kind, dtype, sizes):
    tokens, vocabulary = 96, 64
    blocks, width, intermediate, heads, kv_heads, head_width = sizes
    config = kind(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=intermediate, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_width,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).train()
    for weight in model.parameters():
        weight.requires_grad_(weight.ndim == 2 and weight is not model.get_input_embeddings().weight)
    weights = {weight.data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # place → tensor, held so that no other takes its place

    def keep(tensor):
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            kept[place] = tensor
        return tensor

    halved = torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()
    with halved, saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=torch.arange(tokens)[None] % vocabulary, use_cache=False)
    shape = shape_of(llama_tensors(*sizes, vocabulary, tied=True))
    size = 2 if dtype == "bfloat16" else 4
    copies = shape.inside * size if dtype == "bfloat16" else 0  # of the weights, which are another term
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) - copies
    expected = sizing.activations(shape, run_with(seq_len=tokens, distill_batch_size=1), size)
    assert measured <= expected <= 1.5 * measured
