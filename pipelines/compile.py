"""Compile the pipelines to `pipelines/compiled/*.yaml`: `python pipelines/compile.py`."""

from pathlib import Path

from kfp import compiler

from pipelines.compress import compress
from pipelines.compress_distributed import compress_distributed

COMPILED = Path(__file__).with_name("compiled")


def main() -> None:
    """Write one YAML a pipeline; a run with nothing changed writes the same bytes."""
    for pipeline in (compress, compress_distributed):
        path = COMPILED / f"{pipeline.name}.yaml"
        compiler.Compiler().compile(pipeline, str(path))
        print(path)


if __name__ == "__main__":
    main()
