"""A parameter is defined once: pipelines, components and stage settings agree, and every omission has a stated reason."""

import ast
import dataclasses
import importlib
import inspect
import itertools
from pathlib import Path
from typing import get_type_hints

import pytest
from docstring_parser import parse

from components.core.settings import configure
from components.distill.checkpoints import CheckpointSettings
from components.distill.config import DistillConfig
from components.distill_distributed.component import sweep_jobs
from components.distill_distributed.sweep import SweepConfig
from components.quantize.config import FormatsSettings
from pipelines.compress import compress
from pipelines.compress_distributed import compress_distributed
from pipelines.parameters import GROUPS, SHARED, help_of, parameters, pipeline_name
from pipelines.sizes import PodSettings

COMPONENTS = Path(__file__).parents[2] / "components"
STAGES = sorted(folder.name for folder in COMPONENTS.iterdir() if (folder / "component.py").is_file())
IN_PIPELINES = [stage for stage in STAGES if stage not in ("evaluate", "report")]
RUN_PARAMETERS = {"parameters", "quantize_formats"}  # what the resolve component puts into one setting
PIPELINES = {pipeline.name: pipeline for pipeline in (compress, compress_distributed)}


def component_of(stage):
    """The KFP component of a stage."""
    return getattr(importlib.import_module(f"components.{stage}.component"), stage)


def config_of(stage):
    """The settings class of a stage."""
    module = importlib.import_module(f"components.{stage}.config")
    return getattr(module, f"{stage.title().replace('_', '')}Config")


def not_in_pipelines(stage):
    """The stage's settings that pipelines do not offer, with the reasons."""
    return getattr(importlib.import_module(f"components.{stage}.config"), "NOT_IN_PIPELINES", {})


def values_of(component):
    """Parameter → annotation, for what a component takes besides artifacts and the other stages' parameters."""
    taken = {name for name, spec in component.component_spec.inputs.items() if "system." not in str(spec.type)}
    taken -= RUN_PARAMETERS if component is component_of("resolve") else set()
    signature = inspect.signature(component.python_func).parameters
    return {name: signature[name].annotation for name in taken if "TaskConfig" not in str(signature[name].annotation)}


def bound_in_the_body(stage):
    """The fields that a component sets itself, such as the paths of its artifacts."""
    calls = [
        node
        for node in ast.walk(ast.parse((COMPONENTS / stage / "component.py").read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("configure", config_of(stage).__name__)
    ]
    return {keyword.arg for call in calls for keyword in call.keywords}


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_component_takes_are_fields_of_its_settings_with_their_types(stage):
    hints = get_type_hints(config_of(stage)) | get_type_hints(
        CheckpointSettings
    )  # from which the component makes checkpoint_dir
    taken = values_of(component_of(stage))
    assert taken == {name: hints.get(name) for name in taken}


def test_the_sweep_takes_fields_of_its_settings():
    hints = get_type_hints(SweepConfig)
    assert values_of(sweep_jobs) == {name: hints[name] for name in ("run_id", "handover", "checkpoints")}


@pytest.mark.parametrize("stage", IN_PIPELINES)
def test_every_setting_is_a_parameter_or_bound_or_left_out_for_a_reason(stage):
    fields = {entry.name for entry in dataclasses.fields(config_of(stage))} | ({"checkpoints"} if stage == "distill" else set())
    taken, bound, left_out = set(values_of(component_of(stage))), bound_in_the_body(stage), not_in_pipelines(stage)
    assert fields == taken | bound | left_out.keys()
    assert not (taken | bound) & left_out.keys()
    assert all(left_out.values())


@pytest.mark.parametrize("name", PIPELINES)
def test_what_a_pipeline_leaves_out_is_what_no_component_takes(name):
    distillation = "distill_distributed" if name == "compress-distributed" else "distill"
    for group in GROUPS[name]:
        if group.settings in (PodSettings, FormatsSettings):
            continue
        component = component_of(distillation if group.stage == "distill" else group.stage)
        fields = {entry.name for entry in dataclasses.fields(group.settings)}
        assert group.names().keys() == fields & values_of(component).keys()
        assert set(group.left_out) >= fields - values_of(component).keys()


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_takes_what_its_settings_say_in_type_and_words(name):
    made = {entry.name: entry for entry in parameters(GROUPS[name])}
    signature = inspect.signature(PIPELINES[name].pipeline_func).parameters
    described = {entry.arg_name: entry.description for entry in parse(inspect.getdoc(PIPELINES[name].pipeline_func)).params}
    assert {entry: parameter.annotation for entry, parameter in signature.items()} == {
        entry: parameter.type for entry, parameter in made.items()
    }
    assert described == {entry: parameter.help for entry, parameter in made.items()}
    assert all(described.values())


@pytest.mark.parametrize("name", SHARED)
def test_what_stages_share_means_the_same_everywhere(name):
    """Only settings that a pipeline sets; what its components bind, such as the tokens as eval_data, has its own help."""
    owners = [config_of(stage) for stage in IN_PIPELINES if name in values_of(component_of(stage))]
    assert len(owners) >= 2
    assert len({(help_of(owner, name), str(get_type_hints(owner)[name])) for owner in owners}) == 1


def test_no_bare_name_hides_a_stages_own_setting():
    """A component's input gets the parameter of the same name, if there is one."""
    bare = {*SHARED} | {entry.name for entry in dataclasses.fields(PodSettings)}
    for groups in GROUPS.values():
        for group in groups:
            own = {field for field, name in group.names().items() if field != name}
            assert not own & bare, group


@pytest.mark.parametrize(
    ("stage", "field", "name"),
    [
        ("prune", "sparsity", "prune_sparsity"),
        ("distill", "learning_rate", "distill_learning_rate"),
        ("distill", "seq_len", "seq_len"),
        ("publish", "publish_to", "publish_to"),
        ("pods", "gpu_type", "gpu_type"),
    ],
)
def test_a_name_carries_its_group(stage, field, name):
    assert pipeline_name(stage, field) == name


@pytest.mark.parametrize("name", PIPELINES)
def test_the_description_names_ten_existing_parameters(name):
    text = PIPELINES[name].description
    important = text.partition("matter most: ")[2].partition(". All")[0].split(", ")
    assert len(important) == 10
    assert set(important) <= PIPELINES[name].component_spec.inputs.keys()


def test_settings_take_their_values_by_name(checkpoint, tmp_path):
    local = {"epochs": 3, "pruned_model": object(), "teacher_model": object()}
    paths = {"student_model": "a", "mask_file": "b", "output_dir": "c"}
    config = configure(DistillConfig, local, teacher_model="d", **paths)
    assert (config.epochs, config.teacher_model, config.batch_size) == (3, "d", DistillConfig.batch_size)


def test_no_list_of_names_is_kept_twice():
    """Two literal lists in the product that share many settings would have to be changed together."""
    known = {entry.name for stage in STAGES for entry in dataclasses.fields(config_of(stage))}
    known |= {entry.name for groups in GROUPS.values() for entry in parameters(groups)}
    lists = {}
    for file in [*COMPONENTS.rglob("*.py"), *(COMPONENTS.parent / "pipelines").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            entries = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
            names = {entry.value for entry in entries if isinstance(entry, ast.Constant) and isinstance(entry.value, str)}
            if len(names & known) > 4:
                lists[f"{file.relative_to(COMPONENTS.parent)}:{node.lineno}"] = names & known
    assert any(names >= {*SHARED} for names in lists.values())
    assert [pair for pair in itertools.combinations(lists, 2) if len(lists[pair[0]] & lists[pair[1]]) > 4] == []
