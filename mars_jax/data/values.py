"""Values of rows, as files hold them: which of them are absent or blank, and what texts stand for."""

import math

_ABSENT_DEPTH = 4
_NOTHING = ("nan", "null", "none", "[]", "{}")
_LONGEST_NUMBER = 50
_WORDS = {"true": 1, "yes": 1, "false": 0, "no": 0}


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


def is_blank(value: object) -> bool:
    """Whether a value is no text to ask with: an empty cell, or white space."""
    return is_unset(value.strip() if isinstance(value, str) else value)


def stands_for_nothing(value: object) -> bool:
    """Whether a value is blank, or a text for null or an empty list or object."""
    return is_blank(value) or (isinstance(value, str) and value.strip().lower() in _NOTHING)


def number_of(value: object) -> float | None:
    """The number that a value stands for, also as text; true and yes are 1, false and no are 0. None if it is none."""
    if isinstance(value, bool | int | float):
        return value
    if not isinstance(value, str) or len(value) > _LONGEST_NUMBER:
        return None
    text = value.strip().lower()
    if text in _WORDS:
        return _WORDS[text]
    try:
        return float(text)
    except ValueError:
        return None
