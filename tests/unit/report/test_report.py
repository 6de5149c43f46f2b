"""The report: correct numbers, nothing invented, nothing from outside, the same bytes each time."""

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from components.core.history import REPORT_PAGE, REPORT_SUMMARY, StageRecord
from components.report import text
from components.report.config import ReportConfig
from components.report.page import FIRST_TOKENS
from components.report.plots import POINTS, draw
from components.report.stage import run
from components.report.summary import MODEL_NAMES, summarize
from tests.unit.report.conftest import PASSED, SOURCE, Records, full, loaded, write

VOID = {"meta", "br", "hr", "img", "input", "link"}
Report = Callable[..., tuple[str, dict[str, Any], StageRecord]]


@pytest.fixture
def report(tmp_path: Path) -> Report:
    """A function that makes a report on models with these records: (page, summary, the stage's own record)."""

    def make(records: Records, source: dict[str, str] = SOURCE) -> tuple[str, dict[str, Any], StageRecord]:
        result = run(ReportConfig(models=write(records, tmp_path / "in", source), output_dir=str(tmp_path / "out")))
        page = (tmp_path / "out" / REPORT_PAGE).read_text(encoding="utf-8")
        return page, json.loads((tmp_path / "out" / REPORT_SUMMARY).read_text()), result

    return make


class Shape(HTMLParser):
    """Check that tags nest, and keep ids, text and attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.words.append(data.strip())


def titles(page: str) -> list[str]:
    return re.findall(r"<figure[^>]*>\s*<h3>(.*?)</h3>", page)


def test_full_run_tells_every_number(report: Report) -> None:
    page, summary, result = report(full())  # which names int8 first: the report sorts formats by name

    assert (summary["model_id"], summary["revision"]) == ("some/model", "abc123")
    assert [row["name"] for row in summary["rows"]] == ["dense", "pruned", "distilled", "fp8", "int8"]
    assert [row["perplexity"] for row in summary["rows"]] == [20.25, 90.75, 40.5, 42.25, 41.25]
    assert [row["bytes"] for row in summary["rows"]] == [4_000_000, 4_000_000, 4_000_000, 1_100_000, 1_000_000]
    assert [row["sparsity"] for row in summary["rows"]] == [None, 0.7, 0.7, 0.72, 0.71]
    assert summary["rows"][1]["integrity"] == {"passed": True, "violations": 0, "max_abs": 0.0}
    assert summary["measured"] == {
        "compression_ratio": 4.0,  # of the smallest, int8
        "sparsity": 0.71,
        "perplexity_dense": 20.25,
        "perplexity_pruned": 90.75,
        "perplexity_distilled": 40.5,
        "perplexity_fp8": 42.25,
        "perplexity_int8": 41.25,
    }
    assert result.stage == "report"
    assert {"seconds", "peak_memory_bytes"} == result.measured.keys() - summary["measured"].keys()
    assert summary["measured"].items() <= result.measured.items()

    words = Shape(page).words
    for expected in ("4.00×", "71.0%", "20.25 → 41.25", "+103.7%", "4.00 MB", "1 h 01 min", "some/model", "abc123"):
        assert any(expected in word for word in words), expected
    assert "1.0 (fetch, prune); 2.0 (distill)" in words


def test_full_run_draws_every_plot(report: Report) -> None:
    page, _, _ = report(full())
    assert titles(page) == [
        "Perplexity by stage",
        "Size by stage",
        "Reconstruction error by layer",
        "Sparsity by layer",
        "Loss while distilling",
        "Perplexity by epoch",
    ]
    shape = Shape(page)
    assert len(shape.ids) == len(set(shape.ids))
    assert {"q_proj", "down_proj", "cross-entropy", "1.00 MB"} <= set(shape.words)
    assert "Largest: 2.02 in model.layers.2.mlp.down_proj.weight." in page


def table(page: str, heading: str) -> list[list[str]]:
    """The rows of the first table under a heading, each the text of its cells."""
    body = page.split(f"<h2>{heading}</h2>", 1)[1].split("</table>", 1)[0]
    cells = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.DOTALL) for row in re.findall(r"<tr.*?</tr>", body, re.DOTALL)]
    return [[" ".join(re.sub(r"<.*?>", " ", cell).split()) for cell in row] for row in cells]


MEASURED = {
    "sparsity": 0.625,
    "damping": 0.01,
    "condition": 123456.7,
    "dead_inputs": 1536,
    "relative_error_of_method": 0.34567,
    "relative_error": 0.000123456,
    "seconds": 0.0456,
}


def test_each_layer_has_a_line(report: Report) -> None:
    records = full()
    layers = records["sparse"]["details"]["layers"]
    layers[0] |= MEASURED
    page, _, _ = report(records)
    headings, first, second, *others = table(page, "Layers")
    assert headings[1:] == ["Sparsity", "Damping", "Condition", "Dead inputs", "Error before refit", "Error after", "Seconds"]
    assert first == ["0 self_attn.q_proj", "62.5%", "0.01", "1.23e+05", "1,536", "0.346", "0.000123", "0.0456"]
    assert second == ["0 mlp.down_proj", "70.0%", "–", "–", "–", "–", "0.02", "–"]  # an older record
    assert len(others) == len(layers) - 2
    assert "6 pruned layers" in page
    assert "Allocation of sparsity" not in page


def test_many_layers_are_cut_and_said_to_be(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.report.page.LAYERS", 4)
    page, _, _ = report(full())
    assert len(table(page, "Layers")) == 1 + 4
    assert "the first 4; prune_stats.json has all" in page


def test_allocations_that_were_tried_are_compared_with_the_first(report: Report) -> None:
    records = full()
    records["sparse"]["details"]["allocations"] = [
        {"name": "uniform", "divergence": 2.0, "chosen": False},
        {"name": "slope +0.1", "divergence": 1.5, "chosen": True},
        {"name": "owl", "divergence": "?"},
    ]
    page, _, _ = report(records)
    headings, *rows = table(page, "Allocation of sparsity")
    assert headings == ["Candidate", "KL from the dense model, nats per token", "Chosen"]
    assert rows == [["uniform", "2", ""], ["slope +0.1", "1.5 −25.0%", "chosen"], ["owl", "–", ""]]


def test_page_needs_nothing_from_outside(report: Report) -> None:
    page, _, _ = report(full())
    assert not re.search(r"https?:|src=|@import|url\((?!#)|//[a-z]", page)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & Shape(page).tags


def test_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    folders = write(full(), tmp_path)
    for name in ("a", "b"):
        run(ReportConfig(models=folders, output_dir=str(tmp_path / name)))
    for file in (REPORT_PAGE, REPORT_SUMMARY):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(
    "dark", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "$x_{$", "&lt;b&gt;", "é漢\n\x07"]
)
def test_hostile_names_stay_text(report: Report, dark: str) -> None:
    records = full()
    records["dense"]["parameters"] = {"model_id": dark}
    records["int8"]["parameters"]["format"] = dark
    records["sparse"]["details"]["layers"][0] |= {"linear": dark, "name": dark, "relative_error": 9.0}
    records["sparse"]["parameters"][dark] = dark
    records["sparse"]["versions"][dark] = dark
    records["student"]["sparse_integrity_check"] = PASSED | {"passed": False, "tensors": {dark: {"violations": 1}}}
    page, summary, _ = report(records, {"model_id": dark, "revision": dark})
    shape = Shape(page)
    assert not {"script", "img", "b"} & shape.tags
    assert summary["model_id"] == dark
    assert any(dark.strip() in word for word in shape.words)


def test_skipped_perplexity_is_a_dash(report: Report) -> None:
    records = full()
    for record in records.values():
        record["measured"] = {key: value for key, value in record["measured"].items() if "perplexity" not in key}
    records["student"]["details"]["epochs"] = []
    page, summary, _ = report(records)
    assert all(row["perplexity"] is None for row in summary["rows"])
    assert not [name for name in summary["measured"] if "perplexity" in name]
    assert "not measured" in page
    assert not [title for title in titles(page) if "Perplexity" in title]


def test_missing_stages(report: Report) -> None:
    records = full()
    page, summary, _ = report({"sparse": records["sparse"]})
    assert [(row["name"], row["perplexity"], row["bytes"]) for row in summary["rows"]] == [
        ("dense", 20.25, None),
        ("pruned", 90.75, 4_000_000),
    ]
    assert summary["measured"] == {"sparsity": 0.7, "perplexity_dense": 20.25, "perplexity_pruned": 90.75}
    assert "20.25 → 90.75" in page
    assert "Loss while distilling" not in titles(page)


def test_only_fetch(report: Report) -> None:
    page, summary, _ = report({"dense": full()["dense"]})
    assert summary["measured"] == {}
    assert titles(page) == ["Size by stage"]


def test_perplexities_of_different_texts_are_not_compared(report: Report) -> None:
    records = full()
    records["int8"]["measured"]["perplexity_text"] = "0" * 64
    page, _, _ = report(records)
    assert "on different texts" in page
    assert "+103.7%" not in page
    assert "Measured on another text, so not shown: int8." in page


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({}, "."),
        (dict.fromkeys(("sparse", "student", "int8", "fp8"), "always"), f", {FIRST_TOKENS['always']}."),
        (dict.fromkeys(("sparse", "student", "int8", "fp8"), "never"), f", {FIRST_TOKENS['never']}."),
        (
            {"sparse": "always", "int8": "never"},
            f", {FIRST_TOKENS['always']} (dense, pruned), or {FIRST_TOKENS['never']} (int8).",
        ),
    ],
    ids=["unknown", "always", "never", "both"],
)
def test_the_first_token_of_the_blocks_is_told(report: Report, choices: dict[str, str], words: str) -> None:
    records = full()
    for name, bos in choices.items():
        records[name]["measured"]["bos"] = bos
    page, summary, _ = report(records)
    assert [told for told in Shape(page).words if told.startswith("Perplexity is ")] == [
        f"Perplexity is per token, over non-overlapping blocks{words}"
    ]
    assert {row["name"]: row["bos"] for row in summary["rows"] if row["bos"]} == (
        {MODEL_NAMES.get(records[name]["stage"], name): bos for name, bos in choices.items()}
        | ({"dense": choices["sparse"]} if choices else {})
    )


def test_violation_is_shown(report: Report) -> None:
    records = full()
    check = {"passed": False, "violations": 3, "max_abs": 0.5, "tensors": {"layer.weight": {"violations": 3}}}
    records["student"]["sparse_integrity_check"] = check
    page, summary, _ = report(records)
    assert summary["rows"][2]["integrity"] == {"passed": False, "violations": 3, "max_abs": 0.5}
    assert {"failed", "in distilled", "3 violations, largest 0.5", "layer.weight"} <= set(Shape(page).words)


def test_unknown_stages_and_values_do_no_harm(report: Report) -> None:
    records = full()
    records["extra"] = {
        "stage": "tokenize",
        "measured": {"seconds": 2.0, "fingerprints": ["a", None]},
        "details": {"steps": 3},
    }
    records["again"] = {
        "stage": "quantize",
        "parameters": {"format": "int8"},
        "measured": {"bytes": "many", "sparsity": True},
    }
    records["sparse"]["details"] = {"layers": [None, {"block": "x"}, {}], "other": 1}
    records["student"]["details"] = {"steps": {"a": 1}}
    records["fp8"]["sparse_integrity_check"] = {"verdict": "?"}
    page, summary, _ = report(records)
    rows = {row["name"]: row for row in summary["rows"]}
    assert list(rows) == ["dense", "pruned", "distilled", "tokenize", "fp8", "int8", "int8_2"]
    assert rows["tokenize"]["seconds"] == 2.0
    assert rows["int8_2"]["bytes"] is None
    assert rows["int8_2"]["sparsity"] is None
    assert rows["fp8"]["integrity"] is None
    assert titles(page) == ["Perplexity by stage", "Size by stage"]
    assert "<h2>Layers</h2>" not in page


def test_a_whole_number_beyond_those_of_the_machine_does_no_harm(report: Report) -> None:
    records = full()
    records["int8"]["measured"]["perplexity"] = 2**63
    _, summary, _ = report(records)
    assert summary["measured"]["perplexity_int8"] == 2.0**63


def test_not_finite_numbers_are_not_measurements() -> None:
    records = full()
    records["student"]["measured"]["perplexity"] = math.nan
    records["int8"]["measured"]["perplexity"] = math.inf
    rows = {row.name: row for row in summarize(loaded(records)).rows}
    assert rows["distilled"].perplexity is None
    assert rows["int8"].perplexity is None


def test_long_training_is_thinned() -> None:
    records = full()
    records["student"]["details"] = {"steps": [{"step": step, "loss": 1.0 + step % 2} for step in range(50 * POINTS)]}
    plots = {plot.title: plot for plot in draw(loaded(records), summarize(loaded(records)))}
    plot = plots["Loss while distilling"]
    assert len(plot.svg) < 40_000
    assert "Each point is the mean of 50 steps." in plot.caption


def test_experts_share_a_line_and_equal_endings_do_not() -> None:
    layers = [
        {"block": 0, "linear": linear, "sparsity": 0.5}
        for linear in ("mlp.experts.0.up", "mlp.experts.1.up", "attn.proj", "mlp.proj")
    ]
    records = loaded({"sparse": {"stage": "prune", "details": {"layers": layers}}})
    (plot,) = draw(records, summarize(records))
    labels = {word for word in Shape(plot.svg).words if word.isidentifier() or "." in word}
    assert {"up", "attn.proj", "mlp.proj"} <= labels
    assert "4 layers" in plot.caption


def test_numbers_read_well() -> None:
    assert [text.size(value) for value in (None, 0, 999, 1000, 999_600, 12_340_000, 538_090_408)] == [
        "–",
        "0 B",
        "999 B",
        "1.00 kB",
        "1.00 MB",
        "12.3 MB",
        "538 MB",
    ]
    assert [text.duration(value) for value in (None, 0.04, 9.96, 59.6, 192, 3599.7, 3900)] == [
        "–",
        "0.0 s",
        "10 s",
        "1 min 00 s",
        "3 min 12 s",
        "1 h 00 min",
        "1 h 05 min",
    ]
    assert [text.perplexity(value) for value in (None, 29.6018, 1234.5, 3.2e9)] == ["–", "29.60", "1,234", "3.20e+09"]
    assert [text.significant(value) for value in (None, "x", 0, 12345, 0.0, 1234.5)] == [
        "–",
        "–",
        "0",
        "12,345",
        "0",
        "1.23e+03",
    ]
    assert [text.change(value, 20) for value in (30, 10, 400)] == ["+50.0%", "−50.0%", "×20"]
    assert [text.plain(value) for value in (None, "", True, 2e-05, [1, None], "é")] == [
        "–",
        "–",
        "true",
        "2e-05",
        "[1, null]",
        "é",
    ]
