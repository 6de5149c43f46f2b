"""Objects in Google Cloud Storage, transferred by the transfer manager of google-cloud-storage.

Small files are transferred whole, many at once; large ones in pieces, several at once (XML multipart upload, ranged reads).
Threads are used, not processes: nearly all of the work is in calls that release the GIL, and forking a process that has loaded
a training framework may hang. Every request has the library's timeout and retry deadline (60 s, 120 s).
An upload that is killed midway may leave pieces that do not show up in listings of the bucket; a lifecycle rule
(`AbortIncompleteMultipartUpload`) removes them.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import requests  # type: ignore[import-untyped]
from google.api_core import exceptions as api
from google.auth.exceptions import GoogleAuthError, TransportError
from google.cloud import storage
from google.cloud.storage import Blob, transfer_manager
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
from google.cloud.storage.retry import DEFAULT_RETRY
from google.oauth2 import service_account

from components.core.errors import readable
from components.core.retry import TRANSIENT, TransientError
from components.core.storage.base import CHUNK, WORKERS, Held, split
from components.core.storage.session import TOKEN, current_session

SCOPES = ("https://www.googleapis.com/auth/devstorage.read_write",)


def open_store(_: str, bucket: str, prefix: str) -> "GcsStore":
    """The store at `gs://bucket/prefix`."""
    return GcsStore(bucket, prefix)


def _credentials() -> Any:
    """The service account whose key KFP names for its store."""
    with readable(f"{TOKEN} must be a service account's key"):
        info = json.loads(os.environ.get(TOKEN, ""))  # not `parse_json`, which would show it in an error
        return service_account.Credentials.from_service_account_info(info, scopes=SCOPES)


class GcsStore:
    """See `components.core.storage.base.Store`."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.place = f"gs://{bucket}/{prefix}"
        self.prefix = f"{prefix}/" if prefix else ""
        session = current_session(f"gs://{bucket}/{prefix}")
        with self._one_line():
            options: dict[str, Any] = {"credentials": _credentials()} if session and session.secret else {}
            self.bucket = storage.Client(project=None, **options).bucket(bucket)  # access to objects needs no project

    def list(self) -> dict[str, Held]:
        """See `Store`."""
        with self._one_line():
            blobs = self.bucket.list_blobs(prefix=self.prefix)
            return {blob.name.removeprefix(self.prefix): Held(blob.size, blob.crc32c) for blob in blobs}

    def put(self, files: Mapping[str, Path]) -> None:
        """See `Store`."""
        small, large = split({name: path.stat().st_size for name, path in files.items()})
        with self._one_line():
            transfer_manager.upload_many(
                [(str(files[name]), self._blob(name)) for name in small],
                upload_kwargs={"checksum": "crc32c"},
                raise_exception=True,
                worker_type=transfer_manager.THREAD,
                max_workers=WORKERS,
            )
            for name in large:
                transfer_manager.upload_chunks_concurrently(
                    str(files[name]),
                    self._blob(name),
                    chunk_size=CHUNK,
                    checksum="crc32c",
                    worker_type=transfer_manager.THREAD,
                    max_workers=WORKERS,
                )

    def get(self, files: Mapping[str, Path]) -> None:
        """See `Store`. The caller verifies the checksums of the written files."""
        sizes = self.list()
        small, large = split({name: sizes[name].size for name in files})
        with self._one_line():
            transfer_manager.download_many(
                [(self._blob(name), str(files[name])) for name in small],
                download_kwargs={"checksum": None, "single_shot_download": True},
                raise_exception=True,
                worker_type=transfer_manager.THREAD,
                max_workers=WORKERS,
            )
            for name in large:
                transfer_manager.download_chunks_concurrently(
                    self._blob(name),
                    str(files[name]),
                    chunk_size=CHUNK,
                    # otherwise the library copies 8 KiB at a time, which does not run in parallel
                    download_kwargs={"single_shot_download": True},
                    crc32c_checksum=False,
                    worker_type=transfer_manager.THREAD,
                    max_workers=WORKERS,
                )

    def read(self, name: str) -> bytes:
        """See `Store`."""
        with self._one_line():
            try:
                return bytes(self._blob(name).download_as_bytes(checksum="crc32c"))
            except api.NotFound as error:
                self.list()  # a missing bucket gives the same error here, but a clear one when listed
                raise FileNotFoundError(f"{self.place} has no {name}") from error

    def write(self, name: str, data: bytes) -> None:
        """See `Store`."""
        with self._one_line():
            self._blob(name).upload_from_string(data, content_type="application/octet-stream", checksum="crc32c")

    def create(self, name: str, data: bytes) -> bool:
        """See `Store`. The precondition is that the object has no generation yet."""
        with self._one_line():
            try:
                self._blob(name).upload_from_string(
                    data, content_type="application/octet-stream", checksum="crc32c", if_generation_match=0
                )
            except api.PreconditionFailed:
                return False
        return True

    def delete(self, names: Iterable[str]) -> None:
        """See `Store`."""
        with self._one_line():
            # a retried request may find the objects already gone: missing is as good as deleted
            self.bucket.delete_blobs([self._blob(name) for name in names], on_error=lambda _: None, retry=DEFAULT_RETRY)

    def _blob(self, name: str) -> Blob:
        return self.bucket.blob(self.prefix + name)

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        """Turn the library's exceptions into errors that a command reports in one line."""
        try:
            yield
        except api.NotFound as error:
            raise ValueError(f"{self.place} must lie in a bucket that exists") from error
        except TransportError as error:  # the servers of credentials do not answer
            raise TransientError(f"{self.place}: {error}") from error
        except GoogleAuthError as error:
            raise ValueError(f"{self.place} needs Google credentials: {error}") from error
        except api.GoogleAPICallError as error:
            raise (TransientError if error.code in TRANSIENT else OSError)(f"{self.place}: {error}") from error
        except (requests.ConnectionError, requests.Timeout) as error:
            raise TransientError(f"{self.place}: {error}") from error
        except (api.GoogleAPIError, InvalidResponse, DataCorruption) as error:
            raise OSError(f"{self.place}: {error}") from error
