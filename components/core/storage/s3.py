"""Objects in S3 or an S3-compatible store such as MinIO, transferred by s3fs.

Small files are transferred whole, many at once; large ones in pieces, several at once (multipart upload, ranged reads). Every
request has botocore's timeouts, and s3fs repeats failed ones soon; `PersistentStore` does so for longer.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import s3fs
from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError, NoCredentialsError, SSLError

from components.core.retry import TRANSIENT, TransientError
from components.core.storage.base import CHUNK, WORKERS, Held, split
from components.core.storage.session import CREDENTIALS, current_session

CREATE_TRIES, CREATE_PAUSE = 5, 0.5  # the pause between tries is in seconds
# those that Kubeflow Pipelines runs, since 2.16 and before; for stages that it tells nothing about its store
_OF_KFP = ("seaweedfs.kubeflow", "minio-service.kubeflow")
_PORT = 9000


def open_store(scheme: str, bucket: str, prefix: str) -> "S3Store":
    """The store at `s3://bucket/prefix` or `minio://bucket/prefix`."""
    root = f"{bucket}/{prefix}".rstrip("/")
    place = f"{scheme}://{root}"
    if session := current_session(f"{scheme}://{bucket}/{prefix}"):
        key, secret = (os.environ.get(name) if session.secret else None for name in CREDENTIALS)
        return S3Store(place, root, key, secret, session.endpoint, session.region, session.path_style)
    if scheme == "s3":
        return S3Store(place, root)  # botocore reads AWS_ENDPOINT_URL if it is set
    endpoint = os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("MINIO_ENDPOINT") or _of_kfp()
    # separate variables: in a pod that also uses s3://, these keys must not replace its role
    key, secret = os.environ.get("MINIO_ACCESS_KEY"), os.environ.get("MINIO_SECRET_KEY")
    return S3Store(place, root, key, secret, endpoint if "://" in endpoint else f"http://{endpoint}")


def _of_kfp() -> str:
    """The address of the store that Kubeflow Pipelines runs in this cluster."""
    for host in _OF_KFP:
        with contextlib.suppress(OSError):
            socket.getaddrinfo(host, _PORT)
            return f"{host}:{_PORT}"
    return f"{_OF_KFP[0]}:{_PORT}"


class S3Store:
    """See `components.core.storage.base.Store`."""

    def __init__(
        self,
        place: str,
        root: str,
        key: str | None = None,
        secret: str | None = None,
        endpoint: str = "",
        region: str = "",
        path_style: bool = False,
    ) -> None:
        self.place, self.root = place, root
        style: dict[str, Any] = {"s3": {"addressing_style": "path"}} if path_style else {}
        self.files = s3fs.S3FileSystem(
            key=key,
            secret=secret,
            endpoint_url=endpoint or None,
            client_kwargs={"region_name": region} if region else {},
            config_kwargs={"retries": {"mode": "standard", "max_attempts": 2}, **style},
            use_listings_cache=False,  # other processes write there too
        )

    def list(self) -> dict[str, Held]:
        """See `Store`."""
        with self._one_line():
            found = self.files.find(self.root, detail=True)
        start = f"{self.root}/"  # an object named exactly like the place is not under it
        return {path.removeprefix(start): Held(held["size"], None) for path, held in found.items() if path.startswith(start)}

    def put(self, files: Mapping[str, Path]) -> None:
        """See `Store`."""
        with self._one_line():
            small, large = split({name: path.stat().st_size for name, path in files.items()})
            for names, together in ((small, WORKERS), (large, 1)):
                self.files.put(
                    [str(files[name]) for name in names],
                    [self._path(name) for name in names],
                    batch_size=together,
                    chunksize=CHUNK,
                    max_concurrency=WORKERS,
                )

    def get(self, files: Mapping[str, Path]) -> None:
        """See `Store`."""
        sizes = self.list()
        with self._one_line():
            small, large = split({name: sizes[name].size for name in files})
            for names, together in ((small, WORKERS), (large, 1)):
                self.files.get(
                    [self._path(name) for name in names],
                    [str(files[name]) for name in names],
                    batch_size=together,
                    chunksize=CHUNK,
                    max_concurrency=WORKERS,
                )

    def read(self, name: str) -> bytes:
        """See `Store`."""
        with self._one_line():
            return bytes(self.files.cat_file(self._path(name)))

    def write(self, name: str, data: bytes) -> None:
        """See `Store`."""
        with self._one_line():
            self.files.pipe_file(self._path(name), data)

    def create(self, name: str, data: bytes, tries: int = CREATE_TRIES) -> bool:
        """See `Store`. A store that does not know `If-None-Match` replaces the object and says True."""
        try:
            with self._one_line():
                self.files.pipe_file(self._path(name), data, mode="create")
        except OSError as error:
            if _code(error) == "PreconditionFailed":
                return False
            if _code(error) != "ConditionalRequestConflict" or not tries:
                raise
            time.sleep(CREATE_PAUSE)  # another writer is at it: S3 asks to try again
            return self.create(name, data, tries - 1)
        return True

    def delete(self, names: Iterable[str]) -> None:
        """See `Store`."""
        with self._one_line():
            for name in names:  # not `rm`, which treats a name as a pattern
                self.files.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        """Turn the libraries' exceptions into errors that a command reports in one line."""
        try:
            yield
        except SSLError as error:
            hint = "its certificate must be known, AWS_CA_BUNDLE may name a file with that of its authority"
            raise ValueError(f"{self.place} cannot be reached, {hint}: {error}") from error
        except (ConnectionError, HTTPClientError) as error:  # there is no answer
            raise TransientError(f"{self.place}: {error}") from error
        except NoCredentialsError as error:
            raise ValueError(f"{self.place} needs AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a role: {error}") from error
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise ValueError(f"{self.place} must lie in a bucket that exists") from error
            raise
        except OSError as error:
            if _status(error) in TRANSIENT:
                raise TransientError(f"{self.place}: {error}") from error
            raise
        except (BotoCoreError, ClientError) as error:
            raise OSError(f"{self.place}: {error}") from error


def _status(error: OSError) -> int:
    """The HTTP status of an error that s3fs has translated; 0 if it is not one of S3."""
    cause = error.__cause__
    about = cause.response.get("ResponseMetadata", {}) if isinstance(cause, ClientError) else {}
    return int(about.get("HTTPStatusCode", 0))


def _code(error: OSError) -> str:
    """S3's own name for an error that s3fs has translated; empty if it is not one of S3."""
    cause = error.__cause__
    return str(cause.response["Error"].get("Code", "")) if isinstance(cause, ClientError) else ""
