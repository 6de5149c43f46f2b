"""The report's numbers: one row per model or stage, and the headline.

Whatever a record lacks is None. Two perplexities are compared only if they were measured on the same text.
"""

from dataclasses import asdict, dataclass
from typing import Any

from components.core.history import StageRecord

MODEL_NAMES = {"fetch": "dense", "prune": "pruned", "distill": "distilled"}
EXACT = 2**53  # whole numbers below are exact as floats
TOO_LARGE = 1e300  # beyond this, a JSON number is a broken measurement rather than a value to print


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        name: `dense`, `pruned`, `distilled`, a format such as `int8`, or the name of another stage; unique in a report.
        stage: the stage that measured it.
        perplexity_text: fingerprint of the text behind `perplexity`.
        bos: whether its blocks begin with the beginning-of-sequence token: `always` or `never`.
        sparsity: share of weights that are zero, in [0, 1].
        bytes: size of the weights on disk.
        seconds, peak_memory_bytes, peak_gpu_memory_bytes: what the stage used.
        integrity: `passed`, `violations`, `max_abs` of the stage's sparse integrity check.
    """

    name: str
    stage: str
    perplexity: float | None = None
    perplexity_text: str | None = None
    bos: str | None = None
    sparsity: float | None = None
    bytes: float | None = None
    seconds: float | None = None
    peak_memory_bytes: float | None = None
    peak_gpu_memory_bytes: float | None = None
    integrity: dict[str, Any] | None = None


@dataclass(frozen=True)
class Summary:
    """Rows in the order of the steps, and which of them the headline is about.

    Attributes:
        dense: the model that the run started from.
        final: the smallest quantized model, otherwise the last sparse one.
    """

    rows: list[Row]
    dense: Row | None
    final: Row | None

    def compression_ratio(self) -> float | None:
        """Size of the dense model divided by that of the smallest quantized one."""
        if self.dense and self.final and self.final.stage == "quantize" and self.dense.bytes and self.final.bytes:
            return self.dense.bytes / self.final.bytes
        return None

    def sparse(self) -> Row | None:
        """The final model if its sparsity was measured, otherwise the last pruned or distilled one with a sparsity."""
        if self.final and self.final.sparsity is not None:
            return self.final
        known = [row for row in self.rows if row.stage in ("prune", "distill") and row.sparsity is not None]
        return known[-1] if known else None

    def measured(self) -> dict[str, float]:
        """The headline as scalars: `compression_ratio`, `sparsity`, `perplexity_<row>`; only known ones."""
        sparse = self.sparse()
        scalars = {"compression_ratio": self.compression_ratio(), "sparsity": sparse.sparsity if sparse else None}
        scalars |= {f"perplexity_{row.name}": row.perplexity for row in self.rows}
        return {name: value for name, value in scalars.items() if value is not None}

    def as_json(self) -> dict[str, Any]:
        """`measured` and `rows`, as in summary.json."""
        return {"measured": self.measured(), "rows": [asdict(row) for row in self.rows]}


def summarize(records: list[StageRecord]) -> Summary:
    """Build the rows from the steps' records; the dense model's perplexity is what prune measured before pruning."""
    rows: list[Row] = []
    prune = next((record for record in records if record.stage == "prune"), None)
    before = _perplexity(prune, "perplexity_before") if prune else {}
    if before and not any(record.stage == "fetch" for record in records):
        rows.append(Row(name="dense", stage="prune", **before))  # without a fetch record, the other columns are unknown
    for record in records:
        measured = _perplexity(record, "perplexity")
        perplexity = measured or before if record.stage == "fetch" else measured
        rows.append(_row(record, _unique(_model_name(record), rows), perplexity))
    dense = next((row for row in rows if row.name == "dense"), None)
    return Summary(rows, dense, _final(rows))


def comparable(row: Row, other: Row) -> bool:
    """Whether both rows have a perplexity, measured on the same text."""
    return None not in (row.perplexity, other.perplexity) and row.perplexity_text == other.perplexity_text


def number(value: Any) -> float | None:
    """`value` if it is a finite number, else None; a whole number that the plots could not draw becomes a float."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < TOO_LARGE
    if not usable:
        return None
    return value if abs(value) < EXACT else float(value)


def details_of(record: StageRecord, name: str) -> list[dict[str, Any]]:
    """A list in a record's details, such as one entry for each layer; what is not of that form is left out."""
    found = record.details.get(name)
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def _model_name(record: StageRecord) -> str:
    if record.stage == "quantize":
        return str(record.parameters.get("format") or "quantized")
    return MODEL_NAMES.get(record.stage, record.stage)


def _unique(name: str, rows: list[Row]) -> str:
    taken = {row.name for row in rows}
    count, candidate = 1, name
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    return candidate


def _perplexity(record: StageRecord, key: str) -> dict[str, Any]:
    """`perplexity`, `perplexity_text` and `bos` of a record; empty if it was not measured."""
    value = number(record.measured.get(key))
    text, bos = (None if known is None else str(known) for known in map(record.measured.get, ("perplexity_text", "bos")))
    return {} if value is None else {"perplexity": value, "perplexity_text": text, "bos": bos}


def _row(record: StageRecord, name: str, perplexity: dict[str, Any]) -> Row:
    names = ("sparsity", "bytes", "seconds", "peak_memory_bytes", "peak_gpu_memory_bytes")
    measured: dict[str, Any] = {key: number(record.measured.get(key)) for key in names}
    return Row(name=name, stage=record.stage, integrity=_integrity(record), **measured, **perplexity)


def _integrity(record: StageRecord) -> dict[str, Any] | None:
    check = record.sparse_integrity_check
    if check is None or not isinstance(check.get("passed"), bool):
        return None
    return {"passed": check["passed"]} | {key: number(check.get(key)) for key in ("violations", "max_abs")}


def _final(rows: list[Row]) -> Row | None:
    quantized = [row for row in rows if row.stage == "quantize"]
    if quantized:
        return min(quantized, key=lambda row: row.bytes or TOO_LARGE)
    sparse = [row for row in rows if row.stage in ("prune", "distill") and row.name != "dense"]
    return sparse[-1] if sparse else None
