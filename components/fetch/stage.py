"""Copy a checkpoint to the output folder and write its history."""

import fnmatch
import shutil
from dataclasses import asdict
from pathlib import Path

from components.core.checkpoint.checks import check_checkpoint, check_dense
from components.core.checkpoint.files import weight_bytes, weight_files
from components.core.files import check_new, new_directory
from components.core.history import HISTORY_FILE, StageRecord, Stopwatch, versions, write_history
from components.core.models import HUB_FILES, local_folder, source_history
from components.core.progress import log, track
from components.fetch.config import FetchConfig


def run(config: FetchConfig) -> StageRecord:
    """Fetch a model.

    Raises:
        ValueError: the model does not exist, is gated, is not a dense safetensors checkpoint or does not fit on the disk.
    """
    watch = Stopwatch()
    config.check_environment()
    folder = local_folder(config.model_id, config.revision)
    model_config = check_checkpoint("model_id", folder, config.trust_remote_code)
    check_dense("model_id", folder, model_config)
    check_new("output_dir", config.output_dir, weight_bytes(folder))
    result = StageRecord("fetch", asdict(config), versions=versions())
    files = _files(folder)
    with new_directory(config.output_dir) as scratch:
        for file in track(files, "fetching files", len(files)):
            shutil.copyfile(file, scratch / file.name)
        result.measured |= watch.read()
        write_history(scratch, source_history(config.model_id, folder), result, folder)
    log(f"fetched {config.model_id}, {result.measured['bytes'] / 1e6:.0f} MB: {config.output_dir}")
    return result


def _files(folder: Path) -> list[Path]:
    """The weights and the configuration, tokenizer and licence files; not, for example, weights in other formats."""
    small = [
        file
        for file in sorted(folder.iterdir())
        if file.is_file()
        and file.suffix != ".safetensors"
        and file.name != HISTORY_FILE
        and any(fnmatch.fnmatch(file.name, pattern) for pattern in HUB_FILES)
    ]
    return small + weight_files(folder)
