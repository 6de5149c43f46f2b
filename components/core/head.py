"""A model's head: the logits of hidden states, as the model itself computes them.

Most models multiply their last hidden states by the matrix of `get_output_embeddings`. Some then scale the logits (Granite,
Cohere), or cap them softly (Gemma 2), or transform the hidden states before (BERT). So that nobody needs to know which, the
model's own code is run, with `Given` in place of its decoder.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput


class Output(BaseModelOutput):
    """What a decoder returns; of all but the hidden states there is nothing, whatever the model asks for."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class Given(nn.Module):
    """In place of a decoder: returns the hidden states that it was given, whatever it is called with.

    Args:
        decoder: the decoder, whose numbers a model may read, such as a factor of its logits.
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        numbers = {name: value for name, value in vars(decoder).items() if isinstance(value, int | float)}
        vars(self).update(numbers)
        self.hidden: Tensor | None = None

    @property
    def decoder(self) -> "Given":
        """Some models call the decoder in their decoder."""
        return self

    def forward(self, *_: Any, **__: Any) -> Output:
        """The hidden states [batch, tokens, width]."""
        return Output(last_hidden_state=self.hidden)


class Head(nn.Module):
    """Hidden states → logits, with the weights of a model's head, and without its decoder.

    Args:
        model: a causal language model; it is not changed.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder, self.matrix = Given(model.base_model), model.get_output_embeddings()
        self.model = copy.copy(model)
        self.model._modules = model._modules | {model.base_model_prefix: self.decoder}

    @property
    def weight(self) -> Tensor:
        """The matrix of the head, [vocabulary, width]."""
        weight: Tensor = self.matrix.weight
        return weight

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] of final hidden states [..., width], as if all were those of one text."""
        rows = hidden.reshape(1, -1, hidden.shape[-1])  # [1, tokens, width]
        self.decoder.hidden = rows
        try:
            ids = torch.zeros(rows.shape[:2], dtype=torch.long, device=hidden.device)
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        finally:
            self.decoder.hidden = None
        return logits.view(*hidden.shape[:-1], -1)
