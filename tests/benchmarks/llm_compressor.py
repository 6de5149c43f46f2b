"""Prune a model by llm-compressor's SparseGPT: a row of prune.py, run by the Python of an environment that has llmcompressor.

    python tests/benchmarks/llm_compressor.py MODEL IDS OUTPUT

MODEL is a folder with a checkpoint, IDS a safetensors file with the calibration tokens `ids` [rows, seq_len], OUTPUT the folder
for the pruned checkpoint.
"""

import resource
import sys

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def main() -> None:
    """Prune and save; print the peak memory in bytes as the last line."""
    folder, ids, output = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = load_file(ids)["ids"].tolist()
    text = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    # `Linear` alone would prune the head too
    recipe = SparseGPTModifier(sparsity=0.7, mask_structure="0:0", targets=[r"re:model\.layers\..*_proj$"])
    oneshot(model=model, dataset=text, recipe=recipe, max_seq_length=len(rows[0]), num_calibration_samples=len(rows))
    model.save_pretrained(output, save_compressed=False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    main()
