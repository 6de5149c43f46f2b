"""Cron expressions as KFP reads them: six fields, starting with the seconds.

The rules are those of the parser in KFP's controller, https://pkg.go.dev/github.com/robfig/cron@v1.2.0.
"""

import re

MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
WEEKDAYS = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")

# field → (lowest value, highest value, names for the values from the lowest up)
FIELDS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "second": (0, 59, ()),
    "minute": (0, 59, ()),
    "hour": (0, 23, ()),
    "day of month": (1, 31, ()),
    "month": (1, 12, MONTHS),
    "day of week": (0, 6, WEEKDAYS),
}
PIECE = re.compile(r"([*?]|([0-9A-Za-z]+)(?:-([0-9A-Za-z]+))?)(?:/([0-9]+))?")


def six_fields(cron: str) -> str:
    """The expression in KFP's form; if it has five fields, a 0 for the seconds is put in front.

    KFP accepts five fields too, but reads the first as the seconds and treats the day of the week as missing: `0 3 * * *` would
    run every hour, at three minutes past.

    Raises:
        ValueError: the expression is wrong; the message names the field, its rule and the expression.
    """
    parts = cron.split()
    if len(parts) == 5:
        parts = ["0", *parts]
    if len(parts) != 6:
        raise ValueError(f"cron must have 6 fields ({', '.join(FIELDS)}) or 5 without the second, got {cron!r}")
    for part, (field, (low, high, names)) in zip(parts, FIELDS.items(), strict=True):
        if not all(_is_valid(piece, low, high, names) for piece in part.split(",")):
            named = f" or {names[0]} to {names[-1]}" if names else ""
            raise ValueError(f"cron must have {low} to {high}{named}, *, a-b, a,b or */n as {field}, got {part!r} in {cron!r}")
        if "?" in part and not field.startswith("day"):
            raise ValueError(f"cron must have ? as day of month or day of week alone, got {part!r} as {field} in {cron!r}")
    return " ".join(parts)


def _is_valid(piece: str, low: int, high: int, names: tuple[str, ...]) -> bool:
    match = PIECE.fullmatch(piece)
    if not match or (match[4] and int(match[4]) == 0):
        return False
    bounds = [_number(text, low, names) for text in (match[2], match[3]) if text]
    return all(low <= bound <= high for bound in bounds) and bounds == sorted(bounds)


def _number(text: str, low: int, names: tuple[str, ...]) -> int:
    """The number that part of a field stands for, or -1, which is outside every range, if it is not valid."""
    if text.isdecimal():
        return int(text)
    return names.index(text.upper()) + low if text.upper() in names else -1
