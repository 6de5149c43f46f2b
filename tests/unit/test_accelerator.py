"""Every stage on a fake accelerator: the same numbers as on the CPU, and no tensor is forgotten there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import save_tiny

ROOT = Path(__file__).parents[2]
PROGRAM = """
import importlib, json, sys
from tests.fake_accelerator import installed

def run(device, place, dense, corpus, dtype):
    from components.distill.config import DistillConfig
    from components.evaluate.config import EvaluateConfig
    from components.prune.config import PruneConfig
    from components.quantize.config import QuantizeConfig

    for module in ("prune.stage", "quantize.stage", "evaluate.stage", "distill.launch"):
        importlib.import_module(f"components.{module}").pick_device = lambda gpus: device
    common = {"eval_data": corpus, "eval_blocks": 4, "eval_seq_len": 32, "dtype": dtype}
    pruned, distilled, quantized = (f"{place}/{name}" for name in ("pruned", "distilled", "quantized"))
    found = {}
    def stage(name, config, what=""):
        found[what or name] = importlib.import_module(f"components.{name}.stage").run(config).measured["perplexity"]
    stage("prune", PruneConfig(
        dense_model=dense, output_dir=pruned, calibration_data=corpus, nsamples=32, seq_len=32, damping=1, **common))
    stage("distill", DistillConfig(
        teacher_model=dense, student_model=pruned, mask_file=pruned, output_dir=distilled, train_data=corpus, seq_len=32,
        batch_size=0, grad_accum_steps=4, max_steps=3, epochs=2, learning_rate=1e-3, teacher_cache=cache, **common))
    stage("quantize", QuantizeConfig(model_dir=distilled, output_dir=quantized, mask_file=pruned, **common))
    stage("evaluate", EvaluateConfig(model_dir=quantized, **common))
    texts = {"calibration_data": corpus, "nsamples": 32, "seq_len": 32}
    stage("quantize", QuantizeConfig(
        model_dir=distilled, output_dir=f"{place}/packed", mask_file=pruned, format="packed-int4", **texts, **common), "packed")
    return found

place, dense, corpus, dtype, cache, where = sys.argv[1:]
import torch
if where == "cpu":
    print(json.dumps(run(torch.device("cpu"), place, dense, corpus, dtype)))
    raise SystemExit
with installed() as device:
    try:
        torch.ones(2, device=device) + torch.ones(2)
        raise SystemExit("devices can be mixed")
    except RuntimeError:
        pass
    print(json.dumps(run(device, place, dense, corpus, dtype)))
"""


def perplexities(*arguments):
    """What the stages measure in a process of its own: torch counts devices once."""
    # modes of torch end at the border of a thread, so the loader must use none
    environment = os.environ | {"HF_DEACTIVATE_ASYNC_LOAD": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize(("dtype", "cache", "rel"), [("float32", "always", 1e-4), ("bfloat16", "never", 5e-2)])
def test_all_stages_run_on_an_accelerator_as_on_the_cpu(tmp_path, corpus, dtype, cache, rel):
    dense = save_tiny(tmp_path / "dense", "qwen3", tied=True)
    on_cpu, on_fake = (perplexities(tmp_path / where, dense, corpus, dtype, cache, where) for where in ("cpu", "fake"))
    assert on_fake.keys() == on_cpu.keys() == {"prune", "distill", "quantize", "evaluate", "packed"}
    for stage, found in on_fake.items():  # a weight half-way between two integers may be rounded either way
        assert found == pytest.approx(on_cpu[stage], rel=rel if stage in ("prune", "distill") else 10 * rel), stage
