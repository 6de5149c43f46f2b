"""Settings of the publish stage."""

import re
from dataclasses import dataclass
from pathlib import Path

from components.core.checks import check_at_least, check_in_unit_interval, check_not_empty
from components.core.errors import shown
from components.core.history import HISTORY_FILE, REPORT_PAGE, REPORT_SUMMARY
from components.core.settings import Settings
from components.core.storage import check_place


@dataclass(frozen=True, kw_only=True)
class PublishSettings(Settings):
    """Where to publish, and which limits a model must meet."""

    publish_to: str = ""
    """Place for the versions: gs://, s3:// or minio:// with bucket and prefix, or an absolute folder; empty = only check the
    quality gate, publish nothing."""
    version: str = ""
    """Name of the version; empty = derived from the content, so that the same models get the same version."""
    max_ppl_ratio: float = 0.0
    """Refuse to publish if a model's perplexity is more than this many times the dense model's; 0 = no limit."""
    min_sparsity: float = 0.0
    """Refuse to publish if a model's sparsity is below this share; 0 = no limit."""
    registry: str = ""
    """Address of a Kubeflow Model Registry, http:// or https://, to register the models in; empty = none."""
    registry_model: str = ""
    """Name of the model in the registry."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.publish_to:
            check_place("publish_to", self.publish_to)
        if self.version and not is_version(self.version):
            raise ValueError(
                f"version must be letters, digits, '.', '_' and '-', and not latest.json, got {shown(self.version)}"
            )
        check_at_least("max_ppl_ratio", self.max_ppl_ratio, 0)
        check_in_unit_interval("min_sparsity", self.min_sparsity)
        if self.registry and not self.publish_to:
            raise ValueError(f"publish_to must be given for a registry, got {self.publish_to!r}")
        if self.registry:
            if not re.fullmatch(r"https?://[^/@\s]+(/\S*)?", self.registry):
                address = self.registry.rsplit("@", 1)[-1]  # what comes before may contain a password
                raise ValueError(
                    f"registry must be an http:// or https:// address without user and password, got {shown(address)}"
                )
            check_not_empty("registry_model", self.registry_model)
        elif self.registry_model:
            raise ValueError(f"registry must be given for a registry_model, got {shown(self.registry)}")


@dataclass(frozen=True, kw_only=True)
class PublishConfig(PublishSettings):
    """Check the quality gate, upload models and report as one immutable version, and point `latest.json` at it."""

    models: list[str]
    """Checkpoints to publish: folders with a compression.json."""
    summary_dir: str
    """Output folder of the report stage, with report.html and summary.json."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.models:
            raise ValueError(f"models must name at least one checkpoint, got {self.models}")

    def check_environment(self) -> None:
        """See `Settings`."""
        super().check_environment()
        for model in self.models:
            if not (Path(model) / HISTORY_FILE).is_file():
                raise ValueError(f"models must be folders with a {HISTORY_FILE}, got {model!r}")
            if not any(Path(model).glob("*.safetensors")):
                raise ValueError(f"models must hold safetensors weights, got {model!r}")
        for file in (REPORT_PAGE, REPORT_SUMMARY):
            if not (Path(self.summary_dir) / file).is_file():
                raise ValueError(f"summary_dir must be a folder with a {file}, got {self.summary_dir!r}")


def is_version(name: str) -> bool:
    """Whether a name is valid in a place and differs from that of the pointer."""
    return bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)) and name != "latest.json"
