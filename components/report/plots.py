"""Which figures the report has, and what they show. A figure without data is left out."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import PercentFormatter

from components.core.history import StageRecord
from components.report.canvas import (
    ACCENT,
    INK,
    LOG_FROM,
    MUTED,
    SERIES,
    as_svg,
    bars,
    house_style,
    line_axes,
    log_if_wide,
    series,
)
from components.report.summary import Row, Summary, comparable, details_of, number
from components.report.text import large, percent, perplexity, size

POINTS = 400  # per line; more would not be visible at this size


@dataclass(frozen=True)
class Plot:
    """A figure: heading, inline SVG and a short caption."""

    title: str
    svg: str
    caption: str


def draw(records: list[StageRecord], summary: Summary) -> list[Plot]:
    """Every figure that the records have data for."""
    plots = [_perplexities(summary), _sizes(summary)]
    for index, record in enumerate(records):
        if record.stage == "distill":
            plots += [_loss(record, f"loss{index}"), _learning_rate(record, f"rate{index}"), _epochs(record, f"epochs{index}")]
        if record.stage == "prune":
            layers = _by_kind(details_of(record, "layers"))
            plots += [_errors(layers, f"errors{index}"), _sparsities(layers, f"sparsities{index}")]
    return [plot for plot in plots if plot]


def _perplexities(summary: Summary) -> Plot | None:
    measured = [row for row in summary.rows if row.perplexity is not None]
    rows = [row for row in measured if comparable(row, measured[0])]
    if not rows:
        return None
    values = [row.perplexity or 0.0 for row in rows]
    log = min(values) >= 1 and max(values) / min(values) > LOG_FROM
    caption = "Lower is better." + (" Logarithmic scale from 1, the lowest possible value." if log else "")
    if len(rows) < len(measured):
        others = ", ".join(row.name for row in measured if row not in rows)
        caption += f" Measured on another text, so not shown: {others}."
    svg = _bars("perplexity", rows, values, [perplexity(value) for value in values], log)
    return Plot("Perplexity by stage", svg, caption)


def _sizes(summary: Summary) -> Plot | None:
    rows = [row for row in summary.rows if row.bytes is not None]
    if not rows:
        return None
    values = [row.bytes or 0.0 for row in rows]
    caption = "Weights on disk."
    if any(row.stage == "prune" and row.bytes == summary.dense.bytes for row in rows if summary.dense):
        caption += " Zeros are stored like any other weight, so pruning alone saves nothing."
    return Plot("Size by stage", _bars("size", rows, values, [size(value) for value in values]), caption)


def _bars(name: str, rows: list[Row], values: list[float], texts: list[str], log: bool = False) -> str:
    colors = [MUTED if row.name == "dense" else ACCENT for row in rows]
    return bars(name, [row.name for row in rows], values, texts, colors, log)


def _loss(record: StageRecord, name: str) -> Plot | None:
    names = {
        "loss": ("loss", INK),
        "kd_loss": ("distillation", SERIES[0]),
        "ce_loss": ("cross-entropy", SERIES[1]),
        "hidden_loss": ("hidden states", SERIES[2]),
    }
    steps = details_of(record, "steps")
    lines = {key: _points(steps, "step", key) for key in names}
    if not any(lines.values()):
        return None
    with house_style(name):
        figure, axes = line_axes("optimizer step")
        for key, points in lines.items():
            if points:
                x, y = zip(*_thin(points), strict=True)
                label, color = names[key]
                marker = "o" if len(points) == 1 else ""
                axes.plot(x, y, label=label, color=color, marker=marker, zorder=3 if key == "loss" else 2)
        figure.legend(loc="outside lower center", ncols=2)
        svg = as_svg(figure, name)
    bins = -(-len(steps) // POINTS)
    caption = f"{large(len(steps))} steps." + (f" Each point is the mean of {bins} steps." if bins > 1 else "")
    return Plot("Loss while distilling", svg, caption)


def _learning_rate(record: StageRecord, name: str) -> Plot | None:
    points = _points(details_of(record, "steps"), "step", "learning_rate")
    if not points:
        return None
    with house_style(name):
        figure, axes = line_axes("optimizer step")
        axes.plot(*zip(*_thin(points), strict=True), color=ACCENT)
        axes.set_ylim(bottom=0)
        svg = as_svg(figure, name)
    return Plot("Learning rate", svg, f"Peak {max(y for _, y in points):.2g}.")


def _epochs(record: StageRecord, name: str) -> Plot | None:
    points = _points(details_of(record, "epochs"), "epoch", "eval_ppl")
    if len(points) < 2:
        return None
    start = number(record.measured.get("perplexity_before"))
    if start is not None:
        points = [(0, start), *points]
    with house_style(name):
        figure, axes = line_axes("epoch")
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=ACCENT, marker="o")
        log_if_wide(axes, y)
        svg = as_svg(figure, name)
    return Plot("Perplexity by epoch", svg, "Epoch 0 is the pruned model." if start is not None else "After each epoch.")


def _errors(layers: dict[str, list[dict[str, Any]]], name: str) -> Plot | None:
    lines = {kind: _points(entries, "block", "relative_error") for kind, entries in layers.items()}
    if not any(lines.values()):
        return None
    values = [y for points in lines.values() for _, y in points]
    worst = max(
        (entry for entries in layers.values() for entry in entries if number(entry.get("relative_error")) is not None),
        key=lambda entry: float(entry["relative_error"]),
    )
    with house_style(name):
        figure, axes = series(lines, "block")
        if not log_if_wide(axes, values):
            axes.set_ylim(bottom=0)
        svg = as_svg(figure, name)
    caption = f"Squared error of a layer's output over its squared output, by block. Largest: {worst['relative_error']:.3g}"
    return Plot("Reconstruction error by layer", svg, f"{caption} in {worst.get('name', 'an unnamed layer')}.")


def _sparsities(layers: dict[str, list[dict[str, Any]]], name: str) -> Plot | None:
    lines = {kind: _points(entries, "block", "sparsity") for kind, entries in layers.items()}
    if not any(lines.values()):
        return None
    values = [value for rows in layers.values() for row in rows if (value := number(row.get("sparsity"))) is not None]
    with house_style(name):
        figure, axes = series(lines, "block")
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        svg = as_svg(figure, name)
    low, high = percent(min(values)), percent(max(values))
    spread = f"{low} in every layer" if low == high else f"from {low} to {high}"
    return Plot("Sparsity by layer", svg, f"Share of zeros in each of {large(len(values))} layers, by block: {spread}.")


def _points(entries: list[dict[str, Any]], x: str, y: str) -> list[tuple[float, float]]:
    """(x, mean of y), sorted by x, of the entries that have both: a block may have several layers of one kind (experts)."""
    found: dict[float, list[float]] = defaultdict(list)
    for entry in entries:
        place, value = number(entry.get(x)), number(entry.get(y))
        if place is not None and value is not None:
            found[place].append(value)
    return [(place, sum(values) / len(values)) for place, values in sorted(found.items())]


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS points, each the mean of a run of neighbours."""
    width = -(-len(points) // POINTS)
    runs = [points[start : start + width] for start in range(0, len(points), width)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def _by_kind(layers: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Group layers by their linear's name without numbers, shortened to its last part where that is unambiguous."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for layer in layers:
        parts = [part for part in str(layer.get("linear", "linear")).split(".") if not part.isdigit()]
        groups[".".join(parts)].append(layer)
    ends = Counter(kind.rsplit(".", 1)[-1] for kind in groups)
    return {end if ends[end := kind.rsplit(".", 1)[-1]] == 1 else kind: rows for kind, rows in groups.items()}
