"""Compile the pipelines to `pipelines/compiled/*.yaml`: `python pipelines/compile.py`."""

from pathlib import Path

from kfp import compiler

from pipelines.compress import compress

COMPILED = Path(__file__).with_name("compiled")


def main() -> None:
    """Write one YAML a pipeline; a run with nothing changed writes the same bytes."""
    for pipeline in (compress,):
        path = COMPILED / f"{pipeline.name}.yaml"
        compiler.Compiler().compile(pipeline, str(path))
        print(path)


if __name__ == "__main__":
    main()
