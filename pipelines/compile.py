"""Compile the pipelines to YAML: `python pipelines/compile.py`; add `--registry ghcr.io/team` for your own cluster."""

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
    """Write one YAML file per pipeline; unchanged code gives identical bytes."""

    output_dir: str = str(COMPILED)
    """Folder to write the YAML files to."""
    registry: str = ""
    """Registry prefix for the image names, such as ghcr.io/team; empty = no prefix."""
    handover_claim: str = ""
    """ReadWriteMany volume claim through which compress-distributed exchanges models with its nodes; empty = use a bucket."""


def compiled(pipeline: Any, registry: str) -> str:
    """A pipeline compiled to YAML."""
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
