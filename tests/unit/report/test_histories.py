"""What the report reads: the histories of models, and the whole records beside them."""

import json
from pathlib import Path
from typing import Any

import pytest

from components.core.history import REPORT_PAGE, REPORT_SUMMARY
from components.report.config import ReportConfig
from components.report.stage import load, run
from tests.unit.report.conftest import as_record, full, loaded, save_model, write
from tests.unit.report.test_report import titles


def test_steps_that_models_share_count_once_whatever_the_order(tmp_path: Path) -> None:
    made = {name: as_record(record) for name, record in full().items()}
    common = [made["dense"], made["sparse"], made["student"]]
    folders = [save_model(tmp_path / name, [*common, made[name]]) for name in ("int8", "fp8")]
    folders += [save_model(tmp_path / f"step{count}", common[:count]) for count in (3, 1, 2)]
    assert load(folders) == load(folders[::-1]) == [*common, made["fp8"], made["int8"]]


def test_repeated_stages_are_shown_in_their_order(tmp_path: Path) -> None:
    """Pruned twice, a little more each time: only the last of them has its whole record in the folder."""
    made = loaded(full())[:3]
    again = [as_record(full()[name] | {"parameters": {"round": 2}}) for name in ("sparse", "student")]
    run(ReportConfig(models=[save_model(tmp_path / "model", made + again)], output_dir=str(tmp_path / "out")))
    rows = json.loads((tmp_path / "out" / REPORT_SUMMARY).read_text())["rows"]
    assert [row["name"] for row in rows] == ["dense", "pruned", "distilled", "pruned_2", "distilled_2"]
    page = (tmp_path / "out" / REPORT_PAGE).read_text(encoding="utf-8")
    assert titles(page).count("Loss while distilling") == 1


def test_a_whole_record_that_is_missing_or_of_another_step_only_costs_its_figures(tmp_path: Path, capsys: Any) -> None:
    models = write(full(), tmp_path / "in")
    for model in models:
        (Path(model) / "prune_stats.json").unlink()
        as_record(full()["student"] | {"parameters": {"epochs": 3}}).save(Path(model) / "distill_stats.json")
    run(ReportConfig(models=models, output_dir=str(tmp_path / "out")))
    assert f"{models[0]}/distill_stats.json is not the record of a step in compression.json" in capsys.readouterr().out
    page = (tmp_path / "out" / REPORT_PAGE).read_text(encoding="utf-8")
    assert titles(page) == ["Perplexity by stage", "Size by stage"]
    assert [row["name"] for row in json.loads((tmp_path / "out" / REPORT_SUMMARY).read_text())["rows"]] == [
        "dense",
        "pruned",
        "distilled",
        "fp8",
        "int8",
    ]


def test_wrong_settings_are_refused(tmp_path: Path) -> None:
    (good,) = write({"dense": full()["dense"]}, tmp_path)
    (tmp_path / "empty").mkdir()
    new = str(tmp_path / "out")
    for models, output_dir, title, message in (
        ([], new, "t", r"models must name at least one checkpoint, got \[\]"),
        ([""], new, "t", "models must be given"),
        ([good, str(tmp_path / "none")], new, "t", "models must be folders with a compression.json, got .*none"),
        ([str(tmp_path / "empty")], new, "t", "models must be folders with a compression.json, got .*empty"),
        ([good], str(tmp_path / "empty"), "t", "output_dir must not exist yet, got .*empty"),
        ([good], "", "t", "output_dir must be given"),
        ([good], new, " ", "title must be given"),
    ):
        with pytest.raises(ValueError, match=message):
            ReportConfig(models=models, output_dir=output_dir, title=title).check_environment()


def test_a_history_without_steps_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", [])
    with pytest.raises(ValueError, match=r"compression\.json must list at least one step, got none"):
        run(ReportConfig(models=[folder], output_dir=str(tmp_path / "out")))


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[1]",
        '{"a": 1}',
        '{"stage": 1, "parameters": {}}',
        '{"stage": "prune", "parameters": []}',
        '{"stage": "prune", "parameters": {}, "measured": 3}',
        '{"stage": "prune", "parameters": {}, "sparse_integrity_check": true}',
    ],
)
def test_what_is_not_a_record_is_refused_and_leaves_nothing(tmp_path: Path, content: str) -> None:
    (folder,) = write({"sparse": full()["sparse"]}, tmp_path)
    (Path(folder) / "prune_stats.json").write_text(content)
    with pytest.raises(ValueError, match=r"prune_stats\.json must be JSON"):
        run(ReportConfig(models=[folder], output_dir=str(tmp_path / "out")))
    assert list(tmp_path.iterdir()) == [Path(folder)]
