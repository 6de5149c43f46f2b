"""Object stores on loopback, and places in them and in folders, as fixtures for tests of whatever uploads and downloads.

gs:// is gcp-storage-emulator or tests/gcs_server.py (which has the calls that transfer large files in parts, and the
precondition that an object must not exist, and runs in a separate process), s3:// and minio:// are moto's server.
"""

import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

GCS_SERVER = Path(__file__).with_name("gcs_server.py")


@pytest.fixture(scope="session")
def servers(tmp_path_factory):
    """The address of each server; each has one bucket, `bucket`."""
    import s3fs
    from gcp_storage_emulator.server import create_server
    from moto.s3.responses import S3Response
    from moto.server import ThreadedMotoServer

    emulator = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    emulator.start()
    put_object, one_at_a_time = S3Response.put_object, threading.Lock()

    def put_alone(self):
        """S3 decides atomically whether an object exists and writes it; moto does one after the other."""
        with one_at_a_time:
            return put_object(self)

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    folder = tmp_path_factory.mktemp("gcs")
    (folder / "bucket").mkdir()
    script = [sys.executable, str(GCS_SERVER), str(folder)]
    with (
        pytest.MonkeyPatch.context() as patch,
        subprocess.Popen(script, stdout=subprocess.PIPE, text=True) as gcs_server,
    ):
        try:
            patch.setattr(S3Response, "put_object", put_alone)
            assert gcs_server.stdout
            s3 = "http://{}:{}".format(*moto.get_host_and_port())
            s3fs.S3FileSystem(endpoint_url=s3, key="key", secret="secret").mkdir("bucket")
            yield {
                "gs": f"http://127.0.0.1:{emulator._api._httpd.server_port}",
                "gs in pieces": gcs_server.stdout.readline().strip(),
                "s3": s3,
            }
        finally:
            gcs_server.terminate()
    moto.stop()
    emulator.stop()


@pytest.fixture
def connect(servers, monkeypatch):
    """A function that points the libraries at the server of a scheme, or at a proxy for it at `address`."""
    import s3fs

    def to(scheme: str, address: str = "") -> None:
        s3fs.S3FileSystem.clear_instance_cache()
        for name in ("AWS_ENDPOINT_URL", "MINIO_ENDPOINT", "STORAGE_EMULATOR_HOST"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        if scheme.startswith("gs"):
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", address or servers[scheme])
        elif scheme == "s3":
            monkeypatch.setenv("AWS_ENDPOINT_URL", address or servers["s3"])
        elif scheme == "minio":
            monkeypatch.setenv("MINIO_ENDPOINT", servers["s3"].removeprefix("http://"))

    return to


def demands(region: str, key: str):
    """A fault for `tests.faulty_server`: requests are refused unless they are signed for a region and by a key."""
    return lambda _, __, headers: (
        None if re.search(f"Credential={key}/[0-9]+/{region}/s3/", headers.get("Authorization", "")) else 403
    )


def place_of(scheme: str, tmp_path: Path) -> str:
    """An empty place of a scheme, another one for every test."""
    return str(tmp_path / "mounted") if scheme == "folder" else f"{scheme.split()[0]}://bucket/{tmp_path.name}"
