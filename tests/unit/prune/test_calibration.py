"""The replay of single blocks, and models for which it would differ from the model itself."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from components.core.blocks import check_blocks, find_blocks, report_dense
from components.prune.calibration import capture, check_replay
from tests.conftest import tiny_model


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, hidden, shift):
        return hidden + self.linear(hidden) + shift


class Once(Block):
    """A block that can be run once."""

    used = False

    def forward(self, hidden, shift):
        if self.used:
            raise KeyError("keys of another block")
        self.used = True
        return super().forward(hidden, shift)


class Passing(nn.Module):
    """Each block is called with something that the one before it has computed."""

    def __init__(self, passes: bool):
        super().__init__()
        self.embedding = nn.Embedding(256, 16)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.passes = passes

    def forward(self, input_ids, use_cache):
        hidden = self.embedding(input_ids)
        for block in self.layers:
            hidden = block(hidden, shift=hidden.mean() if self.passes else torch.tensor(0.5))
        return hidden


def replay(model, base):
    ids = torch.randint(256, (4, 8), generator=torch.Generator().manual_seed(0))
    blocks = find_blocks("dense_model", model)[1]
    holder = SimpleNamespace(base_model=base, parameters=model.parameters)
    check_replay(holder, blocks, capture(holder, blocks, ids)[0], ids)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_blocks_of_a_usual_model_can_be_replayed(kind):
    model = tiny_model(kind)
    replay(model, model.base_model)


def test_blocks_that_are_called_with_results_of_others_are_refused():
    torch.manual_seed(0)
    independent, passing = Passing(False), Passing(True)
    replay(independent, independent)
    with pytest.raises(
        ValueError, match="^dense_model must have blocks that depend on each other by their hidden states alone"
    ):
        replay(passing, passing)


def test_a_block_that_cannot_be_replayed_is_refused_in_one_line():
    model = Passing(False)
    model.layers[1] = Once()
    with pytest.raises(ValueError, match="^dense_model must have blocks .* cannot be pruned: 'keys of another block'$"):
        replay(model, model)


def test_a_block_with_the_weights_of_another_is_refused():
    model = tiny_model()
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    rule = "^dense_model must have blocks with weights of their own; model.layers.1 shares mlp.up_proj with model.layers.0$"
    with pytest.raises(ValueError, match=rule):
        check_blocks("dense_model", *find_blocks("dense_model", model))


def test_a_matrix_without_weights_is_refused():
    model = tiny_model()
    model.model.layers[1].mlp.up_proj = nn.Linear(0, 4, bias=False)
    rule = "^dense_model must have weights in all its matrices; model.layers.1.mlp.up_proj has none$"
    with pytest.raises(ValueError, match=rule):
        check_blocks("dense_model", *find_blocks("dense_model", model))


def test_matrices_that_stay_dense_are_counted_and_named(capsys):
    model = tiny_model()
    names = [name for name, weight in model.named_parameters() if "layers" in name and weight.ndim == 2]
    assert report_dense(model, names) == {}
    model.extra = nn.Conv1d(4, 8, 3)
    assert report_dense(model, names[1:]) == {"dense_weights": 64 * 64 + 4 * 8 * 3}
    assert capsys.readouterr().out == f"4192 weights stay dense: {names[0]}, extra.weight\n"
