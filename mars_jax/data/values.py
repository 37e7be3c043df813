"""Values of rows, as files hold them: which of them are absent, and what texts stand for."""

import math
from decimal import Decimal

_ABSENT_DEPTH = 4
_NOTHING = ("nan", "null", "none", "[]", "{}")


def is_absent(value: object, depth: int = _ABSENT_DEPTH) -> bool:
    """Whether a value is one of those for no value: null, NaN, an empty text, or a list or object of nothing else."""
    if value is None or isinstance(value, str):
        return not value
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return not value or (depth > 0 and all(is_absent(item, depth - 1) for item in value))
    return isinstance(value, float) and math.isnan(value)


def is_unset(value: object) -> bool:
    """Whether a cell of a table is empty; some were written by pandas, as "nan"."""
    return is_absent(value) or value == "nan"


def stands_for_nothing(value: object) -> bool:
    """Whether a value is absent, white space, or a text for null or for an empty list or object."""
    text = value.strip().lower() if isinstance(value, str) else None
    return text in _NOTHING if text else text == "" or is_absent(value)


def number_of(value: object) -> float | None:
    """The number that a value is, also as text or as a table's decimal. None if it is none."""
    if not isinstance(value, bool | int | float | str | Decimal):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
