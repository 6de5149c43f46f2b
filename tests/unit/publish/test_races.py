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
def contents(tmp_path) -> list[dict]:
    """Settings that publish two models of one size with one report."""
    summary = tmp_path / "summary"
    summary.mkdir()
    for name in ("report.html", "summary.json"):
        (summary / name).write_text("{}")
    names = ("one1", "two2")
    return [{"models": [save_model(tmp_path / name, name.encode())], "summary_dir": str(summary)} for name in names]


def weights(folder: Path) -> bytes:
    """The first bytes of a model's weights, which are its name many times."""
    data = (folder / "model.safetensors").read_bytes()
    assert data == data[:4] * 100_000
    return data[:4]


def test_one_content_gets_the_version_and_is_published_by_all_who_have_it(place, contents, tmp_path):
    first, second = contents
    for time in range(TIMES):
        version = f"v{time}"
        many = [first, second, first] if time % 2 else [second, first, second]
        ended = publish_all(many, place, version)
        download(f"{place}/{version}", tmp_path / version)
        winner = weights(tmp_path / version / "int8").decode()
        for settings, end in zip(many, ended, strict=True):
            if settings["models"][0].endswith(winner):
                assert end == "published"
            else:
                assert str(end).startswith(f"version must be new for new content, {place}/{version} "), end
        assert read_bytes(f"{place}/latest.json") == read_bytes(f"{place}/{version}/version.json")
        assert not [name for name in open_store(place).list() if name.endswith(".partial")]


def test_a_damaged_version_is_mended_by_several_at_once_and_never_taken_over(place, contents, tmp_path):
    first, second = contents
    run(PublishConfig(**first, publish_to=place, version="v1"))
    latest = read_bytes(f"{place}/latest.json")
    for _ in range(TIMES // 4):
        open_store(f"{place}/v1").delete(["int8/model.safetensors"])
        ended = publish_all([first, first, second], place, "v1")
        assert ended[:2] == ["published"] * 2
        assert str(ended[2]).startswith("version must be new for new content")
        assert read_bytes(f"{place}/latest.json") == latest
    download(f"{place}/v1", tmp_path / "down")
    assert weights(tmp_path / "down" / "int8") == b"one1"
