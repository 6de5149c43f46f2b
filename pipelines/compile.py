"""Compile the pipelines to YAML: `python pipelines/compile.py`, or for a cluster of your own with `--registry ghcr.io/team`."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfp import compiler

from components.core.cli import parse
from components.core.files import new_file
from components.images import CPU_IMAGE, GPU_IMAGE, LAUNCHER_IMAGE
from pipelines.compress import compress
from pipelines.compress_distributed import distributed

COMPILED = Path(__file__).with_name("compiled")


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """Write one YAML a pipeline; with nothing changed it writes the same bytes."""

    output_dir: str = str(COMPILED)
    """Folder for the files."""
    registry: str = ""
    """What stands in front of the images' names, such as ghcr.io/team; empty = the names alone."""
    handover_claim: str = ""
    """ReadWriteMany volume claim on which the nodes of compress-distributed exchange models; empty = in a bucket."""


def compiled(pipeline: Any, registry: str) -> str:
    """A pipeline as YAML."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline, str(path))
        text = path.read_text(encoding="utf-8")
    for image in (CPU_IMAGE, GPU_IMAGE, LAUNCHER_IMAGE) if registry else ():
        text = text.replace(image, f"{registry.rstrip('/')}/{image}")
    return text


def main() -> None:
    """Write the files."""
    config = parse(CompileConfig, "Compile the pipelines.")
    for pipeline in (compress, distributed(config.handover_claim)):
        path = Path(config.output_dir) / f"{pipeline.name}.yaml"
        with new_file(path) as scratch:
            scratch.write_text(compiled(pipeline, config.registry), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
