"""The pipelines' parameters, derived from the stages' settings: their names, types, defaults and help.

A setting of one stage is called `<stage>_<field>`, since the KFP UI lists parameters alphabetically and shows only name and
type; a setting that several stages share keeps the field's name. A pipeline offers all settings of a stage but those that the
stage leaves out, which are those that its component does not take.

Without kfp, most of which cannot be imported where a stage runs: the resolve stage reads the parameters too.
"""

import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, get_type_hints

from simple_parsing.docstring import get_attribute_docstring

from components.core.settings import Settings
from components.distill.checkpoints import CheckpointSettings
from components.distill.config import NOT_IN_PIPELINES as NOT_OF_DISTILL
from components.distill.config import DistillSettings
from components.distill_distributed.config import NOT_IN_PIPELINES as NOT_OF_JOB
from components.distill_distributed.config import JobSettings
from components.prune.config import NOT_IN_PIPELINES as NOT_OF_PRUNE
from components.prune.config import PruneSettings
from components.publish.config import PublishSettings
from components.quantize.config import FormatsSettings, QuantizeSettings
from components.resolve.config import ResolveSettings
from components.tokenize.config import TokenizeSettings
from pipelines.sizes import PodSettings

SHARED = (
    "model_id", "train_data", "eval_data", "nsamples", "seq_len", "seed", "dtype", "eval_blocks", "eval_seq_len",
    "bos", "skip_ppl_eval", "trust_remote_code",
)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Settings that a pipeline offers.

    Attributes:
        stage: the stage they belong to; `pods` for the sizes of the pods, whose fields are named as the pipeline names them.
        settings: the class that defines them.
        left_out: the fields that are not offered.
    """

    stage: str
    settings: type[Settings]
    left_out: Collection[str] = ()

    def names(self) -> dict[str, str]:
        """Field → parameter."""
        fields = (entry.name for entry in dataclasses.fields(self.settings))
        return {name: pipeline_name(self.stage, name) for name in fields if name not in self.left_out}

    def required(self) -> set[str]:
        """Fields without a default."""
        return {name for name in self.names() if default_of(self.settings, name) is inspect.Parameter.empty}


def _groups(*distillation: Group) -> tuple[Group, ...]:
    return (
        Group("resolve", ResolveSettings),
        Group("tokenize", TokenizeSettings),
        Group("prune", PruneSettings, NOT_OF_PRUNE),
        *distillation,
        Group("quantize", FormatsSettings),
        Group("quantize", QuantizeSettings),
        Group("publish", PublishSettings),
        Group("pods", PodSettings),
    )


# pipeline → the settings that it offers
GROUPS = {
    "compress": _groups(Group("distill", DistillSettings, NOT_OF_DISTILL), Group("distill", CheckpointSettings)),
    "compress-distributed": _groups(Group("distill", JobSettings, NOT_OF_JOB)),
}


@dataclass(frozen=True)
class Parameter:
    """A parameter of a pipeline.

    Attributes:
        name: its name in the pipeline.
        type: its Python type.
        default: its default value; `inspect.Parameter.empty` if a value is required.
        help: its field's docstring, in one line.
        stage: the stage it belongs to; empty if several stages share it.
    """

    name: str
    type: Any
    default: Any
    help: str
    stage: str


def pipeline_name(stage: str, field: str) -> str:
    """The pipelines' name for a stage's setting."""
    bare = stage == "pods" or field in SHARED or field.startswith(f"{stage}_")  # such as publish_to
    return field if bare else f"{stage}_{field}"


def parameters(groups: Iterable[Group], **defaults: Any) -> list[Parameter]:
    """The parameters for groups of settings, without duplicates.

    Args:
        groups: the settings.
        defaults: parameter → default, where it differs from the field's.
    """
    made: dict[str, Parameter] = {}
    for group in groups:
        for field, name in group.names().items():
            default = defaults.get(name, default_of(group.settings, field))
            kind = get_type_hints(group.settings)[field]
            stage = "" if field in SHARED else group.stage
            made.setdefault(name, Parameter(name, kind, default, help_of(group.settings, field), stage))
    shared = [made.pop(name) for name in SHARED if name in made]
    return [*shared, *made.values()]


def default_of(config_class: type, field: str) -> Any:
    """A field's default; `inspect.Parameter.empty` if it has none."""
    (entry,) = (entry for entry in dataclasses.fields(config_class) if entry.name == field)
    if entry.default_factory is not dataclasses.MISSING:
        return entry.default_factory()
    return inspect.Parameter.empty if entry.default is dataclasses.MISSING else entry.default


def help_of(config_class: type, field: str) -> str:
    """A field's docstring, which is the string below it, in one line."""
    return " ".join(get_attribute_docstring(config_class, field).docstring_below.split())


def describe(what: str, important: Iterable[str]) -> str:
    """A pipeline's description; the KFP UI shows it, but not the help of the parameters."""
    names = ", ".join(important)
    return f"{what} The parameters that matter most: {names}. All are documented in pipelines/README.md of the repository."


def takes(made: list[Parameter]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a pipeline function these parameters; it receives them together as its first argument.

    KFP reads a function's signature and docstring, so both are generated. The function's other arguments stay as they are.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        written = inspect.signature(function)
        own = list(written.parameters.values())[1:]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = own + [inspect.Parameter(entry.name, kind, annotation=entry.type, default=entry.default) for entry in made]
        signature.sort(key=lambda entry: entry.default is not entry.empty)  # Python requires those without a default first
        names = [entry.name for entry in signature]

        def pipeline(*arguments: Any) -> Any:
            values = dict(zip(names, arguments, strict=True))
            first = SimpleNamespace(**{entry.name: values[entry.name] for entry in made})
            return function(first, **{entry.name: values[entry.name] for entry in own})

        pipeline.__name__ = function.__name__
        pipeline.__doc__ = "\n".join(
            [inspect.getdoc(function) or "", "", "Args:", *(f"    {entry.name}: {entry.help}" for entry in made)]
        )
        pipeline.__signature__ = written.replace(parameters=signature)  # type: ignore[attr-defined]
        return pipeline

    return decorate


def call(component: Any, p: SimpleNamespace, **bound: Any) -> Any:
    """Add a task to the pipeline that is being defined, and return it.

    Args:
        component: a component, or a pipeline inside a pipeline.
        p: the parameters of the pipeline, by name.
        bound: values for inputs, such as outputs of earlier tasks. Every other input gets the pipeline parameter of the same
            name, or the one prefixed with the stage, which is the first word of the component's name.
    """
    stage, values = component.name.partition("-")[0], vars(p)
    for name in component.component_spec.inputs.keys() - bound.keys():
        parameter = name if name in values else f"{stage}_{name}"
        if parameter in values:  # KFP fills in a TaskConfig itself, and rejects the call if anything else is missing
            bound[name] = values[parameter]
    return component(**bound)
