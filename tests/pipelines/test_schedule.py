"""Recurring runs, against a fake KFP API on loopback."""

import pytest

from pipelines.cron import six_fields
from pipelines.schedule import main
from tests.pipelines.fake_kfp import command, kfp  # noqa: F401 (fixtures)

# ruff: noqa: F811 (pytest passes fixtures by name)


def test_a_schedule_runs_the_uploaded_version_one_at_a_time_without_catching_up(kfp, command):
    flags = ["--cron", "0 30 3 ? * MON-FRI", "--set", "distill_epochs=2", "--service_account", "runner"]
    times = ["--start_time", "2026-12-01T00:00:00Z", "--end_time", "2027-12-01T00:00:00+01:00"]
    code, out, err = command(main, "create", "--name", "nightly", *flags, *times)
    assert (code, err) == (0, "")
    assert "created  recurring_runs-1  ENABLED  cron 0 30 3 ? * MON-FRI  nightly" in out
    assert kfp.things["recurring_runs"] == [
        {
            "recurring_run_id": "recurring_runs-1",
            "display_name": "nightly",
            "experiment_id": "experiments-1",
            "pipeline_version_reference": {"pipeline_id": "pipelines-1", "pipeline_version_id": "pipeline_versions-1"},
            "runtime_config": {"parameters": {"distill_epochs": 2}},
            "trigger": {
                "cron_schedule": {
                    "cron": "0 30 3 ? * MON-FRI",
                    "start_time": "2026-12-01T00:00:00+00:00",
                    "end_time": "2027-12-01T00:00:00+01:00",
                }
            },
            "max_concurrency": 1,
            "no_catchup": True,
            "mode": "ENABLE",
            "service_account": "runner",
            "status": "ENABLED",
        }
    ]


def test_an_interval_and_a_second_schedule_of_the_same_version(kfp, command):
    command(main, "create", "--name", "nightly", "--cron", "0 0 3 * * *")
    code, out, _ = command(main, "create", "--name", "hourly", "--every", "3600")
    assert code == 0
    assert "nothing uploaded" in out
    assert "every 3600 s  hourly" in out
    assert kfp.things["recurring_runs"][1]["trigger"] == {"periodic_schedule": {"interval_second": 3600}}
    assert len(kfp.uploads) == 1


def test_five_fields_get_a_second_and_it_says_so(kfp, command):
    _, out, _ = command(main, "create", "--name", "nightly", "--cron", "30 3 * * *")
    assert "cron '30 3 * * *' has 5 fields; KFP wants the second first, so it becomes '0 30 3 * * *'" in out
    assert kfp.things["recurring_runs"][0]["trigger"]["cron_schedule"]["cron"] == "0 30 3 * * *"


@pytest.mark.parametrize(
    "cron",
    [
        "0 0 3 * * ?",
        "*/10 0-30/5 1,2,3 ? JAN-mar SUN",
        "59 59 23 31 12 6",
        "  0  0 0 1 1 0 ",
        "0 5/15 * * DEC *",
        "0 0 0 1-31 * ?",
    ],
)
def test_what_kfp_takes_is_taken(cron):
    assert six_fields(cron) == " ".join(cron.split())


@pytest.mark.parametrize(
    ("cron", "rule"),
    [
        ("0 3 * *", "cron must have 6 fields (second, minute, hour, day of month, month, day of week) or 5"),
        ("0 0 0 3 * * *", "or 5 without the second, got '0 0 0 3 * * *'"),
        ("@daily", "cron must have 6 fields"),
        ("60 0 3 * * *", "cron must have 0 to 59, *, a-b, a,b or */n as second, got '60'"),
        ("0 60 3 * * *", "as minute, got '60'"),
        ("0 0 24 * * *", "cron must have 0 to 23, *, a-b, a,b or */n as hour, got '24'"),
        ("0 0 3 0 * *", "cron must have 1 to 31, *, a-b, a,b or */n as day of month, got '0'"),
        ("0 0 3 * 13 *", "cron must have 1 to 12 or JAN to DEC, *, a-b, a,b or */n as month, got '13'"),
        ("0 0 3 * * 7", "cron must have 0 to 6 or SUN to SAT, *, a-b, a,b or */n as day of week, got '7'"),
        ("0 0 3 * * MONDAY", "as day of week, got 'MONDAY'"),
        ("0 */0 3 * * *", "as minute, got '*/0'"),
        ("0 30-10 3 * * *", "as minute, got '30-10'"),
        ("0 1,,2 3 * * *", "as minute, got '1,,2'"),
        ("0 -5 3 * * *", "as minute, got '-5'"),
        ("0 0 ? * * *", "cron must have ? as day of month or day of week alone, got '?' as hour"),
        ("0 0 ٣ * * *", "as hour, got '٣'"),
    ],
)
def test_what_kfp_would_not_take_is_refused_by_its_rule(cron, rule):
    with pytest.raises(ValueError, match="cron must have") as error:
        six_fields(cron)
    assert rule in str(error.value)
    assert repr(cron) in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cron", "61 0 0 * * *"], "cron must have 0 to 59"),
        ([], "one of cron and every must be given, got cron '' and every 0"),
        (["--cron", "0 0 3 * * *", "--every", "60"], "one of cron and every must be given"),
        (["--every", "-60"], "every must be at least 0, got -60"),
        (["--every", "60", "--start_time", "tomorrow"], "start_time must be a date and time with Z or an offset"),
        (["--every", "60", "--end_time", "2026-12-01T00:00:00"], "end_time must be a date and time with Z or an offset"),
        (
            ["--every", "60", "--start_time", "2026-12-01T00:00:00Z", "--end_time", "2026-12-01T00:30:00+01:00"],
            "end_time must be after start_time, got 2026-12-01T00:30:00+01:00",
        ),
        (["--every", "60", "--set", "distill_epochs=0"], "distill_epochs must be at least 1, got 0"),
        (["--every", "60", "--name", " "], "name must be given, got ' '"),
    ],
)
def test_a_wrong_value_is_reported_in_one_line_before_any_request(kfp, command, flags, message):
    code, out, err = command(main, "create", "--name", "nightly", *flags)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert len(err.splitlines()) == 1
    assert kfp.requests == []


@pytest.fixture
def three(kfp):
    """A KFP with three schedules, on two pages."""
    for number in (1, 2, 3):
        trigger = {"periodic_schedule": {"interval_second": "60"}}
        schedule = {"display_name": f"s{number}", "trigger": trigger, "status": "ENABLED", "experiment_id": "e"}
        kfp.add("recurring_runs", "recurring_run_id", schedule)
    return kfp


def states(server):
    return {thing["display_name"]: thing["status"] for thing in server.things["recurring_runs"]}


def test_a_name_that_is_taken_is_refused_and_nothing_uploaded(three, command):
    code, _, err = command(main, "create", "--name", "s3", "--every", "60")
    assert (code, err) == (2, "error: name must be new, got 's3': delete that schedule first\n")
    assert not [request for request in three.requests if not request.startswith("GET")]


def test_all_pages_are_listed(three, command):
    code, out, _ = command(main, "list", "--namespace", "alice")
    assert code == 0
    assert three.namespaces["GET recurringruns"] == "alice"
    assert out.splitlines() == [f"recurring_runs-{number}  ENABLED  every 60 s  s{number}" for number in (1, 2, 3)]


def test_a_schedule_is_paused_resumed_and_deleted_by_name_or_id(three, command):
    assert command(main, "pause", "--name", "s3")[1] == "paused  recurring_runs-3  s3\n"
    assert states(three) == {"s1": "ENABLED", "s2": "ENABLED", "s3": "DISABLED"}
    assert command(main, "resume", "--name", "recurring_runs-3")[0] == 0
    assert states(three)["s3"] == "ENABLED"
    assert command(main, "delete", "--name", "recurring_runs-1")[0] == 0
    assert command(main, "delete", "--name", "s2")[0] == 0
    assert states(three) == {"s3": "ENABLED"}


@pytest.fixture
def runs(three):
    """Runs of the schedules, on several pages, the last of each schedule going on."""
    for number in range(6):
        schedule = three.things["recurring_runs"][number % 2]["recurring_run_id"]
        state = "RUNNING" if number > 3 else ("SUCCEEDED", "FAILED")[number // 2]
        about = {"display_name": "r", "recurring_run_id": schedule, "experiment_id": "e", "state": state}
        three.workflows[three.add("runs", "run_id", about)["run_id"]] = {}
    three.add("runs", "run_id", {"display_name": "by hand", "experiment_id": "e", "state": "RUNNING"})
    three.add("runs", "run_id", {"display_name": "elsewhere", "experiment_id": "other", "state": "RUNNING"})
    return three


@pytest.mark.parametrize("state", ["RUNNING", "PENDING", "CANCELING", "PAUSED"])
def test_a_schedule_with_a_run_going_on_is_not_deleted_unasked(runs, command, state):
    runs.things["runs"][5]["state"] = state
    code, out, err = command(main, "delete", "--name", "s2")
    assert (code, out) == (2, "")
    assert err.startswith("error: force must be given to delete 's2' now: its run runs-6 is going on, and KFP would delete")
    assert "submit.py --run_id runs-6 --terminate" in err
    assert len(err.splitlines()) == 1
    assert len(states(runs)) == 3
    assert len(runs.workflows) == 6


def test_a_schedule_is_deleted_by_force_and_what_goes_with_it_is_told(runs, command):
    code, out, err = command(main, "delete", "--name", "s2", "--force")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "deleted  recurring_runs-2  s2",
        "with it KFP deletes the workflows and pods of its runs; their records and artifacts stay",
        "run runs-6 was going on: it ends now, without its exit handler",
    ]
    assert set(states(runs)) == {"s1", "s3"}
    assert set(runs.workflows) == {"runs-1", "runs-3", "runs-5"}


def test_a_schedule_whose_runs_have_ended_is_deleted_and_says_what_goes_with_it(runs, command):
    runs.things["runs"][5]["state"] = "FAILED"
    code, out, err = command(main, "delete", "--name", "s2")
    assert (code, err) == (0, "")
    assert out.splitlines()[1:] == ["with it KFP deletes the workflows and pods of its runs; their records and artifacts stay"]


def test_a_name_must_mean_one_schedule(three, command):
    three.things["recurring_runs"][1]["display_name"] = "s1"
    message = "error: name must be that of one schedule, or an id, got"
    assert command(main, "delete", "--name", "s1")[2] == f"{message} 's1': recurring_runs-1, recurring_runs-2 found\n"
    assert command(main, "delete", "--name", "s9")[2] == f"{message} 's9': none found\n"
    assert len(states(three)) == 2


@pytest.mark.parametrize("flags", [["list"], ["pause", "--name", "a"], ["create", "--name", "a", "--every", "60"]])
def test_a_refused_login_is_one_line(kfp, command, monkeypatch, flags):
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "another")
    code, out, err = command(main, *flags)
    assert (code, out) == (2, "")
    assert err.startswith("error: KFP asks for a login (401)")
    assert len(err.splitlines()) == 1
