"""Prune, quantize and evaluate do not hold a whole model: their peaks, in processes of their own, on one of many blocks."""

import pytest

from tests.benchmarks.memory import peak
from tests.benchmarks.models import make_model

LAYERS = 24
EVALUATION = ["--eval_blocks=2", "--eval_seq_len=64", "--eval_data=builtin:python-docs"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A model that takes 1.5 GB in float32, 63 MB of it in a block."""
    folder = tmp_path_factory.mktemp("memory") / "dense"
    assert make_model(folder, LAYERS, vocabulary=1024) > 0.75e9
    return folder


def test_stages_hold_a_few_blocks_alone(dense, tmp_path):
    pruned, half = tmp_path / "pruned", 0.75e9
    calibration = ["--calibration_data=builtin:python-docs", "--nsamples=2", "--seq_len=64", "--method=magnitude"]
    commands = {
        "prune": [f"--dense_model={dense}", f"--output_dir={pruned}", *calibration, *EVALUATION],
        "quantize": [f"--model_dir={pruned}", f"--output_dir={tmp_path / 'int8'}", *EVALUATION],
        "evaluate": [f"--model_dir={dense}", *EVALUATION],
    }
    taken = {stage: peak(stage, flags) - peak(stage, []) for stage, flags in commands.items()}
    print(taken)
    assert max(taken.values()) < half, taken
