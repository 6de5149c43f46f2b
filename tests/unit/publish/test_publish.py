"""Publishing to a folder: complete versions that never change, a pointer that moves last, a gate before everything."""

import json
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from components.core.storage import download
from components.publish.config import PublishConfig
from components.publish.stage import run
from tests.unit.publish.conftest import DENSE, FP8, INT8, save_model

ROOT = Path(__file__).parents[3]
SECRET = "do-not-print-me"


def publish(settings, **changes):
    return run(PublishConfig(**settings | changes))


def shell(settings, **options) -> subprocess.CompletedProcess:
    """Publish in a separate process."""
    command = [sys.executable, "-m", "components.publish"]
    for name, value in settings.items():
        command += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)


def content(place: Path) -> dict[str, bytes]:
    """The content of every file below a place."""
    return {file.relative_to(place).as_posix(): file.read_bytes() for file in sorted(place.rglob("*")) if file.is_file()}


def test_a_version_holds_models_report_and_what_they_are(settings, models, tmp_path):
    record = publish(settings)
    place, version = Path(record.measured["place"]), record.measured["version"]
    assert place == tmp_path / "models" / version
    download(str(place), tmp_path / "down")  # which verifies every checksum
    published = content(tmp_path / "down")
    latest = published.pop("version.json")
    wanted = {"int8": models[0], "fp8": models[1], "report": settings["summary_dir"]}
    files = {f"{name}/{path}": data for name, folder in wanted.items() for path, data in content(Path(folder)).items()}
    assert {path: data for path, data in published.items() if path != "complete.json"} == files
    assert (tmp_path / "models" / "latest.json").read_bytes() == latest
    described = json.loads(latest)
    origin = {"model_id": "some/model", "revision": "abc"}
    numbers = {"dense_perplexity": DENSE, "sparsity": 0.7, "bytes": 300_000}
    assert described["version"] == version == described["digest"][:12]
    assert described["models"] == {
        "int8": {**origin, "perplexity": INT8, **numbers},
        "fp8": {**origin, "perplexity": FP8, **numbers},
    }
    assert record.measured["ppl_ratio_fp8"] == FP8 / DENSE


def test_published_again_it_is_recognised_and_nothing_is_uploaded(settings, tmp_path, monkeypatch):
    first = publish(settings)
    before = content(tmp_path / "models")
    monkeypatch.setattr("components.publish.stage.complete", lambda *_: pytest.fail("uploaded twice"))
    assert publish(settings).measured["place"] == first.measured["place"]
    assert publish(settings, models=settings["models"][::-1]).measured["version"] == first.measured["version"]
    assert content(tmp_path / "models") == before


@pytest.mark.parametrize("damage", ["deleted", "changed"])
def test_a_published_version_that_was_damaged_is_uploaded_anew(settings, tmp_path, capsys, damage):
    place = Path(publish(settings).measured["place"])
    before = content(place)
    weights = place / "int8" / "model.safetensors"
    if damage == "deleted":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[::-1])
    publish(settings)
    assert "published before, but damaged since" in capsys.readouterr().out
    assert content(place) == before


def test_other_models_are_another_version_and_the_pointer_moves(settings, tmp_path):
    first = publish(settings).measured["version"]
    kept = content(tmp_path / "models" / first)
    second = publish(settings, models=[save_model(tmp_path / "c", b"more")]).measured["version"]
    assert first != second
    assert json.loads((tmp_path / "models" / "latest.json").read_text())["version"] == second
    assert content(tmp_path / "models" / first) == kept


def test_publishing_an_older_version_again_points_back_at_it(settings, tmp_path):
    first = publish(settings)
    latest = (tmp_path / "models" / "latest.json").read_bytes()
    publish(settings, models=[save_model(tmp_path / "c", b"more")])
    assert (tmp_path / "models" / "latest.json").read_bytes() != latest
    assert publish(settings).measured["version"] == first.measured["version"]
    assert (tmp_path / "models" / "latest.json").read_bytes() == latest


def test_a_given_version_never_changes(settings, tmp_path):
    assert publish(settings, version="v1.0").measured["place"] == str(tmp_path / "models" / "v1.0")
    before = content(tmp_path / "models")
    other = [save_model(tmp_path / "c", b"more")]
    with pytest.raises(ValueError, match=r"version must be new for new content, .*/v1.0 holds other models"):
        publish(settings, version="v1.0", models=other)
    assert content(tmp_path / "models") == before
    publish(settings, version="v1.0")


def test_contents_that_differ_in_one_byte_of_a_large_file_are_told_apart(settings, tmp_path):
    first, twin = (save_model(tmp_path / name, b"one1" * 25) for name in ("large", "twin"))
    with Path(twin, "model.safetensors").open("r+b") as file:
        file.seek(100_001)  # between the samples of a file that is sampled
        file.write(b"-")
    publish(settings, version="v1", models=[first])
    with pytest.raises(ValueError, match="version must be new for new content"):
        publish(settings, version="v1", models=[twin])


def test_what_fails_the_gate_is_not_published(settings, tmp_path):
    run = shell(settings | {"max_ppl_ratio": 2.1, "min_sparsity": 0.5})
    assert run.returncode == 2
    assert run.stderr.splitlines() == [
        "error: nothing is published, the gate failed; "
        f"fp8: perplexity over dense must be at most max_ppl_ratio 2.1, got 2.1250 ({FP8:.4f} over {DENSE:.4f})"
    ]
    assert not (tmp_path / "models").exists()


def test_the_gate_is_asked_before_an_older_version_is_pointed_at_again(settings, tmp_path):
    publish(settings)
    publish(settings, models=[save_model(tmp_path / "c", b"more")])
    before = content(tmp_path / "models")
    with pytest.raises(ValueError, match="the gate failed"):
        publish(settings, min_sparsity=0.9)
    assert content(tmp_path / "models") == before


def test_an_upload_that_breaks_off_leaves_the_pointer_and_a_retry_completes_it(settings, tmp_path):
    publish(settings, version="1")
    latest = (tmp_path / "models" / "latest.json").read_bytes()
    changed = settings | {"models": [save_model(tmp_path / "c", b"more")], "version": "2"}
    size = 300_000  # the most bytes that the process can write to one file; the weights have 400,000
    broken = shell(changed, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    assert broken.returncode != 0
    assert "File too large" in broken.stderr
    assert (tmp_path / "models" / "latest.json").read_bytes() == latest
    other = shell(changed | {"models": [save_model(tmp_path / "d", b"others")]})
    assert other.returncode == 2
    assert other.stderr.splitlines() == [
        f"error: version must be new for new content, {tmp_path}/models/2 was begun with other models or another report: "
        "complete it by publishing those again, remove it, or name another version"
    ]
    retried = shell(changed)
    assert retried.returncode == 0, retried.stderr
    assert json.loads((tmp_path / "models" / "latest.json").read_text())["version"] == "2"
    download(str(tmp_path / "models" / "2"), tmp_path / "down")
    assert (tmp_path / "down" / "int8" / "model.safetensors").read_bytes() == b"more" * 100_000


def test_when_publishers_run_at_the_same_time_the_last_pointer_wins_and_all_versions_are_whole(settings, tmp_path):
    many = [settings | {"models": [save_model(tmp_path / name, name.encode())]} for name in ("one1", "two2", "tri3")]
    with ThreadPoolExecutor(len(many)) as pool:
        ended = list(pool.map(shell, many))
    assert [run.returncode for run in ended] == [0, 0, 0], ended
    places = [folder for folder in (tmp_path / "models").iterdir() if folder.is_dir()]
    assert len(places) == len(many)
    for place in places:
        download(str(place), tmp_path / "down" / place.name)
    assert (tmp_path / "models" / "latest.json").read_bytes() in [(place / "version.json").read_bytes() for place in places]


def test_no_secret_is_printed_or_published(settings, tmp_path, monkeypatch):
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MINIO_SECRET_KEY"):
        monkeypatch.setenv(name, SECRET)
    run = shell(settings)
    assert run.returncode == 0, run.stderr
    assert SECRET not in run.stdout + run.stderr
    assert all(SECRET.encode() not in data for data in content(tmp_path / "models").values())


def test_it_runs_without_torch():
    """The image for the small pods does not have it."""
    code = "import components.publish.stage, sys; print(*sorted({'torch', 'transformers', 'kfp'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "\n"


WRONG = [
    ({"models": []}, "models must name at least one checkpoint"),
    ({"models": ["/no/such"]}, "models must be folders with a compression.json, got '/no/such'"),
    ({"summary_dir": "/no/such"}, "summary_dir must be a folder with a report.html, got '/no/such'"),
    ({"publish_to": "ftp://host/models"}, "publish_to must "),
    ({"publish_to": "models"}, "publish_to must "),
    ({"version": "../1"}, "version must be letters, digits"),
    ({"version": "latest.json"}, "version must be letters, digits"),
    ({"max_ppl_ratio": -1.0}, "max_ppl_ratio must be at least 0, got -1.0"),
    ({"max_ppl_ratio": float("nan")}, "max_ppl_ratio must be at least 0, got nan"),
    ({"min_sparsity": 70.0}, r"min_sparsity must be in \[0, 1\], got 70.0"),
    ({"registry": "host:8080", "registry_model": "m"}, "registry must be an http:// .*, got 'host:8080'"),
    ({"registry": f"http://me:{SECRET}@host", "registry_model": "m"}, "without user and password, got 'host'"),
    ({"registry": "http://host:8080"}, "registry_model must be given, got ''"),
    ({"registry_model": "m"}, "registry must be given for a registry_model, got ''"),
]


@pytest.mark.parametrize(("changes", "line"), WRONG, ids=[str(changes) for changes, _ in WRONG])
def test_a_wrong_setting_is_told_by_name(settings, changes, line):
    with pytest.raises(ValueError, match=line):
        PublishConfig(**settings | changes).check_environment()


def test_two_models_of_one_format_are_refused(settings, tmp_path):
    with pytest.raises(ValueError, match="models must be of different formats, got int8 2 times"):
        publish(settings, models=[settings["models"][0], save_model(tmp_path / "c")])
    assert not (tmp_path / "models").exists()


def test_a_place_in_use_by_something_else_is_left_alone(settings, tmp_path):
    from components.core.storage import upload

    upload(Path(settings["summary_dir"]), str(tmp_path / "models" / "v1"))
    before = content(tmp_path / "models")
    with pytest.raises(ValueError, match="version must not be used by something else"):
        publish(settings, version="v1")
    assert content(tmp_path / "models") == before


def test_with_nowhere_to_publish_to_only_the_gate_is_held(settings, tmp_path):
    record = run(PublishConfig(**settings | {"publish_to": "", "max_ppl_ratio": 1e6}))
    assert record.measured["place"] == ""
    assert not (tmp_path / "models").exists()
    with pytest.raises(ValueError, match="max_ppl_ratio"):
        run(PublishConfig(**settings | {"publish_to": "", "max_ppl_ratio": 1e-6}))
