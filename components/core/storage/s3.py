"""Objects in S3 or an S3-compatible store such as MinIO, transferred by s3fs.

Small files are transferred whole, many at once; large ones in pieces, several at once (multipart upload, ranged reads). Every
request has botocore's timeouts and retries, and s3fs retries failed ones again.
"""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import s3fs
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

from components.core.storage.base import CHUNK, WORKERS, Held, split

CREATE_TRIES, CREATE_PAUSE = 5, 0.5  # the pause between tries is in seconds
_MINIO = "http://minio-service.kubeflow:9000"  # the one that Kubeflow Pipelines runs


def open_store(scheme: str, bucket: str, prefix: str) -> "S3Store":
    """The store at `s3://bucket/prefix` or `minio://bucket/prefix`."""
    root = f"{bucket}/{prefix}".rstrip("/")
    if scheme == "s3":
        return S3Store(f"s3://{root}", root)  # botocore reads AWS_ENDPOINT_URL if it is set
    endpoint = os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("MINIO_ENDPOINT") or _MINIO
    # separate variables: in a pod that also uses s3://, these keys must not replace its role
    login = {"key": os.environ.get("MINIO_ACCESS_KEY"), "secret": os.environ.get("MINIO_SECRET_KEY")}
    return S3Store(f"minio://{root}", root, endpoint_url=endpoint if "://" in endpoint else f"http://{endpoint}", **login)


class S3Store:
    """See `components.core.storage.base.Store`."""

    def __init__(self, place: str, root: str, **server: str | None) -> None:
        self.place, self.root = place, root
        self.files = s3fs.S3FileSystem(
            **server,
            config_kwargs={"retries": {"mode": "standard", "max_attempts": 5}},
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
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise ValueError(f"{self.place} must lie in a bucket that exists") from error
            raise
        except NoCredentialsError as error:
            raise ValueError(f"{self.place} needs AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a role: {error}") from error
        except (BotoCoreError, ClientError) as error:
            raise OSError(f"{self.place}: {error}") from error


def _code(error: OSError) -> str:
    """S3's own name for an error that s3fs has translated; empty if it is not one of S3."""
    cause = error.__cause__
    return str(cause.response["Error"].get("Code", "")) if isinstance(cause, ClientError) else ""
