"""Values of rows, as files hold them: which of them are absent or blank."""

import math

_ABSENT_DEPTH = 4


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
