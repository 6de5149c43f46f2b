"""Read the models' histories, then write the page and its numbers."""

from dataclasses import asdict
from pathlib import Path

from components.core.files import new_directory, write_json
from components.core.history import (
    HISTORY_FILE,
    REPORT_PAGE,
    REPORT_SUMMARY,
    StageRecord,
    Stopwatch,
    read_history,
    read_steps,
    versions,
)
from components.core.progress import log
from components.report.config import ReportConfig
from components.report.page import render
from components.report.plots import draw
from components.report.summary import summarize


def run(config: ReportConfig) -> StageRecord:
    """Write `report.html` and `summary.json`.

    Raises:
        ValueError: a model's history or one of its records is damaged or empty.
    """
    watch = Stopwatch()
    config.check_environment()
    records = load(config.models)
    summary = summarize(records)
    source = read_history(config.models[0])["source"]
    page = render(config.title, source, records, summary, draw(records, summary))
    with new_directory(config.output_dir) as scratch:
        # a lone surrogate in one record must not prevent the page from being written
        (scratch / REPORT_PAGE).write_text(page, encoding="utf-8", errors="replace")
        write_json(scratch / REPORT_SUMMARY, {"title": config.title, **source, **summary.as_json()})
    log(f"report of {len(records)} steps: {Path(config.output_dir) / REPORT_PAGE}")
    return StageRecord("report", asdict(config), {**summary.measured(), **watch.read()}, versions=versions())


def load(models: list[str]) -> list[StageRecord]:
    """The steps of all models: each model's in the order of its history, formats by name, and shared steps once.

    Raises:
        ValueError: a history has no steps, or a file is not a history or not a record.
    """
    histories = [read_steps(model) for model in models]
    for model, steps in zip(models, histories, strict=True):
        if not steps:
            raise ValueError(f"{Path(model) / HISTORY_FILE} must list at least one step, got none")
    histories.sort(key=lambda steps: str(steps[-1].parameters.get("format", "")))
    records: list[StageRecord] = []
    for step in (step for steps in histories for step in steps):
        if not any(step.is_step_of(other) for other in records):
            records.append(step)
    return records
