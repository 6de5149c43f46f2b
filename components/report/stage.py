"""Load and sort the records, then write the page and its numbers."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from components.core.files import new_directory, write_json
from components.core.history import HISTORY_FILE, REPORT_PAGE, REPORT_SUMMARY, StageRecord, Stopwatch, read_history, versions
from components.core.progress import log
from components.report.config import ReportConfig, record_files
from components.report.page import render
from components.report.plots import draw
from components.report.summary import order, summarize


def run(config: ReportConfig) -> StageRecord:
    """Write `report.html` and `summary.json`.

    Raises:
        ValueError: a file is not a record.
    """
    watch = Stopwatch()
    config.check_environment()
    files = record_files(config.records)
    records = order(load(files))
    summary = summarize(records)
    source = find_source(records, files)
    page = render(config.title, source, records, summary, draw(records, summary))
    with new_directory(config.output_dir) as scratch:
        # a lone surrogate in one record must not prevent the page from being written
        (scratch / REPORT_PAGE).write_text(page, encoding="utf-8", errors="replace")
        write_json(scratch / REPORT_SUMMARY, {"title": config.title, **source, **summary.as_json()})
    log(f"report of {len(records)} records: {Path(config.output_dir) / REPORT_PAGE}")
    return StageRecord("report", asdict(config), {**summary.measured(), **watch.read()}, versions=versions())


def load(files: list[Path]) -> list[StageRecord]:
    """Read records; copies of one record in several folders count once.

    Raises:
        ValueError: a file is not a record.
    """
    records: list[StageRecord] = []
    for file in files:
        record = StageRecord.load(file)
        if record not in records:
            records.append(record)
    return records


def find_source(records: list[StageRecord], files: list[Path]) -> dict[str, Any]:
    """`model_id` and `revision` of the dense model; None if unknown.

    They come from the fetch record, otherwise from a checkpoint's history next to a record; failing both, the model that
    prune was given is named.
    """
    known: list[Mapping[str, Any]] = [record.parameters for record in records if record.stage == "fetch"]
    known += [read_history(file.parent)["source"] for file in files if (file.parent / HISTORY_FILE).is_file()]
    known += [{"model_id": record.parameters.get("dense_model")} for record in records if record.stage == "prune"]
    named = [source for source in known if source.get("model_id")]
    revisions = [source["revision"] for source in named if source.get("revision")]
    return {
        "model_id": str(named[0]["model_id"]) if named else None,
        "revision": str(revisions[0]) if revisions else None,
    }
