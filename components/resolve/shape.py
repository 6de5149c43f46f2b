"""A model's sizes, from the headers of its weight files: on the hub, in a folder, or known of the built-in model.

There is no model here in which `components.core.blocks` could look for the blocks, so the names of the tensors tell: of the
lists whose entries have numbers (`model.layers.0.…`), the one with the most weights in matrices is the decoder.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from components.core.checkpoint.files import stored_tensors
from components.core.errors import readable
from components.core.hub import from_hub
from components.core.models import SMOLLM2

IN_LIST = re.compile(r"((?:[^.]+\.)*?)(\d+)\.")  # the list's name, with its dot, and the entry's number
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # of a number, by safetensors' name of the format; others have at most 1
Tensors = Mapping[str, tuple[list[int], str]]  # name → shape and format


@dataclass(frozen=True)
class Shape:
    """What decides how much memory a model's stages take: numbers of weights, unless it says otherwise.

    Attributes:
        parameters: all.
        stored: bytes of the weight files.
        blocks: number of blocks.
        block: of the largest block.
        matrix: of the largest matrix in a block.
        hessians: numbers in the Hessians of the matrices of a block, in_features² for each; of the block with the most.
        widest: largest in_features of a matrix in a block.
        features: in_features and out_features of the matrices of a block, added up; of the block with the most.
        outside: outside the blocks, such as embeddings and the head.
        vocabulary: number of words.
        width: width of the hidden states.
    """

    parameters: int
    stored: int
    blocks: int
    block: int
    matrix: int
    hessians: int
    widest: int
    features: int
    outside: int
    vocabulary: int
    width: int

    @property
    def inside(self) -> int:
        """Weights in the blocks; nearly all of them train."""
        return self.parameters - self.outside

    @property
    def head(self) -> int:
        """Weights of the head."""
        return self.vocabulary * self.width


def shape_of(tensors: Tensors) -> Shape:
    """The sizes of a model with these tensors.

    Raises:
        ValueError: there is no list of blocks with matrices, or there are no embeddings.
    """
    lists: dict[str | None, dict[str, list[list[int]]]] = defaultdict(lambda: defaultdict(list))  # list → number → shapes
    for name, (shape, _) in tensors.items():
        found = IN_LIST.match(name)
        lists[found[1] if found else None][found[2] if found else ""].append(shape)
    weights = {own: _weights(_matrices(*blocks.values())) for own, blocks in lists.items() if own is not None}
    decoder = max(weights, key=lambda own: weights[own], default=None)
    blocks = list(lists.pop(decoder).values()) if decoder is not None else []
    others = [shape for entries in lists.values() for shapes in entries.values() for shape in shapes]
    words = max(_matrices(others), key=math.prod, default=[0, 0])
    if decoder is None or not weights[decoder] or not math.prod(words):
        raise ValueError("its tensors are not those of a decoder: numbered blocks with matrices, and embeddings")
    return Shape(
        parameters=_weights(others) + sum(_weights(block) for block in blocks),
        stored=sum(math.prod(shape) * BYTES.get(kind, 1) for shape, kind in tensors.values()),
        blocks=len(blocks),
        block=max(_weights(block) for block in blocks),
        matrix=max(math.prod(shape) for shape in _matrices(*blocks)),
        hessians=max(sum(shape[1] ** 2 for shape in _matrices(block)) for block in blocks),
        widest=max(shape[1] for shape in _matrices(*blocks)),
        features=max(sum(map(sum, _matrices(block))) for block in blocks),
        outside=_weights(others),
        vocabulary=words[0],
        width=words[1],
    )


def _matrices(*blocks: list[list[int]]) -> list[list[int]]:
    """The shapes [out, in] of all matrices; a tensor may hold those of several experts, [experts, out, in]."""
    shapes = [shape for block in blocks for shape in block if len(shape) >= 2]
    return [shape[-2:] for shape in shapes for _ in range(math.prod(shape[:-2]))]


def _weights(shapes: list[list[int]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def llama_tensors(
    blocks: int,
    width: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    head_width: int,
    vocabulary: int,
    *,
    tied: bool,
    kind: str = "BF16",
) -> Tensors:
    """The matrices of a model that is built like Llama or Qwen3, as a checkpoint stores them; its norms are too small to count.

    Args:
        blocks: number of blocks.
        width: width of the hidden states.
        intermediate: width between the matrices of the MLP.
        heads: number of attention heads.
        kv_heads: number of heads for keys and values.
        head_width: width of a head.
        vocabulary: number of words.
        tied: whether the head is the embeddings.
        kind: number format, as safetensors names it.
    """
    block = {
        "self_attn.q_proj": [heads * head_width, width],
        "self_attn.k_proj": [kv_heads * head_width, width],
        "self_attn.v_proj": [kv_heads * head_width, width],
        "self_attn.o_proj": [width, heads * head_width],
        "mlp.gate_proj": [intermediate, width],
        "mlp.up_proj": [intermediate, width],
        "mlp.down_proj": [width, intermediate],
    }
    outside = ["model.embed_tokens.weight"] if tied else ["model.embed_tokens.weight", "lm_head.weight"]
    made = {f"model.layers.{index}.{name}.weight": shape for index in range(blocks) for name, shape in block.items()}
    return {name: (shape, kind) for name, shape in (made | {name: [vocabulary, width] for name in outside}).items()}


def model_shape(model_id: str, revision: str) -> Shape:
    """The sizes of a model that `resolve_model` has found; of one on the hub, only the headers of its files are fetched.

    Raises:
        ValueError: they cannot be known: there are no safetensors files, the hub does not give them, or it is no decoder.
    """
    if model_id == SMOLLM2:  # the package has it in another format; it becomes a float32 checkpoint
        return shape_of(llama_tensors(30, 576, 1536, 9, 3, 64, 49152, tied=True, kind="F32"))
    if Path(model_id).is_dir():
        return shape_of({name: (tensor.shape, tensor.dtype) for name, tensor in stored_tensors(Path(model_id)).items()})
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    with readable("the headers of its files cannot be used"):
        found = from_hub("model_id", model_id, lambda: HfApi().get_safetensors_metadata(model_id, revision=revision))
        files = found.files_metadata.values()
        return shape_of({name: (tensor.shape, tensor.dtype) for file in files for name, tensor in file.tensors.items()})
