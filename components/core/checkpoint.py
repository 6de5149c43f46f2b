"""The checkpoint contract: an ordinary Hugging Face folder plus `compression.json`.

`AutoModelForCausalLM.from_pretrained` loads the folder with no code of ours; one quantized by optimum-quanto is loaded by
`QuantizedModelForCausalLM.from_pretrained`. `compression.json` tells where the model came from and, in order, what was
done to it, with which parameters, and what was measured.
"""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from components.core.files import read_json, write_json
from components.core.progress import quiet_bars
from components.core.record import StageRecord

HISTORY_FILE = "compression.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
QUANTO_FILE = "quanto_qmap.json"

transformers_logging.disable_progress_bar()  # control characters have no place in a pod's log


def check_checkpoint(parameter: str, path: str | Path, trust_remote_code: bool = False) -> Any:
    """Check that a folder holds a checkpoint and return its configuration, without reading weights.

    Raises:
        ValueError: no folder, no readable config.json, or no safetensors weights.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{parameter} must be a folder with a Hugging Face checkpoint, got {path}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{parameter} must be a folder with a config.json, got {path}")
    if not weight_files(folder):
        raise ValueError(f"{parameter} must hold safetensors weights (pickled ones are never read), got {path}")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{parameter} must have a config.json that transformers can read, got {path}: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those of its index, else the single one.

    Raises:
        ValueError: the index is none, or names a file that is not there, elsewhere or of another kind.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        return []
    try:
        names = sorted({str(name) for name in read_json(index)["weight_map"].values()})
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{index} must have a 'weight_map' from weights to shards") from error
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} must name safetensors files in its own folder, got {name!r}")
        if not (folder / name).is_file():
            raise ValueError(f"{folder} must hold every shard that its index names, {name} is missing")
    return [folder / name for name in names]


def weight_bytes(folder: str | Path) -> int:
    """Bytes on disk of a checkpoint's weights."""
    return sum(file.stat().st_size for file in weight_files(Path(folder)))


def check_seq_len(parameter: str, seq_len: int, config: Any) -> None:
    """Raise `ValueError` if blocks of `seq_len` tokens do not fit the model's positions."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and seq_len > positions:
        raise ValueError(f"{parameter} must be at most the model's {positions} positions, got {seq_len}")


def check_dense(parameter: str, path: str | Path, config: Any) -> None:
    """Raise `ValueError` if a checkpoint is quantized: its weights can be neither pruned nor trained."""
    if (Path(path) / QUANTO_FILE).is_file() or getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{parameter} must not be quantized yet, got {path}")


def load_model(path: str | Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load any checkpoint of ours, dense, sparse or quantized, in evaluation mode.

    Raises:
        ValueError: the folder is no checkpoint or its weights do not fit its configuration.
    """
    config = check_checkpoint("model folder", path, trust_remote_code)
    try:
        if (Path(path) / QUANTO_FILE).is_file():
            from optimum.quanto import QuantizedModelForCausalLM

            model = QuantizedModelForCausalLM.from_pretrained(path)._wrapped
            if device.type == "cuda":
                dequantize(model)
        else:
            more: dict[str, Any] = {"dtype": dtype}
            if (getattr(config, "quantization_config", None) or {}).get("quant_method") == "compressed-tensors":
                # decompress now, not in the first forward of the whole model: we call its decoder alone
                more = {"dtype": "auto", "quantization_config": CompressedTensorsConfig(run_compressed=False)}
            with quiet_bars():
                model, report = AutoModelForCausalLM.from_pretrained(
                    path,
                    use_safetensors=True,
                    trust_remote_code=trust_remote_code,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # they are told below, by name
                    **more,
                )
            for name, found, expected in sorted(report["mismatched_keys"]):
                raise ValueError(f"{path} must hold weights of its model's shapes, {name} is {[*found]}, not {[*expected]}")
            for name in sorted(report["missing_keys"]):
                raise ValueError(f"{path} must hold every weight of its model, {name} is missing")
    except SafetensorError as error:
        raise ValueError(f"{path} holds weights that cannot be read: {error}") from error
    return model.to(device).eval()


def dequantize(model: nn.Module) -> None:
    """Replace optimum-quanto's linears by plain ones with the same weights, in place.

    On recent GPUs its float8 weights would be repacked for kernels that it compiles with nvcc, which an image for running
    models does not have.
    """
    from optimum.quanto import QLinear

    for name, module in list(model.named_modules()):
        if isinstance(module, QLinear):
            weight = module.weight.dequantize()
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, "meta")
            plain.weight = nn.Parameter(weight, requires_grad=False)
            plain.bias = module.bias
            model.set_submodule(name, plain)


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> Any:
    """Load a checkpoint's tokenizer.

    Raises:
        ValueError: the folder has none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # what some classes make where there are no files
            raise ValueError("it has special tokens alone")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must hold a tokenizer that transformers can read: {error}") from error
    return tokenizer


def empty_model(config: Any, trust_remote_code: bool = False) -> nn.Module:
    """The model of a configuration without memory for its weights, to look at names and shapes."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model


def save_checkpoint(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer into `folder`, such that transformers and servers load it.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(f"writing weights to {folder.parent} failed: {error}") from error
    tokenizer.save_pretrained(folder)
    _write_index(folder)


def _write_index(folder: Path) -> None:
    """Give a single-file checkpoint an index as well.

    Servers that read `*.safetensors` (vLLM, SGLang) go by the index where there is one, so that a mask in the same
    folder is never taken for weights.
    """
    if (folder / INDEX_FILE).exists():
        return
    with (folder / WEIGHTS_FILE).open("rb") as file:  # a safetensors file opens with its header's length and JSON
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    names = [name for name in header if name != "__metadata__"]
    total = sum(header[name]["data_offsets"][1] - header[name]["data_offsets"][0] for name in names)
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(names, WEIGHTS_FILE)})


def read_history(folder: str | Path) -> dict[str, Any]:
    """The content of `compression.json`; for a checkpoint from elsewhere, a history that begins with this folder."""
    path = Path(folder) / HISTORY_FILE
    if path.is_file():
        history = read_json(path)
        if not isinstance(history, dict) or not {"source", "steps"} <= history.keys():
            raise ValueError(f"{path} must have 'source' and 'steps'")
        return history
    return {"format": 1, "source": {"model_id": str(folder), "revision": None}, "steps": []}


def write_history(folder: Path, history: dict[str, Any], record: StageRecord) -> None:
    """Write `compression.json` with the record's summary as the last step, and the whole record beside it.

    Adds `bytes`, those of the folder's weights, to the record's measurements.
    """
    record.measured["bytes"] = weight_bytes(folder)
    write_json(folder / HISTORY_FILE, history | {"steps": [*history["steps"], record.summary()]})
    record.save(folder / stats_file(record.stage))


def stats_file(stage: str) -> str:
    """Name of a stage's record in its output folder, e.g. `distill_stats.json`."""
    return f"{stage}_stats.json"


def known_perplexity(history: dict[str, Any], text: str) -> float | None:
    """The perplexity that the model's last step measured, if it was on the same text; nothing is measured twice."""
    measured = history["steps"][-1]["measured"] if history["steps"] else {}
    return measured.get("perplexity") if measured.get("perplexity_text") == text else None
