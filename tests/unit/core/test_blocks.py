"""What blocks of a decoder must be, and what of a model lies outside them."""

import pytest
from torch import nn

from components.core.blocks import check_blocks, find_blocks, report_dense
from tests.conftest import tiny_model


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
