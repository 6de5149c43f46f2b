"""Check the gate, upload everything as one version, register it, and move the pointer last.

    <publish_to>/<version>/<format>/…       the checkpoints
    <publish_to>/<version>/report/…         the report
    <publish_to>/<version>/version.json     what the version holds
    <publish_to>/latest.json                a copy of one version's version.json: the pointer

A version belongs to the content that was first to create its version.json, which the store lets only one do. Other content is
refused from then on, even if the version was never completed; the same content may be published again, after a crash or several
times at once, since every object is written with the same bytes and none is deleted. A failure before the end leaves the
pointer unchanged. Publishing an older version again moves the pointer back to it.
"""

import hashlib
import json
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from components.core.files import content_fingerprint
from components.core.history import StageRecord, Stopwatch, versions
from components.core.progress import log
from components.core.reading import parse_json
from components.core.storage import (
    check_whole,
    check_writable,
    complete,
    create_bytes,
    is_complete,
    read_bytes,
    write_bytes,
)
from components.publish.config import PublishConfig
from components.publish.gate import Candidate, check_gate, read_candidate
from components.publish.registry import Registry

LATEST_FILE = "latest.json"
VERSION_FILE = "version.json"
REPORT = "report"
WORKERS = 8  # files that are read at once


class Version(TypedDict):
    """The part of `version.json` that decides whether a version has the same content."""

    digest: str


def run(config: PublishConfig) -> StageRecord:
    """Publish the models and the report.

    Raises:
        ValueError: a model fails the gate, or the version belongs to other content; nothing is uploaded.
        OSError: the place or the registry failed; the pointer is unchanged.
    """
    watch = Stopwatch()
    config.check_environment()
    candidates = [read_candidate(folder) for folder in config.models]
    folders = named_folders(candidates, Path(config.summary_dir))
    check_gate(candidates, config.max_ppl_ratio, config.min_sparsity)
    version = place = ""
    if config.publish_to:
        version, place = publish(config, candidates, folders)
        log(f"published {', '.join(folders)}: {place}")
    else:
        log("the gate is passed; publish_to is empty, so nothing is published")
    return StageRecord("publish", asdict(config), measure(version, place, candidates) | watch.read(), versions=versions())


def publish(config: PublishConfig, candidates: list[Candidate], folders: dict[str, Path]) -> tuple[str, str]:
    """Upload models that have passed the gate, register them and move the pointer; returns the version and its place."""
    check_writable("publish_to", config.publish_to)
    registry = Registry(config.registry, config.registry_model) if config.registry else None
    digest = fingerprint(folders)
    version = config.version or digest[:12]
    place = f"{config.publish_to}/{version}"
    description = describe(version, digest, candidates)
    claim(place, digest, description)
    if not is_whole(place):
        upload_version(folders, description, place)
    if registry:
        for candidate in candidates:
            registry.register(f"{version}-{candidate.name}", f"{place}/{candidate.name}", known(candidate))
    write_bytes(f"{config.publish_to}/{LATEST_FILE}", read_bytes(f"{place}/{VERSION_FILE}"))
    return version, place


def named_folders(candidates: list[Candidate], summary_dir: Path) -> dict[str, Path]:
    """Name → folder for the parts of a version: the models, then the report.

    Raises:
        ValueError: two models have the same name.
    """
    names = Counter([*(candidate.name for candidate in candidates), REPORT])
    for name, count in names.items():
        if count > 1:
            raise ValueError(f"models must be of different formats, got {name} {count} times")
    return {candidate.name: candidate.folder for candidate in candidates} | {REPORT: summary_dir}


def files_of(folders: dict[str, Path]) -> dict[str, Path]:
    """All files of a version except its description, by their path within the version."""
    return {
        f"{name}/{file.relative_to(folder).as_posix()}": file
        for name, folder in folders.items()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def fingerprint(folders: dict[str, Path]) -> str:
    """SHA-256 over the names and contents of all files."""
    files = files_of(folders)
    with ThreadPoolExecutor(WORKERS) as pool:
        contents = dict(zip(files, pool.map(content_fingerprint, files.values()), strict=True))
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def claim(place: str, digest: str, description: bytes) -> None:
    """Take a version for a content by creating its description, unless it has one of the same content.

    Raises:
        ValueError: the version belongs to other content, or the place is used by something else.
    """
    file = f"{place}/{VERSION_FILE}"
    if not is_complete(place) and create_bytes(file, description):
        return
    try:
        found = parse_json(read_bytes(file), file, Version)["digest"]
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"version must not be used by something else, {place} has no {VERSION_FILE} of ours") from error
    if found != digest:
        holds, advice = "holds", ""
        if not is_complete(place):
            holds, advice = "was begun with", ": complete it by publishing those again, remove it, or name another version"
        raise ValueError(f"version must be new for new content, {place} {holds} other models or another report{advice}")


def is_whole(place: str) -> bool:
    """Whether a version is complete and still holds every object as it was uploaded."""
    if not is_complete(place):
        return False
    try:
        check_whole(place)
    except ValueError as error:
        log(f"published before, but damaged since, so it is uploaded anew: {error}")
        return False
    log(f"already published with the same content: {place}")
    return True


def upload_version(folders: dict[str, Path], description: bytes, place: str) -> None:
    """Upload all folders and the description together, so that the version is either complete or does not count."""
    with tempfile.TemporaryDirectory() as staging:
        for path, file in files_of(folders).items():
            link = Path(staging, path)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
        Path(staging, VERSION_FILE).write_bytes(description)
        complete(Path(staging), place)


def describe(version: str, digest: str, candidates: list[Candidate]) -> bytes:
    """The content of `version.json` and the pointer, without a date, so that the same models give the same bytes."""
    models = {candidate.name: known(candidate) for candidate in sorted(candidates, key=lambda one: one.name)}
    described = {"version": version, "digest": digest, "models": models}
    return (json.dumps(described, indent=2, allow_nan=False) + "\n").encode()


def known(candidate: Candidate) -> dict[str, Any]:
    """The numbers and the source of a model, as far as they are known."""
    numbers = {name: getattr(candidate, name) for name in ("perplexity", "dense_perplexity", "sparsity", "bytes")}
    return {name: value for name, value in (candidate.source | numbers).items() if value is not None}


def measure(version: str, place: str, candidates: list[Candidate]) -> dict[str, Any]:
    """The record's measurements: the version, its place, and the numbers that the gate checked."""
    measured: dict[str, Any] = {"version": version, "place": place}
    for candidate in candidates:
        numbers = {"ppl_ratio": candidate.ppl_ratio(), "sparsity": candidate.sparsity}
        measured |= {f"{name}_{candidate.name}": value for name, value in numbers.items() if value is not None}
    return measured
