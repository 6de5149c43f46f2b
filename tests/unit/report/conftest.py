"""Records as the stages leave them, and models with histories made of them."""

from pathlib import Path
from typing import Any

from components.core.files import write_json
from components.core.history import HISTORY_FILE, StageRecord

TEXT = "f" * 64
SOURCE = {"model_id": "some/model", "revision": "abc123"}
PASSED = {"passed": True, "sparsity": 0.7, "violations": 0, "max_abs": 0.0, "eps": 0.0, "tensors": {}}
KINDS = ("self_attn.q_proj", "mlp.down_proj")
Records = dict[str, dict[str, Any]]


def full() -> Records:
    """Records of a whole run by name; the perplexities are the only numbers with two decimals."""
    layers = [
        {
            "name": f"model.layers.{block}.{kind}.weight",
            "block": block,
            "linear": kind,
            "sparsity": 0.7,
            "relative_error": error,
        }
        for block in range(3)
        for kind, error in zip(KINDS, (0.01 + block, 0.02 + block), strict=True)
    ]
    steps = [{"step": step, "loss": 3 / step, "kd_loss": 2 / step, "ce_loss": 4 / step} for step in range(1, 6)]
    return {
        "dense": {
            "stage": "fetch",
            "parameters": SOURCE,
            "measured": {
                "bytes": 4_000_000,
                "seconds": 12.0,
                "peak_memory_bytes": 900_000_000,
                "parameters": 1_000_000,
            },
            "versions": {"torch": "1.0"},
        },
        "sparse": {
            "stage": "prune",
            "parameters": {"dense_model": "/somewhere/dense", "sparsity": 0.7},
            "measured": {
                "perplexity_before": 20.25,
                "perplexity": 90.75,
                "perplexity_text": TEXT,
                "sparsity": 0.7,
                "bytes": 4_000_000,
                "seconds": 61.0,
                "peak_memory_bytes": 2_000_000_000,
            },
            "sparse_integrity_check": PASSED,
            "versions": {"torch": "1.0"},
            "details": {"layers": layers},
        },
        "student": {
            "stage": "distill",
            "parameters": {"epochs": 2},
            "measured": {
                "perplexity_before": 90.75,
                "perplexity": 40.5,
                "perplexity_text": TEXT,
                "sparsity": 0.7,
                "bytes": 4_000_000,
                "seconds": 3700.0,
            },
            "sparse_integrity_check": PASSED,
            "versions": {"torch": "2.0"},
            "details": {"steps": steps, "epochs": [{"epoch": 1, "eval_ppl": 50.5}, {"epoch": 2, "eval_ppl": 40.5}]},
        },
        "int8": {
            "stage": "quantize",
            "parameters": {"format": "int8"},
            "measured": {"perplexity": 41.25, "perplexity_text": TEXT, "sparsity": 0.71, "bytes": 1_000_000},
            "sparse_integrity_check": PASSED,
        },
        "fp8": {
            "stage": "quantize",
            "parameters": {"format": "fp8"},
            "measured": {"perplexity": 42.25, "perplexity_text": TEXT, "sparsity": 0.72, "bytes": 1_100_000},
            "sparse_integrity_check": PASSED,
        },
    }


def as_record(record: dict[str, Any]) -> StageRecord:
    fields: dict[str, Any] = {"parameters": {}, **record}
    return StageRecord(**fields)


def save_model(folder: Path, records: list[StageRecord], source: dict[str, str] = SOURCE) -> str:
    """Write the history of a model with these steps, and their whole records."""
    folder.mkdir(parents=True)
    history = {"format": 1, "source": source, "steps": [record.summary() for record in records]}
    write_json(folder / HISTORY_FILE, history)
    for record in records:
        record.save(folder / f"{record.stage}_stats.json")
    return str(folder)


def write(records: Records, folder: Path, source: dict[str, str] = SOURCE) -> list[str]:
    """Write models with these records: one for each that was quantized, with all other steps before it; return the folders."""
    made = loaded(records)
    before = [record for record in made if record.stage != "quantize"]
    last = [[record] for record in made if record.stage == "quantize"] or [[]]
    return [save_model(folder / f"model{index}", before + own, source) for index, own in enumerate(last)]


def loaded(records: Records) -> list[StageRecord]:
    return [as_record(record) for record in records.values()]
