"""Recurring runs on a cluster: `python pipelines/schedule.py create --name nightly --cron '0 0 3 * * ?'`.

One run at a time, with no catch-up for runs missed while a schedule was paused or an earlier run was still active.
"""

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kfp.client import Client
from simple_parsing import subparsers

from components.core.checks import check_at_least, check_not_empty
from components.core.cli import errors_in_one_line, parse
from components.core.progress import log
from components.core.settings import naming
from pipelines.api import PipelineConfig, ServerConfig, connect, everything, plain_errors, upload
from pipelines.cron import six_fields
from pipelines.package import read_package, read_parameters
from pipelines.watch import FINISHED


@dataclass(frozen=True, kw_only=True)
class CreateConfig(PipelineConfig):
    """Upload a pipeline, unless this exact version already exists, and run it on a schedule."""

    name: str
    """Name of the schedule; must be new."""
    cron: str = ""
    """When to run: second minute hour day month weekday, or five fields without the second; in KFP's time zone, usually UTC."""
    every: int = 0
    """Seconds between runs, instead of cron."""
    start_time: str = ""
    """No runs before this time, e.g. 2026-12-01T00:00:00Z; empty = start now."""
    end_time: str = ""
    """No runs after this time; empty = no end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_empty("name", self.name)
        if bool(self.cron) == bool(self.every):
            raise ValueError(f"one of cron and every must be given, got cron {self.cron!r} and every {self.every}")
        if self.cron:
            six_fields(self.cron)
        check_at_least("every", self.every, 0)
        times = [_time(name, getattr(self, name)) for name in ("start_time", "end_time") if getattr(self, name)]
        if len(times) == 2 and times[0] >= times[1]:
            raise ValueError(f"end_time must be after start_time, got {self.end_time}")


@dataclass(frozen=True, kw_only=True)
class ListConfig(ServerConfig):
    """List all schedules: id, state, when, name."""


@dataclass(frozen=True, kw_only=True)
class NamedConfig(ServerConfig):
    """One schedule."""

    name: str
    """Name or id of the schedule."""


@dataclass(frozen=True, kw_only=True)
class PauseConfig(NamedConfig):
    """Start no more runs until the schedule is resumed; a run that has started continues."""


@dataclass(frozen=True, kw_only=True)
class ResumeConfig(NamedConfig):
    """Resume a paused schedule."""


@dataclass(frozen=True, kw_only=True)
class DeleteConfig(NamedConfig):
    """Delete a schedule and, as KFP does, the workflows and pods of its runs; the runs' records are kept."""

    force: bool = False
    """Delete it although one of its runs is going on; that run ends at once, without its exit handler."""


Command = CreateConfig | ListConfig | PauseConfig | ResumeConfig | DeleteConfig
COMMANDS = {"create": CreateConfig, "list": ListConfig, "pause": PauseConfig, "resume": ResumeConfig, "delete": DeleteConfig}


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Recurring runs."""

    command: Command = subparsers(COMMANDS)  # noqa: RUF009 (it is a field)
    """What to do; each command lists its flags with --help."""


def _time(parameter: str, text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = datetime.min
    if moment.tzinfo is None:
        raise ValueError(f"{parameter} must be a date and time with Z or an offset, such as 2026-12-01T00:00:00Z, got {text!r}")
    return moment


def create(config: CreateConfig) -> None:
    """Create a schedule; everything that can be checked locally is checked before the first request."""
    package = read_package(config.pipeline, cache=not config.no_cache)
    parameters = read_parameters(package, config.params, config.set)
    cron = six_fields(config.cron) if config.cron else None
    if cron and len(config.cron.split()) == 5:
        log(f"cron {config.cron!r} has 5 fields; KFP wants the second first, so it becomes {cron!r}")
    client = connect(config)
    if any(schedule.display_name == config.name for schedule in schedules(client, config)):
        raise ValueError(f"name must be new, got {config.name!r}: delete that schedule first")
    version = upload(client, package, config.namespace)
    schedule = client.create_recurring_run(
        client.create_experiment(config.experiment, namespace=config.namespace or None).experiment_id,
        config.name,
        start_time=_time("start_time", config.start_time).isoformat() if config.start_time else None,
        end_time=_time("end_time", config.end_time).isoformat() if config.end_time else None,
        cron_expression=cron,
        interval_second=config.every or None,
        max_concurrency=1,
        no_catchup=True,
        params=parameters,
        pipeline_id=version.pipeline_id,
        version_id=version.pipeline_version_id,
        service_account=config.service_account or None,
    )
    log(f"created  {line(schedule)}")


def schedules(client: Client, config: ServerConfig) -> Any:
    """All schedules of the namespace."""
    return everything(client.list_recurring_runs, "recurring_runs", namespace=config.namespace or client.get_user_namespace())


def line(schedule: Any) -> str:
    """A schedule as one line: id, state, when, name."""
    cron, period = schedule.trigger.cron_schedule, schedule.trigger.periodic_schedule
    when = f"cron {cron.cron}" if cron else f"every {period.interval_second} s"
    return f"{schedule.recurring_run_id}  {schedule.status}  {when}  {schedule.display_name}"


def change(config: NamedConfig) -> None:
    """Pause, resume or delete a schedule."""
    client = connect(config)
    found = [each for each in schedules(client, config) if config.name in (each.display_name, each.recurring_run_id)]
    if len(found) != 1:
        ids = ", ".join(each.recurring_run_id for each in found) or "none"
        raise ValueError(f"name must be that of one schedule, or an id, got {config.name!r}: {ids} found")
    (schedule,) = found
    if isinstance(config, DeleteConfig):
        delete(client, schedule, config.force)
        return
    act, done = {
        PauseConfig: (client.disable_recurring_run, "paused"),
        ResumeConfig: (client.enable_recurring_run, "resumed"),
    }[type(config)]
    act(schedule.recurring_run_id)
    log(f"{done}  {schedule.recurring_run_id}  {schedule.display_name}")


def delete(client: Client, schedule: Any, force: bool) -> None:
    """Delete a schedule, unless one of its runs is going on and `force` is not set."""
    going_on = runs_going_on(client, schedule)
    if going_on and not force:
        raise ValueError(
            f"force must be given to delete {schedule.display_name!r} now: its run {going_on[0]} is going on, and KFP would "
            f"delete the run's workflow with it; to end the run first: submit.py --run_id {going_on[0]} --terminate"
        )
    client.delete_recurring_run(schedule.recurring_run_id)
    log(f"deleted  {schedule.recurring_run_id}  {schedule.display_name}")
    log("with it KFP deletes the workflows and pods of its runs; their records and artifacts stay")
    for run_id in going_on:
        log(f"run {run_id} was going on: it ends now, without its exit handler")


def runs_going_on(client: Client, schedule: Any) -> list[str]:
    """Ids of the schedule's runs that have not ended."""
    unfinished = [{"operation": "NOT_EQUALS", "key": "state", "stringValue": state} for state in FINISHED]
    where = {"experiment_id": schedule.experiment_id, "filter": json.dumps({"predicates": unfinished})}
    runs = everything(client.list_runs, "runs", **where)
    return [run.run_id for run in runs if run.recurring_run_id == schedule.recurring_run_id]


def main() -> None:
    """Parse the flags and run the command."""
    config: Command = parse(ScheduleConfig, "Recurring runs on Kubeflow Pipelines.").command
    with errors_in_one_line(), naming(config), plain_errors(config.host):
        if isinstance(config, CreateConfig):
            create(config)
        elif isinstance(config, NamedConfig):
            change(config)
        else:
            for schedule in schedules(connect(config), config):
                log(line(schedule))


if __name__ == "__main__":
    main()
