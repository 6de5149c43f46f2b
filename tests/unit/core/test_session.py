"""The store of a pipeline's artifacts is reached as KFP tells with every artifact, and by nothing else."""

import base64
import json
import ssl
import subprocess
from types import SimpleNamespace

import pytest
import s3fs
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from components.core import storage
from components.core.storage import current_session, session, use_session, use_store_of
from components.core.storage.session import CREDENTIALS, INFO, STORE, TOKEN, session_of
from tests.faulty_server import in_front_of
from tests.stores import demands

URI = "minio://bucket/v2/artifacts/compress/3f0c/prune/1/pruned_model"
PARAMS = {
    "endpoint": "seaweedfs.kubeflow:9000", "region": "minio", "disableSSL": "true", "fromEnv": "false",
    "secretName": "mlpipeline-minio-artifact", "accessKeyKey": "accesskey", "secretKeyKey": "secretkey",
}  # fmt: skip


def told(provider="minio", leave_out=(), **changes):
    """An artifact's metadata."""
    params = {name: value for name, value in (PARAMS | changes).items() if name not in leave_out}
    return {INFO: json.dumps({"Provider": provider, "Params": params})}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    """No variable of another test or of this machine."""
    for name in (STORE, *CREDENTIALS, TOKEN, "AWS_ENDPOINT_URL", "MINIO_ENDPOINT", "MINIO_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        monkeypatch.setenv(name, "")  # so that what a test sets is removed after it
        monkeypatch.delenv(name)


@pytest.fixture
def secrets(monkeypatch, tmp_path):
    """Secrets as this pod's API server has them: name → key → value."""
    held = {"mlpipeline-minio-artifact": {"accesskey": "minio", "secretkey": "minio123"}}

    def read(_, name, namespace, **__):
        assert namespace == "team"
        if name not in held:
            raise ApiException(404, "Not Found")
        return SimpleNamespace(data={key: base64.b64encode(value.encode()).decode() for key, value in held[name].items()})

    (tmp_path / "namespace").write_text("team\n")
    monkeypatch.setattr(session, "NAMESPACE_FILE", tmp_path / "namespace")
    monkeypatch.setattr(config, "load_incluster_config", lambda settings: None)
    monkeypatch.setattr(client.CoreV1Api, "read_namespaced_secret", read)
    return held


def test_what_kfp_tells_is_the_bucket_alone(secrets, monkeypatch):
    use_session(session_of(URI, told()), URI)
    found = current_session("minio://bucket/anything")
    assert (found.bucket, found.endpoint, found.region) == ("minio://bucket", "http://seaweedfs.kubeflow:9000", "minio")
    assert current_session("minio://bucket-2/anything") is None
    assert current_session("s3://bucket/anything") is None


@pytest.mark.parametrize(
    ("changes", "endpoint"),
    [
        ({"disableSSL": "false"}, "https://seaweedfs.kubeflow:9000"),
        ({"leave_out": ["disableSSL"]}, "https://seaweedfs.kubeflow:9000"),
        ({"endpoint": "http://store:1"}, "http://store:1"),
        ({"leave_out": ["endpoint"]}, ""),
    ],
)
def test_endpoints(changes, endpoint):
    assert session_of(URI, told(**changes)).endpoint == endpoint


def test_a_pods_own_identity_needs_no_secret(monkeypatch):
    found = session_of("s3://bucket/a", told("s3", fromEnv="true"))
    assert found.secret == ""
    assert [entry["name"] for entry in found.as_env()] == [STORE]
    use_session(found, "s3://bucket/b")  # reads no secret


def test_without_what_kfp_tells_nothing_changes():
    for metadata in ({}, {INFO: ""}, {INFO: None}):
        assert session_of(URI, metadata) is None
    use_session(None, URI)
    assert current_session(URI) is None


@pytest.mark.parametrize(
    ("info", "said"),
    [
        ("{", f"{INFO} must be JSON"),
        ("[]", f"{INFO} must be JSON of its form"),
        ('{"Params": {}}', f"{INFO} must be JSON of its form, Provider"),
        ('{"Provider": "minio", "Params": {"endpoint": 1}}', f"{INFO} must be JSON of its form, Params.endpoint"),
        ('{"Provider": "azure", "Params": {}}', f"{INFO} must have a Provider among minio, s3, gs, got 'azure'"),
        (
            '{"Provider": "s3", "Params": {"secretName": "x"}}',
            f"{INFO} must name the keys of secret 'x', it has no accessKeyKey",
        ),
    ],
)
def test_what_is_damaged_or_unknown_is_refused_in_one_line(info, said):
    with pytest.raises(ValueError, match=said):
        session_of(URI, {INFO: info})


def test_a_secret_that_is_not_there_is_named(secrets):
    with pytest.raises(ValueError, match="names the secret other, which cannot be read: 404, Not Found"):
        use_session(session_of(URI, told(secretName="other")), URI)
    with pytest.raises(ValueError, match="names the secret .*, which must have the key token, it has accesskey, secretkey"):
        use_session(session_of(URI, told(accessKeyKey="token")), URI)


def test_what_is_not_needed_is_not_read():
    use_session(session_of(URI, told()), "gs://other/place", "")
    use_store_of(URI, {INFO: "damaged"}, "gs://other/place", "", "auto")
    assert current_session(URI) is None
    with pytest.raises(ValueError, match=f"{INFO} must be JSON"):
        use_store_of(URI, {INFO: "damaged"}, "minio://bucket/checkpoints")


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_api_server_is_asked_again_for_the_secret(secrets, monkeypatch, capsys, status):
    plain, answers = client.CoreV1Api.read_namespaced_secret, [status, status]

    def read(self, name, namespace, **options):
        if answers:
            raise ApiException(answers.pop(), "Busy")
        return plain(self, name, namespace, **options)

    monkeypatch.setattr(client.CoreV1Api, "read_namespaced_secret", read)
    use_store_of(URI, told(), URI)
    assert capsys.readouterr().out.count("trying again in 0 s") == 2
    assert current_session(URI) is not None


def test_outside_a_pod_the_secret_cannot_be_read(monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ValueError, match="names the secret mlpipeline-minio-artifact, which can only be read in a pod"):
        use_session(session_of(URI, told()), URI)


def test_a_store_that_demands_endpoint_region_and_key_gets_them(servers, secrets, tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "file").rename(source / "file")
    with in_front_of(servers["s3"]) as server:
        server.fault = demands("a-region", "minio")
        place = f"minio://bucket/{tmp_path.name}"
        use_session(session_of(URI, told(endpoint=server.url.removeprefix("http://"), region="a-region")), URI)
        storage.upload(source, place)
        storage.download(place, tmp_path / "back")
        assert (tmp_path / "back" / "file").read_bytes() == b"content"
        use_session(session_of(URI, told(endpoint=server.url.removeprefix("http://"), region="other")), URI)
        with pytest.raises(OSError, match="Forbidden|403"):
            storage.is_complete(place)


def test_a_store_with_a_certificate_of_its_own_is_reached_if_it_is_known(servers, secrets, tmp_path, monkeypatch):
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *files, *names], check=True, capture_output=True
    )
    with in_front_of(servers["s3"]) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        use_session(session_of(URI, told(endpoint=server.url.removeprefix("http://"), disableSSL="false")), URI)
        place = f"minio://bucket/{tmp_path.name}/object"
        with pytest.raises(ValueError, match="cannot be reached, its certificate must be known, AWS_CA_BUNDLE may name"):
            storage.write_bytes(place, b"content")
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "cert.pem"))
        s3fs.S3FileSystem.clear_instance_cache()  # this process has the client that does not know it
        storage.write_bytes(place, b"content")
        assert storage.read_bytes(place) == b"content"


def test_a_service_accounts_key_is_used_for_gs_and_not_shown(secrets):
    secrets["gcs"] = {"token": '{"private_key": "very secret"'}
    params = {"secretName": "gcs", "tokenKey": "token", "fromEnv": "false"}
    use_session(session_of("gs://bucket/a", {INFO: json.dumps({"Provider": "gs", "Params": params})}), "gs://bucket/b")
    with pytest.raises(ValueError, match=f"^{TOKEN} must be a service account's key") as refused:
        storage.read_bytes("gs://bucket/a/b")
    assert "very secret" not in str(refused.value)
