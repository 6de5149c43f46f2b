"""Dependencies go one way: pipelines → components/<stage> → components/core. Checked by reading the imports."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPONENTS = ROOT / "components"
STAGES = sorted(folder.name for folder in COMPONENTS.iterdir() if (folder / "config.py").is_file())
SOURCES = sorted(COMPONENTS.rglob("*.py"))


def imports(source: str, package: str) -> Iterator[str]:
    """Every module that a source imports, at the top level or inside; `from a import b` gives both `a` and `a.b`.

    Args:
        source: Python code.
        package: the package that it lies in, for relative imports.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


def imports_of(file: Path) -> set[str]:
    return set(imports(file.read_text(encoding="utf-8"), ".".join(file.relative_to(ROOT).parent.parts)))


def violations(files: list[Path], is_forbidden) -> list[str]:
    return [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in sorted(imports_of(file))
        if is_forbidden(file, name)
    ]


def belongs(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_imports_are_found_wherever_and_however_they_are_written():
    source = """
import kfp.dsl as dsl, os
from ..prune.stage import run
from . import config
from components import quantize
def later():
    from components.distill import loop
    importlib.import_module("components.fetch.stage")
"""
    assert set(imports(source, "components.tokenize")) >= {
        "kfp.dsl",
        "os",
        "components.prune.stage",
        "components.tokenize.config",
        "components.quantize",
        "components.distill.loop",
        "components.fetch.stage",
    }


def test_the_stages_are_found():
    assert {"resolve", "fetch", "tokenize", "prune", "distill", "quantize", "evaluate"} <= set(STAGES)
    assert "core" not in STAGES


def test_a_stage_never_imports_another_stage():
    def another_stage(file: Path, name: str) -> bool:
        own = file.relative_to(COMPONENTS).parts[0]
        shared = ("components.distill.config", "components.distill.checkpoints")
        if own == "distill_distributed" and any(belongs(name, module) for module in shared):
            return False  # it runs that stage on other machines, and shares its settings
        if own == "quantize" and any(belongs(name, f"components.prune.{part}") for part in ("calibration", "conditioning")):
            return False  # GPTQ and SparseGPT have the same Hessians
        return any(belongs(name, f"components.{stage}") for stage in STAGES if stage != own)

    assert violations([file for file in SOURCES if file.relative_to(COMPONENTS).parts[0] in STAGES], another_stage) == []


def test_core_imports_no_stage():
    core = sorted((COMPONENTS / "core").rglob("*.py"))
    assert {"core", "checkpoint", "mask", "storage"} <= {file.parent.name for file in core}
    assert violations(core, lambda _, name: any(belongs(name, f"components.{stage}") for stage in STAGES)) == []


def test_only_components_and_images_import_kfp():
    allowed = [file for file in SOURCES if file.name == "component.py" or file == COMPONENTS / "images.py"]
    assert any(belongs(name, "kfp") for file in allowed for name in imports_of(file))
    others = [file for file in SOURCES if file not in allowed]
    assert violations(others, lambda _, name: belongs(name, "kfp")) == []


def test_no_method_imports_the_images():
    others = [file for file in SOURCES if file.name != "component.py"]
    assert violations(others, lambda _, name: belongs(name, "components.images")) == []


def test_only_distill_distributed_imports_kubernetes():
    """And what reads the secret of the pipeline's store, as KFP's own launcher has done in the same pod."""
    session = COMPONENTS / "core" / "storage" / "session.py"
    others = [file for file in SOURCES if file.relative_to(COMPONENTS).parts[0] != "distill_distributed" and file != session]
    assert violations(others, lambda _, name: belongs(name, "kubernetes")) == []


def test_nothing_below_imports_pipelines_or_tests():
    """But for the first stage, which checks the run's parameters by the rules by which they are checked before a run."""

    def above(file: Path, name: str) -> bool:
        if file == COMPONENTS / "resolve" / "stage.py" and belongs(name, "pipelines.checks"):
            return False
        return belongs(name, "pipelines") or belongs(name, "tests")

    assert violations(SOURCES, above) == []


def test_a_run_is_checked_without_what_the_launcher_image_and_a_pod_lack():
    """KFP's executor has most of kfp switched off, and the image has no torch."""
    code = "import sys, components.resolve.stage; print(*sys.modules)"
    environment = os.environ | {"_KFP_RUNTIME": "true"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert "pipelines" in loaded
    assert not {"torch", "transformers", "datasets", "accelerate", "kfp", "kubernetes", "rich", "jinja2", "matplotlib"} & loaded


@pytest.mark.parametrize("stage", STAGES)
def test_an_entry_point_is_short_and_runs_nothing_at_import(stage):
    file = COMPONENTS / stage / "__main__.py"
    source = file.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 80
    *rest, last = ast.parse(source).body
    assert isinstance(last, ast.If)
    assert ast.unparse(last.test) == "__name__ == '__main__'"
    harmless = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    assert all(
        isinstance(node, harmless) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in rest
    )


WITHOUT_TORCH = [f"core.{name}" for name in ("history", "mask.file", "checkpoint.files", "storage", "settings")]


@pytest.mark.parametrize("module", [*WITHOUT_TORCH, "distill_distributed.node"])
def test_what_knows_no_weights_needs_neither_torch_nor_another_stage(module):
    """A node that finds no torch must live long enough to say so."""
    code = f"import sys, components.{module}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    others = {f"components.{stage}" for stage in STAGES if stage != module.partition(".")[0]}
    assert not ({"torch", "transformers", "datasets", "kfp"} | others) & loaded


@pytest.mark.parametrize(("folders", "limit"), [(("components", "pipelines", "docker"), 300), (("tests",), 450)])
def test_no_file_is_too_long_to_have_one_subject(folders, limit):
    lengths = {
        file: len(file.read_text(encoding="utf-8").splitlines()) for name in folders for file in (ROOT / name).rglob("*.py")
    }
    assert len(lengths) > 5 * len(folders)
    assert {file: length for file, length in lengths.items() if length > limit} == {}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_checks_its_environment_itself(stage):
    """In a pod nothing else does: the component only makes the settings."""
    source = ast.parse((COMPONENTS / stage / "stage.py").read_text(encoding="utf-8"))
    (run,) = (node for node in source.body if isinstance(node, ast.FunctionDef) and node.name == "run")
    assert "config.check_environment()" in [ast.unparse(statement) for statement in run.body[:3]]


def test_settings_are_read_without_torch():
    """A wrong value is reported immediately, and a machine that only submits runs needs no torch."""
    code = f"""
import importlib, sys
for stage in {STAGES}:
    importlib.import_module(f"components.{{stage}}.config")
    print(stage, *sorted({{"torch", "transformers", "datasets", "kfp", "kubernetes"}} & sys.modules.keys()))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == STAGES
