"""The walk through a checkpoint: what it computes, models it is wrong for, and what a killed walk goes on from."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from components.core.perplexity import perplexity
from components.core.walk.activations import Activations
from components.core.walk.measure import measure
from components.core.walk.stream import Batch, batches_of, check_finite, run_block
from components.core.walk.walk import ReplayError, Walk
from components.core.walk.work import Work, work_key
from tests.conftest import SMALL, VOCABULARY, save_tiny, tiny_model
from tests.walks import CPU, InMemory, walk_of

FLOAT = torch.float32


def ids(count: int, seq_len: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (count, seq_len), generator=torch.Generator().manual_seed(3))


def gemma3(**changes):
    """A model whose blocks have sliding or full attention, and are called with different masks and positions."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(**(SMALL | {"num_hidden_layers": 6, "sliding_window": 8, "sliding_window_pattern": 3} | changes))
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("make", [None, gemma3], ids=["llama-qwen3", "sliding-attention"])
def test_a_walk_gives_the_models_own_losses(model, make, tmp_path):
    model = make() if make else model
    tokens = ids(6, 24)
    walk = walk_of(model, tmp_path / "saved")
    walk.check()
    with walk.outside():
        stream = walk.record(tokens, tmp_path, "hidden", fresh=True)
    for index in range(len(walk.blocks)):
        with walk.block(index):
            walk.advance(stream, index)
    with walk.outside():
        losses = walk.losses(stream)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[:, :-1]
    wanted = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(6, -1).sum(1)
    torch.testing.assert_close(losses, wanted.double(), rtol=1e-5, atol=0)
    assert "forward" not in vars(walk.blocks[1])  # nothing is left patched
    assert {parameter.device.type for parameter in walk.model.parameters()} == {"meta"}  # nothing is left loaded


def test_only_one_block_is_loaded_at_a_time(tmp_path):
    walk = walk_of(tiny_model("qwen3", tied=True), tmp_path)
    for index in (1, 0):
        with walk.block(index) as block:
            loaded = {name for name, parameter in walk.model.named_parameters() if parameter.device.type != "meta"}
            assert loaded == {f"model.layers.{index}.{name}" for name, _ in block.named_parameters()}
    with walk.outside():
        loaded = {name for name, parameter in walk.model.named_parameters() if parameter.device.type != "meta"}
        assert loaded == {"model.embed_tokens.weight", "model.norm.weight"}
        assert walk.model.lm_head.weight is walk.model.model.embed_tokens.weight


def test_activations_that_are_not_finite_end_the_walk_with_the_layer_they_begin_at(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3, 5] = torch.inf
    folder = save_tiny(tmp_path / "saved")
    model.save_pretrained(folder)
    rule = "^dtype must hold the activations: the output of model.layers.1.self_attn.v_proj is not finite; try bfloat16$"
    with pytest.raises(ValueError, match=rule):
        measure("model_dir", folder, ids(6, 24), FLOAT, CPU, tmp_path / "work")


def test_a_block_whose_layers_are_finite_is_named_itself():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, hidden):
            return hidden + self.inner(hidden)

    batch = Batch(range(1), torch.full((1, 4, 8), 3e38), ((), {}))
    with pytest.raises(
        ValueError, match="^dtype must hold the activations: the output of layers.7 is not finite; try bfloat16$"
    ):
        check_finite(run_block(Sum(), batch), Sum(), batch, "layers.7")


def test_the_last_batch_may_be_smaller():
    assert batches_of(ids(5, 1024)) == [range(2), range(2, 4), range(4, 5)]
    assert batches_of(ids(2, 4096)) == [range(1), range(1, 2)]


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
        self.passes, self.between = passes, 1

    def forward(self, input_ids, use_cache):
        hidden = self.embedding(input_ids)
        for block in self.layers:
            hidden = block(hidden * self.between, shift=hidden.mean() if self.passes else torch.tensor(0.5))
        return SimpleNamespace(last_hidden_state=hidden)


class Model(nn.Module):
    """A causal language model with a decoder and a head."""

    base_model_prefix = "base_model"

    def __init__(self, decoder):
        super().__init__()
        self.base_model, self.head = decoder, nn.Linear(16, 256)

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.head(self.base_model(input_ids, use_cache).last_hidden_state))

    def get_input_embeddings(self):
        return self.base_model.embedding

    def get_output_embeddings(self):
        return self.head


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_blocks_of_a_usual_model_can_be_run_one_by_one(kind):
    InMemory(tiny_model(kind)).check()


RULE = "^dense_model must have blocks that depend on each other by their hidden states alone, "


def test_blocks_that_are_called_with_results_of_others_are_refused():
    torch.manual_seed(0)
    independent, passing = Passing(False), Passing(True)
    InMemory(Model(independent)).check()
    with pytest.raises(ReplayError, match=RULE + "those of Model give other results one by one"):
        InMemory(Model(passing)).check()


def test_a_block_that_cannot_be_run_again_is_refused_in_one_line():
    model = Passing(False)
    model.layers[1] = Once()
    with pytest.raises(ReplayError, match=RULE + "Model fails otherwise: 'keys of another block'$"):
        InMemory(Model(model)).check()


class Leaving(Block):
    """A block that reads what the one before it has left in an object that all are called with."""

    def forward(self, hidden, shift, left):
        hidden = super().forward(hidden, shift) + left.get("mean", 0.0)
        left["mean"] = hidden.mean()
        return hidden


def test_blocks_that_leave_something_for_others_in_a_shared_object_are_refused():
    model = Passing(False)
    model.layers = nn.ModuleList(Leaving() for _ in range(3))

    def forward(input_ids, use_cache):
        hidden, left = model.embedding(input_ids), {}
        for block in model.layers:
            hidden = block(hidden, shift=torch.tensor(0.5), left=left)
        return SimpleNamespace(last_hidden_state=hidden)

    model.forward = forward
    with pytest.raises(ReplayError, match=RULE + "those of Model give other results one by one"):
        InMemory(Model(model)).check()


def test_hidden_states_that_change_between_blocks_are_refused():
    model = Passing(False)
    model.between = 2
    with pytest.raises(ReplayError, match=RULE + "those of Model give other results one by one"):
        InMemory(Model(model)).check()


def test_a_walk_goes_on_after_the_blocks_that_were_finished(tmp_path):
    folder, tokens, place = save_tiny(tmp_path / "dense"), ids(6, 24), tmp_path / "place"
    wanted = measure("model_dir", folder, tokens, FLOAT, CPU, tmp_path / "whole")
    walk, advanced = Walk.advance, []

    def fail_in_the_second(self, stream, index):
        advanced.append(index)
        walk(self, stream, index)
        if len(advanced) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Walk, "advance", fail_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            measure("model_dir", folder, tokens, FLOAT, CPU, place)
        assert measure("model_dir", folder, tokens, FLOAT, CPU, place) == wanted
    assert advanced == [0, 1, 1]
    assert wanted == pytest.approx(perplexity(tiny_model(), tokens), rel=1e-6)


@pytest.mark.parametrize("damaged", ["hidden.0", "part"])
def test_finished_work_that_is_damaged_is_not_used(tmp_path, capsys, damaged):
    work, states = Work(tmp_path, "pruning"), Activations(tmp_path / "hidden.0", (2, 3, 4), FLOAT)
    states.write(range(2), torch.ones(2, 3, 4))
    (tmp_path / "part").write_bytes(b"weights")
    work.commit({"number": 0}, [tmp_path / "part"])
    work.commit({"number": 1}, activations=[states])
    assert Work(tmp_path, "pruning").results == [{"number": 0}, {"number": 1}]
    with (tmp_path / damaged).open("r+b") as file:
        file.write(b"\x01")
    assert Work(tmp_path, "pruning").results == []
    assert capsys.readouterr().out.splitlines() == [
        "pruning: going on after the 2 blocks that a process has finished before it ended",
        "pruning: the work of a process that was killed is damaged, so it begins anew",
    ]
    assert Work(tmp_path, "pruning").results == []


def test_hidden_states_come_back_as_they_were_written(tmp_path):
    states = Activations(tmp_path / "hidden", (5, 3, 4), torch.bfloat16)
    assert states.file.stat().st_size == 5 * 3 * 4 * 2  # its space is reserved
    hidden = torch.randn(5, 3, 4).bfloat16()
    for rows in (range(2), range(2, 5)):
        states.write(rows, hidden[rows.start : rows.stop])
    again = Activations(tmp_path / "hidden", (5, 3, 4), torch.bfloat16)
    assert torch.equal(again.read(range(5), CPU), hidden)
    assert torch.equal(again.read(range(3, 4), CPU), hidden[3:4])
    states.file.write_bytes(b"cut")
    with pytest.raises(OSError, match="hidden ends before its row 5"):
        again.read(range(5), CPU)


def test_a_key_changes_with_everything_it_is_made_of():
    assert work_key({"a": 1, "b": [2]}) == work_key({"b": [2], "a": 1})
    assert len({work_key({"a": 1}), work_key({"a": 2}), work_key({"b": 1})}) == 3
