"""The page: a Jinja2 template filled from the summary, the records and the plots.

The template engine escapes every value except the SVG of the plots, whose text matplotlib has already escaped.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from components.core.history import Source, StageRecord
from components.report import text
from components.report.plots import Plot
from components.report.summary import Row, Summary, comparable, details_of, number

TEMPLATE = "page.html.j2"
FIRST_TOKENS = {
    "always": "which begin with the tokenizer's beginning-of-sequence token",
    "never": "without a beginning-of-sequence token in front of each, as in GPTQ",
}
TENSORS = 20  # at most this many violated tensors are listed
LAYERS = 2000  # and this many layers; only a mixture of experts has more
COLUMNS = {
    "damping": "Damping",
    "condition": "Condition",
    "dead_inputs": "Dead inputs",
    "relative_error_of_method": "Error before refit",
    "relative_error": "Error after",
    "seconds": "Seconds",
}  # of a layer's entry in the record, with their headings


@dataclass(frozen=True)
class Card:
    """One headline number. `tone` is `good`, `bad` or empty."""

    label: str
    value: str
    note: str
    tone: str = ""


@dataclass(frozen=True)
class Candidate:
    """An allocation of sparsity that was tried: its KL divergence from the dense model, and the change from the first one."""

    name: str
    divergence: float | None
    change: str
    chosen: bool


@dataclass(frozen=True)
class PrunedLayers:
    """The layers that a prune stage has pruned.

    Attributes:
        shown: their entries in the record, at most `LAYERS`.
        count: how many there are.
        candidates: allocations of sparsity that were tried.
    """

    shown: list[dict[str, Any]]
    count: int
    candidates: list[Candidate]


def render(title: str, source: Source, records: list[StageRecord], summary: Summary, plots: list[Plot]) -> str:
    """Fill the template.

    Args:
        title: heading of the page.
        source: the dense model that the models were made from.
        records: in display order.
        summary: rows and headline.
        plots: figures to show; may be empty.
    """
    environment = Environment(
        loader=PackageLoader("components.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        name: getattr(text, name)
        for name in ("perplexity", "percent", "size", "duration", "large", "plain", "measure", "significant")
    }
    return environment.get_template(TEMPLATE).render(
        title=title,
        source=source,
        cards=cards(summary),
        rows=summary.rows,
        final=summary.final,
        notes={row.name: _notes(row, summary) for row in summary.rows},
        first_tokens=first_tokens(summary.rows),
        texts_differ=len({row.perplexity_text for row in summary.rows if row.perplexity is not None}) > 1,
        plots=plots,
        pruned=[table for record in records if record.stage == "prune" and (table := _layers(record))],
        columns=COLUMNS,
        records=list(zip(records, _headings(records), strict=True)),
        violated=violated,
        versions=package_versions(records),
    )


def cards(summary: Summary) -> list[Card]:
    """The four headline numbers."""
    dense, final, sparse = summary.dense, summary.final, summary.sparse()
    ratio = summary.compression_ratio()
    sizes = [text.size(row.bytes if row else None) for row in (dense, final)]
    return [
        Card(
            "Compression",
            f"{ratio:.2f}×" if ratio else text.DASH,
            f"{sizes[0]} → {sizes[1]} ({final.name})" if ratio and final else "",
        ),
        Card(
            "Sparsity",
            text.percent(sparse.sparsity if sparse else None),
            f"of the weights in pruned layers ({sparse.name})" if sparse else "",
        ),
        _perplexity_card(dense, final),
        _integrity_card(summary.rows),
    ]


def _perplexity_card(dense: Row | None, final: Row | None) -> Card:
    before, after = (row.perplexity if row else None for row in (dense, final))
    if before is None and after is None:
        return Card("Perplexity", text.DASH, "not measured")
    value = f"{text.perplexity(before)} → {text.perplexity(after)}"
    note = f"dense → {final.name}" if final else "dense"
    if dense and final and before and after:
        note += f", {text.change(after, before)}" if comparable(dense, final) else ", on different texts"
    return Card("Perplexity", value, note)


def _integrity_card(rows: list[Row]) -> Card:
    checked = [row for row in rows if row.integrity]
    failed = [row.name for row in checked if row.integrity and not row.integrity["passed"]]
    if failed:
        return Card("Sparsity check", "failed", "in " + ", ".join(failed), "bad")
    if checked:
        return Card("Sparsity check", "passed", "pruned weights are zero: " + ", ".join(row.name for row in checked), "good")
    return Card("Sparsity check", text.DASH, "not run")


def _notes(row: Row, summary: Summary) -> dict[str, str]:
    """Small print under a row's numbers: how it compares with the dense model, and GPU memory."""
    notes = {"perplexity": "", "bytes": "", "memory": ""}
    dense = summary.dense
    if dense and row is not dense:
        if comparable(row, dense) and row.perplexity is not None and dense.perplexity:
            notes["perplexity"] = text.change(row.perplexity, dense.perplexity)
        if row.bytes and dense.bytes and row.bytes < 0.995 * dense.bytes:
            notes["bytes"] = f"{dense.bytes / row.bytes:.2f}× smaller"
    if row.peak_gpu_memory_bytes is not None:
        notes["memory"] = f"GPU {text.size(row.peak_gpu_memory_bytes)}"
    return notes


def first_tokens(rows: list[Row]) -> str:
    """How the blocks begin that perplexity was measured on; if they differ, each way with its rows; empty if it is unknown."""
    found: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.perplexity is not None and row.bos in FIRST_TOKENS:
            found[FIRST_TOKENS[row.bos]].append(row.name)
    return ", or ".join(f"{way} ({', '.join(names)})" if len(found) > 1 else way for way, names in found.items())


def _headings(records: list[StageRecord]) -> list[str]:
    """The heading of each record: its stage, followed by the format for quantize."""
    return [
        f"{record.stage} {text.plain(record.parameters.get('format'))}" if record.stage == "quantize" else record.stage
        for record in records
    ]


def _layers(record: StageRecord) -> PrunedLayers | None:
    """What a prune stage's record tells of its layers; None if it tells nothing."""
    layers = details_of(record, "layers")
    if not any(number(layer.get(name)) is not None for layer in layers for name in COLUMNS):
        return None
    tried = details_of(record, "allocations")
    uniform = number(tried[0].get("divergence")) if tried else None
    candidates = [
        Candidate(
            text.plain(entry.get("name")),
            divergence := number(entry.get("divergence")),
            text.change(divergence, uniform) if entry is not tried[0] and divergence is not None and uniform else "",
            entry.get("chosen") is True,
        )
        for entry in tried
    ]
    return PrunedLayers(layers[:LAYERS], len(layers), candidates)


def violated(record: StageRecord) -> dict[str, Any]:
    """Tensor → what is wrong with it, from a failed sparse integrity check; at most the first `TENSORS`."""
    tensors = (record.sparse_integrity_check or {}).get("tensors")
    return dict(list(tensors.items())[:TENSORS]) if isinstance(tensors, dict) else {}


def package_versions(records: list[StageRecord]) -> dict[str, str]:
    """Package → its version; if the stages differ, each version with its stages."""
    stages: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for record, heading in zip(records, _headings(records), strict=True):
        for package, version in record.versions.items():
            stages[package][str(version)].append(heading)
    return {
        package: next(iter(found))
        if len(found) == 1
        else "; ".join(f"{version} ({', '.join(where)})" for version, where in found.items())
        for package, found in sorted(stages.items())
    }
