"""What is uploaded comes back unchanged or not at all, whatever the scheme and whatever goes wrong on the way."""

import json
import os
import socket
import socketserver
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from s3fs.errors import translate_boto_error

from components.core import storage
from components.core.storage.base import CHUNK
from components.core.storage.place import open_store
from tests.stores import place_of

ROOT = Path(__file__).parents[3]
SCHEMES = ["folder", "gs", "s3", "minio"]
IN_PIECES = ["gs in pieces", "s3"]
CONDITIONAL = ["folder", "gs in pieces", "s3", "minio"]  # gcp-storage-emulator ignores preconditions


@pytest.fixture(params=SCHEMES)
def place(request, connect, tmp_path) -> str:
    """An empty place of each scheme in turn."""
    connect(request.param)
    return place_of(request.param, tmp_path)


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FILES = {"config.json": b"{}", "empty": b"", "deep/er/weights.bin": bytes(range(256)) * 1000, "with space+ü%41.txt": b"x"}


def test_what_is_uploaded_comes_back(place, tmp_path, capsys):
    files = FILES | {f"shard-{index:02}": bytes([index]) * index for index in range(30)}
    assert not storage.is_complete(place)
    storage.upload(fill(tmp_path / "source", files), place)
    assert storage.is_complete(place)
    storage.download(place, tmp_path / "back")
    assert content(tmp_path / "back") == files
    sent, received = capsys.readouterr().out.splitlines()
    assert sent.startswith(f"uploaded {place}: 34 files, 0.3 MB in ")
    assert received.startswith(f"downloaded {place}: 34 files, 0.3 MB in ")
    assert sent.endswith(" MB/s")


@pytest.mark.parametrize("scheme", IN_PIECES)
def test_a_large_file_travels_in_pieces(scheme, connect, tmp_path):
    connect(scheme)
    place = place_of(scheme, tmp_path)
    piece = os.urandom(2**20)
    large = b"".join(index.to_bytes(4, "big") + piece[4:] for index in range(2 * CHUNK // 2**20)) + b"tail"
    files = {"large": large, "larger than a piece": large[: CHUNK + 1], "a piece": large[:CHUNK], "small": b"s"}
    storage.upload(fill(tmp_path / "source", files), place)
    storage.download(place, tmp_path / "back")
    assert content(tmp_path / "back") == files


def test_a_complete_place_is_refused(place, tmp_path):
    source = fill(tmp_path / "source", FILES)
    storage.upload(source, f"{place}/a")
    with pytest.raises(ValueError, match=f"place must not be complete yet, got {place}/a"):
        storage.upload(source, f"{place}/a")
    with pytest.raises(ValueError, match=f"place must not hold other places .* got {place} with a/complete.json"):
        storage.upload(source, place)
    storage.download(f"{place}/a", tmp_path / "back")
    assert content(tmp_path / "back") == FILES


def test_what_an_earlier_try_left_is_replaced(place, tmp_path):
    storage.write_bytes(f"{place}/config.json", b"half")
    storage.write_bytes(f"{place}/stale/weights.bin", b"old")
    with pytest.raises(ValueError, match=f"{place} is not complete"):
        storage.download(place, tmp_path / "back")
    storage.upload(fill(tmp_path / "source", FILES), place)
    storage.download(place, tmp_path / "back")
    assert content(tmp_path / "back") == FILES
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{place}/stale/weights.bin")


@pytest.mark.parametrize("damaged", [b"[]", b"{", b"{} "], ids=["other bytes", "shorter", "longer"])
def test_a_damaged_object_fails_and_is_named(place, tmp_path, damaged):
    storage.upload(fill(tmp_path / "source", FILES), place)
    storage.write_bytes(f"{place}/config.json", damaged)
    with pytest.raises(ValueError, match=f"{place}/config.json must be what"):
        storage.download(place, tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir() if "back" in path.name] == []


@pytest.mark.parametrize("damage", ["missing", "shorter", "other bytes"])
def test_a_place_that_no_longer_holds_what_was_uploaded_is_told_from_a_whole_one(place, tmp_path, damage):
    storage.upload(fill(tmp_path / "source", FILES), place)
    storage.check_whole(place)
    if damage == "missing":
        open_store(place).delete(["config.json"])
    else:
        data = FILES["config.json"]
        storage.write_bytes(f"{place}/config.json", data[:-1] if damage == "shorter" else data[::-1])
    with pytest.raises(ValueError, match=f"{place}/config.json must be what"):
        storage.check_whole(place)


def listing(files: dict[str, bytes]) -> bytes:
    return json.dumps({"files": {name: {"size": len(data), "crc32c": "AAAAAA=="} for name, data in files.items()}}).encode()


def test_a_missing_object_fails_and_is_named(place, tmp_path):
    storage.write_bytes(f"{place}/complete.json", listing({"lost": b"x"}))
    with pytest.raises(ValueError, match=f"{place}/lost must be what was uploaded, .*, got no object"):
        storage.download(place, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "a/../../escaped", "..", "", "a//b", "./a", "a\0"])
def test_a_name_that_leads_out_of_the_folder_is_refused(name, tmp_path):
    place = str(tmp_path / "mounted")
    storage.write_bytes(f"{place}/complete.json", listing({name: b""}))
    with pytest.raises(ValueError, match="must stay below their folder, got"):
        storage.download(place, tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["mounted"]


@pytest.mark.parametrize(
    "damaged", [b"", b"[]", b'{"files": {"a": {"size": 1}}}', b'{"files": {"a": {"size": "x", "crc32c": ""}}}']
)
def test_a_damaged_list_of_files_is_named(damaged, tmp_path):
    place = str(tmp_path / "mounted")
    storage.write_bytes(f"{place}/complete.json", damaged)
    with pytest.raises(ValueError, match=f"{place}/complete.json must be JSON"):
        storage.download(place, tmp_path / "back")


def test_a_pointer_is_written_over_and_read(place):
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{place}/latest.json")
    for data in (b"first", b"second, longer"):
        storage.write_bytes(f"{place}/latest.json", data)
        assert storage.read_bytes(f"{place}/latest.json") == data


@pytest.mark.parametrize("scheme", CONDITIONAL)
def test_of_many_writers_at_once_exactly_one_creates_an_object(scheme, connect, tmp_path):
    connect(scheme)
    place, writers = place_of(scheme, tmp_path), [f"writer {number}".encode() * 100 for number in range(4)]
    for name in (f"{place}/{number}/claim.json" for number in range(20)):
        start = threading.Barrier(len(writers))

        def create(data, name=name, start=start):
            start.wait()
            return storage.create_bytes(name, data), storage.read_bytes(name)

        with ThreadPoolExecutor(len(writers)) as pool:
            told, seen = zip(*pool.map(create, writers), strict=True)
        assert sorted(told) == [False, False, False, True]
        assert set(seen) == {writers[told.index(True)]}  # the losers find all of it at once
    assert len(open_store(place).list()) == 20  # no scratch file is left


def test_a_creation_that_meets_another_one_under_way_is_tried_again(connect, tmp_path, monkeypatch):
    connect("s3")
    store = open_store(place_of("s3", tmp_path))
    monkeypatch.setattr("components.core.storage.s3.CREATE_PAUSE", 0)
    store = store.store
    pipe_file, conflicts = store.files.pipe_file, 2

    def meet(*arguments, **options):
        nonlocal conflicts
        conflicts -= 1
        if conflicts >= 0:
            cause = ClientError({"Error": {"Code": "ConditionalRequestConflict"}}, "PutObject")
            raise translate_boto_error(cause)
        return pipe_file(*arguments, **options)

    monkeypatch.setattr(store.files, "pipe_file", meet)
    assert store.create("claim.json", b"{}")
    assert store.read("claim.json") == b"{}"
    conflicts = 100
    with pytest.raises(OSError, match="ConditionalRequestConflict"):
        store.create("claim.json", b"{}")


def test_completing_a_place_mends_it_and_leaves_what_is_right(place, tmp_path):
    source = fill(tmp_path / "source", FILES)
    storage.upload(source, place)
    storage.write_bytes(f"{place}/config.json", b"longer than before")
    open_store(place).delete(["deep/er/weights.bin"])
    storage.complete(source, place)
    storage.check_whole(place)
    storage.download(place, tmp_path / "back")
    assert content(tmp_path / "back") == FILES


def test_a_file_that_is_written_again_with_the_same_bytes_is_whole_all_the_time(tmp_path):
    source, place = fill(tmp_path / "source", {"weights": os.urandom(2**24)}), str(tmp_path / "mounted")
    storage.upload(source, place)
    ended = threading.Event()

    def write_again():
        try:
            for _ in range(20):
                storage.complete(source, place)
        finally:
            ended.set()

    writer = threading.Thread(target=write_again)
    writer.start()
    while not ended.is_set():
        storage.check_whole(place)
    writer.join()


def test_remove_deletes_everything_under_a_place_and_nothing_beside_it(place, tmp_path):
    source = fill(tmp_path / "source", FILES)
    storage.upload(source, f"{place}/a")
    storage.upload(source, f"{place}/a2")
    storage.remove(f"{place}/a")
    storage.remove(f"{place}/a")  # nothing is left there
    assert (storage.is_complete(f"{place}/a"), storage.is_complete(f"{place}/a2")) == (False, True)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{place}/a/config.json")
    storage.download(f"{place}/a2", tmp_path / "back")
    assert content(tmp_path / "back") == FILES


@pytest.mark.parametrize("scheme", ["gs", "gs in pieces", "s3", "minio"])
def test_a_missing_bucket_is_reported_in_one_line(scheme, connect, tmp_path):
    connect(scheme)
    place = f"{scheme.split()[0]}://missing-bucket/x"
    rule = f"{place} must lie in a bucket that exists"
    with pytest.raises(ValueError, match=f"handover must be a place that can be written, got {place}: {rule}"):
        storage.check_writable("handover", place)
    with pytest.raises(ValueError, match=rule):
        storage.upload(fill(tmp_path / "source", FILES), place)
    with pytest.raises(ValueError, match=rule):
        storage.download(place, tmp_path / "back")
    with pytest.raises(ValueError, match=rule):
        storage.is_complete(place)


def test_a_place_that_can_be_written_is_left_as_it_was(place, tmp_path):
    storage.check_writable("handover", place)
    assert not (tmp_path / "mounted").exists()
    if "://" in place:
        assert open_store(place).list() == {}


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"handover must be a place that can be written, got {tmp_path}/file/x"):
        storage.check_writable("handover", f"{tmp_path}/file/x")


@pytest.mark.parametrize("good", ["gs://bucket/x", "s3://my.bucket-1/x/y z", "minio://mlpipeline/v2/artifacts", "/mnt/volume"])
def test_a_place_is_taken(good):
    storage.check_place("handover", good)


@pytest.mark.parametrize(
    "wrong",
    [
        *("", "x", "./x", "/", "/mnt/../etc", "/mnt/x/", "/a\nb", "gs:/bucket/x", "hdfs://bucket/x"),
        *("gs://", "gs:///x", "gs://bucket", "gs://bucket/", "gs://Bucket/x", "gs://bucket/a/../b"),
        *("s3://bucket//x", "s3://bucket/x?versionId=1", "s3://bucket/x*"),
    ],
)
def test_what_is_not_a_place_is_refused(wrong):
    for call in (storage.check_place, storage.check_writable):
        with pytest.raises(ValueError, match="handover must be one of gs://bucket/prefix, .* or an absolute folder path, got"):
            call("handover", wrong)
    with pytest.raises(ValueError, match="place must be one of"):
        storage.remove(wrong)


def test_a_folder_without_files_or_with_a_list_of_its_own_is_refused(tmp_path):
    (tmp_path / "source" / "empty").mkdir(parents=True)
    for _ in range(2):
        with pytest.raises(ValueError, match="folder must hold files, none of them complete.json, got"):
            storage.upload(tmp_path / "source", str(tmp_path / "mounted"))
        fill(tmp_path / "source", {"a": b"", "complete.json": b""})


def test_nothing_is_downloaded_over_a_folder(place, tmp_path):
    storage.upload(fill(tmp_path / "source", FILES), place)
    before = content(tmp_path / "source")
    with pytest.raises(ValueError, match="folder must not exist yet"):
        storage.download(place, tmp_path / "source")
    assert content(tmp_path / "source") == before


class Proxy(socketserver.ThreadingTCPServer):
    """A proxy for a server. Once it has passed on `limit` bytes, it cuts the connection or stalls."""

    daemon_threads = True

    def __init__(self, server: str, limit: int, cut: bool) -> None:
        super().__init__(("127.0.0.1", 0), None)
        host, port = server.removeprefix("http://").split(":")
        self.server, self.left, self.cut = (host, int(port)), limit, cut
        self.reached, self.lock = threading.Event(), threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def finish_request(self, request, client_address):
        with socket.create_connection(self.server) as server:
            answers = threading.Thread(target=self.answers, args=(server, request), daemon=True)
            answers.start()
            while data := request.recv(2**16):
                with self.lock:
                    self.left -= len(data)
                    now = self.left < 0 and not self.reached.is_set()
                    if now:
                        self.reached.set()
                if self.reached.is_set() and not self.cut:
                    threading.Event().wait()  # until the test ends
                if now:
                    break
                server.sendall(data)
            for end in (request, server):
                end.shutdown(socket.SHUT_RDWR)
            answers.join()

    def answers(self, server, request):
        try:
            while data := server.recv(2**16):
                request.sendall(data)
            request.shutdown(socket.SHUT_RDWR)
        except OSError:
            self.handle_error(request, self.server)

    def handle_error(self, request, client_address):
        """Ignore it: either side may be gone, which is what these tests provoke."""


@pytest.fixture
def proxy(servers):
    """A function that puts a proxy in front of the server of a scheme."""
    proxies = []

    def before(scheme: str, limit: int, cut: bool) -> Proxy:
        proxies.append(Proxy(servers[scheme], limit, cut))
        threading.Thread(target=proxies[-1].serve_forever, daemon=True).start()
        return proxies[-1]

    yield before
    for one in proxies:
        one.shutdown()
        one.server_close()


WHOLE = {f"shard-{index}": os.urandom(2**20) for index in range(6)}


@pytest.mark.parametrize("scheme", IN_PIECES)
def test_a_connection_that_breaks_is_taken_up_again(scheme, connect, proxy, tmp_path):
    cutting = proxy(scheme, 3 * 2**20, cut=True)
    connect(scheme, cutting.url)
    place = place_of(scheme, tmp_path)
    storage.upload(fill(tmp_path / "source", WHOLE), place)
    assert cutting.reached.is_set()
    storage.download(place, tmp_path / "back")
    assert content(tmp_path / "back") == WHOLE


@pytest.mark.parametrize("scheme", IN_PIECES)
def test_a_killed_upload_is_not_complete_and_the_next_one_is(scheme, connect, proxy, tmp_path):
    source, place = fill(tmp_path / "source", WHOLE), place_of(scheme, tmp_path)
    holding = proxy(scheme, 3 * 2**20, cut=False)
    connect(scheme, holding.url)
    code = f"from pathlib import Path; from components.core import storage; storage.upload(Path({str(source)!r}), {place!r})"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as run:
        assert holding.reached.wait(120)
        run.kill()
    connect(scheme)
    assert not storage.is_complete(place)
    with pytest.raises(ValueError, match="is not complete"):
        storage.download(place, tmp_path / "back")
    storage.upload(source, place)
    storage.download(place, tmp_path / "back")
    assert content(tmp_path / "back") == WHOLE


@pytest.mark.parametrize(("scheme", "library", "extra"), [("gs", "google.cloud.storage", "gcs"), ("minio", "s3fs", "s3")])
def test_a_missing_library_is_reported_with_its_extra(scheme, library, extra, monkeypatch):
    monkeypatch.delitem(sys.modules, f"components.core.storage.{extra}", raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"{scheme}:// needs pip install 'sparse-distill\[{extra}\]'"):
        storage.is_complete(f"{scheme}://bucket/x")


def test_no_library_is_imported_that_is_not_needed(tmp_path):
    code = f"""
import sys
from components.core import storage
storage.write_bytes({str(tmp_path / "a")!r}, b"")
print(sorted({{"torch", "google.cloud.storage", "s3fs", "fsspec"}} & sys.modules.keys()))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_missing_credentials_are_reported_in_one_line(connect, monkeypatch):
    connect("s3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(ValueError, match="s3://bucket/x needs AWS_ACCESS_KEY_ID"):
        storage.is_complete("s3://bucket/x")
