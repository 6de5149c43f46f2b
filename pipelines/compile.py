"""Compile the pipelines to YAML: `python pipelines/compile.py`; add `--registry ghcr.io/team` for your own cluster."""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfp import compiler

from components.core.cli import errors_in_one_line, parse
from components.core.errors import shown
from components.core.files import check_folder, new_file
from components.core.progress import log
from components.core.settings import naming
from components.distill_distributed.config import LABEL
from components.images import CPU_IMAGE, GPU_IMAGE, LAUNCHER_IMAGE
from pipelines.compress import compress
from pipelines.compress_distributed import distributed

REGISTRY = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?(:\d{1,5})?(/[a-z0-9._-]{1,128}){0,8}/?")
COMPILED = Path(__file__).with_name("compiled")


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """Write one YAML file per pipeline; unchanged code gives identical bytes."""

    output_dir: str = str(COMPILED)
    """Folder to write the YAML files to."""
    registry: str = ""
    """Registry prefix for the image names, such as ghcr.io/team; empty = no prefix."""
    handover_claim: str = ""
    """ReadWriteMany volume claim through which compress-distributed exchanges models with its nodes; empty = nodes use the
    artifacts."""

    def __post_init__(self) -> None:
        if self.registry and not REGISTRY.fullmatch(self.registry):
            what = "a registry's host, with a port and path if it has them, such as ghcr.io/team"
            raise ValueError(f"registry must be {what}, got {shown(self.registry)}")
        if self.handover_claim and not LABEL.fullmatch(self.handover_claim):
            raise ValueError(f"handover_claim must be the name of a Kubernetes object, got {shown(self.handover_claim)}")


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
    with errors_in_one_line(), naming(config):
        check_folder("output_dir", config.output_dir)
        for pipeline in (compress, distributed(config.handover_claim)):
            path = Path(config.output_dir) / f"{pipeline.name}.yaml"
            with new_file(path) as scratch:
                scratch.write_text(compiled(pipeline, config.registry), encoding="utf-8")
            log(str(path))


if __name__ == "__main__":
    main()
