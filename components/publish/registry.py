"""Kubeflow Model Registry: each model becomes a version whose only artifact gives the model's place.

A registered version never changes. Every step checks what exists before it writes, so that the next run completes an
interrupted registration; the client's own `register_model` would refuse a half-registered version. The client is 0.3.14,
the last to use the v1alpha3 API; later ones use v1, which deployed registries do not support yet.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from components.core.errors import one_line
from components.core.retry import TRANSIENT, TransientError, retried

# the client's own variable: a token must not be in a setting, which is recorded, or on a command line
TOKEN_PATH = "KF_PIPELINES_SA_TOKEN_PATH"
FORMAT = "huggingface"  # KServe's name for checkpoints that transformers can load


class Registry:
    """A connection to a registry, opened before the upload so that a wrong address is found early.

    Args:
        server: address, http:// or https://.
        model: name of the registered model.

    Raises:
        OSError: the token file cannot be read, or the registry does not answer.
        ImportError: the client is not installed.
    """

    def __init__(self, server: str, model: str) -> None:
        from model_registry.core import ModelRegistryAPIClient
        from model_registry.types import ListOptions
        from mr_openapi import Configuration

        token_path = os.environ.get(TOKEN_PATH)
        token = Path(token_path).read_text(encoding="utf-8").strip() if token_path else None
        self.server, self.model = server.rstrip("/"), model
        self.client: Any = ModelRegistryAPIClient(Configuration(host=self.server, access_token=token))
        self._ask(lambda: self.client.get_registered_models(ListOptions(limit=1)))  # fails early on a wrong address or token

    def register(self, version: str, uri: str, properties: dict[str, Any]) -> None:
        """Register a published model, unless it already is.

        Args:
            version: name of the version, unique for the model.
            uri: where the checkpoint is.
            properties: numbers and text to show with the version.

        Raises:
            OSError: the registry refused or did not answer.
            ValueError: the version is already registered with another place.
        """
        self._ask(lambda: self._register(version, uri, properties))

    def _ask(self, request: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Send requests, all of them again after a fault that may pass."""

        def once() -> None:
            with self._named():
                asyncio.run(request())

        retried(once)

    async def _register(self, version: str, uri: str, properties: dict[str, Any]) -> None:
        from model_registry.types import ModelArtifact, ModelVersion, RegisteredModel

        client = self.client
        model = await client.get_registered_model_by_params(self.model)
        model = model or await client.upsert_registered_model(RegisteredModel(name=self.model))
        known = await client.get_model_version_by_params(model.id, version)
        known = known or await client.upsert_model_version(ModelVersion(name=version, custom_properties=properties), model.id)
        artifacts = await client.get_model_artifacts(known.id)
        if not artifacts:
            artifact = ModelArtifact(name=self.model, uri=uri, model_format_name=FORMAT, model_format_version="1")
            await client.upsert_model_version_artifact(artifact, known.id)
        elif [artifact.uri for artifact in artifacts] != [uri]:
            raise ValueError(f"version {version} must not be registered with another place yet, it is at {artifacts[0].uri}")

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Turn the client's exceptions into one error that names the server."""
        from aiohttp import ClientError
        from mr_openapi.exceptions import ApiException

        try:
            yield
        except ApiException as error:  # its own text includes all headers and the body
            kind = TransientError if error.status in TRANSIENT else OSError
            raise kind(f"the registry {one_line(self.server)} answered {error.status} {error.reason}") from error
        except (ClientError, TimeoutError) as error:
            raise TransientError(f"the registry {one_line(self.server)} does not answer: {error}") from error
