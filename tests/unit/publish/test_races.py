"""Publishers of one version at the same time: one content gets it, whole, and the others are refused."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from components.core.storage import check_whole, download, read_bytes
from components.core.storage.place import open_store
from components.publish.config import PublishConfig
from components.publish.stage import run
from tests.stores import place_of
from tests.unit.publish.conftest import save_model

TIMES = 20
STORES = ["folder", "gs in pieces", "s3"]


@pytest.fixture(params=STORES)
def place(request, connect, tmp_path) -> str:
    """An empty place in each kind of store that can refuse to write over an object."""
    connect(request.param)
    return place_of(request.param, tmp_path)


def publish_all(many: list[dict], place: str, version: str) -> list[str | ValueError]:
    """Publish at the same moment; what each ends with. Whoever has published finds the version whole at once."""
    gc.collect()  # clients that are gone close their connections: tests/gcs_server.py has a process for each
    start = threading.Barrier(len(many))

    def publish(settings):
        start.wait()
        try:
            run(PublishConfig(**settings, publish_to=place, version=version))
        except ValueError as error:
            return error
        check_whole(f"{place}/{version}")
        return "published"

    with ThreadPoolExecutor(len(many)) as pool:
        return list(pool.map(publish, many))


@pytest.fixture
def contents(tmp_path, summary_dir) -> list[dict]:
    """Settings that publish three models, of one size, with one report."""
    names = ("one1", "two2", "tri3")
    return [{"models": [save_model(tmp_path / name, name.encode())], "summary_dir": summary_dir} for name in names]


def weights(content: dict) -> bytes:
    """The weights of a content: its name, many times."""
    return content["models"][0].rsplit("/", 1)[-1].encode() * 100_000


def test_of_different_contents_one_is_published_and_the_others_are_refused(place, contents, tmp_path):
    for time in range(TIMES):
        version = f"v{time}"
        ended = publish_all(contents, place, version)
        won = [content for content, end in zip(contents, ended, strict=True) if end == "published"]
        assert len(won) == 1, ended
        for refused in (end for end in ended if end != "published"):
            assert str(refused).startswith(f"version must be new for new content, {place}/{version} "), refused
        download(f"{place}/{version}", tmp_path / version)
        assert (tmp_path / version / "int8" / "model.safetensors").read_bytes() == weights(won[0])
        assert read_bytes(f"{place}/latest.json") == read_bytes(f"{place}/{version}/version.json")


def test_the_same_content_is_published_by_all(place, contents, tmp_path):
    for time in range(TIMES):
        version = f"v{time}"
        assert publish_all([contents[0]] * 3, place, version) == ["published"] * 3
        download(f"{place}/{version}", tmp_path / version)
        assert (tmp_path / version / "int8" / "model.safetensors").read_bytes() == weights(contents[0])
        assert not [name for name in open_store(place).list() if name.endswith(".partial")]


def test_a_damaged_version_is_mended_by_several_at_once_and_never_taken_over(place, contents, tmp_path):
    run(PublishConfig(**contents[0], publish_to=place, version="v1"))
    latest = read_bytes(f"{place}/latest.json")
    for _ in range(TIMES):
        open_store(f"{place}/v1").delete(["int8/model.safetensors"])
        ended = publish_all([contents[0], contents[0], contents[1]], place, "v1")
        assert ended[:2] == ["published"] * 2
        assert str(ended[2]).startswith("version must be new for new content")
        assert read_bytes(f"{place}/latest.json") == latest
    download(f"{place}/v1", tmp_path / "down")
    assert (tmp_path / "down" / "int8" / "model.safetensors").read_bytes() == weights(contents[0])


def test_contents_that_differ_in_one_byte_differ(place, summary_dir, tmp_path):
    """Large files that a sample would not tell apart."""
    twins = []
    for name in ("left", "right"):
        folder = save_model(tmp_path / name, b"w" * 100)
        with Path(folder, "model.safetensors").open("r+b") as file:
            file.seek(100_001)
            file.write(name[:1].encode())
        twins.append({"models": [folder], "summary_dir": summary_dir})
    ended = publish_all(twins, place, "v1")
    assert ended.count("published") == 1, ended
