"""Format numbers for people. What is unknown becomes a dash."""

import json
from typing import Any

from components.report.summary import number

DASH = "–"
UNITS = ("B", "kB", "MB", "GB", "TB")  # powers of 1000, as for disks and on the hub


def perplexity(value: float | None) -> str:
    """`29.60`, or `1,234` where decimals do not matter."""
    if value is None:
        return DASH
    if value >= 1e7:
        return f"{value:.2e}"
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """A share in [0, 1] as `70.0%`."""
    return DASH if value is None else f"{value:.1%}"


def change(value: float, reference: float) -> str:
    """The change from a positive `reference` as `+12.3%` or `−4.0%`, or as `×12` from tenfold on."""
    ratio = value / reference
    return f"×{ratio:,.0f}" if ratio >= 10 else f"{ratio - 1:+.1%}".replace("-", "−")


def size(value: float | None) -> str:
    """Bytes as `538 MB`, with three significant digits."""
    if value is None:
        return DASH
    power = 0
    while value >= 999.5 and power < len(UNITS) - 1:
        value, power = value / 1000, power + 1
    digits = 0 if value >= 99.95 or power == 0 else 1 if value >= 9.995 else 2
    return f"{value:,.{digits}f} {UNITS[power]}"


def duration(value: float | None) -> str:
    """Seconds as `0.4 s`, `42 s`, `3 min 12 s` or `1 h 05 min`."""
    if value is None:
        return DASH
    if value < 9.95:
        return f"{value:.1f} s"
    seconds = round(value)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    return f"{seconds // 3600:,} h {seconds % 3600 // 60:02} min"


def large(value: float | None) -> str:
    """A count as `134,515,008`."""
    return DASH if value is None else f"{value:,.0f}"


def significant(value: Any) -> str:
    """A count, or a number with three significant digits, such as `0.0123` or `1.23e+05`."""
    known = number(value)
    if known is None:
        return DASH
    return large(known) if isinstance(known, int) else f"{known:.3g}"


def plain(value: Any) -> str:
    """Any value of a record: text as it is, floats with at most six significant digits, the rest as JSON."""
    if value is None or value == "":
        return DASH
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, ensure_ascii=False)


def measure(name: str, value: Any) -> str:
    """A measured value in the unit that its name implies."""
    known = number(value)
    if name == "perplexity_text" and isinstance(value, str):
        return value[:12] + "…"  # enough of a fingerprint to compare by eye
    if known is None:
        return plain(value)
    if name == "bytes" or name.endswith("_bytes"):
        return size(known)
    if name == "seconds":
        return duration(known)
    if name == "sparsity":
        return percent(known)
    if name.startswith("perplexity"):
        return perplexity(known)
    return large(known) if isinstance(known, int) else plain(known)
